# SPDX-License-Identifier: Apache-2.0
"""A model larger than the memory that the process may have is verified within it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from quantkit.formats import FORMATS
from quantkit.methods import rtn
from quantkit.scheme import Scheme

LAYERS, HIDDEN, INTERMEDIATE, VOCABULARY = 24, 512, 3328, 64
MIB = 2**20
SPARE = 160 * MIB  # beyond what a process holds that has verified a small model: less than 7 of its 24 layers
SCHEME = Scheme(4, 128, True)

# Data segments are private memory: what is allocated, and not files that are mapped and can be dropped at any time.
WITHIN = """
import json, os, resource, sys
from pathlib import Path
from quantkit.commands.verify import VerifyRequest, verify_files
from quantkit.report.terminal.screen import Terminal

small, large, ids, spare = *map(Path, sys.argv[1:4]), int(sys.argv[4])

def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmData:"))

def verify(folder):
    request = VerifyRequest(
        folder / "quantized", "verify", str(folder / "model"), str(ids), max_ppl_increase=100.0, offline=True
    )
    return verify_files(request, Terminal(quiet=True)).content()["verification"]

verify(small)
limit = held() + spare
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    bytearray(2 * spare)
    sys.exit("there is no limit")
except MemoryError:
    pass
print(json.dumps({"limit": limit, "verification": verify(large)}))
"""


def write(folder: Path, config: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> None:
    """A checkpoint with one file for each entry of `tensors`, and the index that names them."""
    folder.mkdir(parents=True)
    for file, content in tensors.items():
        save_file(content, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, content in tensors.items() for name in content}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))


def write_pair(folder: Path, layers: int) -> int:
    """A model in float32, all of whose layers are alike, and its quantized counterpart; returns the former's bytes."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return 0.05 * torch.randn(*shape, generator=generator)

    linears = {f"self_attn.{kind}_proj": random(HIDDEN, HIDDEN) for kind in "qkvo"}
    linears |= {f"mlp.{kind}_proj": random(INTERMEDIATE, HIDDEN) for kind in ("gate", "up")}
    linears["mlp.down_proj"] = random(HIDDEN, INTERMEDIATE)
    norms = {f"{name}_layernorm.weight": torch.ones(HIDDEN) for name in ("input", "post_attention")}
    outside = {"model.embed_tokens.weight": random(VOCABULARY, HIDDEN), "model.norm.weight": torch.ones(HIDDEN)}
    plain = {f"{name}.weight": weight for name, weight in linears.items()}
    packed = {
        f"{name}.{key}": tensor
        for name, weight in linears.items()
        for key, tensor in FORMATS["gptq"].pack(rtn.quantize(weight, SCHEME, search=False)).items()
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    }
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "checkpoint_format": "gptq"}
    for name, local, more in (
        ("model", plain, {}),
        ("quantized", packed, {"quantization_config": quantization}),
    ):
        files = {"outside.safetensors": outside}
        for layer in range(layers):
            prefix = f"model.layers.{layer}."
            files[f"{layer}.safetensors"] = {f"{prefix}{key}": tensor for key, tensor in (local | norms).items()}
        write(folder / name, config | more, files)
    return sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for a limit on a process's memory")
def test_a_model_larger_than_the_memory_of_the_process_is_verified(tmp_path: Path) -> None:
    write_pair(tmp_path / "small", 2)
    size = write_pair(tmp_path / "large", LAYERS)
    ids = torch.randint(0, VOCABULARY, (2, 32), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    names = [str(tmp_path / name) for name in ("small", "large", "ids.safetensors")]
    done = subprocess.run(
        [sys.executable, "-c", WITHIN, *names, str(SPARE)],
        # glibc would otherwise raise the size from which freed memory goes back, depending on what was freed before
        env={
            "OMP_NUM_THREADS": "1",
            "MALLOC_MMAP_THRESHOLD_": str(2**18),
            "CUDA_VISIBLE_DEVICES": "",
            "PATH": "",
            "PYTHONPATH": ":".join(sys.path),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["verification"]["layer_errors"]) == LAYERS
    assert found["verification"]["verdict"] == "pass"
    if size <= found["limit"]:
        pytest.skip(
            f"this build of torch holds {found['limit'] // MIB - SPARE // MIB} MiB by itself, more than the model"
        )
