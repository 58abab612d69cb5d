# SPDX-License-Identifier: Apache-2.0
"""Resuming: what survives a kill at any byte, who may write in a folder, and what a fresh start removes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quantkit.checkpoint.journal import JOURNAL, Unit, open_journal
from quantkit.checkpoint.writer import write_text
from quantkit.errors import NumericsError, OutputError

IDENTITY = {
    "version": "0.1.0",
    "options": {"bits": 4, "group_size": 128},
    "model": {"model.safetensors": "sha256:" + "a" * 64},
}


def finish(folder: Path, number: int) -> Unit:
    """A unit whose file is written, as a run would."""
    name = f"model-{number:05d}.safetensors"
    digest = write_text(folder / name, f"layer {number}")
    return Unit(f"layer.{number}", name, digest, {"loss": 0.1 * number, "layers": [{"name": "q", "bits": 4}]})


def run(folder: Path, *numbers: int, fresh: bool = False, **options: Any) -> list[str]:
    """A run that finishes these units; returns the units it found finished."""
    with open_journal(folder, {**IDENTITY, **options}, fresh=fresh) as journal:
        found = list(journal.finished)
        for number in numbers:
            journal.append(finish(folder, number))
    return found


def test_a_resumed_run_leaves_the_same_bytes(tmp_path: Path) -> None:
    assert run(tmp_path / "whole", 0, 1, 2) == []
    assert run(tmp_path / "parts", 0) == []
    assert run(tmp_path / "parts", 1) == ["layer.0"]
    assert run(tmp_path / "parts", 2) == ["layer.0", "layer.1"]
    whole, parts = ((tmp_path / name / JOURNAL).read_bytes() for name in ("whole", "parts"))
    assert whole == parts
    assert [set(json.loads(line)) for line in whole.splitlines()] == [
        {"quantkit_journal", "identity"},
        *[{"unit", "file", "sha256", "record", "seal"}] * 3,
    ]
    assert (tmp_path / "whole" / JOURNAL).stat().st_mode & 0o777 == 0o644


def test_what_was_appended_is_what_is_read_back(tmp_path: Path) -> None:
    with open_journal(tmp_path, IDENTITY, fresh=False) as journal:
        unit = finish(tmp_path, 7)
        journal.append(Unit(unit.unit, unit.file, unit.sha256, {"pair": (1, 0.1 + 0.2), "名": None}))
        appended = dict(journal.finished)
    with open_journal(tmp_path, IDENTITY, fresh=False) as journal:
        assert journal.finished == appended
        assert journal.finished["layer.7"].record == {"pair": [1, 0.1 + 0.2], "名": None}


def test_a_journal_cut_anywhere_resumes(tmp_path: Path) -> None:
    run(tmp_path, 0, 1)
    path = tmp_path / JOURNAL
    whole = path.read_bytes()
    first, second, third = (index + 1 for index, byte in enumerate(whole) if byte == ord("\n"))
    for cut in sorted({*range(first, third, 7), second - 1, second, second + 1, third - 1, third}):
        path.write_bytes(whole[:cut])
        expected = ["layer.0"] * (cut >= second) + ["layer.1"] * (cut >= third)
        assert run(tmp_path) == expected
        assert path.read_bytes() == whole[: (first, second, third)[len(expected)]]  # the torn line is gone
    for file in tmp_path.glob("model*"):
        file.unlink()
    for cut in range(0, first, 7):  # killed in the middle of the first line: nothing else had been written
        path.write_bytes(whole[:cut])
        assert run(tmp_path) == []
        assert path.read_bytes() == whole[:first]


def test_a_line_that_the_disk_lost(tmp_path: Path) -> None:
    run(tmp_path, 0, 1)
    path = tmp_path / JOURNAL
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1] + b"\0" * 20 + b"\n")  # the last line may be lost
    assert run(tmp_path) == ["layer.0"]
    for damaged in (b"\0" * 20 + b"\n", b"[]\n", lines[1].replace(b"model-", b"../del-"), lines[2], b'{"unit": 3}\n'):
        path.write_bytes(lines[0] + damaged + lines[2] + lines[1])
        with pytest.raises(OutputError, match=r"journal.jsonl: line [23] is damaged"):
            run(tmp_path)
    assert run(tmp_path, fresh=True) == []


@pytest.mark.parametrize(
    "change", [{"record": {}}, {"record": {"loss": 0}}, {"sha256": "0"}, {"more": 1}, {"seal": "0" * 16}]
)
def test_a_line_that_was_changed_is_not_believed(tmp_path: Path, change: dict[str, Any]) -> None:
    run(tmp_path, 0, 1)
    path = tmp_path / JOURNAL
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], json.dumps(json.loads(lines[1]) | change), lines[2], ""]))
    with pytest.raises(OutputError, match=r"journal.jsonl: line 2 is damaged; --fresh starts over"):
        run(tmp_path)


def test_a_pipe_is_no_journal(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / JOURNAL)
    with pytest.raises(OutputError, match="a pipe or a device"):
        run(tmp_path)


@pytest.mark.parametrize("swapped", [False, True])
def test_a_folder_that_is_another_at_the_end(tmp_path: Path, swapped: bool) -> None:
    folder, away = tmp_path / "run", tmp_path / "away"

    def swap() -> None:
        folder.rename(away)
        if swapped:
            folder.mkdir()
            (folder / JOURNAL).write_bytes((away / JOURNAL).read_bytes())

    with pytest.raises(OutputError, match="moved, removed or replaced"), open_journal(folder, IDENTITY, fresh=False):
        swap()
    shutil.rmtree(folder, ignore_errors=True)
    away.rename(folder)
    with open_journal(folder, IDENTITY, fresh=False) as journal:
        unit = finish(folder, 0)
        swap()
        with pytest.raises(OutputError, match="moved, removed or replaced"):
            journal.append(unit)
        assert not journal.finished
        shutil.rmtree(folder, ignore_errors=True)
        away.rename(folder)
        journal.append(unit)
    assert run(folder) == ["layer.0"]


def test_units_are_verified_and_dropped_with_all_later_ones(tmp_path: Path) -> None:
    run(tmp_path, 0, 1, 2, 3)
    with open_journal(tmp_path, IDENTITY, fresh=False) as journal:
        before = (tmp_path / JOURNAL).read_bytes()
        (tmp_path / "model-00002.safetensors").write_text("layer x")
        (tmp_path / "model-00003.safetensors").unlink()
        assert [journal.verify_unit(unit) for unit in journal.finished.values()] == [True, True, False, False]
        journal.drop_from("layer.2")
        assert list(journal.finished) == ["layer.0", "layer.1"]
        with pytest.raises(KeyError):
            journal.drop_from("layer.3")
        with pytest.raises(OutputError, match="another run is writing here"):
            run(tmp_path)
        journal.append(finish(tmp_path, 2))
    assert run(tmp_path, 3) == ["layer.0", "layer.1", "layer.2"]
    assert (tmp_path / JOURNAL).read_bytes() == before


def test_mistakes_in_a_unit_leave_no_line(tmp_path: Path) -> None:
    run(tmp_path, 0)
    before = (tmp_path / JOURNAL).read_bytes()
    with open_journal(tmp_path, IDENTITY, fresh=False) as journal:
        with pytest.raises(ValueError, match="already finished"):
            journal.append(finish(tmp_path, 0))
        with pytest.raises(ValueError, match="not a plain file name"):
            journal.append(Unit("layer.1", "../x", "0", {}))
        with pytest.raises(NumericsError, match=r"the record of layer\.1"):
            journal.append(Unit("layer.1", "x", "0", {"loss": float("inf")}))
    assert (tmp_path / JOURNAL).read_bytes() == before


def test_other_settings_are_named(tmp_path: Path) -> None:
    run(tmp_path, 0)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(OutputError) as caught:
        run(tmp_path, options={"bits": 3, "sym": True}, model={"model.safetensors": "sha256:" + "b" * 64})
    message = str(caught.value)
    for part in (
        "options.bits: 4 -> 3",
        "options.group_size: 128 -> none",
        "options.sym: none -> true",
        'model.model.safetensors: "sha256:aaaaa..." -> "sha256:bbbbb..."',
        "--fresh",
        "another --out",
    ):
        assert part in message
    assert "version" not in message
    assert "\n" not in message
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert run(tmp_path, options={"group_size": 128, "bits": 4}) == ["layer.0"]  # the order of settings means nothing


def test_a_fresh_start_removes_what_a_run_left_and_nothing_else(tmp_path: Path) -> None:
    run(tmp_path, 0, 1)
    for name in ("config.json", "quantkit.json", "tokenizer.json", "report.html", ".model-00002.safetensors.tmp"):
        (tmp_path / name).write_text("old")
    for name in ("notes.txt", "model.py", "data.safetensors"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "config.json").write_text("mine")
    assert run(tmp_path, 5, fresh=True, options={"bits": 3}) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "data.safetensors", "journal.jsonl", "model-00005.safetensors", "model.py", "notes.txt", "sub",
    ]  # fmt: skip
    assert (tmp_path / "sub" / "config.json").exists()
    assert run(tmp_path, options={"bits": 3}) == ["layer.5"]


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize(
    "journal", [None, b"", b'{"quantkit_jo', b'{"mine": 1}\n', b"mine", b'{"quantkit_journal": 2, "x": 1}\n']
)
def test_a_folder_that_is_not_ours_is_not_touched(tmp_path: Path, fresh: bool, journal: bytes | None) -> None:
    for name in ("config.json", ".x.tmp"):
        (tmp_path / name).write_text("mine")
    if journal is not None:
        (tmp_path / JOURNAL).write_bytes(journal)
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    with pytest.raises(OutputError, match=r"not empty and not the output of|not a journal that this version"):
        run(tmp_path, fresh=fresh)
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()} == before


def test_stale_temporary_files_are_removed(tmp_path: Path) -> None:
    run(tmp_path, 0)
    (tmp_path / ".model-00001.safetensors.tmp").write_text("half")
    assert run(tmp_path) == ["layer.0"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["journal.jsonl", "model-00000.safetensors"]


def test_a_run_that_leaves_nothing_leaves_no_folder(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with pytest.raises(RuntimeError), open_journal(folder, IDENTITY, fresh=False):
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    folder.mkdir(parents=True)
    with pytest.raises(RuntimeError), open_journal(folder, IDENTITY, fresh=True):
        raise RuntimeError
    assert not list(folder.iterdir())
    with open_journal(folder, IDENTITY, fresh=False):
        write_text(folder / "config.json", "{}")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", JOURNAL]
    assert run(folder, 1) == []


def test_folders_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "x", Path("/proc/x")):
        with pytest.raises(OutputError, match="cannot be written"):
            run(folder)
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / JOURNAL).symlink_to(tmp_path / "file")
    with pytest.raises(OutputError, match="cannot be written"):
        run(linked)
    assert (tmp_path / "file").read_bytes() == b""


HOLDER = """
import sys
from pathlib import Path
from quantkit.checkpoint.journal import Unit, open_journal
from quantkit.checkpoint.writer import write_text
import json
folder = Path(sys.argv[1])
with open_journal(folder, json.loads(sys.argv[2]), fresh=False) as journal:
    digest = write_text(folder / "model-00000.safetensors", "layer 0")
    journal.append(Unit("layer.0", "model-00000.safetensors", digest, {}))
    (folder / ".model-00001.safetensors.tmp").write_text("half")
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_processes_and_a_kill(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "out"), json.dumps(IDENTITY)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"held\n"
        for fresh in (False, True):
            with pytest.raises(OutputError, match=f"out: another run is writing here( .process {process.pid}.)?; wait"):
                run(tmp_path / "out", fresh=fresh)
        assert (tmp_path / "out" / ".model-00001.safetensors.tmp").exists()
        process.send_signal(signal.SIGKILL)
    assert run(tmp_path / "out", 1) == ["layer.0"]
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_a_journal_that_cannot_grow_is_as_it_was(tmp_path: Path) -> None:
    program = """
import json, resource, sys
from pathlib import Path
from quantkit.checkpoint.journal import JOURNAL, Unit, open_journal
from quantkit.errors import OutputError
folder = Path(sys.argv[1])
with open_journal(folder, json.loads(sys.argv[2]), fresh=False) as journal:
    size = (folder / JOURNAL).stat().st_size
    for extra in (0, 10):  # nothing of the line fits, part of the line fits
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + extra, resource.RLIM_INFINITY))
        try:
            journal.append(Unit("layer.1", "x", "0", {}))
        except OutputError as error:
            print(error)
    assert list(journal.finished) == ["layer.0"]
"""
    run(tmp_path, 0)
    before = (tmp_path / JOURNAL).read_bytes()
    command = [sys.executable, "-c", program, str(tmp_path), json.dumps(IDENTITY)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert "File too large" in said[0]
    assert "disk full while writing" in said[1]
    assert (tmp_path / JOURNAL).read_bytes() == before


def test_the_lock_is_free_after_the_run(tmp_path: Path) -> None:
    descriptors = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0  # noqa: PTH208
    for _ in range(3):
        run(tmp_path)
    if descriptors:
        assert len(os.listdir("/proc/self/fd")) == descriptors  # noqa: PTH208
