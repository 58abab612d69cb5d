# SPDX-License-Identifier: Apache-2.0
"""FP8 and MXFP4 originals: slow oracles, transformers' own dequantization, and runs that are those of the numbers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantkit.checkpoint.original import as_numbers
from quantkit.checkpoint.reader import Checkpoint, open_checkpoint
from quantkit.checkpoint.scaled import dequantize_mxfp4, powers
from quantkit.errors import ModelError
from quantkit.gguf import export
from quantkit.model.streaming import open_model
from tests.conftest import make_qwen2, make_tokenizer
from tests.running import done
from tests.verified import run, verify

BLOCK = 32
FP8: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
CT: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"type": "float", "num_bits": 8}}},
}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8"}


def by_block(weight: Tensor) -> Tensor:
    rows, columns = (-(-size // BLOCK) for size in weight.shape)
    return torch.stack(
        [
            torch.stack([weight[r * BLOCK :, c * BLOCK :][:BLOCK, :BLOCK].abs().max() / 448 for c in range(columns)])
            for r in range(rows)
        ]
    )


def spread(scale: Tensor, shape: tuple[int, int]) -> Tensor:
    """One number after the other: the oracle."""
    full = torch.empty(shape)
    counts = (*scale.shape, 1, 1)[:2]
    grid = scale.reshape(counts).float()
    steps = [1 if n == size else size if n == 1 else BLOCK for n, size in zip(counts, shape, strict=True)]
    for r in range(shape[0]):
        for c in range(shape[1]):
            full[r, c] = grid[r // steps[0], c // steps[1]]
    return full


KINDS: dict[str, tuple[str, Callable[[Tensor], Tensor], dict[str, Any] | None]] = {
    "blocks": ("weight_scale_inv", by_block, FP8),
    "tensor": ("weight_scale", lambda w: w.abs().max() / 448, MODELOPT),
    "tensor as a vector": ("weight_scale", lambda w: (w.abs().max() / 448).reshape(1), None),
    "rows": ("weight_scale", lambda w: w.abs().amax(1, keepdim=True) / 448, CT),
    "rows as a vector": ("weight_scale", lambda w: w.abs().amax(1) / 448, None),
    "rows in bfloat16": ("weight_scale", lambda w: (w.abs().amax(1, keepdim=True) / 448).bfloat16(), CT),
}


def in_float8(model: Path, folder: Path, kind: str) -> tuple[Path, dict[str, Tensor]]:
    """The model with its linears in FP8, and what these stand for."""
    name_of_scale, scale_of, settings = KINDS[kind]
    shutil.copytree(model, folder)
    tensors = {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        path.unlink()
    numbers = {}
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        weight, base = tensors[name].float(), name.removesuffix("weight")
        scale = scale_of(weight)
        full = spread(scale, (weight.shape[0], weight.shape[1]))
        tensors[name] = (weight / full).to(torch.float8_e4m3fn)
        tensors[base + name_of_scale] = scale
        if settings == MODELOPT:
            tensors[base + "input_scale"] = torch.ones(())
        numbers[name] = tensors[name].float() * full
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | ({"quantization_config": settings} if settings else {})))
    return folder, numbers


def as_floats(model: Path, folder: Path, numbers: dict[str, Tensor]) -> Path:
    """The model with these numbers in float32."""
    shutil.copytree(model, folder)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        save_file({n: numbers.get(n, t) for n, t in tensors.items()}, path, metadata={"format": "pt"})
    return folder


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """Widths that the block does not divide."""
    model = make_qwen2(tmp_path / "model", intermediate_size=80, num_key_value_heads=1)
    make_tokenizer(model)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_float8_weights_are_the_numbers_that_they_stand_for(kind: str, odd: Path, tmp_path: Path) -> None:
    folder, numbers = in_float8(odd, tmp_path / "fp8", kind)
    opened = open_model(folder)
    assert opened.ignored == ()
    for name, expected in numbers.items():
        assert torch.equal(opened.checkpoint.read(name), expected)
        parts = torch.cat(list(opened.checkpoint.pieces(name, 37)))  # pieces begin and end within rows
        assert torch.equal(parts.view(expected.shape), expected)


def test_blocks_of_128_need_no_config(tmp_path: Path) -> None:
    weight, scales = torch.randn(200, 300).to(torch.float8_e4m3fn), torch.rand(2, 3)
    save_file({"a.weight": weight, "a.weight_scale_inv": scales}, tmp_path / "model.safetensors")
    found = as_numbers(open_checkpoint(tmp_path), {}).read("a.weight")
    expected = weight.float() * scales.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]
    assert torch.equal(found, expected)


def test_stacked_weights_have_scales_of_their_own(tmp_path: Path) -> None:
    weight = torch.randn(3, 64, 96).to(torch.float8_e4m3fn)
    for number, scales in enumerate((torch.rand(3, 2, 3), torch.rand(3, 1, 1), torch.rand(3, 64, 1), torch.rand(()))):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file({"up": weight, "up_scale_inv": scales}, folder / "model.safetensors")
        found = as_numbers(open_checkpoint(folder), {"weight_block_size": [32, 32]})
        full = scales
        for dim in range(scales.dim()):
            full = full.repeat_interleave(weight.shape[dim] // full.shape[dim], dim)
        assert torch.equal(found.read("up"), weight.float() * full)
        assert torch.equal(torch.cat(list(found.pieces("up", 1000))), (weight.float() * full).flatten())


def test_it_equals_what_transformers_reads(odd: Path, tmp_path: Path) -> None:
    fine_grained = pytest.importorskip("transformers.integrations.finegrained_fp8")
    weight = torch.randn(64, 96)
    scales = by_block(weight)
    stored = (weight / spread(scales, (64, 96))).to(torch.float8_e4m3fn)
    save_file({"a.weight": stored, "a.weight_scale_inv": scales}, tmp_path / "model.safetensors")
    found = as_numbers(open_checkpoint(tmp_path), FP8).read("a.weight")
    if not hasattr(fine_grained, "Fp8Dequantize"):
        pytest.skip("an older transformers")
    assert torch.equal(found, fine_grained.Fp8Dequantize(None)._dequantize_one(stored, scales, torch.float32))


@pytest.mark.parametrize("kind", ["blocks", "rows"])
def test_a_run_is_that_of_the_numbers(kind: str, qwen2: Path, ids: Path, tmp_path: Path) -> None:
    folder, numbers = in_float8(qwen2, tmp_path / "fp8", kind)
    plain = as_floats(qwen2, tmp_path / "plain", numbers)
    found, expected = (
        run(model, tmp_path / f"{model.name}-out", ids, method="gptq", calib=str(ids)) for model in (folder, plain)
    )
    for figure in ("perplexity_fp16", "perplexity", "kl_divergence", "top1_agreement"):
        assert found["verification"][figure] == expected["verification"][figure]
    assert [file["sha256"] for file in found["files"]] == [file["sha256"] for file in expected["files"]]
    config = json.loads((tmp_path / "fp8-out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "gptq"
    again = verify(tmp_path / "fp8-out")["verification"]
    assert again["kl_divergence"] == pytest.approx(found["verification"]["kl_divergence"], abs=1e-7)


def test_fit_plans_a_new_checkpoint_of_it(qwen2: Path, tmp_path: Path) -> None:
    folder, _ = in_float8(qwen2, tmp_path / "fp8", "blocks")
    answer = done("fit", str(folder), "--group", "32", "--json")
    assert json.loads(answer.stdout)["scheme"] == "W4 g32 asym, stored as awq"


def test_rows_are_read_some_at_a_time(odd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "ROWS_BYTES", 1000)
    folder, numbers = in_float8(odd, tmp_path / "fp8", "blocks")
    for name, expected in numbers.items():
        rows = list(export.read_rows(open_model(folder).checkpoint, name))
        assert len(rows) > 1
        assert torch.equal(torch.cat(rows), expected)


def changed(model: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


SCALE = "model.layers.0.mlp.up_proj.weight_scale_inv"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop(SCALE),
            "up_proj.weight is stored in float8 and its scale is missing; looked for .*_scale_inv",
        ),
        (
            lambda t: t.update({SCALE: torch.ones(3, 7)}),
            r"up_proj.weight_scale_inv: expected one scale, .* got \[3, 7\]",
        ),
        (lambda t: t.update({SCALE: torch.ones(2, 2, 2)}), r"got \[2, 2, 2\]"),
        (lambda t: t.update({SCALE + "_x": torch.ones(1)}), "1 tensors have no place in the model"),
    ],
)
def test_a_scale_that_does_not_fit_is_one_line(
    change: Callable[[dict[str, Tensor]], None], message: str, qwen2: Path, tmp_path: Path
) -> None:
    folder, _ = in_float8(qwen2, tmp_path / "fp8", "blocks")
    with pytest.raises(ModelError, match=message) as caught:
        open_model(changed(folder, change))
    assert "\n" not in str(caught.value)


def test_weights_that_are_no_floats_are_still_refused(qwen2: Path, tmp_path: Path) -> None:
    for number, settings in enumerate(({"quant_method": "gptq"}, {"quant_method": "modelopt", "quant_algo": "NVFP4"})):
        folder = tmp_path / str(number)
        shutil.copytree(qwen2, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
        with pytest.raises(ModelError, match="already quantized"):
            open_model(folder)


# ---------------------------------------------------------------- MXFP4


def mxfp4_by_hand(blocks: Tensor, scales: Tensor) -> Tensor:
    """One byte after the other, for [experts, out, groups, 16]."""
    experts, out, groups, _ = blocks.shape
    full = torch.empty(experts, groups * 32, out)
    for e in range(experts):
        for o in range(out):
            for g in range(groups):
                for place in range(32):
                    byte = int(blocks[e, o, g, place // 2])
                    code = byte >> 4 if place % 2 else byte & 15
                    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
                    value = (1 + mantissa / 2) * 2 ** (exponent - 1) if exponent else mantissa / 2
                    full[e, g * 32 + place, o] = (-1) ** sign * value * 2.0 ** (int(scales[e, o, g]) - 127)
    return full


def mxfp4() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (2, 5, 3, 16), generator=generator, dtype=torch.uint8)
    return blocks, torch.randint(118, 130, (2, 5, 3), generator=generator, dtype=torch.uint8)


def test_mxfp4_stands_for_what_its_definition_says() -> None:
    blocks, scales = mxfp4()
    assert torch.equal(dequantize_mxfp4(blocks, scales), mxfp4_by_hand(blocks, scales))


def test_mxfp4_equals_what_transformers_reads() -> None:
    theirs = pytest.importorskip("transformers.integrations.mxfp4")
    blocks, scales = mxfp4()
    expected = theirs.convert_moe_packed_tensors(blocks, scales.int() - 127 if _signed(theirs) else scales)
    assert torch.equal(dequantize_mxfp4(blocks, scales).bfloat16(), expected.bfloat16())


def _signed(theirs: Any) -> bool:
    """Whether that version of transformers wants the exponents themselves."""
    one = theirs.convert_moe_packed_tensors(
        torch.full((1, 1, 1, 16), 0x22, dtype=torch.uint8), torch.zeros(1, 1, 1).int()
    )
    return bool(one.flatten()[0] == 1)


def test_mxfp4_is_read_in_parts_as_in_whole(tmp_path: Path) -> None:
    blocks, scales = mxfp4()
    save_file(
        {"e.up_blocks": blocks, "e.up_scales": scales, "e.up_bias": torch.ones(2)}, tmp_path / "model.safetensors"
    )
    found: Checkpoint = as_numbers(open_checkpoint(tmp_path), {})
    assert found.entries.keys() == {"e.up", "e.up_bias"}
    assert torch.equal(found.read("e.up"), mxfp4_by_hand(blocks, scales))
    assert torch.equal(torch.cat(list(found.pieces("e.up", 77))), found.read("e.up").flatten())
    save_file({"e.up_blocks": blocks, "e.up_scales": scales[:, :4].contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"e.up_scales: expected uint8 \[2, 5, 3\], got uint8 \[2, 4, 3\]"):
        as_numbers(open_checkpoint(tmp_path), {})


def test_exponents_are_powers_of_two() -> None:
    assert powers(torch.tensor([0, 126, 127, 128, 254], dtype=torch.uint8)).tolist() == [2.0**-127, 0.5, 1, 2, 2.0**127]
