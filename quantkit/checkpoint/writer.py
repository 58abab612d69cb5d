# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or not there: written to a temporary name, flushed to the disk, and renamed.

A temporary file is called `.<name>.tmp` and lies in the same folder; what a killed process leaves of it, the next run
removes (`journal.py`). The same content gives the same bytes, and files are readable by all whatever the umask.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint.header import Spec, encode, spec_bytes
from quantkit.checkpoint.reader import INDEX
from quantkit.dtypes import dtype_name, torch_dtype
from quantkit.errors import ModelError, NumericsError, OutputError

if TYPE_CHECKING:
    from torch import Tensor

MIB, GIB = 2**20, 2**30
COPY_BYTES = 2**20


def write_chunks(path: Path, chunks: Iterable[bytes | memoryview]) -> str:
    """Write a file atomically and return its sha256. On any failure the file is as it was before.

    Raises:
        OutputError: the disk is full, or the folder is missing or cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    digest = hashlib.sha256()
    try:
        temporary.unlink(missing_ok=True)
        try:
            with temporary.open("xb") as file:
                for chunk in chunks:
                    file.write(chunk)
                    digest.update(chunk)
                file.flush()
                os.fchmod(file.fileno(), 0o644)
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _fsync_folder(path.parent)
    except OSError as error:
        raise output_error(path, error) from error
    return digest.hexdigest()


def require_writable(path: Path, option: str) -> None:
    """Make the folder of a file that is to be written later, and try whether the file can be written there.

    option: the option that names it, for the message

    Raises:
        OutputError: it cannot be.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        temporary.unlink(missing_ok=True)
        temporary.open("xb").close()
        temporary.unlink()
    except OSError as error:
        raise output_error(path, error, option) from error


def output_error(path: Path, error: OSError, option: str = "--out") -> OutputError:
    """A failure to write, as one line that says what to do; option: what names another place."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            f"disk full while writing {path}: {_size(_free_bytes(path.parent))} free; "
            "the finished layers are kept: make room and run the same command again"
        )
    return OutputError(
        f"{path} cannot be written: {error.strerror or error}; choose another {option} or repair the folder"
    )


def write_text(path: Path, text: str) -> str:
    """Write UTF-8 text atomically, line ends as they are; see `write_chunks`.

    Bytes of file names that are not UTF-8, which Python holds as lone surrogates, are written as `\\udcff`.
    """
    return write_chunks(path, [text.encode(errors="backslashreplace")])


def write_json(path: Path, value: Any, *, finite: bool = True) -> str:
    """Write JSON atomically, keys in the order given; see `write_chunks`.

    Args:
        finite: False lets NaN and infinities pass, as Python reads and writes them

    Raises:
        NumericsError: a number is NaN or infinite, which JSON cannot hold.
    """
    text = to_json(value, str(path), indent=2) if finite else json.dumps(value, indent=2, ensure_ascii=False)
    return write_text(path, text + "\n")


def make_folder(folder: Path) -> None:
    """Make a folder, if it is not there.

    Raises:
        OutputError: it cannot be made.
    """
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise output_error(folder, error) from error


def to_json(value: Any, where: str, indent: int | None = None) -> str:
    """Strict JSON.

    Raises:
        NumericsError: a number is NaN or infinite, which JSON cannot hold.
    """
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise NumericsError(f"{where}: {error}") from error


def copy_file(source: Path, target: Path) -> str:
    """Copy a file's content atomically (links are followed, permissions are not copied); see `write_chunks`.

    Raises:
        ModelError: the source cannot be opened.
    """
    try:
        file = source.open("rb")
    except OSError as error:
        raise ModelError(f"{source}: cannot be read: {error.strerror}") from error
    with file:
        return write_chunks(target, iter(lambda: file.read(COPY_BYTES), b""))


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file atomically and return its sha256; one tensor at a time is copied from its device.

    Raises:
        OutputError: the disk is full, or the folder is missing or cannot be written.
        ValueError: a dtype that safetensors does not hold.
    """
    specs = {name: (dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
    return write_pieces(path, specs, lambda name: [tensors[name]])


def write_pieces(path: Path, specs: Mapping[str, Spec], pieces: Callable[[str], Iterable[Tensor]]) -> str:
    """As `write_shard`, for tensors that are not all at hand: `pieces` is asked for one after the other, in file order.

    What it yields for a name are the tensor's values in row-major order, in any number of pieces.

    Raises:
        OutputError: see `write_shard`.
        ValueError: pieces of another dtype or number of values than specs says.
    """
    header, order = encode(specs)
    return write_chunks(path, chain([header], (_raw(p) for name in order for p in _checked(name, specs[name], pieces))))


def _checked(name: str, spec: Spec, pieces: Callable[[str], Iterable[Tensor]]) -> Iterator[Tensor]:
    left = math.prod(spec[1])
    for piece in pieces(name):
        left -= piece.numel()
        if dtype_name(piece.dtype) != spec[0]:
            raise ValueError(f"{name}: expected {spec[0]}, got {dtype_name(piece.dtype)}")
        yield piece
    if left:
        raise ValueError(f"{name}: {left} of {math.prod(spec[1])} values are missing")


def shard_bytes(specs: Mapping[str, Spec]) -> int:
    """The exact size of the file that `write_shard` makes of tensors of these dtypes and shapes."""
    return len(encode(specs)[0]) + sum(map(spec_bytes, specs.values()))


def shard_name(number: int, count: int) -> str:
    """The name of shard `number` (the first is 1) of `count`, as the hub's tools name it."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def write_index(folder: Path, weight_map: Mapping[str, str], total_size: int) -> str:
    """Write the index of a sharded checkpoint: tensor name -> file, and the bytes of all tensors without headers."""
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    return write_json(folder / INDEX, index)


def require_disk(folder: Path, needed_bytes: int) -> None:
    """Refuse to start what the disk of `folder` (which need not exist yet) cannot hold.

    Raises:
        OutputError: naming the folder, what is needed, and what is free.
    """
    free = _free_bytes(folder)
    if free < needed_bytes:
        raise OutputError(
            f"{folder}: {_size(needed_bytes)} needed, {_size(free)} free; make room or choose an --out on another disk"
        )


def _raw(tensor: Tensor) -> memoryview:
    """The tensor's bytes in row-major order (little endian, as every machine that torch supports well is)."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch_dtype("uint8")).numpy().data


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free_bytes(folder: Path) -> int:
    existing = next((path for path in (folder.absolute(), *folder.absolute().parents) if path.exists()), Path("/"))
    return shutil.disk_usage(existing).free


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / MIB:.2f} MiB"
