# SPDX-License-Identifier: Apache-2.0
"""`quantkit convert FILE.gguf --to fp16`: the weights that a GGUF file stands for, as a 16-bit model's folder.

Its config and tokenizer come from the file's metadata, or from the original where that is named.
"""

import time
from pathlib import Path
from typing import Any

from quantkit import __version__
from quantkit.checkpoint.journal import Unit, open_journal
from quantkit.checkpoint.writer import require_disk, write_index, write_json
from quantkit.commands.conversion import FP16, ConvertRequest, unfinished, weight_error
from quantkit.convert.from_gguf import plain_shards, write_plain
from quantkit.dtypes import SERVED
from quantkit.errors import InputError, ModelError
from quantkit.gguf.file import open_gguf
from quantkit.gguf.folder import config_of, tokenizer_files
from quantkit.gguf.metadata import metadata_differences
from quantkit.gguf.reading import GGUFModel, open_gguf_model
from quantkit.hardware.machine import peak_rss_bytes, versions
from quantkit.jsonfile import read_object
from quantkit.model.config import config_from_dict, with_dtype, with_older_keys
from quantkit.model.skeleton import build
from quantkit.model.streaming import open_model
from quantkit.plan import DISK_MARGIN, ShardPlan
from quantkit.records import BaseModelFacts, Converted, Linear, Numbers, Result
from quantkit.report.terminal.screen import Terminal
from quantkit.results.folder import copy_companions, file_records, require_another, sha256_of, write_result
from quantkit.settings.defaults import find_model


def convert_from_gguf(request: ConvertRequest, path: Path, terminal: Terminal) -> tuple[Result, Path]:
    """Write the folder, and return what its quantkit.json says and where it is.

    Raises:
        InputError: another format than 16 bit. ModelError: a file that cannot be read, or is not of `against`.
        OutputError: the folder cannot be written.
    """
    began = time.monotonic()
    to, against = request.to, request.against
    if to != FP16:
        raise InputError(
            f"--to {to}: a .gguf becomes {FP16} first: quantkit convert {path} --to {FP16}; then quantize that folder"
        )
    out = request.out or Path("outputs") / f"{path.stem}-{to}"
    require_another(out, path.parent, against)
    opened, raw, original = _open(path, against, offline=request.offline)
    shards = plain_shards(opened.model)
    terminal.say(f"{path} -> {out} ({to})")
    require_disk(out, sum(shard.file_bytes for shard in shards if not (out / shard.file).exists()) + DISK_MARGIN)
    source = {path.name: sha256_of(path)}
    with open_journal(out, {"quantkit": __version__, "convert": to, "source": source}, fresh=request.fresh) as journal:
        for shard in terminal.steps(unfinished(journal, shards), "convert"):
            journal.append(write_plain(opened, shard, out))
        units = tuple(journal.finished.values())
        files = {unit.file: unit.sha256 for unit in units} | _beside(opened, raw, original, shards, out)
        result = _result(opened, shards, units, request.command, against or str(path)).having(
            files=file_records(out, files), seconds=time.monotonic() - began
        )
        write_result(out, result)
    return result, out


def _open(path: Path, against: str | None, *, offline: bool) -> tuple[GGUFModel, dict[str, Any], Path | None]:
    """The file, the content of its config.json, and the folder of the original if one is named."""
    if against is None:
        raw = config_of(open_gguf(path))
        return open_gguf_model(path, build(config_from_dict(raw))), raw, None
    original = open_model(find_model(against, offline=offline))
    opened = open_gguf_model(path, original)
    if differences := metadata_differences(opened.file, original):
        raise ModelError(f"{path}: is not of {against}: {differences[0]}; leave out --against")
    return opened, read_object(original.directory / "config.json", "expected a model"), original.directory


def _beside(
    opened: GGUFModel, raw: dict[str, Any], original: Path | None, shards: tuple[ShardPlan, ...], out: Path
) -> dict[str, str]:
    """Write what stands beside the shards: file -> sha256."""
    places = {name: (shard.file, spec.nbytes) for shard in shards for name, spec in shard.tensors.items()}
    total = sum(size for _, size in places.values())
    files = {
        "model.safetensors.index.json": write_index(out, {name: file for name, (file, _) in places.items()}, total),
        "config.json": write_json(out / "config.json", with_dtype(with_older_keys(raw), SERVED), finite=False),
    }
    if original is not None:
        return files | copy_companions(original, out)
    return files | {name: write_json(out / name, content) for name, content in tokenizer_files(opened.file).items()}


def _result(
    opened: GGUFModel, shards: tuple[ShardPlan, ...], units: tuple[Unit, ...], command: str, model: str
) -> Result:
    rows = [Linear.model_validate(row) for unit in units for row in unit.record["linears"]]
    errors = [row.weight_error for row in rows if row.weight_error is not None]
    notes = ["each weight is the float16 number nearest to what its block stands for; nothing was measured"]
    if not tokenizer_files(opened.file):
        notes.append("its tokenizer is of a kind that is not written here: copy tokenizer.json from the original")
    return Result(
        quantkit_version=__version__,
        command=command,
        model=model,
        base_model=BaseModelFacts(id=None, license=None),
        method="gguf",
        format=FP16,
        scheme=Numbers(bits=16, group_size=-1, symmetric=True),
        layers=[],
        bits_per_weight=16.0,
        total_bytes=sum(shard.file_bytes for shard in shards),
        tensor_bytes=sum(spec.nbytes for shard in shards for spec in shard.tensors.values()),
        peak_rss_bytes=peak_rss_bytes(),
        peak_device_bytes=0,
        device="cpu",
        torch_dtype=SERVED,
        versions=versions(),
        fallbacks=notes,
        converted=Converted(
            origin=str(opened.file.path),
            from_format=opened.format_name,
            made_by=str(opened.file.metadata.get("general.quantized_by", "unknown")),
            source={opened.file.path.name: sha256_of(opened.file.path)},
            lossless=False,
            equal=0,
            rounded=len(rows),
            weight_error=weight_error(errors),
        ),
        verification=None,
    )
