# SPDX-License-Identifier: Apache-2.0
"""What is added by data alone: each test here adds it in the test, and leaves the package as it is."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.formats import FORMATS, Format, QuantizedLayer, TensorSpec
from quantkit.formats.base import matching
from quantkit.formats.names import Fused
from quantkit.grids.base import Grid, Parameters, Spacing, relative_energy, stored_in_float16, to_float16
from quantkit.grids.registry import GRIDS, dequantize, encode
from quantkit.methods import gptq, rtn
from quantkit.methods.refine import refine
from quantkit.methods.tune import offsets, tune
from quantkit.model.architectures import FAMILIES
from quantkit.model.config import load_config
from quantkit.model.family import EVERY, KEYS_AND_VALUES, Family, Part, Site, folded_site
from quantkit.model.shapes import shapes_of
from quantkit.model.skeleton import build
from quantkit.scheme import NAMED, QuantizedTensor, Scheme, expand
from quantkit.stats import output_error
from tests.outputs import contents
from tests.running import done, run_words
from tests.tiny import save_tiny

# ---------------------------------------------------------------- an architecture

QKV, O, GATE_UP, DOWN = "self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"
PHI3 = Family(
    layers={
        EVERY: (
            Part(
                sites=(folded_site("input_layernorm", QKV), Site((O,))),
                sizes={
                    O: ("hidden_size", "num_attention_heads * head_dim"),  # in the order of its modules
                    QKV: ("(num_attention_heads + 2 * num_key_value_heads) * head_dim", "hidden_size"),
                },
                norms={"input_layernorm": "hidden_size"},
                per_token=KEYS_AND_VALUES,
            ),
            Part(
                sites=(Site((GATE_UP,)), Site((DOWN,))),  # its norm could take a scale; the row does not say so
                sizes={GATE_UP: ("2 * intermediate_size", "hidden_size"), DOWN: ("hidden_size", "intermediate_size")},
                norms={"post_attention_layernorm": "hidden_size"},
            ),
        )
    },
    optional={"tie_word_embeddings": False, "sliding_window": None},
    by_input=frozenset({"o_proj", "down_proj"}),
)


@pytest.fixture(scope="module")
def phi3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family that transformers has and quantkit has no row for."""
    assert "phi3" not in FAMILIES
    return save_tiny(tmp_path_factory.mktemp("phi3"), "phi3", hidden_size=64, vocab_size=96)


def test_a_row_tells_the_shapes_of_its_architecture(phi3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = json.loads((phi3 / "config.json").read_text())
    assert shapes_of(raw) is None
    monkeypatch.setitem(FAMILIES, "phi3", PHI3)
    found, expected = shapes_of(raw), build(load_config(phi3))
    assert found is not None
    assert found.layer_tensors == expected.layer_tensors
    assert found.layer_linears == expected.layer_linears
    assert found.outside() == expected.outside()
    words = ["fit", str(phi3), "--json", "--context", "64", "--group", "32"]
    by_row = done(*words)
    monkeypatch.delitem(FAMILIES, "phi3")
    assert done(*words).stdout == by_row.stdout


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_row_is_quantized_continued_and_verified(
    method: str, phi3: Path, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, "phi3", PHI3)
    out = tmp_path / "out"
    words = run_words(method, phi3, out, ids)
    done(*words)
    expected = contents(out)
    layers = json.loads((out / "quantkit.json").read_text())["layers"]
    assert {layer["kind"] for layer in layers} == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    scaled = {layer["kind"] for layer in layers if layer.get("scale", "1") != "1"}
    assert scaled == ({"qkv_proj"} if method == "awq" else set())  # the only fold of the row
    (out / "model-00003-of-00005.safetensors").unlink()
    done(*words)
    assert contents(out) == expected
    measured = json.loads((out / "quantkit.json").read_text())["verification"]["kl_divergence"]
    verify = ["verify", str(out), "--eval", str(ids), "--device", "cpu", "--max-ppl-increase", "900%", "--json"]
    assert json.loads(done(*verify).stdout)["verification"]["kl_divergence"] == measured


# ---------------------------------------------------------------- a grid, and a target that stores it

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
FLOAT4 = Scheme(4, 32, True, "e2m1")


def spanning(weight: Tensor, scheme: Scheme, min_zero: int = 0) -> Parameters:
    """Float16 scales with which the largest weight of each group is a 6."""
    largest = weight.float().unflatten(1, (scheme.groups(weight.shape[1]), -1)).abs().amax(2)
    scales = to_float16(largest / 6)
    return Parameters(scheme, scales, torch.zeros_like(scales, dtype=torch.uint8))


def searched(weight: Tensor, scheme: Scheme, energy: Tensor | None = None, min_zero: int = 0) -> Parameters:
    """The best of some narrower ranges, by the weighted error of each group."""
    importance = relative_energy(energy, weight)
    widest, best, least = spanning(weight, scheme).scales.float(), torch.Tensor(), torch.Tensor()
    for shrinkage in (1.0, 0.95, 0.9, 0.85, 0.8, 0.7):
        tried = Parameters(scheme, to_float16(widest * shrinkage), torch.zeros_like(widest, dtype=torch.uint8))
        lost = (dequantize(encode(weight, tried)) - weight.float()).square() * importance
        error = lost.unflatten(1, (widest.shape[1], -1)).sum(2)
        better = error < (least if len(least) else torch.full_like(error, torch.inf))
        best = torch.where(better, tried.scales, best) if len(best) else tried.scales
        least = torch.where(better, error, least) if len(least) else error
    return Parameters(scheme, best, torch.zeros_like(best, dtype=torch.uint8))


FLOAT_GRID = Grid(
    name="e2m1",
    plain=spanning,
    search=searched,
    spacing=lambda parameters: Spacing(parameters.scales.float(), torch.zeros_like(parameters.scales.float())),
    store=stored_in_float16,
    restored=lambda parameters, scales: replace(parameters, scales=to_float16(scales).contiguous()),
    divided=lambda parameters, by: replace(parameters, scales=to_float16(parameters.scales.float() / by.unsqueeze(1))),
    values=E2M1,
)


def float_specs(scheme: Scheme, out_features: int, in_features: int) -> dict[str, TensorSpec]:
    scales = TensorSpec("float16", (out_features, scheme.groups(in_features)))
    return {"weight_codes": TensorSpec("uint8", (out_features, in_features // 2)), "weight_scale": scales}


def float_pack(quantized: QuantizedTensor) -> dict[str, Tensor]:
    low, high = quantized.codes[:, ::2], quantized.codes[:, 1::2]
    return {"weight_codes": low | high << 4, "weight_scale": quantized.scales.contiguous()}


def float_unpack(tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> QuantizedTensor:
    packed, scales = matching(tensors, float_specs(scheme, *shape))
    codes = torch.stack([packed & 15, packed >> 4], 2).flatten(1)
    return QuantizedTensor(codes, scales, torch.zeros_like(scales, dtype=torch.uint8), scheme)


def float_config(
    quantized: Sequence[QuantizedLayer], kept: Sequence[str], fused: Fused, **options: object
) -> dict[str, Any]:
    return {"quant_method": "pairs", "modules": [name for name, _ in quantized]}


PAIRS = Format(
    name="pairs",
    holds_mixed=False,
    quant_method="pairs",
    reads=lambda config: lambda name: FLOAT4 if name in config["modules"] else None,
    codes="weight_codes",
    specs=float_specs,
    why_not=lambda scheme, rows, columns: None if scheme.grid == "e2m1" else f"pairs holds e2m1, got {scheme}",
    min_zero=lambda scheme: 0,
    pack=float_pack,
    unpack=float_unpack,
    unpack_zeros=lambda tensors, scheme, shape: float_unpack(tensors, scheme, shape).zeros,
    config=float_config,
    extra_files=lambda config: {},
    grids=("e2m1",),
    scales=lambda tensors: tensors.get("weight_scale"),
)


@pytest.fixture
def float4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GRIDS, "e2m1", FLOAT_GRID)
    monkeypatch.setitem(NAMED, "e2m1", FLOAT4)
    monkeypatch.setitem(FORMATS, "pairs", PAIRS)


def correlated_problem() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(600, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    return 0.05 * torch.randn(24, 64, generator=generator), inputs.T @ inputs


@pytest.mark.usefixtures("float4")
def test_methods_round_on_a_grid_that_is_a_table() -> None:
    """Every value is a level times its scale; GPTQ beats rounding to nearest, refinement beats GPTQ; AWQ runs."""
    weight, gram = correlated_problem()
    factor = gptq.factorize(gram)
    nearest = rtn.quantize(weight, FLOAT4, energy=gram.diagonal())
    once = gptq.quantize(weight, FLOAT4, factor, energy=gram.diagonal())
    refined, left = refine(weight, once, gram, damp=factor.damp, rounds=4)
    errors = [float(output_error(dequantize(q) - weight, gram).sum()) for q in (nearest, once, refined)]
    assert errors[2] < errors[1] < 0.8 * errors[0]
    assert float(left.sum()) == pytest.approx(errors[2], rel=1e-3)
    for quantized in (nearest, once, refined):
        levels = torch.tensor(E2M1)[quantized.codes.long()]
        assert torch.equal(dequantize(quantized), levels * expand(quantized.scales.float(), 32))
        assert torch.equal(float_unpack(float_pack(quantized), FLOAT4, (24, 64)).codes, quantized.codes)


@pytest.mark.usefixtures("float4")
def test_tuning_moves_codes_of_a_table() -> None:
    weight, gram = correlated_problem()
    before = rtn.quantize(weight, FLOAT4)
    root = torch.linalg.cholesky(gram + 1e-3 * gram.diagonal().mean() * torch.eye(64))

    def loss(weights: Mapping[str, Tensor]) -> Tensor:
        lost: Tensor = ((weights["w"] - weight) @ root).square().sum() / (weight @ root).square().sum()
        return lost

    after = tune({"w": before}, {"w": offsets(weight, before)}, [loss] * 64)["w"]
    assert float(loss({"w": dequantize(after)})) < 0.8 * float(loss({"w": dequantize(before)}))


@pytest.mark.usefixtures("float4")
@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_a_grid_and_a_target_are_quantized_continued_and_verified(
    method: str, qwen2: Path, ids: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = [*run_words(method, qwen2, out, ids)]
    words = [*words[:2], *without(words[2:], "--group", "--w-bit"), "--scheme", "e2m1"]
    done(*words)
    expected = contents(out)
    result = json.loads((out / "quantkit.json").read_text())
    assert result["format"] == "pairs"
    assert result["bits_per_weight"] == 4.5
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "pairs"
    (out / "model-00003-of-00004.safetensors").unlink()
    done(*words)
    assert contents(out) == expected
    verify = ["verify", str(out), "--eval", str(ids), "--device", "cpu", "--max-ppl-increase", "900%", "--json"]
    measured = result["verification"]["kl_divergence"]
    assert json.loads(done(*verify).stdout)["verification"]["kl_divergence"] == pytest.approx(measured, rel=1e-6)


def without(words: Sequence[str], *options: str) -> list[str]:
    """The words less some options and the value of each."""
    dropped = {i + step for i, word in enumerate(words) if word in options for step in (0, 1)}
    return [word for i, word in enumerate(words) if i not in dropped]
