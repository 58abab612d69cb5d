# SPDX-License-Identifier: Apache-2.0
"""What conversions of every kind share: what is asked, which files are finished already, and measuring the result."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from quantkit.checkpoint.journal import Journal
from quantkit.commands.verify import measured_like, verify_files
from quantkit.errors import QuantkitError
from quantkit.plan import ShardPlan
from quantkit.records import Result, Verification, WeightError
from quantkit.report.terminal.screen import Terminal
from quantkit.results.folder import write_result

FP16 = "fp16"


@dataclass(frozen=True)
class Asked:
    """What the user asked for, whatever the target.

    source: a quantized folder, a .gguf file, or a model
    requantize: round again what the target does not hold
    against: the 16-bit model to measure with, on `evaluation` (None: as recorded)
    """

    source: str
    command: str
    out: Path | None = None
    requantize: bool = False
    fresh: bool = False
    against: str | None = None
    evaluation: str | None = None
    eval_samples: int | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    offline: bool = False


@dataclass(frozen=True)
class ConvertRequest(Asked):
    """The same for a folder of safetensors. engine: one that must load the result."""

    to: str = FP16
    engine: str | None = None


@dataclass(frozen=True)
class ExportRequest(Asked):
    """The same for one GGUF file. None: not said.

    type: of the linears; outside: of the embedding and the head; nearest: round without error compensation; the rest as
    in `commands.quantize.Request`
    """

    type: str | None = None
    outside: str = "f16"
    nearest: bool = False
    calib: str | None = None
    samples: int | None = None
    seqlen: int | None = None
    seed: int = 0
    verify: bool = True


def unfinished(journal: Journal, shards: Sequence[ShardPlan]) -> list[ShardPlan]:
    """The shards that are still to be written; a damaged one is, with all behind it."""
    for shard in shards:
        unit = journal.finished.get(shard.unit)
        if unit is not None and not journal.verify_unit(unit):
            journal.drop_from(shard.unit)
    return [shard for shard in shards if shard.unit not in journal.finished]


def weight_error(errors: Iterable[float]) -> WeightError | None:
    """Of the linears that were rounded, if there are any."""
    values = list(errors)
    return WeightError(mean=sum(values) / len(values), worst=max(values)) if values else None


def measured_again(
    request: Asked, result: Result, out: Path, terminal: Terminal, before: Verification | None, *, offline: bool
) -> Result:
    """The document with a new verification where the 16-bit model is at hand, else with a note that says why not.

    before: the verification of the source, whose tokens and limits are taken
    """
    asked = measured_like(
        before,
        out=out,
        command=request.command,
        against=request.against,
        evaluation=request.evaluation,
        eval_samples=request.eval_samples,
        device=request.device,
        offline=offline,
    )
    try:
        measured = verify_files(asked, terminal)
    except QuantkitError as error:
        if request.against is not None:
            raise
        note = f"what the conversion costs was not measured: {error}"
        result = result.having(fallbacks=[*result.fallbacks, note])
        write_result(out, result)
        return result
    assert isinstance(measured, Result)
    return measured
