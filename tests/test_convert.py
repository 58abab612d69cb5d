# SPDX-License-Identifier: Apache-2.0
"""`quantkit convert`: the same integers in another format, what is refused, and what rounding again costs."""

import json
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.commands.verify import VerifyRequest, verify_files
from quantkit.errors import InputError, ModelError, NumericsError, OutputError, QuantkitError, SchemeError
from quantkit.grids.registry import dequantize
from quantkit.scheme import QuantizedTensor, Scheme
from tests.conftest import make_qwen2, make_tokenizer
from tests.foreign import QUIET, W4, assert_held, edit, foreign, rewrite, run, same, tensors, to, unpacked
from tests.running import command, done, quantkit, run_process, started
from tests.tiny import load_whole


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("group_size", [128, 64])
@pytest.mark.parametrize("symmetric", [False, True])
def test_around_and_back_gives_the_same_files(tmp_path: Path, tied: bool, group_size: int, symmetric: bool) -> None:
    model = make_qwen2(tmp_path / "model", hidden_size=128, intermediate_size=256, tie_word_embeddings=tied)
    first = tmp_path / "awq"
    run(model, first, group_size=group_size, symmetric=symmetric)
    folder = first
    for target in ("compressed-tensors", "gptq_v2", "awq"):
        result = to(folder, target, tmp_path / f"to-{target}")
        assert result["converted"]["lossless"]
        assert result["converted"]["equal"] == 14
        folder = tmp_path / f"to-{target}"
    assert same(tensors(first), tensors(folder))
    for path in (*first.glob("*.safetensors"), first / "config.json", first / "model.safetensors.index.json"):
        assert path.read_bytes() == (folder / path.name).read_bytes(), path.name
    weights = json.loads((tmp_path / "to-compressed-tensors" / "config.json").read_text())["quantization_config"]
    assert weights["config_groups"]["group_0"]["weights"]["symmetric"] is symmetric


def test_symmetric_gptq_around_and_back(tmp_path: Path, qwen2: Path) -> None:
    run(qwen2, tmp_path / "gptq", symmetric=True, format="gptq")
    to(tmp_path / "gptq", "compressed-tensors", tmp_path / "ct")
    to(tmp_path / "ct", "awq", tmp_path / "awq")
    to(tmp_path / "awq", "gptq", tmp_path / "again")
    assert same(tensors(tmp_path / "gptq"), tensors(tmp_path / "again"))
    said = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert (said["sym"], said["desc_act"]) == (True, False)
    assert json.loads((tmp_path / "again" / "quantize_config.json").read_text()) == said


def test_mixed_bits_and_kept_layers(tmp_path: Path, qwen2: Path) -> None:
    recipe = tmp_path / "mixed.yaml"
    recipe.write_text(
        "rules:\n  - {kind: down_proj, bits: 8, group_size: 64}\n  - {layers: '1', match: '*.o_proj', keep: 16bit}\n"
    )
    run(qwen2, tmp_path / "ct", format="compressed-tensors", recipe=recipe, symmetric=True)
    to(tmp_path / "ct", "gptq", tmp_path / "gptq")
    to(tmp_path / "gptq", "compressed-tensors", tmp_path / "again")
    assert same(tensors(tmp_path / "ct"), tensors(tmp_path / "again"))
    first, last = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("ct", "again"))
    assert first == last


def test_what_was_measured_is_carried_over(tmp_path: Path, qwen2: Path, ids: Path) -> None:
    before = run(qwen2, tmp_path / "awq", verify=True, evaluation=str(ids))
    after = to(tmp_path / "awq", "gptq_v2", tmp_path / "gptq")
    for key in ("perplexity", "kl_divergence", "top1_agreement", "eval", "limits", "verdict"):
        assert after["verification"][key] == before["verification"][key], key
    assert after["verification"]["fit"]["weights"] != before["verification"]["fit"]["weights"]  # g_idx
    assert any("measured before it was converted" in note for note in after["fallbacks"])
    assert [layer["loss"] for layer in after["layers"]] == [layer["loss"] for layer in before["layers"]]
    again = verify_files(VerifyRequest(out=tmp_path / "gptq", command="quantkit verify", offline=True), QUIET).content()
    assert again["verification"] == after["verification"]
    names = {path.name for path in (tmp_path / "gptq").iterdir()}
    assert {"tokenizer.json", "report.html", "README.md", "quantkit.json", "journal.jsonl"} <= names


def test_a_changed_source_takes_its_measurements_with_it(tmp_path: Path, qwen2: Path, ids: Path) -> None:
    run(qwen2, tmp_path / "awq", verify=True, evaluation=str(ids))
    shard = tmp_path / "awq" / "model-00002-of-00004.safetensors"
    state = load_file(shard)
    state["model.layers.0.mlp.down_proj.qweight"][0, 0] ^= 1
    save_file(state, shard, {"format": "pt"})
    after = to(tmp_path / "awq", "gptq_v2", tmp_path / "gptq")
    assert after["verification"] is None
    assert any("is not the file that the run wrote" in note for note in after["fallbacks"])


@pytest.mark.parametrize(
    ("fmt", "scheme", "target", "told"),
    [
        ("compressed-tensors", Scheme(3, 32, False), "awq", "4 bits only"),
        ("compressed-tensors", Scheme(8, 32, True), "awq", "4 bits only"),
        ("compressed-tensors", Scheme(5, 32, True), "gptq", "2, 3, 4 and 8 bits"),
    ],
)
def test_bits_that_the_target_lacks(tmp_path: Path, fmt: str, scheme: Scheme, target: str, told: str) -> None:
    held = foreign(tmp_path / "source", fmt, scheme)
    with pytest.raises(SchemeError, match=told) as refused:
        to(tmp_path / "source", target, tmp_path / "out")
    assert "--requantize" in str(refused.value)
    result = to(tmp_path / "source", target, tmp_path / "out", requantize=True)
    assert not result["converted"]["lossless"]
    assert result["converted"]["rounded"] == len(held)
    layer = result["layers"][0]
    found = unpacked(
        tmp_path / "out",
        layer["name"],
        target,
        Scheme(layer["bits"], layer["group_size"], target != "awq" and layer["symmetric"]),
        (layer["out_features"], layer["in_features"]),
    )
    weight = dequantize(held[layer["name"]])
    error = float((dequantize(found) - weight).norm() / weight.norm())
    assert layer["weight_error"] == pytest.approx(error, rel=1e-5)
    assert layer["loss"] is None
    assert 0 < error < (0.2 if scheme.bits > layer["bits"] else 0.08)


def test_a_zero_point_of_zero_is_refused_by_gptq_v1(tmp_path: Path) -> None:
    def lower(name: str, quantized: QuantizedTensor) -> QuantizedTensor:
        zeros = quantized.zeros.clone()
        zeros[0, 0] = 0 if "layers.1.mlp.down_proj" in name else 1
        return replace(quantized, zeros=zeros)

    held = foreign(tmp_path / "awq", change=lower)
    with pytest.raises(SchemeError, match=r"layers\.1\.mlp\.down_proj: a zero point of 0"):
        to(tmp_path / "awq", "gptq", tmp_path / "gptq")
    to(tmp_path / "awq", "gptq_v2", tmp_path / "v2")
    assert_held(tmp_path / "v2", "gptq_v2", held)
    result = to(tmp_path / "awq", "gptq", tmp_path / "gptq", requantize=True)
    assert [layer["name"] for layer in result["layers"] if not layer["equal"]] == ["model.layers.1.mlp.down_proj"]
    zeros = unpacked(tmp_path / "gptq", "model.layers.1.mlp.down_proj", "gptq", W4, (64, 128)).zeros
    assert zeros.min() >= 1


def test_one_scheme_for_awq(tmp_path: Path) -> None:
    wide = {"down_proj": Scheme(4, 64, False)}
    foreign(tmp_path / "ct", "compressed-tensors", schemes=wide)
    with pytest.raises(SchemeError, match="awq holds one scheme, W4 g32 asym here, and this is W4 g64 asym"):
        to(tmp_path / "ct", "awq", tmp_path / "awq")
    result = to(tmp_path / "ct", "awq", tmp_path / "awq", requantize=True)
    assert {layer["kind"] for layer in result["layers"] if not layer["equal"]} == {"down_proj"}


def test_act_order_rounded_again_is_measured_with_the_original(tmp_path: Path, qwen2: Path, ids: Path) -> None:
    """KL of what comes out, by the machinery of verify, since the 16-bit model is at hand."""
    before = run(qwen2, tmp_path / "ct", bits=8, format="compressed-tensors", verify=True, evaluation=str(ids))
    after = to(tmp_path / "ct", "awq", tmp_path / "awq", requantize=True)
    assert after["verification"]["kl_divergence"] > 4 * before["verification"]["kl_divergence"] > 0
    assert after["verification"]["eval"]["sha256"] == before["verification"]["eval"]["sha256"]
    assert json.loads((tmp_path / "awq" / "quantkit.json").read_text()) == after


def test_fp16_is_what_the_integers_stand_for(tmp_path: Path) -> None:
    held = foreign(tmp_path / "awq")
    result = to(tmp_path / "awq", "fp16", tmp_path / "fp16")
    state = tensors(tmp_path / "fp16")
    for name, quantized in held.items():
        assert torch.equal(state[f"{name}.weight"], dequantize(quantized, torch.float16)), name
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    assert 0 < result["converted"]["weight_error"]["worst"] < 2**-11
    loaded = load_whole(tmp_path / "fp16")
    assert torch.equal(loaded.lm_head.weight, state["lm_head.weight"].float())


def test_damaged_sources(tmp_path: Path) -> None:
    foreign(tmp_path / "gptq", "gptq")
    rewrite(tmp_path / "gptq", lambda state: state["model.layers.1.mlp.up_proj.g_idx"].fill_(99))
    with pytest.raises(ModelError, match=r"up_proj.*g_idx"):
        to(tmp_path / "gptq", "gptq_v2", tmp_path / "out")
    rewrite(tmp_path / "gptq", lambda state: state.pop("model.layers.1.mlp.up_proj.scales"))
    with pytest.raises(ModelError, match=r"up_proj: scales is missing"):
        to(tmp_path / "gptq", "gptq_v2", tmp_path / "out")
    with pytest.raises(ModelError, match="no such folder"):
        to(tmp_path / "nothing", "awq", tmp_path / "out")


def test_infinite_scales_are_told_by_name(tmp_path: Path) -> None:
    foreign(tmp_path / "awq")
    rewrite(tmp_path / "awq", lambda state: state["model.layers.0.mlp.up_proj.scales"].fill_(float("inf")))
    with pytest.raises(NumericsError, match=r"layers\.0\.mlp\.up_proj: scales"):
        to(tmp_path / "awq", "gptq_v2", tmp_path / "out")


def test_the_source_is_never_written_to(tmp_path: Path, qwen2: Path) -> None:
    run(qwen2, tmp_path / "awq")
    before = {path.name: path.read_bytes() for path in (tmp_path / "awq").iterdir()}
    for said in ({}, {"fresh": True}):
        with pytest.raises(InputError, match="is the model or checkpoint itself"):
            to(tmp_path / "awq", "gptq_v2", tmp_path / "model" / ".." / "awq", **said)
    to(tmp_path / "awq", "gptq_v2", tmp_path / "gptq")
    assert {path.name: path.read_bytes() for path in (tmp_path / "awq").iterdir()} == before
    with pytest.raises(OutputError, match="other settings"):
        to(tmp_path / "awq", "compressed-tensors", tmp_path / "gptq")
    to(tmp_path / "awq", "compressed-tensors", tmp_path / "gptq", fresh=True)
    assert not (tmp_path / "gptq" / "quantize_config.json").exists()


def test_killed_and_resumed_gives_the_same_bytes(tmp_path: Path) -> None:
    foreign(tmp_path / "awq", layers=6)
    words = ("convert", str(tmp_path / "awq"), "--to", "gptq_v2", "--out")
    done(*words, str(tmp_path / "whole"))
    out, killed = tmp_path / "out", 0
    for wanted in (1, 3, 6):
        process = started(*words, str(out))
        deadline = time.monotonic() + 600
        while process.is_alive() and time.monotonic() < deadline:
            if out.is_dir() and sum(p.name.startswith(("model-", ".model-")) for p in out.iterdir()) >= wanted:
                process.kill()
                killed += 1
                break
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
    first = out / "model-00002-of-00008.safetensors"
    damaged = bytearray(first.read_bytes())
    damaged[-1] ^= 1
    first.write_bytes(bytes(damaged))
    done(*words, str(out))
    assert killed >= 2
    for path in (tmp_path / "whole").iterdir():
        if path.name not in ("quantkit.json", "report.html", "README.md"):  # these hold times and the command
            assert path.read_bytes() == (out / path.name).read_bytes(), path.name
    assert not list(out.glob(".*.tmp"))


@pytest.mark.parametrize("target", ["compressed-tensors", "fp16"])
def test_peak_memory_is_that_of_a_layer(tmp_path: Path, target: str) -> None:
    """A wide embedding passes in pieces: 4 x the layers and a table of 128 MiB add next to nothing."""
    wide: dict[str, Any] = {
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "num_attention_heads": 8,
        "tie_word_embeddings": True,
    }
    peaks = []
    for layers, vocabulary in ((2, 96), (8, 65536)):
        folder = tmp_path / f"awq-{layers}"
        foreign(folder, layers=layers, vocab_size=vocabulary, **wide)
        out = tmp_path / f"out-{layers}"
        # glibc would otherwise keep freed memory or not, depending on what was freed before
        words = command("convert", str(folder), "--to", target, "--out", str(out))
        made = run_process(words, MALLOC_MMAP_THRESHOLD_=str(2**18))
        assert made.returncode == 0, made.stderr
        peaks.append(json.loads((out / "quantkit.json").read_text())["peak_rss_bytes"])
    assert peaks[1] - peaks[0] < 32 * 2**20, peaks  # pieces are of 4 MiB


def test_refusals_are_one_line_and_exit_1(tmp_path: Path) -> None:
    foreign(tmp_path / "ct", "compressed-tensors", Scheme(3, 32, True))
    refused = quantkit("convert", str(tmp_path / "ct"), "--to", "awq", "--out", str(tmp_path / "out"))
    assert refused.returncode == 1
    assert refused.stderr.startswith("quantkit: model.layers.0")
    assert len(refused.stderr.splitlines()) == 1


def test_a_16_bit_model_is_refused(tmp_path: Path, qwen2: Path) -> None:
    with pytest.raises(QuantkitError, match="no quantization_config"):
        to(qwen2, "awq", tmp_path / "out")


def test_tokenizer_travels(tmp_path: Path) -> None:
    foreign(tmp_path / "awq")
    make_tokenizer(tmp_path / "awq")
    to(tmp_path / "awq", "compressed-tensors", tmp_path / "ct")
    assert (tmp_path / "ct" / "tokenizer.json").read_bytes() == (tmp_path / "awq" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    "words",
    [
        ["--to", "gptq_v2", "--samples", "8"],
        ["--to", "gptq_v2", "--embeddings", "f16"],
        ["--to", "gguf", "--calib", "mix"],
        ["--to", "gguf", "--rounding", "nearest"],
        ["--to", "gguf", "--seed", "3"],
        ["--to", "gptq_v2", "--eval", "nowhere.txt"],
        ["--to", "fp16", "--eval-samples", "2"],
    ],
)
def test_options_that_mean_nothing_for_the_target_are_refused_by_name(tmp_path: Path, words: list[str]) -> None:
    foreign(tmp_path / "awq")
    refused = quantkit("convert", str(tmp_path / "awq"), *words, "--out", str(tmp_path / "out"))
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"quantkit: {words[2]}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["gptq_v2", "fp16"])
def test_older_readers_find_the_rotary_base_of_a_newer_config(tmp_path: Path, target: str) -> None:
    foreign(tmp_path / "source")

    def newer(raw: dict[str, Any]) -> None:
        for key in ("rope_theta", "rope_scaling"):
            raw.pop(key, None)
        raw["rope_parameters"] = {"rope_type": "default", "rope_theta": 123456.0}

    edit(tmp_path / "source", newer)
    to(tmp_path / "source", target, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 123456.0
