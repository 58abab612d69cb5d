# SPDX-License-Identifier: Apache-2.0
"""What a run makes: everything that determines its bytes."""

from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch

from quantkit import __version__
from quantkit.calibration.tokens import TokenSet
from quantkit.checkpoint.reader import fingerprint
from quantkit.dtypes import SERVED
from quantkit.hardware.machine import device_name
from quantkit.methods.table import Options
from quantkit.pipeline.runtime import Runtime
from quantkit.plan import LinearPlan, Plan

TUNING_TOKENS = 2**18  # to tune on; what the calibration set lacks, the original model writes,
MOST_COPIES = 3  # as copies of it
DRIFT_TOKENS = 2**15  # that the drift is summed up of at least, where it is not of all


@dataclass(frozen=True)
class Job:
    """What a run makes, and where.

    runtime: the model, and where it runs; the checkpoint is written to its folder
    method: a name in METHODS, for the linears whose plan names no other
    calibration: None when no method needs one
    evaluation: None to leave out verification
    inputs: what calibrates a layer: "quantized", what it will see after the layers before it, or "original"
    amend: make finished layers of another recipe anew, from the first that differs, instead of refusing them
    served: the dtype that the figures are of: an engine casts to it what files hold in float16; None: no dtype is
    written down
    """

    runtime: Runtime
    plan: Plan
    method: str
    options: Options
    calibration: TokenSet | None = None
    evaluation: TokenSet | None = None
    inputs: str = "quantized"
    amend: bool = False
    served: str | None = SERVED

    @property
    def reference(self) -> TokenSet | None:
        """The first calibration samples, which travel through the original model too; all of them on a GPU.

        On a CPU half of them, unless the options say how many: a second model costs a CPU as much as all the rest, and
        half of the drift is nearly as good (`LOG.md`). Tuning aims at what the original makes of every sample.
        """
        every = self.calibration
        if every is None or not self.options.needs_original or self.inputs != "quantized":
            return None
        count = self.options.drift_samples
        if count is None and self.runtime.device.type == "cpu":
            count = max(-(-every.samples // 2), -(-DRIFT_TOKENS // every.seqlen))
        return every if count is None or self.options.tune else replace(every, input_ids=every.input_ids[:count])

    def chosen_options(self) -> dict[str, Any]:
        """The options for a record, with what they left to be chosen."""
        return vars(self.options) | {"drift_samples": self.reference.samples if self.reference else 0}

    @property
    def tuning_copies(self) -> int:
        """How many rewritten copies of the calibration set tuning wants."""
        if self.calibration is None or not self.options.tune:
            return 0
        return min(MOST_COPIES, -(-TUNING_TOKENS // self.calibration.input_ids.numel()) - 1)

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to be continued: everything that the bytes of the shards depend on.

        Mixed schemes stand in the records of the layers instead: see `resume`.
        """
        schemes = {str(linear.scheme) for linear in self.plan.linears}
        return {
            "quantkit": __version__,
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "device": device_name(self.runtime.device),
            "method": self.method,
            "format": self.plan.format.name,
            "scheme": schemes.pop() if len(schemes) == 1 and not self.amend else "by linear",
            "options": self.chosen_options(),
            "calibration": self.calibration.sha256 if self.calibration else None,
            "model": fingerprint(self.runtime.model.checkpoint),
        } | ({"inputs": self.inputs} if self.inputs != "quantized" else {})

    def method_of(self, linear: LinearPlan) -> str:
        """The method that chooses the integers of a linear."""
        return linear.method or self.method
