# SPDX-License-Identifier: Apache-2.0
"""The loop, through the command line, as users run it: what it writes, that it resumes, what it refuses."""

import hashlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
import typer
from packaging.version import Version
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantkit.cli.telling import told
from quantkit.formats import FORMATS
from quantkit.pipeline import run as pipeline
from quantkit.scheme import Scheme, dequantize
from tests.conftest import make_qwen2, make_tokenizer
from tests.running import ENVIRONMENT, command, done, quantkit, run_process, run_words, started
from tests.tiny import load_whole


def contents(out: Path) -> dict[str, str]:
    """sha256 of every file whose bytes a run determines: all but the records of time and memory."""
    varying = {"quantkit.json", "report.html", "README.md"}
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.iterdir())
        if path.name not in varying
    }


def original(name: str, model: Path) -> torch.Tensor:
    for path in model.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            if name in file.keys():  # noqa: SIM118 - not a dict
                tensor: torch.Tensor = file.get_tensor(name)
                return tensor
    raise KeyError(name)


def decoded_model(out: Path, model: Path) -> torch.nn.Module:
    """The original architecture in float32 with the weights that the files of `out` stand for."""
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    result = json.loads((out / "quantkit.json").read_text())
    fmt = FORMATS[result["format"]]
    tensors: dict[str, torch.Tensor] = {}
    for path in out.glob("*.safetensors"):
        tensors |= load_file(path)
    assert config["quant_method"] in ("awq", "gptq", "compressed-tensors")
    for layer in result["layers"]:
        scheme = Scheme(layer["bits"], layer["group_size"], layer["symmetric"])
        shape = (layer["out_features"], layer["in_features"])
        packed = {key: tensors.pop(f"{layer['name']}.{key}") for key in fmt.specs(scheme, *shape)}
        tensors[f"{layer['name']}.weight"] = dequantize(fmt.unpack(packed, scheme, shape))
    loaded = load_whole(model)
    missing = loaded.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=False)
    assert not missing.unexpected_keys
    return loaded


def naive_figures(model: Path, quantized: torch.nn.Module, ids: torch.Tensor) -> dict[str, float]:
    reference = load_whole(model)
    with torch.no_grad():
        p = reference(ids).logits[:, :-1].double().log_softmax(-1)
        q = quantized(ids).logits[:, :-1].double().log_softmax(-1)
    targets = ids[:, 1:].unsqueeze(-1)
    return {
        "perplexity": float((-q.gather(-1, targets)).mean().exp()),
        "perplexity_fp16": float((-p.gather(-1, targets)).mean().exp()),
        "kl_divergence": float((p.exp() * (p - q)).sum(-1).mean()),
    }


def test_an_interrupt_that_becomes_an_error_on_its_way_is_told_as_one(capsys: pytest.CaptureFixture[str]) -> None:
    """torch, changing its modes, answers Ctrl-C with a RuntimeError; one of its own keeps its traceback."""

    def changing_modes() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise RuntimeError("trying to pop from empty mode stack")  # noqa: B904 - as torch does

    with pytest.raises(typer.Exit) as stopped, told(resumes=True):
        changing_modes()
    assert stopped.value.exit_code == 130
    assert "interrupted; finished layers are kept" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="its own"), told():
        raise RuntimeError("its own")


@pytest.mark.parametrize(
    ("method", "more", "expected"),
    [
        ("awq", [], "awq"),
        ("awq", ["--w-bit", "3"], "compressed-tensors"),
        ("awq", ["--format", "compressed-tensors", "--sym"], "compressed-tensors"),
        ("gptq", [], "gptq"),
        ("gptq", ["--asym", "--w-bit", "2"], "gptq_v2"),
        ("gptq", ["--asym", "--format", "gptq"], "gptq"),
        ("awq", ["--w-bit", "3", "--quality", "best"], "compressed-tensors"),
        ("rtn", ["--w-bit", "8", "--group", "-1"], "compressed-tensors"),
    ],
)
def test_figures_are_those_of_the_files(
    tmp_path: Path, qwen2: Path, ids: Path, method: str, more: list[str], expected: str
) -> None:
    out = tmp_path / "out"
    done(*run_words(method, qwen2, out, ids, *more))
    result = json.loads((out / "quantkit.json").read_text())
    assert result["format"] == expected
    naive = naive_figures(qwen2, decoded_model(out, qwen2), load_file(ids)["input_ids"])
    for name, value in naive.items():
        assert result["verification"][name] == pytest.approx(value, rel=1e-3), name
    assert result["total_bytes"] == sum(path.stat().st_size for path in out.glob("*.safetensors"))


def test_output_folder(tmp_path: Path, qwen2: Path, ids: Path) -> None:
    out = tmp_path / "out"
    old = os.umask(0o077)
    try:
        answer = done(*run_words("awq", qwen2, out, ids, "--json"))
    finally:
        os.umask(old)
    assert json.loads(answer.stdout) == json.loads((out / "quantkit.json").read_text())
    index = json.loads((out / "model.safetensors.index.json").read_text())
    stored: dict[str, str] = {}
    size = 0
    for path in out.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            stored |= dict.fromkeys(file.keys(), path.name)
            size += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert index == {"metadata": {"total_size": size}, "weight_map": dict(sorted(stored.items()))}
    for path in out.iterdir():
        assert path.stat().st_mode & 0o777 == 0o644, path.name
        assert not path.name.startswith("."), path.name
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (qwen2 / name).read_bytes()
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "awq"
    assert config["torch_dtype"] == "float16"
    assert (out / "report.html").is_file()
    assert (out / "README.md").is_file()


@pytest.mark.skipif(Version(transformers.__version__).major < 5, reason="transformers 4 writes what 4 reads")
def test_older_readers_find_the_rotations(tmp_path: Path, ids: Path) -> None:
    """transformers 4 knows rope_theta and rope_scaling only; 5 writes rope_parameters."""
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = make_qwen2(tmp_path / "model", rope_parameters=rope | {"original_max_position_embeddings": 32})
    done(*run_words("rtn", model, tmp_path / "out", ids, "--no-verify"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == 5e5
    assert config["rope_scaling"]["rope_type"] == "llama3"
    assert config["rope_parameters"]["factor"] == 8.0


def test_awq_folds_keep_the_function(tmp_path: Path, qwen2: Path, ids: Path) -> None:
    """At 8 bits what is left is rounding: scales folded into norms, values and up must cancel."""
    out = tmp_path / "out"
    done(*run_words("awq", qwen2, out, ids, "--w-bit", "8", "--format", "compressed-tensors"))
    result = json.loads((out / "quantkit.json").read_text())
    scaled = {layer["kind"] for layer in result["layers"] if layer["scale"] != "1"}
    assert scaled >= {"q_proj", "gate_proj", "down_proj"}
    assert any(
        original(f"model.layers.{i}.input_layernorm.weight", qwen2)
        .half()
        .ne(load_file(out / f"model-{i + 2:05d}-of-00004.safetensors")[f"model.layers.{i}.input_layernorm.weight"])
        .any()
        for i in range(2)
    )
    assert result["verification"]["kl_divergence"] < 2e-3


def test_same_request_same_bytes_whatever_memory_there_is(tmp_path: Path, qwen2: Path, ids: Path) -> None:
    for name, words in (("ram", ["--states", "ram"]), ("file", ["--states", "file"]), ("limit", ["--ram", "4GiB"])):
        told = done(*run_words("awq", qwen2, tmp_path / name, ids, *words)).stderr
        assert ("in a mapped file" if name == "file" else "in RAM") in told
    assert contents(tmp_path / "ram") == contents(tmp_path / "file") == contents(tmp_path / "limit")
    memory = json.loads((tmp_path / "limit" / "quantkit.json").read_text())["memory"]
    assert memory["ram_limit"] == 4 * 2**30
    assert memory["ram_bytes"] <= memory["ram_limit"]


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_what_is_read_and_written_beside_the_work_changes_no_byte(
    tmp_path: Path, qwen2: Path, ids: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done(*run_words(method, qwen2, tmp_path / "beside", ids))

    @contextmanager
    def read_ahead(read: Callable[[int], object], count: int) -> Iterator[SimpleNamespace]:
        numbers = iter(range(count))
        yield SimpleNamespace(take=lambda: read(next(numbers)))

    @contextmanager
    def writer() -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(submit=lambda write: write())

    monkeypatch.setattr(pipeline, "read_ahead", read_ahead)
    monkeypatch.setattr(pipeline, "writer", writer)
    done(*run_words(method, qwen2, tmp_path / "in_turn", ids))
    assert contents(tmp_path / "in_turn") == contents(tmp_path / "beside")


def test_compressed_tensors_loads_in_transformers(tmp_path: Path, qwen2: Path, ids: Path) -> None:
    pytest.importorskip("compressed_tensors")
    out = tmp_path / "out"
    done(*run_words("gptq", qwen2, out, ids, "--format", "compressed-tensors"))
    ours = decoded_model(out, qwen2)
    theirs = load_whole(out)
    tokens = load_file(ids)["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, ours(tokens).logits, rtol=0, atol=1e-4)


def test_resumes_after_kills_at_random_moments(tmp_path: Path, ids: Path) -> None:
    model = make_qwen2(tmp_path / "model", layers=4)
    done(*run_words("awq", model, tmp_path / "whole", ids))
    expected = contents(tmp_path / "whole")
    rng = random.Random(0)
    out = tmp_path / "out"
    killed = 0
    for _ in range(12):
        process = started(*run_words("awq", model, out, ids))
        # Wait for a random one of the files that come and go, so that kills fall in the middle of the work.
        wanted = rng.randrange(1, 7)
        deadline = time.monotonic() + 600
        while process.is_alive() and time.monotonic() < deadline:
            names = [path.name for path in out.iterdir()] if out.is_dir() else []
            if sum(name.startswith(("model-", ".model-")) for name in names) >= wanted:
                process.kill()
                killed += 1
                break
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        if rng.random() < 0.3 and out.is_dir():
            done(*run_words("awq", model, out, ids))
            assert contents(out) == expected
            for path in out.iterdir():
                path.unlink()
    done(*run_words("awq", model, out, ids))
    assert killed >= 6
    assert contents(out) == expected
    (out / "report.html").unlink()
    done(*run_words("awq", model, out, ids))  # nothing is left to do but to measure
    notes = json.loads((out / "quantkit.json").read_text())["fallbacks"]
    assert any(note.startswith("continued: 6 of 6 files were there") for note in notes)


def test_what_is_finished_is_not_measured_again(tmp_path: Path, qwen2: Path, ids: Path) -> None:
    out = tmp_path / "out"
    words = run_words("rtn", qwen2, out, ids)
    first = done(*words, "--json")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    again = done(*words, "--json")
    assert again.stdout == first.stdout
    assert "finished before; `quantkit verify` measures it again" in " ".join(again.stderr.split())
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    for more in (["--max-kl", "99"], ["--budget", "20GiB"], ["--eval-samples", "2"]):  # another question than before
        answer = done(*words, *more)
        assert "finished before" not in answer.stderr


def test_damaged_shard_is_made_again(tmp_path: Path, qwen2: Path, ids: Path) -> None:
    out = tmp_path / "out"
    done(*run_words("gptq", qwen2, out, ids))
    expected = contents(out)
    shard = out / "model-00003-of-00004.safetensors"
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(bytes(damaged))
    done(*run_words("gptq", qwen2, out, ids))
    assert contents(out) == expected


def test_a_tuned_run_is_continued_to_the_same_bytes(tmp_path: Path, qwen2: Path, ids: Path) -> None:
    out = tmp_path / "out"
    tuned = run_words("gptq", qwen2, out, ids, "--quality", "best", "--no-verify")
    done(*tuned)
    expected = contents(out)
    (out / "model-00003-of-00004.safetensors").unlink()
    done(*tuned)
    assert contents(out) == expected
    (out / "tuning.st").unlink()  # what it was tuned on is written again, and all that came of it
    done(*tuned)
    assert contents(out) == expected


def test_changed_request_is_refused_and_fresh_starts_over(tmp_path: Path, qwen2: Path, ids: Path) -> None:
    out = tmp_path / "out"
    done(*run_words("gptq", qwen2, out, ids))
    before = contents(out)
    refused = quantkit(*run_words("gptq", qwen2, out, ids, "--w-bit", "8"))
    assert refused.returncode == 1
    assert "scheme" in refused.stderr
    assert "--fresh" in refused.stderr
    assert contents(out) == before
    done(*run_words("gptq", qwen2, out, ids, "--w-bit", "8", "--fresh"))
    assert contents(out) != before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_tells_how_to_resume(tmp_path: Path, ids: Path, number: signal.Signals) -> None:
    model = make_qwen2(tmp_path / "model", layers=40)  # time enough for the signal
    out = tmp_path / "out"
    process = subprocess.Popen(
        command(*run_words("awq", model, out, ids, "--fresh")),
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    deadline = time.monotonic() + 600
    while not list(out.glob("model-00002*")) and time.monotonic() < deadline and process.poll() is None:
        pass
    process.send_signal(number)
    _, told = process.communicate(timeout=600)
    assert process.returncode == 130, told
    assert f"quantkit awq {model}" in told
    assert "--fresh" not in told.splitlines()[-1]


def spoil_nan(model: Path) -> None:
    path = sorted(model.glob("*.safetensors"))[0]
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


def spoil_truncate(model: Path) -> None:
    path = sorted(model.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-10])


def spoil_header(model: Path) -> None:
    path = sorted(model.glob("*.safetensors"))[0]
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"BF16"', b'"F32" ', 1))


def spoil_index_missing(model: Path) -> None:
    index = json.loads((model / "model.safetensors.index.json").read_text())
    index["weight_map"][sorted(index["weight_map"])[0]] = "model-99999-of-99999.safetensors"
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def spoil_index_outside(model: Path) -> None:
    index = json.loads((model / "model.safetensors.index.json").read_text())
    index["weight_map"][sorted(index["weight_map"])[0]] = "../../etc/passwd"
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def spoil_config(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    del config["model_type"]
    (model / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (spoil_nan, "finite"),
        (spoil_truncate, "truncated"),
        (spoil_header, "safetensors"),
        (spoil_index_missing, "model-99999"),
        (spoil_index_outside, "passwd"),
        (spoil_config, "model_type"),
    ],
)
def test_bad_models_are_told_in_one_line(tmp_path: Path, ids: Path, spoil: Any, told: str) -> None:
    model = make_qwen2(tmp_path / "model")
    spoil(model)
    refused = quantkit(*run_words("awq", model, tmp_path / "out", ids))
    last = refused.stderr.strip().splitlines()[-1]
    assert refused.returncode == 1
    assert last.startswith("quantkit: ")
    assert told in last
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["--group", "48"], "group_size 48"),
        (["--calib", "nowhere.txt"], "nowhere.txt"),
        (["--w-bit", "3", "--format", "awq"], "compressed-tensors"),
        (["--seqlen", "4096", "--calib", "mix"], "128 positions"),
        (["--device", "tpu"], "--device"),
        (["--ram", "1MiB"], "--ram 1.00 MiB"),
        (["--vram", "22GiB"], "--vram"),
        (["--budget", "22GB"], "--budget"),
        (["--recipe", "nowhere.yaml"], "nowhere.yaml"),
        (["--max-kl", "-1"], "--max-kl"),
        (["--max-ppl-increase", "5"], "--max-ppl-increase"),
    ],
)
def test_bad_requests_leave_no_folder(tmp_path: Path, qwen2: Path, ids: Path, changes: list[str], told: str) -> None:
    refused = quantkit(*run_words("awq", qwen2, tmp_path / "out", ids, *changes))
    assert refused.returncode == 1
    assert told in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "out").exists()


def test_a_budget_that_it_cannot_fit_is_told_before_the_work(tmp_path: Path, qwen2: Path, ids: Path) -> None:
    failed = quantkit(*run_words("rtn", qwen2, tmp_path / "out", ids, "--budget", "1MiB"))
    assert failed.returncode == 3
    told = " ".join(failed.stderr.split())
    assert told.index("of 1.00 MiB; the verdict will be FAIL") < told.index("more than the budget of 1.00 MiB")


def test_wrong_usage_is_exit_2() -> None:
    assert quantkit("awq", "demo", "--w-bit", "5").returncode == 2
    assert quantkit("nonsense").returncode == 2


def test_failed_verdict_is_exit_3_with_everything_in_place(tmp_path: Path, qwen2: Path, ids: Path) -> None:
    failed = quantkit(*run_words("rtn", qwen2, tmp_path / "out", ids, "--max-kl", "0"))
    assert failed.returncode == 3, failed.stderr
    result = json.loads((tmp_path / "out" / "quantkit.json").read_text())
    assert result["verification"]["verdict"] == "fail"
    assert "KL" in result["verification"]["reasons"][0]


def test_recipe_rules_reach_the_files(tmp_path: Path, qwen2: Path, ids: Path) -> None:
    recipe = tmp_path / "mixed.yaml"
    recipe.write_text("rules:\n  - {kind: down_proj, bits: 8}\n  - {layers: '1', match: '*.o_proj', keep: 16bit}\n")
    out = tmp_path / "out"
    done(*run_words("awq", qwen2, out, ids, "--recipe", str(recipe)))
    result = json.loads((out / "quantkit.json").read_text())
    assert result["format"] == "compressed-tensors"
    bits = {layer["name"]: layer["bits"] for layer in result["layers"]}
    assert bits["model.layers.0.mlp.down_proj"] == 8
    assert bits["model.layers.0.mlp.up_proj"] == 4
    assert "model.layers.1.self_attn.o_proj" not in bits
    naive = naive_figures(qwen2, decoded_model(out, qwen2), load_file(ids)["input_ids"])
    assert result["verification"]["kl_divergence"] == pytest.approx(naive["kl_divergence"], rel=1e-3)


def test_text_is_calibrated_and_evaluated_with_the_models_tokenizer(tmp_path: Path) -> None:
    model = make_qwen2(tmp_path / "model", max_position_embeddings=64)
    make_tokenizer(model)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    words = ["--calib", str(text), "--samples", "8", "--seqlen", "32", "--eval", str(text), "--eval-samples", "4"]
    done(*run_words("gptq", model, tmp_path / "out", text, *words))
    result = json.loads((tmp_path / "out" / "quantkit.json").read_text())
    assert (result["calibration"]["samples"], result["calibration"]["seqlen"]) == (8, 32)
    assert result["verification"]["tokens"] == 4 * 31


def test_windows_that_are_used_as_they_are_say_so(tmp_path: Path, qwen2: Path, ids: Path) -> None:
    answer = done(*run_words("gptq", qwen2, tmp_path / "out", ids, "--samples", "2", "--seqlen", "32", "--no-verify"))
    result = json.loads((tmp_path / "out" / "quantkit.json").read_text())
    assert result["calibration"]["samples"] == 6
    (told,) = (note for note in result["fallbacks"] if "left out" in note)
    assert "--samples 2 was left out here: the file is used as it is, 6 x 32 tokens" in told
    assert "--samples 2 was left out" in " ".join(answer.stderr.split())


def test_without_calibration_its_options_are_told_and_change_no_run(tmp_path: Path, qwen2: Path, ids: Path) -> None:
    words = ["--no-verify", "--damp", "0.5", "--no-act-order"]
    answer = done(*run_words("rtn", qwen2, tmp_path / "out", ids, *words))
    told = "--calib, --no-act-order, --damp: nothing is calibrated here; left out"
    assert told in " ".join(answer.stderr.split())
    assert told in json.loads((tmp_path / "out" / "quantkit.json").read_text())["fallbacks"]
    done(*run_words("rtn", qwen2, tmp_path / "out", ids, "--no-verify"))  # the same run, not another one
    ours = [
        *run_words("rtn", qwen2, tmp_path / "gptq", ids, "--format", "gptq", "--sym", "--inputs", "original"),
        *words,
    ]
    done(*ours)
    done(*run_words("rtn", qwen2, tmp_path / "plain", ids, "--format", "gptq", "--sym", "--no-verify"))
    assert contents(tmp_path / "gptq") == contents(tmp_path / "plain")


@pytest.mark.parametrize("command", ["rtn", "sweep", "convert"])
def test_the_models_own_folder_is_never_written_to(tmp_path: Path, qwen2: Path, ids: Path, command: str) -> None:
    """A model that convert --to fp16 has left has a journal: --fresh would clear it."""
    packed, model = tmp_path / "packed", tmp_path / "model"
    done(*run_words("rtn", qwen2, packed, ids, "--no-verify"))
    done("convert", str(packed), "--to", "fp16", "--out", str(model))
    before = contents(model)
    words = {
        "rtn": run_words("rtn", model, model, ids, "--fresh"),
        "sweep": ["sweep", str(model), "--calib", str(ids), "--eval", str(ids), "--out", str(model), "--fresh"],
        "convert": ["convert", str(packed), "--to", "gptq_v2", "--against", str(model), "--out", str(model), "--fresh"],
    }
    refused = quantkit(*words[command])
    assert refused.returncode == 1
    assert "is the model or checkpoint itself" in refused.stderr
    assert contents(model) == before


def test_links_out_of_the_folder_are_told(tmp_path: Path, ids: Path) -> None:
    model, elsewhere = make_qwen2(tmp_path / "model"), tmp_path / "elsewhere.json"
    elsewhere.write_text("{}")
    (model / "generation_config.json").unlink(missing_ok=True)
    (model / "generation_config.json").symlink_to(elsewhere)
    done(*run_words("rtn", model, tmp_path / "out", ids, "--no-verify"))
    assert not (tmp_path / "out" / "generation_config.json").exists()
    told = json.loads((tmp_path / "out" / "quantkit.json").read_text())["fallbacks"]
    assert any(note.startswith("generation_config.json is a link out of") for note in told)


def test_tuning_that_changes_nothing_is_told(tmp_path: Path, qwen2: Path, ids: Path) -> None:
    few = tmp_path / "few.safetensors"
    save_file({"input_ids": load_file(ids)["input_ids"][:1].clone()}, few)
    words = ["--quality", "best", "--calib", str(few), "--no-verify"]
    done(*run_words("gptq", qwen2, tmp_path / "out", ids, *words))
    told = json.loads((tmp_path / "out" / "quantkit.json").read_text())["fallbacks"]
    assert any("14 of 14 linears were no better for tuning" in note for note in told)


def test_peak_memory_does_not_grow_with_depth(tmp_path: Path, ids: Path) -> None:
    """Twenty more layers of 9 MB in float32 would show; one layer at a time does not."""
    peaks = []
    for layers in (4, 24):
        wide: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8}
        model = make_qwen2(tmp_path / f"model-{layers}", layers=layers, **wide)
        made = run_process(
            command(*run_words("gptq", model, tmp_path / f"out-{layers}", ids, "--max-kl", "99", "--refine", "0"))
        )
        assert made.returncode == 0, made.stderr
        peaks.append(json.loads((tmp_path / f"out-{layers}" / "quantkit.json").read_text())["peak_rss_bytes"])
    assert peaks[1] < 1.1 * peaks[0], peaks


def test_demo_passes(tmp_path: Path) -> None:
    made = run_process(
        command("awq", "demo", "--offline", "--samples", "32", "--eval-samples", "40", "--out", str(tmp_path / "out"))
    )
    assert made.returncode == 0, made.stderr
    result = json.loads((tmp_path / "out" / "quantkit.json").read_text())
    assert result["verification"]["verdict"] == "pass"
    assert result["verification"]["fit"]["fits"]


@pytest.mark.skipif(Version(transformers.__version__).major < 5, reason="the model says its rotations as 5 reads them")
@pytest.mark.parametrize(("method", "limit"), [("awq", 0.0200), ("gptq", 0.0205)])
def test_accuracy_on_a_trained_model(tmp_path: Path, shared: Path, method: str, limit: float) -> None:
    """On a quarter of the ids. With all of them AutoAWQ 0.2.9 gets 0.0265 on the whole evaluation set, llm-compressor's
    GPTQ 0.0222, AutoRound's 200 iterations 0.0178, and these 0.0153 and 0.0155 (README.md).
    """
    calibration, evaluation = (str(shared / "data" / f"mini-qwen2-{name}.safetensors") for name in ("calib", "eval"))
    save_file({"input_ids": load_file(calibration)["input_ids"][:32].clone()}, tmp_path / "ids.safetensors")
    words = ["--calib", str(tmp_path / "ids.safetensors"), "--eval", evaluation, "--eval-samples", "32"]
    model = str(shared / "models" / "mini-qwen2-26m")
    done(method, model, "--device", "cpu", *words, "--out", str(tmp_path / "out"))
    result = json.loads((tmp_path / "out" / "quantkit.json").read_text())
    assert result["verification"]["perplexity_fp16"] == pytest.approx(6.4041, abs=1e-3)
    assert result["verification"]["kl_divergence"] <= limit


def test_a_rule_may_name_its_method(tmp_path: Path, qwen2: Path, ids: Path) -> None:
    recipe = tmp_path / "mixed.yaml"
    recipe.write_text(
        "rules:\n  - {kind: down_proj, method: rtn, bits: 8}\n  - {layers: '1', kind: o_proj, method: awq}\n"
        "  - {kind: nowhere, bits: 3}\n"
    )
    out = tmp_path / "out"
    shown = done(*run_words("gptq", qwen2, out, ids, "--recipe", str(recipe)))
    result = json.loads((out / "quantkit.json").read_text())
    methods = {(layer["layer"], layer["kind"]): layer["method"] for layer in result["layers"]}
    assert methods[0, "down_proj"] == "rtn"
    assert methods[0, "o_proj"] == "gptq"
    assert methods[1, "o_proj"] == "awq"
    assert {(row["kind"], row["layers"], row["bits"], row["method"]) for row in result["recipe"]} >= {
        ("down_proj", "0-1", 8, "rtn"),
        ("o_proj", "0", 4, "gptq"),
        ("o_proj", "1", 4, "awq"),
    }
    rounded = [row for row in result["recipe"] if row["kind"] != "lm_head"]  # which no rule names: 16 bit
    assert sum(row["bytes"] for row in rounded) == sum(layer["bytes"] for layer in result["layers"])
    assert "recipe rule 3" in shown.stderr
    assert any("recipe rule 3" in note for note in result["fallbacks"])
    assert "W8 g32 sym" in shown.stderr
    naive = naive_figures(qwen2, decoded_model(out, qwen2), load_file(ids)["input_ids"])
    assert result["verification"]["kl_divergence"] == pytest.approx(naive["kl_divergence"], rel=1e-3)


def test_going_over_it_again_leaves_less_of_an_error(tmp_path: Path, qwen2: Path, ids: Path) -> None:
    def loss(name: str, *more: str) -> float:
        # Calibrated on the original, the sites read the same whatever was rounded before them.
        words = ["--w-bit", "3", "--inputs", "original", "--no-verify", *more]
        done(*run_words("gptq", qwen2, tmp_path / name, ids, *words))
        layers = json.loads((tmp_path / name / "quantkit.json").read_text())["layers"]
        return float(sum(row["loss"] for row in layers))

    assert loss("usual") < loss("once", "--refine", "1") < loss("never", "--refine", "0")


def test_linears_that_read_the_same_input_need_one_method(tmp_path: Path, qwen2: Path, ids: Path) -> None:
    recipe = tmp_path / "mixed.yaml"
    recipe.write_text("rules:\n  - {kind: up_proj, method: rtn}\n")
    refused = quantkit(*run_words("gptq", qwen2, tmp_path / "out", ids, "--recipe", str(recipe)))
    assert refused.returncode == 1
    assert "one method" in refused.stderr
    assert "up_proj" in refused.stderr
