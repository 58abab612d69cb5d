# SPDX-License-Identifier: Apache-2.0
"""What may be said about how integers are chosen. Imports no torch: the command line has its defaults from here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """Settings of the methods that change the result.

    act_order: GPTQ takes columns in order of falling diag(H), on grids fixed beforehand (no g_idx in the file)
    damp: added to diag(H), as a share of its mean
    rounding: "gptq" lets later columns make up for the error of earlier ones; "nearest" does not
    refine: how often codes and scales are gone over again after GPTQ (see `refine`)
    correct: the share of the inputs' drift from the original's that GPTQ makes up for (see `gptq.times_inverse`)
    drift_samples: of how many calibration samples, the first, that drift is summed up; None: see `Job.beside`
    tune: move codes and scales of each layer by gradients afterwards (see `tune`)
    """

    act_order: bool = True
    damp: float = 0.01
    rounding: str = "gptq"
    refine: int = 4
    correct: float = 0.5
    drift_samples: int | None = None
    tune: bool = False

    @property
    def needs_original(self) -> bool:
        """Whether the inputs of the original model are wanted beside those of the quantized one."""
        return self.tune or (self.rounding == "gptq" and self.correct > 0)
