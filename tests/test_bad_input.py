# SPDX-License-Identifier: Apache-2.0
"""Models, options and folders that cannot be: one line, an exit code, and nothing written over."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.conftest import make_qwen2
from tests.outputs import contents
from tests.running import done, quantkit, run_words


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
        (["--budget", "22 cards"], "--budget"),
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
    assert "of 1.00 MiB; the verdict will be FAIL" in " ".join(failed.stderr.split())  # before the work
    assert "more than the budget of 1.00 MiB" in " ".join(failed.stdout.split())


def test_wrong_usage_is_exit_2() -> None:
    assert quantkit("awq", "demo", "--w-bit", "9").returncode == 2
    assert quantkit("nonsense").returncode == 2


def test_failed_verdict_is_exit_3_with_everything_in_place(tmp_path: Path, qwen2: Path, ids: Path) -> None:
    failed = quantkit(*run_words("rtn", qwen2, tmp_path / "out", ids, "--max-kl", "0"))
    assert failed.returncode == 3, failed.stderr
    result = json.loads((tmp_path / "out" / "quantkit.json").read_text())
    assert result["verification"]["verdict"] == "fail"
    assert "KL" in result["verification"]["reasons"][0]


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
