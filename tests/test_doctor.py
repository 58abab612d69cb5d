# SPDX-License-Identifier: Apache-2.0
"""`doctor`: what is here, what a folder would get, and commands that can be typed."""

import json
import shlex
from pathlib import Path

import pytest
import torch

import quantkit as package
from quantkit.cli import app
from tests.running import done, quantkit

DEMO = str(Path(package.__file__).parent / "demo")


def test_what_is_installed_is_told() -> None:
    found = json.loads(done("doctor", "--json").stdout)
    assert found["machine"]["packages"]["torch"] == torch.__version__
    assert found["machine"]["ram_free_bytes"] <= found["machine"]["ram_bytes"]
    shown = done("doctor").stdout
    assert "this machine" in shown
    assert torch.__version__ in shown


def test_a_folder_is_told_its_kernels_and_flags(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done("rtn", "demo", "--no-verify", "--offline", "--device", "cpu", "--out", str(out))
    found = json.loads(done("doctor", str(out), "--json").stdout)
    assert set(found["kernels"]["vllm"].values()) == {"Marlin"}
    assert found["fit"]["engine"]["flags"][:2] == ["--max-model-len", "2048"]
    shown = " ".join(done("doctor", str(out)).stdout.split())
    assert "loads it: Marlin" in shown
    assert "--max-num-seqs 8" in shown
    assert f"quantkit serve {out} --context 2048 " in f"{shown} "


def test_every_trouble_has_a_command_that_exists() -> None:
    found = json.loads(done("doctor", DEMO, "--json").stdout)
    known = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    for trouble in found["troubles"]:
        words = shlex.split(trouble["command"])
        assert words[0] == "quantkit"
        assert words[1] in known


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    answer = quantkit("doctor", str(tmp_path))
    assert answer.returncode == 1
    assert "no config.json" in answer.stderr
    assert answer.stderr.count("\n") == 1


def test_no_engine_is_a_problem_that_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantkit.commands.doctor._version", lambda package: None)
    monkeypatch.setenv("PATH", "/nowhere")
    problems = json.loads(done("doctor", "--json").stdout)["problems"]
    assert any("pip install 'quantkit[serve]'" in problem for problem in problems)
