# SPDX-License-Identifier: Apache-2.0
"""What is inside a folder: what a run wrote down, or what config.json and the headers of another tool's files say."""

from collections.abc import Sequence
from pathlib import Path

from quantkit.errors import ModelError
from quantkit.formats.gguf import scheme_of_type
from quantkit.plan import OUTSIDE, LinearPlan
from quantkit.quantized import open_quantized, writer
from quantkit.records import Foreign, Linear, Result
from quantkit.results.document import RESULT, read_result


def inspect_folder(out: Path) -> Result | Foreign:
    """What a finished run wrote down; of another tool's checkpoint what its files say.

    The linears of a .gguf have the names they have there, and the type of their blocks for a method.

    Raises:
        OutputError: see `read_result`. ModelError: see `quantized.open_quantized`.
    """
    if (path := _lone_gguf(out)) is not None:
        return _inspect_gguf(path)
    if not out.is_dir():
        raise ModelError(f"{out}: no such folder; expected a quantized checkpoint")
    if (out / RESULT).is_file() or (out / "journal.jsonl").is_file():
        return read_result(out)
    opened = open_quantized(out)
    layers = [linear.record(opened.stored_bytes(linear), method=None, loss=None) for linear in opened.quantized]
    return Foreign(
        out=str(out),
        model=opened.raw["model_type"],
        format=opened.format.name,
        made_by=writer(opened.raw),
        act_order=bool(opened.quantization.get("desc_act")),
        layers=layers,
        kept=[linear.name for linear in opened.linears if linear.scheme is None],
        bits_per_weight=opened.bits_per_weight,
        total_bytes=sum((out / name).stat().st_size for name in opened.files),
        tensor_bytes=sum(entry.nbytes for entry in opened.checkpoint.entries.values()),
    )


def _bits_per_weight(layers: Sequence[Linear]) -> float:
    weights = sum(layer.weights for layer in layers)
    return 8 * sum(layer.bytes for layer in layers) / weights if weights else 16.0


def _lone_gguf(out: Path) -> Path | None:
    """A .gguf file, or the only one of a folder with no other weights and nothing of ours."""
    if (out / RESULT).is_file() or not (out.is_file() or any(out.glob("*.gguf"))):
        return None
    from quantkit.gguf.reading import find_gguf  # imports torch

    return find_gguf(out, None)


def _inspect_gguf(path: Path) -> Foreign:
    from quantkit.gguf.file import open_gguf  # imports torch

    file = open_gguf(path)
    layers, kept = [], []
    for name, info in file.infos.items():
        _, _, rest = name.partition("blk.")
        number, _, local = rest.removesuffix(".weight").partition(".")
        if name == "output.weight":
            number, local = str(OUTSIDE), "output"
        elif len(info.shape) != 2 or not number.isdigit():
            continue
        scheme = scheme_of_type(info.type)
        if scheme is None:
            kept.append(name)
            continue
        linear = LinearPlan(name, int(number), local, info.shape[0], info.shape[1], scheme)
        layers.append(linear.record(info.nbytes, method=info.type, loss=None))
    return Foreign(
        out=str(path),
        model=str(file.metadata.get("general.architecture")),
        format="gguf",
        made_by=str(file.metadata.get("general.quantized_by", "unknown")),
        act_order=False,
        layers=layers,
        kept=kept,
        bits_per_weight=_bits_per_weight(layers),
        total_bytes=path.stat().st_size,
        tensor_bytes=sum(info.nbytes for info in file.infos.values()),
    )
