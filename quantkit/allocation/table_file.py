# SPDX-License-Identifier: Apache-2.0
"""What a pass has measured, as a file: `--table` serves other budgets, and smaller menus, of the same calibration."""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from quantkit import __version__
from quantkit.allocation.menu import Entry, Part, entry_name, parse_menu
from quantkit.allocation.problem import Problem
from quantkit.allocation.sensitivity import Measured
from quantkit.calibration.tokens import TokenSet
from quantkit.checkpoint.reader import fingerprint
from quantkit.checkpoint.writer import write_json
from quantkit.errors import InputError
from quantkit.files import read_bytes
from quantkit.hardware.machine import device_name
from quantkit.model.streaming import StreamedModel


def identity(
    problem: Problem, model: StreamedModel, tokens: TokenSet, probes: int, every: int, device: torch.device
) -> dict[str, Any]:
    """Everything that the measurements depend on; probes: windows that measure; every: see `table.is_probed`."""
    return {
        "model": fingerprint(model.checkpoint),
        "calibration": tokens.sha256,
        "probe_samples": probes,
        "every": every,
        "method": problem.method,
        "options": vars(problem.options),
        "format": problem.fmt.name,
        "symmetric": problem.symmetric,
        "device": device_name(device),
        "quantkit": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def write_table(path: Path, identity: Mapping[str, Any], problem: Problem, measured: Measured) -> None:
    """Write measurements to a JSON file."""
    document = {
        "identity": dict(identity),
        "parts": {_key(part): [linear.name for linear in linears] for part, linears in problem.parts.items()},
        "losses": {_key(p): {entry_name(e): x for e, x in row.items()} for p, row in measured.losses.items()},
        "swapped": {f"{_key(p)} {entry_name(e)}": x for (p, e), x in measured.swapped.items()},
        "tokens": measured.tokens,
    }
    write_json(path, document)


def read_table(path: Path, identity: Mapping[str, Any], problem: Problem) -> Measured | None:
    """Measurements of an earlier call; None when there are none.

    Raises:
        InputError: the file is damaged, of another model or calibration, or lacks an entry of the menu.
    """
    if not path.exists():
        return None
    try:
        raw = json.loads(read_bytes(path).decode("utf-8"))
        expected = json.loads(json.dumps(identity))
        other = [key for key in expected if raw["identity"].get(key) != expected[key]]
        if other:
            raise InputError(f"--table {path}: was measured with another {', '.join(other)}; choose another file")
        losses = {_part(p): {_entry(e, problem): float(x) for e, x in row.items()} for p, row in raw["losses"].items()}
        pairs = [(*key.split(" "), value) for key, value in raw["swapped"].items()]
        swapped = {(_part(p), _entry(e, problem)): float(x) for p, e, x in pairs}
        measured = Measured(losses, 0.0, swapped, int(raw["tokens"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"--table {path}: damaged ({type(error).__name__}); delete it, or choose another file"
        ) from error
    for part, entries in problem.menu.items():
        lacking = [entry_name(entry) for entry in entries if entry not in losses.get(part, {})]
        if lacking:
            name = problem.parts[part][0].name
            raise InputError(f"--table {path}: has no {', '.join(lacking)} of {name}; choose another file or --menu")
    return measured


def _entry(text: str, problem: Problem) -> Entry:
    (entry,) = parse_menu(text, problem.symmetric)
    return entry


def _key(part: Part) -> str:
    return f"{part[0]}.{part[1]}"


def _part(text: str) -> Part:
    layer, _, site = text.partition(".")
    return int(layer), int(site)
