# SPDX-License-Identifier: Apache-2.0
"""The methods as rows, and what may be said about how they choose codes. Imports no torch: the command line has its
options and defaults from here.
"""

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
    def compensates(self) -> bool:
        """Whether later columns make up for the error of earlier ones."""
        return self.rounding == "gptq"

    @property
    def needs_original(self) -> bool:
        """Whether the inputs of the original model are wanted beside those of the quantized one."""
        return self.tune or (self.compensates and self.correct > 0)


@dataclass(frozen=True)
class Method:
    """A way to choose the codes of a weight; `site.QUANTIZE` has the function under the same name.

    calibrates: whether it needs to see what linears read; folds: whether it scales input channels, which an earlier op
    undoes; nearest: whether it can also round to nearest after calibration
    formats, symmetric: where the user has not said it, what it is stored as (the first that suits the scheme), and
    whether the zero point is fixed: what engines run fastest
    """

    name: str
    help: str
    calibrates: bool
    folds: bool
    nearest: bool
    formats: tuple[str, ...]
    symmetric: bool

    @property
    def shares_factor(self) -> bool:
        """Whether it takes the Gram matrix as it is, so that one factorisation serves several runs."""
        return self.calibrates and not self.folds


METHODS = {
    row.name: row
    for row in (
        Method(
            "awq",
            "Quantize with AWQ. Scales the channels that matter, then rounds with error compensation.",
            calibrates=True,
            folds=True,
            nearest=True,
            formats=("awq", "compressed-tensors"),
            symmetric=False,
        ),
        Method(
            "gptq",
            "Quantize with GPTQ. Rounds column by column; later columns make up for the error of earlier ones.",
            calibrates=True,
            folds=False,
            nearest=False,
            formats=("gptq", "gptq_v2", "compressed-tensors"),
            symmetric=True,
        ),
        Method(
            "rtn",
            "Quantize by rounding to the nearest code. Needs no calibration.",
            calibrates=False,
            folds=False,
            nearest=True,
            formats=("awq", "compressed-tensors"),
            symmetric=False,
        ),
    )
}
