# SPDX-License-Identifier: Apache-2.0
"""What a run is: everything that determines its bytes."""

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from quantkit import __version__
from quantkit.calibration import TokenSet
from quantkit.checkpoint.reader import fingerprint
from quantkit.machine import device_name
from quantkit.model.streaming import StreamedModel
from quantkit.pipeline.evaluation import run_dtype
from quantkit.plan import LinearPlan, Plan
from quantkit.quantize.options import Options
from quantkit.ranks import ALONE, Ranks

TUNING_TOKENS = 2**18  # to tune on; what the calibration set lacks, the original model writes,
MOST_COPIES = 3  # as copies of it


@dataclass(frozen=True)
class Job:
    """Everything that determines a run.

    method: a name in METHODS, for the linears whose plan names no other; calibration: None when no method needs one;
    evaluation: None to leave out verification; device: where the layers run;
    place: where hidden states live ("device", "ram", "file"; None lets memory decide);
    batch: samples in a micro-batch (None: as many as are usual);
    kept_width: the widest inputs of linears that are kept until their layer is done (0: none; see `passage`);
    inputs: what calibrates a layer: "quantized", what it will see after the layers before it, or "original";
    amend: whether finished layers of another recipe are made anew (from the first that differs), not refused;
    ranks: the processes that share it; their number changes no byte of the result on a CPU.
    """

    model: StreamedModel
    plan: Plan
    method: str
    options: Options
    calibration: TokenSet | None
    evaluation: TokenSet | None
    out: Path
    device: torch.device
    place: str | None = None
    batch: int | None = None
    kept_width: int = 0
    inputs: str = "quantized"
    amend: bool = False
    ranks: Ranks = ALONE

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states and weights while running."""
        return run_dtype(self.model, self.device, f"{self.plan.linears[0].name}.weight")

    @property
    def follows_original(self) -> bool:
        """Whether the calibration samples travel through the original model too."""
        return self.calibration is not None and self.options.needs_original and self.inputs == "quantized"

    @property
    def tuning_copies(self) -> int:
        """How many rewritten copies of the calibration set tuning wants."""
        if self.calibration is None or not self.options.tune:
            return 0
        return min(MOST_COPIES, -(-TUNING_TOKENS // self.calibration.input_ids.numel()) - 1)

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to be continued: everything that the bytes of the shards depend on.

        Mixed schemes stand in the records of the layers instead: see `_compare_recipes`.
        """
        schemes = {str(linear.scheme) for linear in self.plan.linears}
        return {
            "quantkit": __version__,
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "device": device_name(self.device),
            "method": self.method,
            "format": self.plan.format.name,
            "scheme": schemes.pop() if len(schemes) == 1 and not self.amend else "by linear",
            "options": vars(self.options),
            "calibration": self.calibration.sha256 if self.calibration else None,
            "model": fingerprint(self.model.checkpoint),
        } | ({"inputs": self.inputs} if self.inputs != "quantized" else {})

    def method_of(self, linear: LinearPlan) -> str:
        """The method that chooses the integers of a linear."""
        return linear.method or self.method
