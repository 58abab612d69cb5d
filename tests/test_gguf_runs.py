# SPDX-License-Identifier: Apache-2.0
"""Runs and conversions that leave a GGUF file: the very integers, their memory, what is refused."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quantkit.commands.conversion import ExportRequest
from quantkit.commands.convert_gguf import to_gguf
from quantkit.commands.fit import FitRequest, fit_request
from quantkit.commands.inspect import inspect_folder
from quantkit.commands.quantize import quantize
from quantkit.commands.verify import VerifyRequest, verify_files
from quantkit.errors import ModelError, SchemeError
from quantkit.gguf.export import export, open_source
from quantkit.gguf.file import open_gguf
from quantkit.gguf.reading import open_gguf_model
from quantkit.model.streaming import open_model
from quantkit.report.terminal.inspect import inspect_table
from quantkit.report.terminal.screen import Terminal
from quantkit.scheme import Scheme
from quantkit.serving.fit import fit_checkpoint
from quantkit.settings.request import Request
from tests.foreign import foreign, rewrite, shuffled
from tests.gguf_models import (
    DEMO,
    IDS,
    QUIET,
    Watching,
    as_the_model_with,
    as_transformers_reads,
    parameter_names,
    tiny,
)


def test_an_export_is_atomic_repeatable_and_says_what_it_cannot_keep(tmp_path: Path) -> None:
    folder, out = tiny(tmp_path / "model", "llama"), tmp_path / "out"
    asked = Request(method="rtn", model=str(folder), command="rtn", format="compressed-tensors", group_size=64,
                    symmetric=False, out=out, offline=True, verify=False)  # fmt: skip
    quantize(asked, QUIET)
    with pytest.raises(SchemeError, match=r"q_proj: q4_1 stores -zero \* scale in float16.*--requantize.*q8_0"):
        export(open_source(out), tmp_path / "a.gguf")
    with pytest.raises(SchemeError, match="from the 16-bit model it can be made without rounding twice"):
        export(open_source(out), tmp_path / "a.gguf", "q4_k")
    assert not list(tmp_path.glob("*.gguf"))
    exact = export(open_source(out), tmp_path / "a.gguf", "q8_0")
    assert (exact.equal, exact.rounded, exact.nbytes) == (14, {}, (tmp_path / "a.gguf").stat().st_size)
    assert export(open_source(out), tmp_path / "b.gguf", "q8_0").sha256 != ""
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    lossy = export(open_source(out), tmp_path / "c.gguf", requantize=True)
    assert lossy.equal + len(lossy.rounded) == 14
    assert 0 < max(lossy.rounded.values()) < 1e-3


def test_scattered_groups_are_refused(tmp_path: Path) -> None:
    """Blocks are of columns side by side: act-order's groups would be rounded again."""
    foreign(tmp_path / "gptq", "gptq", Scheme(4, 32, True), change=shuffled)
    with pytest.raises(SchemeError, match=r"act-order.*--requantize"):
        export(open_source(tmp_path / "gptq"), tmp_path / "a.gguf")
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
    exported = export(open_source(tmp_path / "ct"), tmp_path / "a.gguf")
    assert (exported.equal, exported.rounded) == (len(held), {})
    rewrite(tmp_path / "ct", lambda state: round_scales(state, 2.0**-14))  # float16 loses bits of these
    with pytest.raises(SchemeError, match="scales in bfloat16 that gguf's float16 does not hold"):
        export(open_source(tmp_path / "ct"), tmp_path / "b.gguf")
    assert not (tmp_path / "b.gguf").exists()


def test_a_checkpoint_without_a_quantized_linear_is_refused(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "model", "qwen2")
    config = json.loads((folder / "config.json").read_text())
    nothing = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}, "ignore": []}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": nothing}))
    with pytest.raises(ModelError, match="every linear is stored in 16 bit"):
        export(open_source(folder), tmp_path / "a.gguf")


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_head_with_zero_points_is_held_exactly(tmp_path: Path, method: str) -> None:
    folder, ids, recipe = tiny(tmp_path / "model", "qwen2"), tmp_path / "ids.safetensors", tmp_path / "recipe.yaml"
    save_file({"input_ids": IDS}, ids)
    recipe.write_text("rules:\n- {kind: lm_head}\n")
    asked = Request(method=method, model=str(folder), command=method, format="gguf", symmetric=False, offline=True,
                    out=tmp_path / "out", calib=str(ids), verify=False, recipe=recipe)  # fmt: skip
    result = quantize(asked, QUIET)[0].content()
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
    run = quantize(asked, QUIET)[0].content()
    before = run["verification"]["fit"]
    tensors = open_gguf_model(out / "out.gguf", open_model(folder)).stored().tensors
    assert before["weights"]["total"] == sum(tensors.values()) == run["tensor_bytes"]
    assert before["weights"]["blocks"] == sum(size for name, size in tensors.items() if name.endswith("_proj.weight"))
    beside = fit_checkpoint(out, budget=before["budget_bytes"], context=before["context"])
    assert beside.weights["total"] < before["weights"]["total"]
    again = verify_files(VerifyRequest(out=out, command="verify", offline=True), QUIET).content()["verification"]
    assert again["fit"] == before
    assert again["kl_divergence"] == pytest.approx(run["verification"]["kl_divergence"], rel=1e-6)
    sizes: dict[str, Any] = {"budget": before["budget_bytes"], "context": before["context"], "kv": "fp16"}
    unsaid: dict[str, Any] = dict.fromkeys(("bits", "group_size", "symmetric", "format", "recipe"))
    shown = fit_request(FitRequest(str(out), **unsaid, **sizes, tensor_parallel=1, offline=True)).content()
    assert {key: shown[key] for key in ("weights", "total_bytes", "engines")} == {
        key: before[key] for key in ("weights", "total_bytes", "engines")
    }
    # a budget between the two is too small for llama.cpp, and the verdict says so
    short = VerifyRequest(out=out, command="verify", offline=True, budget=before["total_bytes"] - 1)
    assert verify_files(short, QUIET).content()["verification"]["verdict"] == "fail"


def test_converting_a_folder_measures_the_file_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out, ids = tiny(tmp_path / "model", "qwen2"), tmp_path / "out", tmp_path / "ids.safetensors"
    save_file({"input_ids": IDS}, ids)
    asked = Request(method="rtn", model=str(folder), command="rtn", format="compressed-tensors", group_size=32,
                    bits=8, symmetric=True, out=out, offline=True, evaluation=str(ids))  # fmt: skip
    run = quantize(asked, QUIET)[0].content()
    made, target = to_gguf(ExportRequest(str(out), "convert", out=tmp_path / "made", offline=True), QUIET)
    result = made.content()
    assert sorted(p.name for p in target.iterdir()) == [
        "README.md", "journal.jsonl", "out-Q8_0.gguf", "quantkit.json", "report.html"]  # fmt: skip
    assert result["converted"]["equal"] == 14
    bare = tmp_path / "bare"  # as others leave it: the file and nothing of ours
    bare.mkdir()
    shutil.copy(target / "out-Q8_0.gguf", bare)
    for found in (inspect_folder(bare).content(), inspect_folder(bare / "out-Q8_0.gguf").content()):
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
    again = verify_files(VerifyRequest(out=target, command="verify", offline=True), QUIET).content()
    assert again["verification"]["verdict"] == "fail"
    assert "out-Q8_0.gguf is not the file" in again["verification"]["reasons"][0]


def test_a_conversion_is_measured_by_the_protocol_of_a_run(tmp_path: Path) -> None:
    """Windows as long as the model allows and the recipe says, and the same tokens as awq and gptq take."""
    folder, text = tiny(tmp_path / "model", "qwen2"), tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and runs away from it. " * 60)
    common: dict[str, Any] = {"calib": str(text), "samples": 4, "evaluation": str(text), "eval_samples": 3}
    asked = Request(method="gptq", model=str(folder), command="gptq", out=tmp_path / "run", offline=True,
                    max_ppl_increase=9.0, group_size=32, **common)  # fmt: skip
    run = quantize(asked, QUIET)[0].content()
    for outside in ("f16", "q8_0"):  # the second is measured once more, from the file
        made = ExportRequest(str(folder), "convert", type="q8_0", outside=outside, out=tmp_path / outside,
                             offline=True, **common)  # fmt: skip
        result = to_gguf(made, QUIET)[0].content()
        for key in ("sha256", "samples", "seqlen", "protocol"):
            assert result["verification"]["eval"][key] == run["verification"]["eval"][key]
            assert result["calibration"][key] == run["calibration"][key]
        assert result["verification"]["eval"]["seqlen"] == 128  # all that the model has
        expected = run["verification"]["perplexity_fp16"]
        assert result["verification"]["perplexity_fp16"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("bits", "kind"), [(8, "q8_0"), (4, "q4_0")])
def test_a_quantized_head_keeps_its_integers(tmp_path: Path, bits: int, kind: str) -> None:
    folder, ids = tiny(tmp_path / "model", "qwen2"), tmp_path / "ids.safetensors"
    save_file({"input_ids": IDS}, ids)
    (tmp_path / "recipe.yaml").write_text(f"rules: [{{kind: lm_head, bits: {bits}}}]")
    common: dict[str, Any] = {"method": "rtn", "model": str(folder), "command": "rtn", "symmetric": True,
                              "recipe": tmp_path / "recipe.yaml", "offline": True, "evaluation": str(ids)}  # fmt: skip
    ours, made = tmp_path / "ours", tmp_path / "made"
    run = quantize(Request(format="gguf", engine="llama.cpp", out=ours, **common), QUIET)[0].content()
    packed = quantize(Request(format="compressed-tensors", group_size=32, out=tmp_path / "packed", **common), QUIET)[1]
    result = to_gguf(ExportRequest(str(packed), "convert", out=made, offline=True), QUIET)[0].content()
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
        assert inspect_folder(path).content()["layers"][-1]["method"] == kind
        original = open_model(folder)
        state = open_gguf_model(path, original).read(parameter_names(original))
        theirs = as_transformers_reads(path, IDS)
        assert torch.allclose(as_the_model_with(state, folder, IDS), theirs, atol=1e-4)
    QUIET.show(inspect_table(inspect_folder(made)))
    stored = open_gguf_model(made / "packed-Q4_0.gguf", open_model(folder)).stored()
    assert [linear.name for linear in stored.head] == ["lm_head"]


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


@pytest.mark.parametrize(("method", "scheme"), [("gptq", "q4_k"), ("awq", "q6_k"), ("rtn", "q5_k")])
def test_k_quants_are_a_run_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, scheme: str
) -> None:
    """Interrupted, continued, measured in the run, and measured again from the file."""
    folder, ids = tiny(tmp_path / "model", "llama"), tmp_path / "ids.safetensors"
    save_file({"input_ids": IDS}, ids)
    asked = Request(method, str(folder), method, scheme=scheme, calib=str(ids), evaluation=str(ids), offline=True)
    asked = replace(asked, out=tmp_path / "out", max_ppl_increase=9.0)
    whole, folder = quantize(replace(asked, out=tmp_path / "whole"), QUIET)
    assert whole.gguf is not None
    expected = (folder / whole.gguf.file).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Terminal, "progress", lambda *_: nullcontext(Watching(1)))
        with pytest.raises(KeyboardInterrupt):
            quantize(asked, QUIET)
    first, out = quantize(asked, QUIET)
    assert first.gguf is not None
    assert first.verification is not None
    assert any("continued: 2 of" in fallback for fallback in first.fallbacks)
    path = out / first.gguf.file
    assert path.read_bytes() == expected
    assert sorted(path.suffix for path in out.iterdir()) == [".gguf", ".html", ".json", ".jsonl", ".md"]
    assert first.bits_per_weight == pytest.approx({"q4_k": 4.5, "q5_k": 5.5, "q6_k": 6.5625}[scheme])
    assert {layer.method for layer in first.layers} == {method}
    assert quantize(asked, QUIET)[0] == first  # finished: nothing is done
    checked = verify_files(VerifyRequest(out=out, command="verify", offline=True), QUIET).verification
    assert checked is not None
    assert checked.kl_divergence == pytest.approx(first.verification.kl_divergence, rel=1e-6)
    path.write_bytes(expected[:-1])  # damaged: made again
    assert quantize(asked, QUIET)[0].gguf == first.gguf
    assert path.read_bytes() == expected
