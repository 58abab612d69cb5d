# SPDX-License-Identifier: Apache-2.0
"""Six ways in which checkpoints fail to load, or load as something else: that we fall in none of them.

Each was seen with a real client; where a client can run here it is the client that is asked.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import typer
from packaging.version import Version
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from quantkit.cli import app
from quantkit.commands.quantize import quantize
from quantkit.errors import EngineError, SchemeError
from quantkit.formats import FORMATS, QuantizedLayer
from quantkit.formats.names import with_fused
from quantkit.formats.reading import unpack
from quantkit.grids.registry import dequantize
from quantkit.model.config import config_from_dict
from quantkit.model.family import FUSED
from quantkit.model.skeleton import build
from quantkit.plan import LinearPlan, make_plan
from quantkit.report.terminal.screen import Terminal
from quantkit.scheme import NAMED, QuantizedTensor, Scheme
from quantkit.serving.engines import LOADERS, heads_of, reasons, require_engine, why_not
from quantkit.serving.fit import fit_checkpoint
from quantkit.serving.versions import VERSIONS
from quantkit.settings.request import Request
from tests.conftest import TINY, make_qwen2
from tests.foreign import foreign, tensors
from tests.running import quantkit
from tests.tiny import load_whole

QUIET = Terminal(quiet=True)
W4 = Scheme(4, 32, False)
LARGE = {"hidden_size": 5120, "intermediate_size": 27648, "num_attention_heads": 40, "num_key_value_heads": 8}
KEEP = "rules:\n  - {layers: '1', kind: down_proj, keep: 16bit}\n  - {layers: '1', kind: q_proj, keep: 16bit}\n"
KEEP += "  - {layers: '1', kind: k_proj, keep: 16bit}\n  - {layers: '1', kind: v_proj, keep: 16bit}\n"


def plan_of(fmt: str, scheme: Scheme, **sizes: Any) -> tuple[LinearPlan, ...]:
    model = build(config_from_dict({"model_type": "qwen2", "num_hidden_layers": 2} | TINY | sizes))
    return make_plan(model, lambda name, layer: scheme, FORMATS[fmt]).linears


def heads(**sizes: Any) -> Any:
    return heads_of(config_from_dict({"model_type": "qwen2", "num_hidden_layers": 2} | TINY | sizes))


def run(model: Path, out: Path, **said: Any) -> dict[str, Any]:
    fixed: dict[str, Any] = {"method": "rtn", "group_size": 32, "offline": True, "verify": False}
    return quantize(Request(model=str(model), command="quantkit rtn", out=out, **(fixed | said)), QUIET)[0].content()


def decoded(out: Path, scheme: Scheme, fmt: str, model: Path) -> Any:
    """The original architecture on what we read from the files."""
    network, state = load_whole(model), tensors(out)
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear) and f"{name}.weight" not in state:
            packed = {key.removeprefix(f"{name}."): t for key, t in state.items() if key.startswith(f"{name}.")}
            shape = (module.out_features, module.in_features)
            state[f"{name}.weight"] = dequantize(unpack(FORMATS[fmt], packed, scheme, shape))
    known = {name for name, _ in network.named_parameters()}
    network.load_state_dict({name: t.float() for name, t in state.items() if name in known}, strict=True)
    return network


# ---------------------------------------------------------------- 1: asymmetric compressed-tensors


@pytest.mark.skipif(Version(transformers.__version__).release != (5, 23, 0), reason="the trap of transformers 5.23.0")
def test_asymmetric_compressed_tensors_in_transformers(tmp_path: Path, qwen2: Path, ids: Path) -> None:
    """It does not load as it is, which the linter says; with dequantize=True it does, and is what we mean."""
    pytest.importorskip("compressed_tensors")
    from transformers import CompressedTensorsConfig

    run(qwen2, tmp_path / "out", format="compressed-tensors", symmetric=False)
    with pytest.raises(RuntimeError, match="mismatched"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    asked = CompressedTensorsConfig(dequantize=True)
    with pytest.warns(UserWarning, match="loading attributes"):
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, quantization_config=asked)
    ours = decoded(tmp_path / "out", W4, "compressed-tensors", qwen2)
    tokens = load_file(ids)["input_ids"]
    with torch.no_grad():
        expected, found = ours(tokens).logits, theirs(tokens).logits
    # It rounds the weights that it unpacks to 16 bit; a zero point that is read wrong is 0.1 and more.
    assert float((expected - found).abs().max() / expected.abs().max()) < 3e-3


def test_the_linter_knows_it_and_what_loads_instead() -> None:
    told = why_not("transformers", "compressed-tensors", plan_of("compressed-tensors", W4), heads())
    assert told is not None
    assert "5.22.2 loads asymmetric ones" in told
    assert told.endswith("W4 g32 sym would load")


# ---------------------------------------------------------------- 2: GPTQ v1 and a zero point of 0


def test_gptq_v1_never_gets_a_zero_point_of_zero(tmp_path: Path, qwen2: Path) -> None:
    """Readers add the 1 to whole words: a wrapped zero point would carry into its neighbour."""
    run(qwen2, tmp_path / "out", format="gptq", symmetric=False)
    packed = {name: t for name, t in tensors(tmp_path / "out").items() if name.endswith("qzeros")}
    assert len(packed) == 14
    for name, words in packed.items():
        stored = torch.stack([(words >> 4 * i) & 15 for i in range(8)])
        assert stored.max() < 15, name  # 15 is 0 - 1
        carried = torch.stack([((words + 0x11111111) >> 4 * i) & 15 for i in range(8)])  # as GPTQModel reads it
        assert torch.equal(carried, stored + 1), name


def test_a_given_zero_point_of_zero_is_refused() -> None:
    zeros = torch.zeros(8, 1, dtype=torch.uint8)
    given = QuantizedTensor(torch.zeros(8, 32, dtype=torch.uint8), torch.ones(8, 1).half(), zeros, W4)
    with pytest.raises(SchemeError, match="gptq_v2 holds it"):
        FORMATS["gptq"].pack(given)
    assert FORMATS["gptq_v2"].pack(given)


# ---------------------------------------------------------------- 3: lists of 16-bit layers


NAMES = [f"model.layers.{i}.{n}" for i in range(12) for n in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")]
KEPT = {"model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj", "model.layers.1.mlp.down_proj"}


def skipping(fmt: str) -> dict[str, Any]:
    quantized = [QuantizedLayer(name, Scheme(4, 32, fmt != "awq")) for name in NAMES if name not in KEPT]
    return FORMATS[fmt].config(quantized, [*sorted(KEPT), "lm_head"], FUSED)


def by_dynamic(config: dict[str, Any], name: str) -> bool:
    """GPTQModel, vLLM and SGLang: a name is left in 16 bit by the first "-:" pattern that `re.match`es it."""
    return any(text.startswith("-:") and re.match(text[2:], name) for text in config.get("dynamic", {}))


@pytest.mark.parametrize("name", with_fused(NAMES, FUSED))
def test_every_reader_leaves_the_same_layers_alone(name: str) -> None:
    """vLLM and SGLang ask under the fused name; layer 1 is not layer 11."""
    expected = name in with_fused(KEPT, FUSED)
    awq, gptq = skipping("awq"), skipping("gptq")
    assert by_dynamic(awq, name) == expected  # GPTQModel reads no other list of an AWQ file
    assert by_dynamic(gptq, name) == expected
    assert any(part in name for part in awq["modules_to_not_convert"]) == expected  # vLLM: by substring
    if name in NAMES:
        assert (name in gptq["modules_in_block_to_quantize"][0]) != expected  # transformers


def test_transformers_own_matching_of_awq_lists() -> None:
    utils = pytest.importorskip("transformers.quantizers.quantizers_utils")
    if not hasattr(utils, "should_convert_module"):
        pytest.skip("an older transformers")
    listed = skipping("awq")["modules_to_not_convert"]
    assert {name for name in NAMES if not utils.should_convert_module(name, listed)} == KEPT


def test_mixed_files_hold_what_the_lists_say(tmp_path: Path, qwen2: Path) -> None:
    """vLLM infers 16-bit layers from the tensors when there is no list: the two must agree."""
    recipe = tmp_path / "keep.yaml"
    recipe.write_text(KEEP)
    for fmt in ("awq", "gptq"):
        run(qwen2, tmp_path / fmt, format=fmt, symmetric=fmt == "gptq", recipe=recipe)
        config = json.loads((tmp_path / fmt / "config.json").read_text())["quantization_config"]
        state = tensors(tmp_path / fmt)
        plain = {n.removesuffix(".weight") for n, t in state.items() if n.endswith("_proj.weight") and t.dim() == 2}
        assert plain == {name for name in map(str, linear_names()) if by_dynamic(config, name)}


def linear_names() -> list[str]:
    attention = [f"self_attn.{x}_proj" for x in "qkvo"]
    return [
        f"model.layers.{i}.{n}"
        for i in (0, 1)
        for n in (*attention, *(f"mlp.{x}_proj" for x in ("gate", "up", "down")))
    ]


# ---------------------------------------------------------------- 4: a quantized lm_head


@pytest.mark.parametrize("fmt", ["awq", "gptq", "gptq_v2", "compressed-tensors"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_head_stays_in_16_bit(tmp_path: Path, fmt: str, tied: bool) -> None:
    model = make_qwen2(tmp_path / "model", tie_word_embeddings=tied)
    run(model, tmp_path / "out", format=fmt, symmetric=fmt != "awq")
    state = tensors(tmp_path / "out")
    assert {name for name in state if name.startswith("lm_head.")} == (set() if tied else {"lm_head.weight"})
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    said = config.get("ignore") or config.get("modules_to_not_convert")
    assert config["lm_head"] is False if fmt.startswith("gptq") else "lm_head" in said


def test_a_foreign_quantized_head_is_told(tmp_path: Path) -> None:
    foreign(tmp_path / "out", "gptq_v2", head=True)
    engines = fit_checkpoint(tmp_path / "out", budget=2**30, context=64).engines
    assert "quantized lm_head" in str(engines["transformers"])
    assert engines["gptqmodel"] is None


# ---------------------------------------------------------------- 5: groups of 256


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize(("fmt", "symmetric"), [("gptq", True), ("gptq_v2", True), ("compressed-tensors", True)])
def test_groups_of_256_have_few_kernels(engine: str, fmt: str, symmetric: bool) -> None:
    linears = plan_of(fmt, Scheme(4, 256, symmetric), **LARGE)
    told = why_not(engine, fmt, linears, heads(**LARGE))
    if (engine, fmt) == ("vllm", "compressed-tensors"):
        assert told is None  # Triton
    else:
        assert told is not None
        assert "groups of 32, 64, 128" in told
        assert told.endswith("W4 g128 sym would load")


@pytest.mark.parametrize(("cards", "group_size", "loads"), [(8, 256, False), (8, 128, True), (4, 256, True)])
def test_groups_must_not_lie_on_two_cards(cards: int, group_size: int, loads: bool) -> None:
    """down_proj of the 32B: 27648 / 8 = 3456 columns on each card."""
    linears = plan_of("awq", Scheme(4, group_size, False), **LARGE)
    told = reasons("vllm", "awq", linears, heads(**LARGE), cards=cards)
    assert any("on 8 cards: 3456 in_features" in line for line in told) != loads


# ---------------------------------------------------------------- 6: 3, 5, 6 and 7 bits in compressed-tensors


def test_odd_bits_are_promised_only_to_engines_that_read_dense_words() -> None:
    linears = plan_of("compressed-tensors", Scheme(3, 32, True))
    for engine in ("sglang", "llama.cpp"):  # 32 // 3 codes a word
        assert why_not(engine, "compressed-tensors", linears, heads()) is not None
    for engine in ("vllm", "transformers"):  # vLLM pins 0.17, which pads, but has a reader of its own
        assert why_not(engine, "compressed-tensors", linears, heads()) is None
    for bits in (1, 2, 4, 8):  # of these the layouts are one
        assert 32 % bits == 0


def words_of_whole_codes(codes: Tensor, bits: int) -> Tensor:
    per_word = 32 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_word)).long().unflatten(1, (-1, per_word))
    words: Tensor = (padded << torch.arange(per_word) * bits).sum(-1)
    return words


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_even_bits_are_the_same_in_every_version(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (4, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    quantized = QuantizedTensor(
        codes, torch.ones(4, 2).half(), torch.full((4, 2), 2 ** (bits - 1)).byte(), Scheme(bits, 32, True)
    )
    words = FORMATS["compressed-tensors"].pack(quantized)["weight_packed"].long() & 0xFFFFFFFF
    assert torch.equal(words, words_of_whole_codes(codes, bits))


# ---------------------------------------------------------------- --for


def test_every_reason_is_a_line() -> None:
    scheme = Scheme(3, 256, True)
    linears = plan_of("gptq", scheme, **LARGE)
    with pytest.raises(EngineError) as refused:
        require_engine("vllm", "gptq", linears, heads(**LARGE), cards=16, act_order=True)
    lines = str(refused.value).splitlines()
    assert all(line.startswith("vLLM 0.32 ") for line in lines)
    assert any("act-order" in line for line in lines)
    assert any("40 attention heads" in line for line in lines)
    assert any("27648" in line or "1728 in_features" in line for line in lines)
    assert len(lines) == len(set(lines))
    require_engine("llama.cpp", "compressed-tensors", plan_of("compressed-tensors", W4), heads())


def test_a_new_format_or_engine_is_an_option_by_itself() -> None:
    assert LOADERS.keys() == VERSIONS.keys()
    help_of = {name: command_help(name) for name in ("gptq", "convert", "allocate")}
    assert f"[{'|'.join(FORMATS)}]" in help_of["gptq"]
    assert f"[{'|'.join((*FORMATS, 'fp16'))}]" in help_of["convert"]
    assert f"[{'|'.join(LOADERS)}]" in help_of["gptq"]
    assert f"[{'|'.join((*LOADERS, 'any'))}]" in help_of["allocate"]
    assert all(name in help_of["gptq"] for name in NAMED)


def test_llama_cpp_may_be_typed_without_its_dot() -> None:
    command = typer.main.get_command(app).commands["gptq"]  # type: ignore[attr-defined]
    assert command.make_context("gptq", ["demo", "--for", "llamacpp"]).params["engine"] == "llama.cpp"


def command_help(name: str) -> str:
    done = CliRunner(env={"COLUMNS": "300", "TERMINAL_WIDTH": "300"}).invoke(app, [name, "--help"])
    assert done.exit_code == 0
    return done.output


@pytest.mark.parametrize(
    "words",
    [
        ("rtn", "demo", "--format", "compressed-tensors", "--asym", "--for", "transformers"),
        ("fit", "demo", "--w-bit", "3", "--format", "gptq", "--sym", "--for", "vllm"),
    ],
)
def test_for_is_an_error_before_work(tmp_path: Path, words: tuple[str, ...]) -> None:
    out = () if words[0] == "fit" else ("--out", str(tmp_path / "out"))
    done = quantkit(*words, "--offline", *out)
    assert done.returncode == 1
    assert done.stdout == ""
    assert all(line.startswith("quantkit: ") and "no kernel" in line for line in done.stderr.splitlines())
    assert not (tmp_path / "out").exists()


def test_for_with_convert(tmp_path: Path) -> None:
    foreign(tmp_path / "awq")
    words = ("convert", str(tmp_path / "awq"), "--out", str(tmp_path / "out"), "--to")
    done = quantkit(*words, "gptq_v2", "--for", "vllm")
    assert done.returncode == 1
    assert "vLLM 0.32 has no kernel for W4 g32 asym in gptq_v2" in done.stderr
    assert not (tmp_path / "out").exists()
    done = quantkit(*words, "compressed-tensors", "--for", "vllm")
    assert done.returncode == 0, done.stderr
