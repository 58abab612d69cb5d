# SPDX-License-Identifier: Apache-2.0
"""Runs that are killed, interrupted, damaged, repeated: what is kept, and what is said."""

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import typer

from quantkit.cli.console import told
from tests.conftest import make_qwen2
from tests.outputs import contents
from tests.running import ENVIRONMENT, command, done, quantkit, run_words, started


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


def test_resumes_after_kills_at_random_moments(tmp_path: Path, ids: Path) -> None:
    model = make_qwen2(tmp_path / "model", layers=4)

    def words(out: Path) -> list[str]:
        return run_words("awq", model, out, ids, "--drift-samples", "4")

    done(*words(tmp_path / "whole"))
    expected = contents(tmp_path / "whole")
    rng = random.Random(0)
    out = tmp_path / "out"
    killed = 0
    for _ in range(12):
        process = started(*words(out))
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
            done(*words(out))
            assert contents(out) == expected
            for path in out.iterdir():
                path.unlink()
    done(*words(out))
    assert killed >= 6
    assert contents(out) == expected
    (out / "quantkit.json").unlink()
    done(*words(out))  # nothing is left to do but to measure
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
        result = json.loads((out / "quantkit.json").read_text())
        assert result["seconds"] > json.loads(first.stdout)["seconds"]  # what the run has cost, and this on top
        assert not any(note.startswith("continued") for note in result["fallbacks"])


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
