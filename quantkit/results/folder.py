# SPDX-License-Identifier: Apache-2.0
"""A finished folder: what stands in it beside the shards, and what is recorded of it.

quantkit.json is written last: it says that all is there.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantkit.checkpoint.companions import companions, is_file_name
from quantkit.checkpoint.journal import JOURNAL
from quantkit.checkpoint.writer import copy_file, make_folder, write_index, write_json, write_text
from quantkit.dtypes import SERVED
from quantkit.errors import InputError, ModelError, OutputError
from quantkit.formats import Format
from quantkit.model.config import QUANTIZED, unsaid_tie, with_dtype, with_older_keys
from quantkit.records import File, Result
from quantkit.report.card import render_card
from quantkit.report.pages.run import render_report
from quantkit.results.document import RESULT, read_result


def result_of(folder: Path) -> Result | None:
    """quantkit.json of a folder of ours; None for a checkpoint of another tool.

    Raises:
        ModelError: no such folder. OutputError: a run that is not finished, or a damaged document.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder; expected a quantized checkpoint")
    return read_result(folder) if (folder / RESULT).exists() or (folder / JOURNAL).exists() else None


def require_another(out: Path, *sources: Path | str | None) -> None:
    """Refuse to write over what is read: starting over would remove it.

    sources: folders; a name that is none, as of the hub, or None is let pass

    Raises:
        InputError: one of them is that folder.
    """
    if any(out.resolve() == Path(source).resolve() for source in sources if source is not None):
        raise InputError(f"--out {out}: is the model or checkpoint itself; choose another folder")


def changed_files(out: Path, recorded: Result | None) -> list[str]:
    """One line for each file of quantkit.json that is missing or has another sha256, and for weights that it lacks.

    Raises:
        OutputError: quantkit.json lists what cannot be a file of the folder.
    """
    if recorded is None:
        return []
    reasons = []
    for file in recorded.files:
        if not is_file_name(file.name):
            raise OutputError(f"{out / RESULT}: files: {ascii(file.name)[:80]} is not the name of a file")
        path = out / file.name
        if not path.is_file():
            reasons.append(f"{file.name} is missing")
        elif path.stat().st_size != file.bytes or sha256_of(path) != file.sha256:
            reasons.append(f"{file.name} is not the file that the run wrote: its sha256 is another than in {RESULT}")
    known = {file.name for file in recorded.files}
    unknown = sorted(path.name for path in out.glob("*.safetensors") if path.name not in known)
    return reasons + [f"{name} is not among the files of {RESULT}" for name in unknown]


def sha256_of(path: Path) -> str:
    """Of a file, as hexadecimal digits.

    Raises:
        ModelError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error


def write_beside(
    out: Path,
    source: Path,
    weight_map: Mapping[str, str],
    tensor_bytes: int,
    config: Mapping[str, Any],
    fmt: Format | None,
) -> dict[str, str]:
    """Write what engines read beside the shards: index, config.json, files of the format, tokenizer and its like.

    weight_map: tensor -> file; fmt: None for 16 bit. Returns the sha256 of each file.
    """
    files = {
        "model.safetensors.index.json": write_index(out, weight_map, tensor_bytes),
        "config.json": write_json(out / "config.json", config, finite=False),  # as the model's own
    }
    if fmt is not None:
        for name, content in fmt.extra_files(config["quantization_config"]).items():
            files[name] = write_json(out / name, content)
    return files | copy_companions(source, out)


def copy_companions(source: Path, out: Path, patterns: Sequence[str] = ("*",)) -> dict[str, str]:
    """Copy what goes along with the weights of a model's folder, as far as a pattern matches: name -> sha256."""
    copied = {}
    for path in companions(source):
        if any(path.match(pattern) for pattern in patterns):
            name = path.relative_to(source).as_posix()
            make_folder((out / name).parent)
            copied[name] = copy_file(path, out / name)
    return copied


def file_records(out: Path, hashes: Mapping[str, str]) -> list[File]:
    """The `files` of quantkit.json; hashes: name -> sha256."""
    return [
        File(name=name, bytes=(out / name).stat().st_size, sha256=sha256) for name, sha256 in sorted(hashes.items())
    ]


def write_result(out: Path, result: Result) -> None:
    """The report, the model card, and then quantkit.json."""
    write_text(out / "report.html", render_report(result, str(out)))
    write_text(out / "README.md", render_card(result, str(out)))
    write_json(out / RESULT, result.content())


def quantized_config(
    directory: Path, quantization_config: Mapping[str, Any], served: str | None = None
) -> dict[str, Any]:
    """The model's config.json with the quantization added, and the dtype to serve it in (float16)."""
    config: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if (tied := unsaid_tie(directory, config)) is not None:
        config["tie_word_embeddings"] = tied
    config = with_dtype(with_older_keys(config), served or SERVED)
    return {k: v for k, v in config.items() if k not in QUANTIZED} | {"quantization_config": dict(quantization_config)}
