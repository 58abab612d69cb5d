# SPDX-License-Identifier: Apache-2.0
"""A model directory of safetensors files, read one tensor at a time.

Everything about the files is validated when they are opened, from their headers alone. Tensors are then read with
plain reads into fresh memory, or where they are told to lie: nothing stays mapped, so a tensor that is dropped is gone
from the process.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint.header import LENGTH_BYTES, MAX_HEADER_BYTES, decode, parse_object
from quantkit.dtypes import ITEMSIZE, torch_dtype
from quantkit.errors import ModelError, NumericsError
from quantkit.jsonfile import read_object
from quantkit.text import clean_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth")
ADAPTER, ADAPTER_CONFIG = "adapter_", "adapter_config.json"  # how the names of LoRA weights begin, and what they are
HASHED_WHOLE_BYTES = 2**30
SAMPLES, SAMPLE_BYTES = 64, 2**20
PIECE_BYTES = 2**22  # of a tensor that is copied and never held whole
FINITE_CHUNK = 2**24  # values looked at in one step: keeps the memory of an exact search small
NUMBERS = "float32"  # what scaled weights are read as: 4 bits times 24, so that nothing is lost


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: nbytes bytes at offset (from the beginning of the file) of a file in the directory.

    dtype: a name of `dtypes`
    part: of another tensor, if it does not lie in one piece; the other fields are then those of a piece like it
    scaled: what is really stored, if the tensor is what that stands for. The other fields are then those of its numbers
    as if they began where the stored weight does.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    scaled: Scaled | None = None
    part: Part | None = None


@dataclass(frozen=True)
class Part:
    """Columns of a matrix, or numbers of a vector, that lie apart in the file: every `step`th from the first on.

    transposed: whether they are then rows
    """

    source: Entry
    first: int
    step: int
    transposed: bool

    def of(self, whole: Tensor) -> Tensor:
        """The part of the source's tensor."""
        found = whole[..., self.first :: self.step]
        return found.T if self.transposed and found.dim() > 1 else found


@dataclass(frozen=True)
class Scaled:
    """A weight and its scales as they are stored.

    counts: number of scales for matrices, rows and columns; None: MXFP4, see `scaled.dequantize_mxfp4`
    block: rows and columns that share a scale
    """

    weight: Entry
    scales: Entry
    counts: tuple[int, int, int] | None = None
    block: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model directory, by name."""

    directory: Path
    entries: Mapping[str, Entry]

    @property
    def files(self) -> list[str]:
        """The names of the files that hold the tensors, sorted."""
        scales = {entry.scaled.scales.file for entry in self.entries.values() if entry.scaled is not None}
        return sorted({entry.file for entry in self.entries.values()} | scales)

    @property
    def file_bytes(self) -> dict[str, int]:
        """The bytes of each file: a header, and tensors without a gap."""
        ends: dict[str, int] = {}
        for entry in self.entries.values():
            ends[entry.file] = max(ends.get(entry.file, 0), entry.offset + entry.nbytes)
        return ends

    def read(self, name: str, device: torch.device | str = "cpu", room: Tensor | None = None) -> Tensor:
        """The tensor, in its stored dtype and shape; what scaled weights stand for.

        room: bytes in RAM (flat, at least as many, aligned) that it is to lie in

        Raises:
            ModelError: there is no such tensor, or its file changed or failed since it was opened.
        """
        import torch  # here and not above: see `dtypes`

        entry = self.entries.get(name)
        if entry is None:
            raise ModelError(f"{self.directory}: expected a tensor named {name}, found none; the model is incomplete")
        raw = torch.empty(entry.nbytes, dtype=torch.uint8) if room is None else room[: entry.nbytes]
        if entry.part is not None:
            whole = Checkpoint(self.directory, {name: entry.part.source}).read(name)
            return raw.view(torch_dtype(entry.dtype)).view(entry.shape).copy_(entry.part.of(whole)).to(device)
        if entry.scaled is not None:
            tensor = raw.view(torch_dtype(entry.dtype)).view(entry.shape)
            return tensor.copy_(self._numbers(entry, entry.scaled)).to(device)
        path = self.directory / entry.file
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(entry.offset)
                read = _fill(file, raw.numpy().data)
        except OSError as error:
            raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
        if read != entry.nbytes:
            raise ModelError(f"{path}: {name} ended after {read} of {entry.nbytes} bytes; the file has changed")
        return raw.view(torch_dtype(entry.dtype)).view(entry.shape).to(device)

    def _numbers(self, entry: Entry, scaled: Scaled) -> Tensor:
        """What a part of a scaled weight, or all of it, stands for."""
        from quantkit.checkpoint.scaled import dequantize_mxfp4, dequantize_rows

        weight, size = scaled.weight, ITEMSIZE[entry.dtype]
        first, count = (entry.offset - weight.offset) // size, entry.nbytes // size
        unit = weight.shape[-1] if scaled.counts else 2 * math.prod(weight.shape[-3:])  # a row; a matrix
        begin, end = first // max(unit, 1), -(-(first + count) // max(unit, 1))
        shape = (unit,) if scaled.counts else weight.shape[-3:]
        nbytes = math.prod(shape)
        part = replace(
            weight, shape=(end - begin, *shape), offset=weight.offset + begin * nbytes, nbytes=(end - begin) * nbytes
        )
        stored, scales = (Checkpoint(self.directory, {"": each}).read("") for each in (part, scaled.scales))
        if scaled.counts is None:
            numbers = dequantize_mxfp4(stored, scales.reshape(-1, *scales.shape[-2:])[begin:end])
        else:
            rows = (1, *weight.shape)[-2]
            numbers = dequantize_rows(stored, scales.reshape(scaled.counts), begin, rows, scaled.block)
        return numbers.flatten()[first - begin * unit :][:count].view(entry.shape)

    def pieces(self, name: str, values: int | None = None) -> Iterator[Tensor]:
        """The tensor's bytes in order, as flat tensors of its dtype of so many values, or 4 MiB at most; see `read`."""
        entry = self.entries[name]
        step = PIECE_BYTES if values is None else values * ITEMSIZE[entry.dtype]
        for begin in range(0, entry.nbytes, step):
            size = min(step, entry.nbytes - begin)
            shape = (size // ITEMSIZE[entry.dtype],)
            part = replace(entry, shape=shape, offset=entry.offset + begin, nbytes=size)
            yield Checkpoint(self.directory, {name: part}).read(name)

    def same(self, first: str, second: str) -> bool:
        """Whether two tensors of floats hold the same values, whatever their dtypes."""
        if self.entries[first].shape != self.entries[second].shape:
            return False
        pairs = zip(*(self.pieces(name, PIECE_BYTES // 8) for name in (first, second)), strict=True)
        return all(bool((a.float() == b.float()).all()) for a, b in pairs)

    def read_many(self, names: Iterable[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Several tensors by name; see `read`."""
        return {name: self.read(name, device) for name in names}


def open_checkpoint(directory: Path) -> Checkpoint:
    """Read and validate the headers of a model directory: one file, or an index and its shards.

    Raises:
        ModelError: something is missing, damaged, or points outside the directory.
    """
    try:
        return Checkpoint(directory, _read_headers(directory))
    except OSError as error:
        raise ModelError(f"{error.filename or directory}: cannot be read: {error.strerror}") from error


def open_file(path: Path) -> Checkpoint:
    """Read and validate the header of one safetensors file.

    Raises:
        ModelError: the file is missing or damaged.
    """
    try:
        return Checkpoint(path.parent, _read_header(path))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error


def fingerprint(checkpoint: Checkpoint) -> dict[str, str]:
    """File name -> hash of the content, for the tensor files and config.json: tells whether a model has changed.

    Files up to 1 GiB are hashed whole ("sha256:..."). Of larger ones the size, the header and 64 evenly spaced
    blocks of 1 MiB are ("sampled:..."), so that a 65 GB model takes a second or two instead of minutes.

    Raises:
        ModelError: a file cannot be read.
    """
    names = checkpoint.files + ["config.json"] * (checkpoint.directory / "config.json").is_file()
    try:
        return {name: _hash(checkpoint.directory / name) for name in names}
    except OSError as error:
        raise ModelError(f"{error.filename}: cannot be read: {error.strerror}") from error


def require_finite(name: str, tensor: Tensor, file: str | Path = "the model") -> None:
    """Refuse NaN and infinities in a tensor read from a file.

    Raises:
        NumericsError: naming the tensor, the file, and how many values are not finite.
    """
    if not tensor.is_floating_point():
        return
    import torch

    # A sum is finite only if all terms are; float8 has no sum, and a float16 sum may overflow: then count.
    if tensor.dtype.itemsize > 1 and bool(torch.isfinite(tensor.sum())):
        return
    chunks = torch.split(tensor.reshape(-1), FINITE_CHUNK)
    bad = sum(int(torch.isfinite(chunk.float()).logical_not_().sum()) for chunk in chunks)
    if bad:
        raise NumericsError(
            f"{name} in {file}: {bad} of {tensor.numel()} values are NaN or infinite; the file is damaged or the "
            "model was saved after training diverged; download it again or use another revision"
        )


def is_plain_name(name: Any) -> bool:
    """Whether a name from a file is a plain file name, so that joining it to a folder stays in that folder."""
    return (
        isinstance(name, str)
        and 0 < len(name.encode(errors="replace")) < 256
        and name.isprintable()
        and not name.startswith(".")
        and not {"/", "\\"} & set(name)
    )


def _read_headers(directory: Path) -> dict[str, Entry]:
    if not directory.is_dir():
        fault = "is a file" if directory.exists() else "no such folder"
        raise ModelError(f"{directory}: {fault}; expected a folder with config.json and {SINGLE}")
    for path in directory.iterdir():
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ModelError(f"{path}: is a pipe or a device; expected a regular file")
    files = weight_files(directory, [path.name for path in directory.iterdir()])
    missing = [file for file in files if not (directory / file).exists()]
    if missing:
        raise ModelError(
            f"{directory}: {len(missing)} of {len(files)} shards missing ({shorten(missing)}); download it again"
        )
    return joined(directory, files, lambda file: _read_header(directory / file))


def weight_files(directory: Path, names: Collection[str]) -> list[str]:
    """The safetensors files of a model whose folder has files of these names: what its index says, or the only one.

    Raises:
        ModelError: the index is damaged, or there is no such file.
    """
    if SINGLE not in names and INDEX in names:
        return sorted(set(_weight_map(directory / INDEX).values()))
    return [_single_file(directory, names)]


def joined(directory: Path, files: Sequence[str], read: Callable[[str], dict[str, Entry]]) -> dict[str, Entry]:
    """The tensors of all files, which must be where the index says, if there is one.

    Raises:
        ModelError: a tensor is in two files, or not in its file.
    """
    entries: dict[str, Entry] = {}
    for file in files:
        for name, entry in read(file).items():
            if name in entries:
                raise ModelError(
                    f"{directory}: {name} is in both {entries[name].file} and {file}; the shards are mixed up"
                )
            entries[name] = entry
    index = directory / INDEX
    weight_map = _weight_map(index) if SINGLE not in files and index.exists() else {}
    for name, file in weight_map.items():
        if name not in entries or entries[name].file != file:
            raise ModelError(
                f"{index}: expected {ascii(name)[1:-1][:80]} in {file}, which lacks it; download both again"
            )
    return entries


def _weight_map(index: Path) -> dict[str, str]:
    if not index.is_file() or index.stat().st_size > MAX_HEADER_BYTES:
        raise ModelError(f"{index}: expected a regular file of at most {MAX_HEADER_BYTES} bytes; download it again")
    weight_map = parse_object(index.read_bytes(), str(index)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: expected a weight_map of tensor names to files; the file is damaged")
    for name, file in weight_map.items():
        if not is_plain_name(file) or not file.endswith(".safetensors"):
            raise ModelError(f"{index}: {ascii(name)[:80]}: expected a file name *.safetensors, got {ascii(file)[:80]}")
    return weight_map


def _single_file(directory: Path, names: Collection[str]) -> str:
    found = sorted(name for name in names if name.endswith(".safetensors") and not name.startswith(ADAPTER))
    if SINGLE in found or len(found) == 1:
        return SINGLE if SINGLE in found else found[0]
    if found:
        raise ModelError(f"{directory}: {len(found)} safetensors files, but neither {SINGLE} nor {INDEX} to order them")
    if any(name.startswith(ADAPTER) for name in names):
        raise adapter_error(directory)
    if any(name.endswith(PICKLES) for name in names):
        raise ModelError(
            f"{directory}: only pickle weights (.bin, .pt), which are not read because loading them can run any code; "
            "use a safetensors revision of the model, or convert it with transformers' save_pretrained"
        )
    raise ModelError(f"{directory}: no weights; looked for {SINGLE}, {INDEX} and *.safetensors")


def adapter_error(directory: Path) -> ModelError:
    """What to do with a folder of LoRA weights."""
    base = ""
    with suppress(ModelError):
        said = read_object(directory / ADAPTER_CONFIG, "").get("base_model_name_or_path")
        base = f" of {clean_line(said)}" if isinstance(said, str) and said else ""
    return ModelError(
        f"{directory}: is a LoRA adapter{base}; merge it into its model first "
        "(peft: AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload().save_pretrained(OUT)), "
        "then give that folder"
    )


def shorten(names: list[str]) -> str:
    """The first two names, and how many more there are."""
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def _read_header(path: Path) -> dict[str, Entry]:
    if not path.is_file():
        raise ModelError(f"{path}: expected a regular file; remove or replace it")
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(LENGTH_BYTES)
        length = _header_length(prefix, size, path)
        text = file.read(length)
    begin = LENGTH_BYTES + length
    return {
        name: Entry(path.name, span.dtype, span.shape, begin + span.start, span.nbytes)
        for name, span in decode(text, size - begin, str(path)).items()
    }


def _header_length(prefix: bytes, size: int, path: Path) -> int:
    if prefix == b"version ":
        raise ModelError(f"{path}: a git-lfs pointer, not the weights; run `git lfs pull` in its folder")
    length = int.from_bytes(prefix, "little")
    if len(prefix) < LENGTH_BYTES or (length <= MAX_HEADER_BYTES and LENGTH_BYTES + length > size):
        raise ModelError(f"{path}: truncated: the header does not fit in the file's {size} bytes; download it again")
    if length > MAX_HEADER_BYTES:
        raise ModelError(
            f"{path}: header of {length} bytes, at most {MAX_HEADER_BYTES} expected; not a safetensors file"
        )
    return length


def _fill(file: FileIO, view: memoryview) -> int:
    done = 0  # one read returns at most 2 GiB
    while done < len(view) and (count := file.readinto(view[done:])):
        done += count
    return done


def _hash(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= HASHED_WHOLE_BYTES:
            return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
        prefix = file.read(LENGTH_BYTES)
        digest = hashlib.sha256(size.to_bytes(8, "little") + prefix)
        digest.update(file.read(min(int.from_bytes(prefix, "little"), MAX_HEADER_BYTES)))
        for sample in range(SAMPLES):
            file.seek(sample * (size - SAMPLE_BYTES) // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return f"sampled:{digest.hexdigest()}"
