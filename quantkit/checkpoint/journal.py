# SPDX-License-Identifier: Apache-2.0
"""The journal of a run: what it is, and which units of it are finished, so that interrupting loses one unit at most.

`journal.jsonl` is append-only. Its first line is the run's identity: everything that determines the bytes of the
result. Every further line is a finished unit, appended (one write, flushed to the disk) after the unit's file is in
place. It ends with a hash of itself, since its figures go into the result as they are. It holds no times, so an
interrupted and resumed run leaves the same journal as one that was not interrupted.

The journal is also the lock: it is held with flock(2) while open, which the kernel releases however the process ends.
"""

import errno
import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit.checkpoint.companions import is_file_name
from quantkit.checkpoint.reader import is_plain_name, shorten
from quantkit.checkpoint.writer import output_error, to_json
from quantkit.errors import OutputError

JOURNAL, RESULT = "journal.jsonl", "quantkit.json"
HEAD = b'{"quantkit_journal": 1, "identity": '  # how every journal of ours begins; the number is the format's version
SEAL = 16  # hexadecimal digits
BESIDE_WEIGHTS = (  # most of what a run copies from the model's folder; the rest is known once it is recorded
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "*.tiktoken",
    "spiece.model",
    "sentencepiece*.model",
    "LICENSE*",
    "NOTICE*",
)
RUN_FILES = (  # what a run leaves beside its journal, and a fresh start removes
    "model*.safetensors",
    "model*.safetensors.index.json",
    "config.json",
    RESULT,
    "quantize_config.json",
    "report.html",
    "README.md",
    *BESIDE_WEIGHTS,
)


@dataclass(frozen=True)
class Unit:
    """A finished unit of work: its name, the file it left, the file's sha256, and what there is to report of it.

    The record is JSON: what is read back on resuming is equal to what was appended.
    """

    unit: str
    file: str
    sha256: str
    record: Mapping[str, Any]


@dataclass
class Journal:
    """An open journal. `finished` holds the finished units by name, in the order in which they were finished."""

    folder: Path
    descriptor: int
    finished: dict[str, Unit] = field(default_factory=dict)
    begins: dict[str, int] = field(default_factory=dict)  # the byte at which the line of a finished unit begins

    def append(self, unit: Unit) -> None:
        """Record a finished unit. Its file must be on the disk already.

        Raises:
            OutputError: the disk is full or failing; the journal is then as it was before.
            NumericsError: the record holds a number that is not finite.
            ValueError: the unit is already finished, or its file is not a plain file name.
        """
        if unit.unit in self.finished or not is_plain_name(unit.file):
            raise ValueError(f"{unit.unit}: already finished, or {unit.file!r} is not a plain file name")
        fields = {"unit": unit.unit, "file": unit.file, "sha256": unit.sha256, "record": unit.record}
        text = to_json(fields, f"the record of {unit.unit}").encode(errors="backslashreplace")
        begin = _append(self.descriptor, _sealed(text), self.folder / JOURNAL)
        self.finished[unit.unit] = Unit(**json.loads(text))
        self.begins[unit.unit] = begin

    def verify_unit(self, unit: Unit) -> bool:
        """Whether the unit's file is there with the content it was finished with."""
        try:
            with (self.folder / unit.file).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == unit.sha256
        except OSError:
            return False

    def drop_from(self, name: str) -> None:
        """Forget a finished unit and all that were finished after it; their files stay until they are overwritten.

        Raises:
            KeyError: the unit is not finished.
            OutputError: the journal cannot be written.
        """
        begin = self.begins[name]
        _truncate(self.descriptor, begin, self.folder / JOURNAL)
        for later in [unit for unit, at in self.begins.items() if at >= begin]:
            del self.finished[later], self.begins[later]


@contextmanager
def open_journal(folder: Path, identity: Mapping[str, Any], *, fresh: bool) -> Iterator[Journal]:
    """Open or begin the journal of a run in its output folder, which is created if it is missing.

    A run that ends before it has left anything leaves the folder as it was found. With `fresh`, what an earlier run
    has left is removed; other files are not touched.

    Raises:
        OutputError: another process works in the folder; the folder holds other files and no journal, or the journal
            of a run with another identity; the journal is damaged; the folder cannot be written, or is another when
            the run ends.
    """
    first_line = HEAD + to_json(identity, "the identity of the run").encode(errors="backslashreplace") + b"}\n"
    path = folder / JOURNAL
    try:
        found = next(parent for parent in (path, *path.parents) if parent.exists())
        if found == folder:
            _refuse_foreign(folder)
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise output_error(path, error) from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OutputError(f"{path}: is a pipe or a device, not a journal; choose another --out")
        _lock(descriptor, path, folder)
        try:
            yield _begin(Journal(folder, descriptor), first_line, fresh=fresh)
            _require_in_place(descriptor, path)
        finally:
            if found != path:
                _leave_as_found(folder, found)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep runs and other verifications out of the folder of a finished run. One that came without a journal, as the
    hub's copies do, is no run's to continue: there the folder itself is the lock.

    Raises:
        OutputError: another process works in the folder, or it cannot be opened.
    """
    path = folder / JOURNAL if (folder / JOURNAL).is_file() else folder
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise output_error(path, error) from error
    try:
        _lock(descriptor, path, folder)
        yield
    finally:
        os.close(descriptor)


def require_folder(folder: Path, identity: Mapping[str, Any] | None) -> None:
    """Try whether the journal of a later run can be opened, and leave the folder as it was found.

    identity: of that run; None if it starts over, whatever run the folder holds

    Raises:
        OutputError: as `open_journal`.
    """
    if identity is None:
        try:
            with (folder / JOURNAL).open("rb") as file:
                identity = dict(json.loads(file.readline())["identity"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            identity = {}
    with open_journal(folder, identity, fresh=False):
        pass


def _begin(journal: Journal, first_line: bytes, *, fresh: bool) -> Journal:
    path = journal.folder / JOURNAL
    try:
        rest = _continue(journal, first_line, fresh=fresh)
        for temporary in journal.folder.glob(".*.tmp"):
            temporary.unlink()
        if rest is not None:
            return _read_units(journal, rest)
        os.ftruncate(journal.descriptor, 0)
        os.fchmod(journal.descriptor, 0o644)
    except OSError as error:
        raise output_error(path, error) from error
    _append(journal.descriptor, first_line, path)
    return journal


def _continue(journal: Journal, first_line: bytes, *, fresh: bool) -> bytes | None:
    """The lines of the units of the run to continue, or None to begin one."""
    path = journal.folder / JOURNAL
    text = path.read_bytes()
    old_line, end_of_line, rest = text.partition(b"\n")
    if not end_of_line and HEAD.startswith(text[: len(HEAD)]):  # begun, and killed in the middle of its first line
        _refuse_foreign(journal.folder)
        return None
    if not old_line.startswith(HEAD):
        raise OutputError(f"{path}: not a journal that this version of quantkit writes; choose another --out")
    if fresh:
        _remove_run(journal.folder, rest)
        return None
    _refuse_other_identity(journal.folder, old_line, first_line)
    return rest


def _read_units(journal: Journal, text: bytes) -> Journal:
    path = journal.folder / JOURNAL
    lines = text.splitlines(keepends=True)
    begin = os.fstat(journal.descriptor).st_size - len(text)
    for number, line in enumerate(lines, start=2):
        unit = _parse_unit(line)
        if unit is None or unit.unit in journal.finished:
            if number <= len(lines):
                raise OutputError(f"{path}: line {number} is damaged; --fresh starts over, or choose another --out")
            _truncate(journal.descriptor, begin, path)  # the last line, torn when the run was killed
            break
        journal.finished[unit.unit] = unit
        journal.begins[unit.unit] = begin
        begin += len(line)
    return journal


def _sealed(text: bytes) -> bytes:
    """The line of a unit: its JSON object with a last key, the hash of the object before it was added."""
    return b'%s, "seal": "%s"}\n' % (text[:-1], hashlib.sha256(text).hexdigest()[:SEAL].encode())


def _parse_unit(line: bytes) -> Unit | None:
    """The unit of a line, or None if anything of it is not as it was written."""
    text = line[: -len(_sealed(b"}"))] + b"}"
    if line != _sealed(text):
        return None
    try:
        unit = Unit(**json.loads(text))
    except (ValueError, TypeError, RecursionError):
        return None
    whole = isinstance(unit.unit, str) and isinstance(unit.sha256, str) and isinstance(unit.record, dict)
    return unit if whole and is_plain_name(unit.file) else None


def _refuse_foreign(folder: Path) -> None:
    """A folder that has files but no journal belongs to someone else."""
    foreign = sorted(path.name for path in folder.iterdir() if path.name != JOURNAL)
    if foreign:
        raise OutputError(
            f"{folder}: not empty and not the output of a quantkit run (holds {shorten(foreign)}); choose another --out"
        )


def _refuse_other_identity(folder: Path, old_line: bytes, first_line: bytes) -> None:
    try:
        old, new = (_flat(json.loads(line)["identity"]) for line in (old_line, first_line))
    except (ValueError, RecursionError, KeyError) as error:
        raise OutputError(f"{folder / JOURNAL}: line 1 is damaged; --fresh starts over") from error
    changes = [
        f"{key}: {_short(old.get(key, 'none'))} -> {_short(new.get(key, 'none'))}"
        for key in {**old, **new}
        if old.get(key) != new.get(key)
    ]
    kinds = ["a conversion" if "convert" in identity else "a run" for identity in (old, new)]
    if kinds[0] != kinds[1]:
        raise OutputError(
            f"{folder} holds {kinds[0]}, and this is {kinds[1]}; choose another --out, or --fresh replaces it"
        )
    if changes:
        raise OutputError(
            f"{folder} holds {kinds[0]} with other settings ({'; '.join(changes)}); "
            "repeat those to continue it, start over with --fresh, or choose another --out"
        )


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(value, dict) and value:
        return {
            k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}.{key}" if prefix else key).items()
        }
    return {prefix: json.dumps(value, ensure_ascii=False)}


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:13]}...{text[-1]}"


def _remove_run(folder: Path, unit_lines: bytes) -> None:
    units = filter(None, map(_parse_unit, unit_lines.splitlines(keepends=True)))
    paths = {folder / unit.file for unit in units}.union(*(folder.glob(pattern) for pattern in RUN_FILES))
    paths |= {folder / name for name in _recorded_files(folder)}
    for path in paths - {folder / JOURNAL}:
        path.unlink(missing_ok=True)


def _recorded_files(folder: Path) -> list[str]:
    """The files that quantkit.json lists, as far as it can be read."""
    try:
        listed = json.loads((folder / RESULT).read_text(encoding="utf-8"))["files"]
        names = [entry["name"] for entry in listed]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    return [name for name in names if is_file_name(name)]


def _leave_as_found(folder: Path, found: Path) -> None:
    """Remove a new journal, and the folders made for it, if nothing but the journal is in the folder."""
    with suppress(OSError):
        if [path.name for path in folder.iterdir()] != [JOURNAL]:
            return
        (folder / JOURNAL).unlink()
        for made in (folder, *folder.parents):
            if made == found:
                break
            made.rmdir()


def _lock(descriptor: int, path: Path, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Another run may have removed its journal between our opening and our locking it.
        if not _in_place(descriptor, path):
            raise BlockingIOError(errno.EWOULDBLOCK, "just released")
    except BlockingIOError as error:
        pid = _holder(descriptor)
        raise OutputError(
            f"{folder}: another run is writing here{f' (process {pid})' if pid else ''}; "
            "wait for it, stop it, or choose another --out"
        ) from error
    except OSError as error:
        raise output_error(path, error) from error


def _in_place(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one of that name."""
    return path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())


def _require_in_place(descriptor: int, path: Path) -> None:
    """What is written by name would go into another folder, and half of the checkpoint be elsewhere.

    Raises:
        OutputError: the folder was moved, removed or replaced since the journal was opened.
    """
    if not _in_place(descriptor, path):
        raise OutputError(
            f"{path.parent}: was moved, removed or replaced while the run wrote to it; the finished layers are where "
            "its journal.jsonl is: put that folder back, and run the same command again"
        )


def _holder(descriptor: int) -> int | None:
    """The process that holds the lock, where Linux tells it: `1: FLOCK ADVISORY WRITE pid major:minor:inode 0 EOF`."""
    status = os.fstat(descriptor)
    wanted = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    with suppress(OSError, ValueError, IndexError):
        for fields in map(str.split, Path("/proc/locks").read_text().splitlines()):
            if fields[1] == "FLOCK" and fields[5] == wanted and int(fields[4]) > 0:
                return int(fields[4])
    return None


def _append(descriptor: int, line: bytes, path: Path) -> int:
    """Append a line whole or not at all; returns where it begins."""
    _require_in_place(descriptor, path)
    begin = os.fstat(descriptor).st_size
    try:
        if os.write(descriptor, line) != len(line):
            raise OSError(errno.ENOSPC, "no space left")
        os.fsync(descriptor)
    except OSError as error:
        os.ftruncate(descriptor, begin)
        raise output_error(path, error) from error
    return begin


def _truncate(descriptor: int, length: int, path: Path) -> None:
    try:
        os.ftruncate(descriptor, length)
        os.fsync(descriptor)
    except OSError as error:
        raise output_error(path, error) from error
