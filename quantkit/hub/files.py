# SPDX-License-Identifier: Apache-2.0
"""Which files of an output folder go up, whether they are those that were verified, and the card among them."""

import builtins
import hashlib
import html
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit.checkpoint.companions import is_file_name
from quantkit.checkpoint.reader import INDEX, SINGLE, shorten
from quantkit.errors import OutputError
from quantkit.jsonfile import read_object
from quantkit.text import clean_line

RESULT, CARD, JOURNAL = "quantkit.json", "README.md", "journal.jsonl"
REQUIRED = ("config.json",)  # beside safetensors: a .gguf says itself what it is
OPTIONAL = tuple(
    f"{RESULT} {CARD} report.html generation_config.json quantize_config.json tokenizer.json tokenizer_config.json "
    "tokenizer.model special_tokens_map.json added_tokens.json vocab.json merges.txt vocab.txt spiece.model "
    "chat_template.jinja chat_template.json tekken.json preprocessor_config.json processor_config.json".split()
)
WEIGHTS = (".safetensors", ".gguf")


@dataclass(frozen=True)
class Upload:
    """A file of the checkpoint: where it is, and what must arrive.

    name: in the repository
    content: what is sent in place of the file's bytes
    """

    name: str
    path: Path
    bytes: int
    sha256: str
    content: builtins.bytes | None = field(default=None, repr=False)


def files_to_push(out: Path) -> list[Upload]:
    """The checkpoint's own files with their sizes and hashes, sorted by name.

    They are the weights that the index (or quantkit.json) names, whatever else quantkit.json lists under `files`, and
    the well-known files of a checkpoint. Never the journal, hidden files, links that leave the folder, or a file that
    nothing names.

    Raises:
        OutputError: a file that the checkpoint needs is missing or lies elsewhere, or a name is not a plain file name.
    """
    required, optional = _names(out)
    if missing := [name for name in required if _inside(out, name) is None]:
        raise OutputError(
            f"{out}: {shorten(missing)} is part of the checkpoint but not a file in it; finish the run or copy it there"
        )
    found = [(name, path) for name in sorted({*required, *optional}) if (path := _inside(out, name)) is not None]
    return [_hashed(name, path) for name, path in found]


def check(out: Path, uploads: Sequence[Upload], *, force: bool) -> dict[str, Any]:
    """Hold the files against quantkit.json: {"forced", "reasons", "verdict", "result"}.

    `forced` says whether `force` was needed, `reasons` why, `verdict` is what the verification said (None without one),
    and `result` is the content of quantkit.json.

    Raises:
        OutputError: there is no passing verification, or a file is not the one that was verified, and force is False.
    """
    result = _result(out)
    reasons = _objections(result, {upload.name: upload for upload in uploads})
    if reasons and not force:
        more = f" (and {len(reasons) - 3} more)" if len(reasons) > 3 else ""
        raise OutputError(
            f"{out}: not pushed: {'; '.join(reasons[:3])}{more}; "
            f"run `quantkit verify {out}`, or push with --force, which the model card will say"
        )
    verification = result.get("verification")
    verdict = verification.get("verdict") if isinstance(verification, dict) else None
    return {"forced": bool(reasons), "reasons": reasons, "verdict": verdict, "result": result}


def _objections(result: Mapping[str, Any], uploads: Mapping[str, Upload]) -> list[str]:
    if not result:
        return [f"no {RESULT}, so nothing says that it was verified"]
    reasons = []
    verification = result.get("verification")
    if not isinstance(verification, dict):
        reasons.append(f"{RESULT} holds no verification")
    elif verification.get("verdict") != "pass":
        why = verification.get("reasons")
        said = f" ({'; '.join(map(clean_line, why[:3]))})" if isinstance(why, list) and why else ""
        reasons.append(f"the verdict is {clean_line(verification.get('verdict'))}, not pass{said}")
    listed = _manifest(result)
    for name, (size, sha256) in listed.items():
        found = uploads[name]
        if found.bytes != size:
            reasons.append(f"{name} is not the file that was verified: expected {size} bytes, got {found.bytes}")
        elif found.sha256 != sha256:
            reasons.append(f"{name} is not the file that was verified: its sha256 is another")
    unknown = [name for name in uploads if name.endswith(WEIGHTS) and name not in listed]
    return reasons + [f"{name} is not among the files of {RESULT}, so it was not verified" for name in unknown]


def _names(out: Path) -> tuple[list[str], list[str]]:
    """The files that must be there, and those that go up when they are."""
    listed = list(_manifest(_result(out)))
    if (out / INDEX).exists():
        weight_map = _read_json(out / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise OutputError(f"{out / INDEX}: expected a weight_map; write the checkpoint again")
        weights = [INDEX, *(_plain(name, out / INDEX) for name in weight_map.values())]
    elif any(name.endswith(WEIGHTS) for name in listed):
        weights = []
    else:
        weights = [SINGLE]
    needed = {*weights, *listed}
    required = REQUIRED if any(name.endswith(".safetensors") for name in needed) else ()
    return sorted({*required, *needed}), [*OPTIONAL, *REQUIRED]


def _manifest(result: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    """quantkit.json's `files`: name -> (bytes, sha256)."""
    listed = result.get("files", [])
    if not isinstance(listed, list):
        raise OutputError(f"{RESULT}: files: expected a list, got {type(listed).__name__}; run the command again")
    manifest = {}
    for entry in listed:
        fields = entry if isinstance(entry, dict) else {}
        size, sha256 = fields.get("bytes"), fields.get("sha256")
        if not isinstance(size, int) or not isinstance(sha256, str):
            raise OutputError(f"{RESULT}: files: expected name, bytes and sha256, got {clean_line(entry)}")
        manifest[_plain(fields.get("name"), Path(RESULT))] = (size, sha256)
    return manifest


def _plain(name: Any, where: Path) -> str:
    if not is_file_name(name) or name == JOURNAL or set(name) & set(':*?"<>|'):
        raise OutputError(
            f"{where}: {clean_line(name)} is not a plain name of a file of the checkpoint; it must not go up"
        )
    return str(name)


def _inside(out: Path, name: str) -> Path | None:
    """The file of this name, unless it is missing, not a regular file, or a link that leads elsewhere."""
    path = out / name
    folder = (out.resolve() / name).parent
    return path if path.is_file() and path.resolve().parent == folder else None


def _hashed(name: str, path: Path) -> Upload:
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            return Upload(name, path, file.tell(), sha256)
    except OSError as error:
        raise OutputError(f"{path}: cannot be read: {error.strerror}; repair the folder") from error


def _result(out: Path) -> dict[str, Any]:
    return _read_json(out / RESULT) if _inside(out, RESULT) else {}


def _read_json(path: Path) -> dict[str, Any]:
    return read_object(path, "the run must write it again", OutputError)


# ----------------------------------------------------------------------------------------------------------- the card


def with_note(card: str, reasons: Sequence[str]) -> str:
    """The model card with a note on top, below its metadata, that says the push was forced, and why."""
    header = re.match(r"---\n.*?\n---\n", card, re.DOTALL)
    end = header.end() if header else 0
    lines = [f"> - {html.escape(clean_line(reason), quote=False)}" for reason in reasons]
    note = "\n".join(["> [!WARNING]", "> Pushed with `--force`, without a passing and matching verification:", *lines])
    return f"{card[:end]}\n{note}\n\n{card[end:].lstrip()}"


def forced_card(out: Path, facts: Mapping[str, Any], card: Callable[[Sequence[str]], str] | None) -> Upload:
    reasons = facts["reasons"]
    if card is not None and facts["result"]:
        text = card(reasons)
    else:
        path = _inside(out, CARD)
        text = with_note(path.read_text(encoding="utf-8") if path else "", reasons)
    return _instead(out / CARD, text)


def named_card(card: Upload, named: Callable[[str], str]) -> Upload:
    """The card as it lies there, which its owner may have changed, with the repository's name in its commands."""
    return _instead(card.path, named(card.path.read_text(encoding="utf-8")))


def _instead(path: Path, text: str) -> Upload:
    """A text that goes up in place of what the file holds."""
    content = text.encode()
    return Upload(path.name, path, len(content), hashlib.sha256(content).hexdigest(), content)
