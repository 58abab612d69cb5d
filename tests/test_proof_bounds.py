# SPDX-License-Identifier: Apache-2.0
"""What verification costs at most: one reading of each FP16 layer, and never the memory of the whole model."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from quantkit.checkpoint.reader import Checkpoint
from quantkit.runs import Request, quantize
from tests.conftest import make_qwen2

MIB = 2**20

# The limit counts private writable memory, of which torch's libraries have some: what they have is added to it.
LIMITED = """
import json, re, resource, sys
from pathlib import Path
import torch
from rich.console import Console
from quantkit.reverify import VerifyRequest, verify_files
from quantkit.runs import Request, quantize

small, model, ids, out, allowed, weights = sys.argv[1:5] + [int(count) for count in sys.argv[5:]]
torch.set_num_threads(1)


def made_and_found(model, out):
    common = {"command": "quantkit", "offline": True, "max_ppl_increase": 9.0}
    quiet = Console(quiet=True)
    request = Request(method="gptq", model=model, group_size=32, calib=ids, evaluation=ids, out=Path(out), **common)
    made, _ = quantize(request, quiet)
    found = verify_files(VerifyRequest(out=Path(out), **common), quiet)
    return made["verification"], found["verification"]


made_and_found(small, out + "-small")  # whatever is imported or set up once, is
before = int(re.search(r"VmData:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (before + allowed, before + allowed))
try:
    torch.empty(weights, dtype=torch.uint8)
except RuntimeError:
    pass
else:
    sys.exit("the limit holds nothing back")
print(json.dumps(made_and_found(model, out)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA counts mapped memory on Linux only")
def test_a_model_larger_than_the_memory_allowed_is_quantized_and_verified_in_it(
    tmp_path: Path, qwen2: Path, ids: Path
) -> None:
    model = make_qwen2(tmp_path / "model", layers=24, hidden_size=512, intermediate_size=1536, num_attention_heads=8)
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    allowed = 112 * MIB
    assert weights > 1.1 * allowed  # in bfloat16; twice that in the float32 that it is computed in
    words = [qwen2, model, ids, tmp_path / "out", allowed, weights]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *map(str, words)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    made, found = json.loads(done.stdout)
    assert found == made
    assert len(found["layer_errors"]) == 24


def reads(monkeypatch: pytest.MonkeyPatch, model: Path, **request: Any) -> Counter[str]:
    """How often each tensor of the model is read in a run."""
    counted: Counter[str] = Counter()
    read = Checkpoint.read

    def spy(self: Checkpoint, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        if self.directory == model:
            counted[name] += 1
        return read(self, name, device)

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "read", spy)
        quantize(Request(model=str(model), command="quantkit", offline=True, **request), Console(quiet=True))
    return counted


@pytest.mark.parametrize("method", ["rtn", "awq", "gptq"])
def test_each_layer_of_the_original_is_read_once_for_quantizing_and_verifying_both(
    tmp_path: Path, qwen2: Path, ids: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    said: dict[str, Any] = {"method": method, "group_size": 32, "calib": str(ids), "evaluation": str(ids)}
    counted = reads(monkeypatch, qwen2, out=tmp_path / "out", **said)
    layers = {name: count for name, count in counted.items() if ".layers." in name}
    assert len(layers) == 2 * (7 + 3 + 2)  # weights, biases of q, k and v, norms
    assert set(layers.values()) == {1}
