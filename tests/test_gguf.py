# SPDX-License-Identifier: Apache-2.0
"""GGUF: blocks against the `gguf` package, K-quants against what they minimise, whole files as transformers reads them.

llama.cpp itself runs in the interop suite; `transformers` reads GGUF files too, and is at hand.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen3Config

import quantkit
from quantkit import calibration
from quantkit.calibration import TokenSet
from quantkit.checkpoint.journal import open_journal
from quantkit.commands.export_gguf import ExportRequest, to_gguf
from quantkit.commands.fit import FitRequest, fit_request
from quantkit.commands.inspect import inspect_folder, inspect_table
from quantkit.commands.quantize import Request, quantize
from quantkit.commands.verify import VerifyRequest, verify_files
from quantkit.errors import InputError, ModelError, SchemeError
from quantkit.fit import fit_checkpoint
from quantkit.formats.gguf import (
    K_TYPES,
    TYPES,
    dequantize_blocks,
    inexact_lows,
    pack,
    pack_superblocks,
    settle,
    unpack,
    unpack_superblocks,
    usual_type,
)
from quantkit.gguf.architecture import rope_factors
from quantkit.gguf.export import export, layout
from quantkit.gguf.file import TensorInfo, Value, open_gguf, write_gguf
from quantkit.gguf.reading import open_gguf_model
from quantkit.gguf.rounding import RoundJob, assemble, round_layers
from quantkit.gguf.tokenizer import PRE_TOKENIZERS, pre_tokenizer, tokenizer_metadata
from quantkit.model.sites import sites_of
from quantkit.model.streaming import drop, open_model
from quantkit.pipeline.remeasure import open_quantized
from quantkit.quantize import gptq, kquants
from quantkit.scheme import QuantizedTensor, Scheme, Superblocks, dequantize, dequantize_superblocks
from quantkit.stats import output_error
from tests.conftest import make_qwen2
from tests.test_convert import foreign, rewrite, shuffled

DEMO = Path(quantkit.__file__).parent / "demo"
QUIET = Console(quiet=True)
INTEGERS = {"q4_0": Scheme(4, 32, True), "q4_1": Scheme(4, 32, False), "q8_0": Scheme(8, 32, True)}


def random_integers(scheme: Scheme, rows: int, columns: int, seed: int = 0) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(seed)
    groups = scheme.groups(columns)
    codes = torch.randint(0, scheme.max_code + 1, (rows, columns), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(rows, groups, generator=generator) * 0.05 - 0.01).to(torch.float16)
    zeros = torch.full((rows, groups), scheme.middle, dtype=torch.uint8)
    if not scheme.symmetric:
        zeros = torch.randint(0, scheme.max_code + 1, (rows, groups), generator=generator, dtype=torch.uint8)
    return QuantizedTensor(codes, scales, zeros, scheme)


def by_the_package(blocks: Tensor, name: str) -> Tensor:
    with np.errstate(invalid="ignore", over="ignore"):
        return torch.from_numpy(quants.dequantize(blocks.numpy(), GGMLQuantizationType[name.upper()]))


# ---------------------------------------------------------------- integers


@given(rows=st.integers(1, 5), blocks=st.integers(1, 6), seed=st.integers(0, 99), name=st.sampled_from(list(INTEGERS)))
@settings(max_examples=40, deadline=None)
def test_integers_go_in_and_come_out(rows: int, blocks: int, seed: int, name: str) -> None:
    quantized = settle(random_integers(INTEGERS[name], rows, 32 * blocks, seed))
    packed = pack(quantized, name)
    assert packed.shape == (rows, TYPES[name].row_bytes(32 * blocks))
    weight = dequantize(quantized)
    assert torch.equal(dequantize_blocks(packed, name), weight)
    assert torch.equal(by_the_package(packed, name), weight)
    if not (quantized.scales == 0).any():
        back = unpack(packed, name, quantized.scheme)
        assert torch.equal(back.codes, quantized.codes)
        assert torch.equal(back.scales, quantized.scales)
        assert torch.equal(back.zeros, quantized.zeros)


@pytest.mark.parametrize("name", list(INTEGERS))
def test_the_packages_own_rounding_is_read_and_written_byte_for_byte(name: str) -> None:
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(3))
    golden = torch.from_numpy(quants.quantize(weight.numpy(), GGMLQuantizationType[name.upper()]))
    assert torch.equal(dequantize_blocks(golden, name), by_the_package(golden, name))
    if name != "q4_1":  # its lows are no whole number of steps
        assert torch.equal(pack(unpack(golden, name, INTEGERS[name]), name), golden)


@pytest.mark.parametrize(
    ("scheme", "name"),
    [(Scheme(3, 32, True), "q4_0"), (Scheme(2, 64, True), "q4_0"), (Scheme(4, 128, True), "q4_0"),
     (Scheme(4, -1, True), "q4_0"), (Scheme(5, 32, True), "q8_0"), (Scheme(4, 128, False), "q8_0"),
     (Scheme(7, 32, False), "q8_0"), (Scheme(3, 64, False), "q4_1")],
)  # fmt: skip
def test_wider_groups_and_fewer_bits_lose_nothing(scheme: Scheme, name: str) -> None:
    quantized = settle(random_integers(scheme, 4, 256))
    assert torch.equal(dequantize_blocks(pack(quantized, name), name), dequantize(quantized))


def test_the_lowest_code_of_q8_0_is_stored() -> None:
    quantized = random_integers(INTEGERS["q8_0"], 1, 32)
    quantized.codes[0, 0] = 0
    assert float(dequantize_blocks(pack(quantized, "q8_0"), "q8_0")[0, 0]) == -128 * float(quantized.scales[0, 0])


def test_what_no_block_holds_is_refused_with_what_would() -> None:
    with pytest.raises(SchemeError, match="q8_0 is symmetric; quantize with --sym"):
        usual_type(Scheme(8, 32, False))
    with pytest.raises(SchemeError, match="blocks of 32, got group_size 16; use --group 32"):
        pack(random_integers(Scheme(4, 16, True), 2, 64), "q4_0")
    with pytest.raises(SchemeError, match="no zero points"):
        pack(random_integers(INTEGERS["q4_1"], 2, 64), "q4_0")
    with pytest.raises(SchemeError, match="no group index"):
        pack(replace(random_integers(INTEGERS["q4_0"], 2, 64), g_idx=torch.arange(64)), "q4_0")


def test_lows_that_float16_does_not_hold_are_counted_refused_and_settled() -> None:
    quantized = random_integers(INTEGERS["q4_1"], 64, 512)
    count = inexact_lows(quantized)
    assert count > 0
    with pytest.raises(SchemeError, match=f"inexact in {count} of 1024 groups"):
        pack(quantized, "q4_1")
    rounded = dequantize_blocks(pack(quantized, "q4_1", exact=False), "q4_1")
    assert 0 < float((rounded - dequantize(quantized)).abs().max()) < 2**-11 * 15 * 0.04
    settled = settle(quantized)
    assert inexact_lows(settled) == 0
    moved = (settled.scales.float() / quantized.scales.float() - 1).abs()
    assert float(moved[quantized.scales.abs() > 1e-4].max()) <= 2**-7
    powers = (quantized.zeros & (quantized.zeros - 1)) == 0
    assert torch.equal(settled.scales[powers], quantized.scales[powers])
    assert torch.equal(settle(settled).scales, settled.scales)


# ---------------------------------------------------------------- K-quants


@pytest.mark.parametrize("name", K_TYPES)
def test_any_bytes_mean_what_the_package_says(name: str) -> None:
    generator = torch.Generator().manual_seed(5)
    raw = torch.randint(0, 256, (5, 2 * TYPES[name].nbytes), generator=generator, dtype=torch.uint8)
    assert torch.equal(pack_superblocks(unpack_superblocks(raw, name), name), raw)
    ours, theirs = dequantize_blocks(raw, name), by_the_package(raw, name)
    assert torch.equal(torch.nan_to_num(ours), torch.nan_to_num(theirs))


def energy_of(columns: int) -> Tensor:
    return torch.exp(torch.randn(columns, generator=torch.Generator().manual_seed(8)))


@given(rows=st.integers(1, 4), blocks=st.integers(1, 3), seed=st.integers(0, 99), name=st.sampled_from(K_TYPES))
@settings(max_examples=15, deadline=None)
def test_k_quants_hold_every_shape(rows: int, blocks: int, seed: int, name: str) -> None:
    weight = torch.randn(rows, 256 * blocks, generator=torch.Generator().manual_seed(seed)) * 0.1
    weight[0, :64] = 0
    found = kquants.quantize(weight, name)
    packed = pack_superblocks(found, name)
    assert torch.equal(dequantize_blocks(packed, name), dequantize_superblocks(found))
    error = float((dequantize_superblocks(found) - weight).norm() / weight.norm())
    assert error < {"q4_k": 0.09, "q5_k": 0.05, "q6_k": 0.03}[name]


@pytest.mark.parametrize("name", K_TYPES)
def test_importance_lowers_the_error_that_counts(name: str) -> None:
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(2)) * 0.02
    weight[:, ::37] *= 4
    energy = energy_of(512)
    weighted = kquants.weighted_error(weight, kquants.quantize(weight, name, energy), energy)
    blind = kquants.weighted_error(weight, kquants.quantize(weight, name), energy)
    assert weighted < 0.92 * blind


@pytest.mark.parametrize(("name", "least"), [("q4_k", 0.97), ("q5_k", 0.93), ("q6_k", 0.99)])
def test_no_worse_than_a_plain_search_of_every_group(name: str, least: float) -> None:
    """The oracle: each group by itself, its range searched as llama.cpp does, in Python and without whole numbers."""
    weight = torch.randn(4, 512, generator=torch.Generator().manual_seed(4)) * 0.02
    energy, kind = energy_of(512), kquants.KINDS[name]
    found = kquants.weighted_error(weight, kquants.quantize(weight, name, energy), energy)
    total = 0.0
    for row in weight.double():
        for begin in range(0, 512, kind.columns):
            part, e = row[begin : begin + kind.columns], energy[begin : begin + kind.columns].double()
            total += min(_oracle(part, e, kind, 0.05 * i - 0.9) for i in range(37))
    assert found < total / least * 1.12  # what whole-number scales may cost, less what is won by fitting again


def _oracle(part: Tensor, energy: Tensor, kind: kquants.Kind, more: float) -> float:
    if kind.zero:
        largest = part[part.abs().argmax()]
        codes = torch.round(part / (-largest / (kind.zero + more))).clamp(-kind.zero, kind.zero - 1)
        step = (energy * codes * part).sum() / (energy * codes * codes).sum()
        return float((energy * (step * codes - part) ** 2).sum())
    low = min(float(part.min()), 0.0)
    codes = torch.round((part - low) / ((float(part.max()) - low) / (kind.max_code + more))).clamp(0, kind.max_code)
    basis = torch.stack([codes, torch.ones_like(codes)], 1) * energy.sqrt().unsqueeze(1)
    solution = torch.linalg.lstsq(basis, (part * energy.sqrt()).unsqueeze(1)).solution
    return float((energy * (codes * solution[0] + solution[1] - part) ** 2).sum())


@pytest.mark.parametrize("name", K_TYPES)
def test_gptq_on_the_grid_lowers_the_output_error(name: str) -> None:
    generator = torch.Generator().manual_seed(6)
    inputs = torch.randn(2000, 256, generator=generator) @ torch.randn(256, 256, generator=generator)
    gram = inputs.T @ inputs
    weight = torch.randn(32, 256, generator=generator) * 0.02
    nearest = kquants.quantize(weight, name, gram.diagonal())
    found = kquants.quantize(weight, name, gram.diagonal(), gptq.factorize(gram))
    for part in ("scales", "lows", "d", "dmin"):
        assert torch.equal(getattr(found, part), getattr(nearest, part))

    def error(blocks: Superblocks) -> float:
        return float(output_error(dequantize_superblocks(blocks) - weight, gram).sum())

    assert error(found) < 0.7 * error(nearest)


def test_k_quants_need_whole_superblocks() -> None:
    with pytest.raises(SchemeError, match="superblocks of 256, got in_features 128"):
        kquants.quantize(torch.zeros(2, 128), "q4_k")


# ---------------------------------------------------------------- files


def test_a_file_is_as_the_package_reads_it_and_the_same_every_time(tmp_path: Path) -> None:
    metadata: dict[str, Value] = {
        "general.architecture": "llama", "a.text": "naïve", "a.flag": True, "a.number": 7, "a.real": 0.5,
        "a.texts": ["x", "yy"], "a.numbers": [1, -2]}  # fmt: skip
    infos = [TensorInfo("one", "f32", (3,)), TensorInfo("two", "q8_0", (2, 32))]
    blocks = pack(random_integers(INTEGERS["q8_0"], 2, 32), "q8_0")
    data = [("one", [torch.arange(3.0)]), ("two", [blocks[:1], blocks[1:]])]
    digest = write_gguf(tmp_path / "a.gguf", metadata, infos, data)
    assert write_gguf(tmp_path / "b.gguf", metadata, infos, data) == digest
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert [(t.name, t.tensor_type.name, t.shape.tolist()) for t in reader.tensors] == [
        ("one", "F32", [3]), ("two", "Q8_0", [32, 2])]  # fmt: skip
    assert reader.tensors[0].data.tolist() == [0, 1, 2]
    assert torch.equal(torch.from_numpy(reader.tensors[1].data.copy()), blocks)
    assert {key: reader.fields[key].contents() for key in metadata} == metadata
    own = open_gguf(tmp_path / "a.gguf")
    assert dict(own.metadata) == metadata
    assert torch.equal(own.read_blocks("two"), blocks)


@pytest.mark.parametrize("length", [3, 20, 60, 200, -1])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "a.gguf"
    infos = [TensorInfo("one", "f32", (64,))]
    write_gguf(path, {"general.architecture": "llama", "x": ["a"] * 9}, infos, [("one", [torch.zeros(64)])])
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ModelError, match=r"a\.gguf"):
        open_gguf(path)


def tiny(folder: Path, kind: str, **changes: Any) -> Path:
    """A random model that K-quants can hold, with the demo's tokenizer."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
             "vocab_size": 4096 + 8, "num_hidden_layers": 2, "max_position_embeddings": 128}  # fmt: skip
    if kind == "qwen2":
        make_qwen2(folder, **(sizes | {"num_hidden_layers": 2, "layers": 2} | changes))
    else:
        from transformers import Qwen3ForCausalLM

        torch.manual_seed(1)
        classes = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
        config, model = classes[kind]
        built = model(config(**(sizes | {"head_dim": 64} | changes)))
        with torch.no_grad():
            for parameter in built.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        built.to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO / name, folder / name)
    return folder


def as_transformers_reads(path: Path, ids: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    with torch.no_grad():
        logits = model(ids).logits
    assert isinstance(logits, Tensor)
    return logits


def as_the_model_with(weights: dict[str, Tensor], folder: Path, ids: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.load_state_dict(weights, strict=False)
    with torch.no_grad():
        logits = model(ids).logits
    assert isinstance(logits, Tensor)
    return logits


WIDE_HEADS = {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1}  # which the reader takes for granted
IDS = torch.randint(0, 4096, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("qwen2", {}), ("qwen2", {"tie_word_embeddings": True}), ("qwen3", WIDE_HEADS), ("llama", {}),
     ("llama", {"attention_bias": True, "rope_theta": 500000.0})],
)  # fmt: skip
def test_transformers_computes_the_same_from_the_file(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    folder, out = tiny(tmp_path / "model", kind, **changes), tmp_path / "out"
    asked = Request(method="rtn", model=str(folder), command="rtn", format="gguf", symmetric=False, out=out,
                    offline=True, verify=False)  # fmt: skip
    result, _ = quantize(asked, QUIET)
    assert (result["format"], result["scheme"]["group_size"]) == ("gguf", 32)
    assert result["gguf"] == {
        "file": "out.gguf",
        "bytes": (out / "out.gguf").stat().st_size,
        "types": ["q4_1"],
        "equal": 14,
    }
    assert result["total_bytes"] == result["gguf"]["bytes"]
    assert result["bits_per_weight"] == 5
    original = open_model(folder)
    written = open_gguf_model(out / "out.gguf", original)
    assert result["tensor_bytes"] == sum(written.stored().tensors.values())
    weights = written.read(_names(original))
    stored = open_quantized(out, original).read(_names(original))
    assert all(torch.equal(weights[name], stored[name].float()) for name in weights)
    if changes.get("attention_bias"):
        return  # transformers' reader drops llama's biases
    ours, theirs = as_the_model_with(weights, folder, IDS), as_transformers_reads(out / "out.gguf", IDS)
    assert float((ours - theirs).abs().max() / ours.abs().max()) < 1e-5


def _names(original: Any) -> list[str]:
    layers = [f"{original.layer_name(i)}.{n}" for i in range(2) for n in original.layer_shapes(i)]
    return [*original.outside(), *layers]


def test_an_export_is_atomic_repeatable_and_says_what_it_cannot_keep(tmp_path: Path) -> None:
    folder, out = tiny(tmp_path / "model", "llama"), tmp_path / "out"
    asked = Request(method="rtn", model=str(folder), command="rtn", format="compressed-tensors", group_size=64,
                    symmetric=False, out=out, offline=True, verify=False)  # fmt: skip
    quantize(asked, QUIET)
    with pytest.raises(SchemeError, match=r"q_proj: q4_1 stores -zero \* scale in float16.*--requantize.*q8_0"):
        export(out, tmp_path / "a.gguf")
    with pytest.raises(SchemeError, match="from the 16-bit model it can be made without rounding twice"):
        export(out, tmp_path / "a.gguf", "q4_k")
    assert not list(tmp_path.glob("*.gguf"))
    exact = export(out, tmp_path / "a.gguf", "q8_0")
    assert (exact.equal, exact.rounded, exact.nbytes) == (14, {}, (tmp_path / "a.gguf").stat().st_size)
    assert export(out, tmp_path / "b.gguf", "q8_0").sha256 != ""
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    lossy = export(out, tmp_path / "c.gguf", requantize=True)
    assert lossy.equal + len(lossy.rounded) == 14
    assert 0 < max(lossy.rounded.values()) < 1e-3


def test_scattered_groups_are_refused(tmp_path: Path) -> None:
    """Blocks are of columns side by side: act-order's groups would be rounded again."""
    foreign(tmp_path / "gptq", "gptq", Scheme(4, 32, True), change=shuffled)
    with pytest.raises(SchemeError, match=r"act-order.*--requantize"):
        export(tmp_path / "gptq", tmp_path / "a.gguf")
    assert not list(tmp_path.glob("*.gguf"))


def test_bfloat16_scales_that_float16_holds(tmp_path: Path) -> None:
    """As llm-compressor writes them for a bfloat16 model."""
    held = foreign(tmp_path / "ct", "compressed-tensors", Scheme(4, 32, True), vocab_size=4104)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, tmp_path / "ct" / name)

    def round_scales(state: dict[str, torch.Tensor], factor: float) -> None:
        for name in held:
            state[f"{name}.weight_scale"] = (state[f"{name}.weight_scale"].float() * factor).bfloat16()

    rewrite(tmp_path / "ct", lambda state: round_scales(state, 1.0))
    exported = export(tmp_path / "ct", tmp_path / "a.gguf")
    assert (exported.equal, exported.rounded) == (len(held), {})
    rewrite(tmp_path / "ct", lambda state: round_scales(state, 2.0**-14))  # float16 loses bits of these
    with pytest.raises(SchemeError, match="scales in bfloat16 that gguf's float16 does not hold"):
        export(tmp_path / "ct", tmp_path / "b.gguf")
    assert not (tmp_path / "b.gguf").exists()


def test_a_checkpoint_without_a_quantized_linear_is_refused(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "model", "qwen2")
    config = json.loads((folder / "config.json").read_text())
    nothing = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}, "ignore": []}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": nothing}))
    with pytest.raises(ModelError, match="every linear is stored in 16 bit"):
        export(folder, tmp_path / "a.gguf")


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_head_with_zero_points_is_held_exactly(tmp_path: Path, method: str) -> None:
    folder, ids, recipe = tiny(tmp_path / "model", "qwen2"), tmp_path / "ids.safetensors", tmp_path / "recipe.yaml"
    save_file({"input_ids": IDS}, ids)
    recipe.write_text("rules:\n- {kind: lm_head}\n")
    asked = Request(method=method, model=str(folder), command=method, format="gguf", symmetric=False, offline=True,
                    out=tmp_path / "out", calib=str(ids), verify=False, recipe=recipe)  # fmt: skip
    result, _ = quantize(asked, QUIET)
    assert result["gguf"]["equal"] == 15  # the head among them


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_a_run_sees_the_scales_that_it_writes_wherever_its_states_are(tmp_path: Path, method: str) -> None:
    """q4_1's scales move a little; what is calibrated afterwards, and kept or computed again, must have them moved."""
    folder, ids = tiny(tmp_path / "model", "qwen2"), tmp_path / "ids.safetensors"
    save_file({"input_ids": IDS}, ids)
    shards = []
    for place in ("ram", "file"):
        asked = Request(method=method, model=str(folder), command=method, format="gguf", symmetric=False, offline=True,
                        out=tmp_path / place, calib=str(ids), verify=False, place=place)  # fmt: skip
        quantize(asked, QUIET)
        shards.append([path.read_bytes() for path in sorted((tmp_path / place).glob("*.safetensors"))])
    assert shards[0] == shards[1]


def test_memory_is_that_of_the_file_which_llama_cpp_loads(tmp_path: Path) -> None:
    """In the run's verdict, `verify` and `fit`: not that of the smaller tensors beside it."""
    folder, out, ids = tiny(tmp_path / "model", "qwen2"), tmp_path / "out", tmp_path / "ids.safetensors"
    save_file({"input_ids": IDS}, ids)
    asked = Request(method="rtn", model=str(folder), command="rtn", format="gguf", symmetric=False, out=out,
                    offline=True, evaluation=str(ids), max_ppl_increase=9.0)  # fmt: skip
    run, _ = quantize(asked, QUIET)
    before = run["verification"]["fit"]
    tensors = open_gguf_model(out / "out.gguf", open_model(folder)).stored().tensors
    assert before["weights"]["total"] == sum(tensors.values()) == run["tensor_bytes"]
    assert before["weights"]["blocks"] == sum(size for name, size in tensors.items() if name.endswith("_proj.weight"))
    beside = fit_checkpoint(out, budget=before["budget_bytes"], context=before["context"])
    assert beside["weights"]["total"] < before["weights"]["total"]
    again = verify_files(VerifyRequest(out=out, command="verify", offline=True), QUIET)["verification"]
    assert again["fit"] == before
    assert again["kl_divergence"] == pytest.approx(run["verification"]["kl_divergence"], rel=1e-6)
    sizes: dict[str, Any] = {"budget": before["budget_bytes"], "context": before["context"], "kv": "fp16"}
    unsaid: dict[str, Any] = dict.fromkeys(("bits", "group_size", "symmetric", "format", "recipe"))
    shown = fit_request(FitRequest(str(out), **unsaid, **sizes, tensor_parallel=1, offline=True))
    assert {key: shown[key] for key in ("weights", "total_bytes", "engines")} == {
        key: before[key] for key in ("weights", "total_bytes", "engines")
    }
    # a budget between the two is too small for llama.cpp, and the verdict says so
    short = VerifyRequest(out=out, command="verify", offline=True, budget=before["total_bytes"] - 1)
    assert verify_files(short, QUIET)["verification"]["verdict"] == "fail"


def test_converting_a_folder_measures_the_file_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out, ids = tiny(tmp_path / "model", "qwen2"), tmp_path / "out", tmp_path / "ids.safetensors"
    save_file({"input_ids": IDS}, ids)
    asked = Request(method="rtn", model=str(folder), command="rtn", format="compressed-tensors", group_size=32,
                    bits=8, symmetric=True, out=out, offline=True, evaluation=str(ids))  # fmt: skip
    run, _ = quantize(asked, QUIET)
    made = ExportRequest(str(out), "convert", out=tmp_path / "made", offline=True)
    result, target = to_gguf(made, QUIET)
    assert sorted(p.name for p in target.iterdir()) == [
        "README.md", "journal.jsonl", "out-Q8_0.gguf", "quantkit.json", "report.html"]  # fmt: skip
    assert result["converted"]["equal"] == 14
    bare = tmp_path / "bare"  # as others leave it: the file and nothing of ours
    bare.mkdir()
    shutil.copy(target / "out-Q8_0.gguf", bare)
    for found in (inspect_folder(bare), inspect_folder(bare / "out-Q8_0.gguf")):
        assert [(x["bits"], x["group_size"], x["method"]) for x in found["layers"]] == [(8, 32, "q8_0")] * 14
        assert (found["format"], found["model"], found["bits_per_weight"]) == ("gguf", "qwen2", 8.5)
        assert found["total_bytes"] == (bare / "out-Q8_0.gguf").stat().st_size
    measured, before = result["verification"], run["verification"]
    assert measured["kl_divergence"] == pytest.approx(before["kl_divergence"], rel=1e-6)
    assert "llama-server" in (target / "README.md").read_text()
    (path,) = target.glob("*.gguf")
    damaged = bytearray(path.read_bytes())
    damaged[-100] ^= 1
    path.write_bytes(bytes(damaged))
    again = verify_files(VerifyRequest(out=target, command="verify", offline=True), QUIET)
    assert again["verification"]["verdict"] == "fail"
    assert "out-Q8_0.gguf is not the file" in again["verification"]["reasons"][0]


@pytest.mark.parametrize(("bits", "kind"), [(8, "q8_0"), (4, "q4_0")])
def test_a_quantized_head_keeps_its_integers(tmp_path: Path, bits: int, kind: str) -> None:
    folder, ids = tiny(tmp_path / "model", "qwen2"), tmp_path / "ids.safetensors"
    save_file({"input_ids": IDS}, ids)
    (tmp_path / "recipe.yaml").write_text(f"rules: [{{kind: lm_head, bits: {bits}}}]")
    common: dict[str, Any] = {"method": "rtn", "model": str(folder), "command": "rtn", "symmetric": True,
                              "recipe": tmp_path / "recipe.yaml", "offline": True, "evaluation": str(ids)}  # fmt: skip
    ours, made = tmp_path / "ours", tmp_path / "made"
    run, _ = quantize(Request(format="gguf", engine="llama.cpp", out=ours, **common), QUIET)
    packed = quantize(Request(format="compressed-tensors", group_size=32, out=tmp_path / "packed", **common), QUIET)[1]
    result, _ = to_gguf(ExportRequest(str(packed), "convert", out=made, offline=True), QUIET)
    assert (run["gguf"]["equal"], result["converted"]["equal"], result["converted"]["made_by"][:8]) == (
        15,
        15,
        "quantkit",
    )
    assert [layer["name"] for layer in result["layers"]] == [layer["name"] for layer in run["layers"]]
    assert result["layers"][-1]["name"] == "lm_head"
    assert result["bits_per_weight"] == run["bits_per_weight"]
    for path in (ours / "ours.gguf", made / "packed-Q4_0.gguf"):
        file = open_gguf(path)
        assert {name: file.infos[name].type for name in ("token_embd.weight", "output.weight")} == {
            "token_embd.weight": "f16", "output.weight": kind}  # fmt: skip
        assert inspect_folder(path)["layers"][-1]["method"] == kind
        original = open_model(folder)
        state = open_gguf_model(path, original).read(_names(original))
        theirs = as_transformers_reads(path, IDS)
        assert torch.allclose(as_the_model_with(state, folder, IDS), theirs, atol=1e-4)
    QUIET.print(inspect_table(inspect_folder(made)))
    stored = open_gguf_model(made / "packed-Q4_0.gguf", open_model(folder)).stored()
    assert [linear.name for linear in stored.head] == ["lm_head"]


def test_a_16_bit_model_becomes_k_quants(tmp_path: Path) -> None:
    folder, ids = tiny(tmp_path / "model", "llama"), tmp_path / "ids.safetensors"
    save_file({"input_ids": IDS}, ids)
    common: dict[str, Any] = {"type": "q4_k", "calib": str(ids), "samples": 2, "seqlen": 24, "offline": True,
                              "evaluation": str(ids)}  # fmt: skip
    result, out = to_gguf(ExportRequest(str(folder), "convert", out=tmp_path / "a", **common), QUIET)
    (path,) = out.glob("*.gguf")
    assert result["bits_per_weight"] == 4.5
    assert len(result["layers"]) == 14
    assert result["verification"]["kl_divergence"] > 0
    assert not list(out.glob("*.safetensors"))
    original = open_model(folder)
    weights = open_gguf_model(path, original).read(_names(original))
    ours, theirs = as_the_model_with(weights, folder, IDS), as_transformers_reads(path, IDS)
    assert float((ours - theirs).abs().max() / ours.abs().max()) < 1e-5
    other = tmp_path / "b"
    to_gguf(ExportRequest(str(folder), "convert", out=other, **common), QUIET)
    whole = next(other.glob("*.gguf")).read_bytes()
    assert whole[-4096:] == path.read_bytes()[-4096:]
    assert len(whole) == path.stat().st_size
    with pytest.raises(InputError, match="--type"):
        to_gguf(ExportRequest(str(folder), "convert", type="q3_x", out=tmp_path / "c"), QUIET)


class Watching:
    """A progress that notes what was taken from the disk, and may stop the work before a layer."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop, self.reused = stop, [False, False]

    def start(self, layers: int, tokens: int, places: Mapping[str, str]) -> None: ...
    def stage(self, name: str) -> None: ...
    def ending(self, name: str) -> None: ...
    def layer(self, index: int) -> None:
        if index == self.stop:
            raise KeyboardInterrupt

    def finished(self, index: int, loss: float, reused: bool) -> None:
        self.reused[index] = reused


def test_rounding_that_was_stopped_goes_on_with_the_same_bytes(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "model", "llama")
    model = open_model(folder)
    types = {f"{model.layer_name(i)}.{name}": "q4_k" for i in range(2) for s in sites_of(model) for name in s.linears}
    made = layout(model, json.loads((folder / "config.json").read_text()), folder, types, "q8_0", "tiny")
    tokens = load_calibration(tmp_path)
    digests = []
    for name, stop in (("whole", None), ("stopped", 1)):
        job = RoundJob(model, made, types, tokens, torch.device("cpu"), tmp_path / name)
        if stop is not None:
            with open_journal(job.out, {"a": 1}, fresh=False) as journal, pytest.raises(KeyboardInterrupt):
                round_layers(job, journal, Watching(stop))
            drop(model.layers[1])
        again = Watching()
        with open_journal(job.out, {"a": 1}, fresh=False) as journal:
            records = round_layers(job, journal, again)
        assert len(records) == 14
        assert again.reused == [stop is not None, False]
        digests.append(assemble(job, job.out / "tiny.gguf"))
    assert digests[0] == digests[1]
    assert open_gguf(tmp_path / "whole" / "tiny.gguf").infos["token_embd.weight"].type == "q8_0"


def load_calibration(folder: Path) -> TokenSet:
    save_file({"input_ids": IDS}, folder / "ids.safetensors")
    source = str(folder / "ids.safetensors")
    return calibration.load(source, pytest.fail, samples=2, seqlen=24, seed=0, vocab_size=4104)


def test_runs_refuse_groups_and_bits_that_gguf_would_only_repeat(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "model", "qwen2")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"group_size": 128}, "use --group 32"),
        ({"bits": 3}, "use --w-bit 4"),
        ({"bits": 8, "symmetric": False}, "8 with --sym"),
    ]
    for said, reason in cases:
        asked = Request(method="rtn", model=str(folder), command="rtn", format="gguf", offline=True, verify=False,
                        out=tmp_path / "out", **said)  # fmt: skip
        with pytest.raises(SchemeError, match=reason):
            quantize(asked, QUIET)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- metadata


def test_rotations_of_llama_3_are_those_of_transformers() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    config = LlamaConfig(
        hidden_size=512, num_attention_heads=4, rope_parameters=dict(rope), max_position_embeddings=131072
    )
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    factors = rope_factors(config)
    assert factors is not None
    plain = 1.0 / 500000.0 ** (torch.arange(0, 128, 2).float() / 128)
    assert torch.allclose(plain / factors, expected, rtol=1e-5)


def test_pre_tokenizers_go_by_their_expression(tmp_path: Path) -> None:
    demo = json.loads((DEMO / "tokenizer.json").read_text())
    assert pre_tokenizer(demo, "demo") == "qwen2"
    for expressions, name in PRE_TOKENIZERS.items():
        changed = json.loads(json.dumps(demo))
        splits = [{"type": "Split", "pattern": {"Regex": e}, "behavior": "Isolated"} for e in expressions]
        changed["pre_tokenizer"]["pretokenizers"][:-1] = splits
        changed["pre_tokenizer"]["pretokenizers"][-1]["use_regex"] = not splits
        assert pre_tokenizer(changed, "changed") == name
    changed["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Digits", "individual_digits": True})
    with pytest.raises(ModelError, match="name for its pre-tokenizer is not known"):
        pre_tokenizer(changed, "changed")
    with pytest.raises(ModelError, match="expected a byte-level BPE"):
        pre_tokenizer(demo | {"model": {"type": "WordLevel"}}, "words")


def test_deepseeks_distilled_qwen_has_its_own_name(tmp_path: Path) -> None:
    tokenizer = json.loads((DEMO / "tokenizer.json").read_text())
    bos = "<｜begin▁of▁sentence｜>"
    tokenizer["added_tokens"].append({"id": 4100, "content": bos, "special": True})
    tokenizer["post_processor"] = {"type": "TemplateProcessing", "single": [
        {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]}  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    said = {"bos_token": {"content": bos}, "eos_token": "<|endoftext|>", "chat_template": "{{ x }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    found = tokenizer_metadata(tmp_path, 4104, {"pad_token_id": 2})
    assert found["tokenizer.ggml.pre"] == "deepseek-r1-qwen"
    ids = [found[f"tokenizer.ggml.{key}_token_id"] for key in ("bos", "eos", "padding")]
    assert ids == [4100, 0, 2]
    assert (found["tokenizer.ggml.add_bos_token"], found["tokenizer.ggml.add_eos_token"]) == (True, False)
    assert found["tokenizer.chat_template"] == "{{ x }}"
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list)
    assert isinstance(kinds, list)
    assert (tokens[4096], kinds[4096], kinds[4100], kinds[4094], kinds[50]) == ("[PAD4096]", 5, 3, 4, 1)
    with pytest.raises(ModelError, match="has token 4100, but the model's vocabulary ends at 4099"):
        tokenizer_metadata(tmp_path, 4100, {})


def test_the_tokenizer_in_the_file_encodes_alike(tmp_path: Path) -> None:
    folder, out = tiny(tmp_path / "model", "qwen2"), tmp_path / "out"
    asked = Request(method="rtn", model=str(folder), command="rtn", format="gguf", out=out, offline=True, verify=False)
    quantize(asked, QUIET)
    mine = AutoTokenizer.from_pretrained(folder)
    theirs = AutoTokenizer.from_pretrained(out, gguf_file="out.gguf")
    for text in ("Hello, world! It's 2026.", "def f(x):\n    return x + 1\n", "naïve 中文 🦙 'RE", "  \n\n\t a"):
        assert theirs.encode(text, add_special_tokens=False) == mine.encode(text, add_special_tokens=False)
    assert isinstance(mine.backend_tokenizer, Tokenizer)


def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "model", "qwen2")
    path = folder / "config.json"
    plain = json.loads(path.read_text())
    changes = ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}, "sliding window of 16")
    path.write_text(json.dumps(plain | changes[0]))
    asked = ExportRequest(str(folder), "convert", out=tmp_path / "out", offline=True)
    with pytest.raises(ModelError, match=changes[1]):
        to_gguf(asked, QUIET)
    path.write_text(json.dumps(plain))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        to_gguf(asked, QUIET)
