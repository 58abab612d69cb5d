# SPDX-License-Identifier: Apache-2.0
"""The files that go along with a model's weights, decided by what they are: tokenizers and processors of any kind, chat
templates, generation settings, licences.

Everything goes along but weights, files that say how weights are quantized, what a run writes itself, and what only
people or a training run need. So a file that no list of ours knows is not lost.
"""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from quantkit.checkpoint.reader import is_plain_name

LARGEST = 256 * 2**20  # bytes; the largest tokenizers take 35 MB
FOLDER = "additional_chat_templates"  # the only sub-folder that is part of a model
SAID = 6  # names in a note

WEIGHTS = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.ggml", "*.onnx*", "*.msgpack", "*.h5", "*.ot"),
    *("*.pb", "*.tflite", "*.mlmodel", "*.engine", "*.npz", "*.npy", "*.pkl", "*.pickle", "*.joblib", "*.index.json"),
)
QUANTIZATION = ("quantize_config.json", "quant_config.json", "hf_quant_config.json", "quantization_config.json")
WRITTEN = ("config.json", "README.md", "report.html", "quantkit.json", "journal.jsonl")  # by a run itself
JUNK = (
    *("*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp", "*.ico", "*.mp4", "*.webm", "*.mp3", "*.wav", "*.pdf"),
    *("*.zip", "*.tar", "*.gz", "*.xz", "*.7z", "*.parquet", "*.ipynb", "*.log", "*.lock", "*.tmp", "*.sh", "*.html"),
    *("trainer_state.json", "*_results.json", "events.out.*", "requirements*.txt", "adapter_*", "README*", "*.pyc"),
    *("*.key", "*.pem", "*credentials*", "*.env", "token", "id_rsa*"),  # nobody means to publish these
)


def is_companion(name: str) -> bool:
    """Whether a file goes along, by its name relative to the model's folder."""
    parts = PurePosixPath(name).parts
    if len(parts) != 1 and (len(parts) != 2 or parts[0] != FOLDER):
        return False
    apart = (*WEIGHTS, *QUANTIZATION, *WRITTEN, *JUNK)
    return is_file_name(name) and not _matches(parts[-1], apart)


def companions(directory: Path) -> list[Path]:
    """The files of a model's folder that go along. A link counts only within the folder, or its hub cache's blobs."""
    return [path for path in _files(directory) if _goes_along(directory, path)]


def left_out(directory: Path) -> list[str]:
    """Notes that name what does not go along, beside weights, hidden files, and what a run writes itself."""
    known = (*WEIGHTS, *QUANTIZATION, *WRITTEN)
    others = [path for path in _files(directory) if not _goes_along(directory, path) and not _matches(path.name, known)]
    links = [path for path in others if not _lies_within(directory, path)]
    names = [_name(directory, path) for path in others if path not in links]
    names += [f"{path.name}/" for path in _folders(directory) if path.name != FOLDER]
    notes = [
        f"{_name(directory, path)} is a link out of {directory} and was not copied; put the file itself there"
        for path in links
    ]
    more = f" and {len(names) - SAID} more" if len(names) > SAID else ""
    return notes + ([f"not copied from {directory}: {', '.join(sorted(names)[:SAID])}{more}"] if names else [])


def is_file_name(name: Any) -> bool:
    """Whether a name that a file gives stays in the folder that it is joined to: plain, or in the one sub-folder."""
    return is_plain_name(name.removeprefix(f"{FOLDER}/") if isinstance(name, str) else name)


def _goes_along(directory: Path, path: Path) -> bool:
    return is_companion(_name(directory, path)) and _lies_within(directory, path) and path.stat().st_size <= LARGEST


def _files(directory: Path) -> list[Path]:
    paths = [*directory.glob("*"), *(directory / FOLDER).glob("*")]
    return sorted(path for path in paths if not path.name.startswith(".") and path.is_file())


def _folders(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("*") if not path.name.startswith(".") and path.is_dir())


def _name(directory: Path, path: Path) -> str:
    return path.relative_to(directory).as_posix()


def _lies_within(directory: Path, path: Path) -> bool:
    root = directory.resolve()
    return any(path.resolve().is_relative_to(place) for place in (root, root.parent.parent / "blobs"))


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name.lower(), pattern.lower()) for pattern in patterns)
