# SPDX-License-Identifier: Apache-2.0
"""What is inside a folder: what a run wrote down, or what config.json and the headers of another tool's files say."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from quantkit.checkpoint.reader import Checkpoint, open_checkpoint
from quantkit.errors import ModelError
from quantkit.formats import Format
from quantkit.plan import OUTSIDE, LinearPlan, number_ranges
from quantkit.quantized import packed_names, quantization_of, read_config, stored_linears, writer
from quantkit.results.document import RESULT, read_result
from quantkit.scheme import Scheme
from quantkit.serving.fit import shapes_in
from quantkit.units import format_bytes


def inspect_folder(out: Path) -> dict[str, Any]:
    """The result document of a finished run; of another tool's checkpoint what its files say, under the same names.

    For those: out, model (its architecture), format, made_by, act_order, layers (method and loss are None), kept (full
    names of the linears in 16 bit), bits_per_weight, total_bytes, tensor_bytes. The linears of a .gguf
    have the names they have there, and the type of their blocks for a method.

    Raises:
        OutputError: see `read_result`. ModelError: see `stored.stored_linears`.
    """
    if (path := _lone_gguf(out)) is not None:
        return _inspect_gguf(path)
    if not out.is_dir():
        raise ModelError(f"{out}: no such folder; expected a quantized checkpoint")
    if (out / RESULT).is_file() or (out / "journal.jsonl").is_file():
        return read_result(out)
    raw = read_config(out)
    quantization = quantization_of(raw)
    if not quantization:
        raise ModelError(
            f"{out}: config.json has no quantization_config, and there is no {RESULT}; nothing is quantized"
        )
    checkpoint = open_checkpoint(out)
    fmt, linears = stored_linears(shapes_in(raw), checkpoint, quantization)
    layers = [_layer(checkpoint, fmt, linear, linear.scheme) for linear in linears if linear.scheme is not None]
    weights = sum(layer["out_features"] * layer["in_features"] for layer in layers)
    return {
        "out": str(out),
        "model": raw["model_type"],
        "format": fmt.name,
        "made_by": writer(raw),
        "act_order": bool(quantization.get("desc_act")),
        "layers": layers,
        "kept": [linear.name for linear in linears if linear.scheme is None],
        "bits_per_weight": 8 * sum(layer["bytes"] for layer in layers) / weights if weights else 16.0,
        "total_bytes": sum((out / name).stat().st_size for name in checkpoint.files),
        "tensor_bytes": sum(entry.nbytes for entry in checkpoint.entries.values()),
    }


def _lone_gguf(out: Path) -> Path | None:
    """A .gguf file, or the only one of a folder with no other weights and nothing of ours."""
    if out.is_file() and out.suffix == ".gguf":
        return out
    if (out / RESULT).is_file() or not any(out.glob("*.gguf")):
        return None
    from quantkit.gguf.reading import find_gguf  # imports torch

    return find_gguf(out, None)


def _inspect_gguf(path: Path) -> dict[str, Any]:
    from quantkit.gguf.file import open_gguf  # imports torch
    from quantkit.scheme import NAMED

    file = open_gguf(path)
    layers, kept = [], []
    for name, info in file.infos.items():
        _, _, rest = name.partition("blk.")
        number, _, local = rest.removesuffix(".weight").partition(".")
        if name == "output.weight":
            number, local = str(OUTSIDE), "output"
        elif len(info.shape) != 2 or not number.isdigit():
            continue
        scheme = NAMED.get(info.type)
        if scheme is None:
            kept.append(name)
            continue
        layers.append(_row(name, int(number), local, scheme, info.nbytes, info.shape) | {"method": info.type})
    weights = sum(layer["out_features"] * layer["in_features"] for layer in layers)
    return {
        "out": str(path),
        "model": str(file.metadata.get("general.architecture")),
        "format": "gguf",
        "made_by": str(file.metadata.get("general.quantized_by", "unknown")),
        "act_order": False,
        "layers": layers,
        "kept": kept,
        "bits_per_weight": 8 * sum(layer["bytes"] for layer in layers) / weights if weights else 16.0,
        "total_bytes": path.stat().st_size,
        "tensor_bytes": sum(info.nbytes for info in file.infos.values()),
    }


def _layer(checkpoint: Checkpoint, fmt: Format, linear: LinearPlan, scheme: Scheme) -> dict[str, Any]:
    stored = sum(checkpoint.entries[name].nbytes for name in packed_names(fmt, linear))
    kind = linear.local.rpartition(".")[2]
    return _row(linear.name, linear.layer, kind, scheme, stored, (linear.out_features, linear.in_features))


def _row(name: str, layer: int, kind: str, scheme: Scheme, nbytes: int, shape: Sequence[int]) -> dict[str, Any]:
    return {
        "name": name,
        "layer": layer,
        "kind": kind,
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "symmetric": scheme.symmetric,
        "method": None,
        "loss": None,
        "bytes": nbytes,
        "out_features": shape[0],
        "in_features": shape[1],
    }


def inspect_table(result: dict[str, Any]) -> Group:
    """Per kind of linear and scheme: how many, bits, group, method, bytes, mean and worst error; then the totals."""
    table = Table("linears", "layers", "bits", "group", "zero point", "method", "bytes", "error", "worst", box=None)
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for layer in result["layers"]:
        key = (layer["kind"], layer["bits"], layer["group_size"], layer["symmetric"], layer["method"])
        groups.setdefault(key, []).append(layer)
    for (kind, bits, group, symmetric, method), members in groups.items():
        losses = [member["loss"] for member in members if member["loss"] is not None]
        table.add_row(
            kind,
            number_ranges([member["layer"] for member in members if member["layer"] >= 0]),
            str(bits),
            "rows" if group == -1 else str(group),
            "middle" if symmetric else "per group",
            method or "",
            format_bytes(sum(member["bytes"] for member in members)),
            f"{sum(losses) / len(losses):.3%}" if losses else "",
            f"{max(losses):.3%}" if losses else "",
        )
    totals = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    totals.add_row("model", str(result["model"]))
    totals.add_row("format", str(result["format"]))
    totals.add_row(
        "size", f"{format_bytes(result['total_bytes'])}, {result['bits_per_weight']:.3f} bits per quantized weight"
    )
    if result.get("kept"):
        totals.add_row("in 16 bit", ", ".join(result["kept"][:4]) + (" ..." if len(result["kept"]) > 4 else ""))
    if result.get("act_order"):
        totals.add_row("act-order", "columns that share a scale are not side by side (desc_act)")
    if result.get("verification"):
        measured = result["verification"]
        kl = measured["kl_divergence"]
        figure = "not measured" if kl is None else f"{kl:.5f} nats"
        totals.add_row("KL divergence", f"{figure}, verdict {measured['verdict']} when it was measured")
    if result.get("converted"):
        source = result["converted"]
        totals.add_row("converted from", f"{source['from_format']}, made by {source['made_by']}: {source['from']}")
    ours = "quantkit_version" in result
    totals.add_row(
        "made by", f"quantkit {result['quantkit_version']}: {result['command']}" if ours else result["made_by"]
    )
    return Group(table, totals)
