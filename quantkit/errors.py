# SPDX-License-Identifier: Apache-2.0
"""Everything that quantkit raises on purpose.

QuantkitError                 a problem the user can fix: the CLI prints its one line and exits with 1
├── InputError                an option, recipe, or calibration source that cannot be used as given
├── ModelError                a model that is missing, damaged, or of a kind that is not supported
├── SchemeError               a scheme that a format, or the shape of a layer, cannot hold
│   └── EngineError           what an engine that was asked for (`--for`) would not load, one line a reason
├── OutputError               an output folder that cannot be written, is busy, or belongs to another run
├── NumericsError             values that are not finite where they must be
└── RankError                 another process of the same run that was lost

A message carries the name, what was expected, what was found, and what to do. Anything that is not a
QuantkitError (or a full disk) is a bug and keeps its traceback.
"""


class QuantkitError(Exception):
    """A problem the user can fix, told in one line."""


class InputError(QuantkitError):
    """An option, recipe, or calibration source that cannot be used as given."""


class ModelError(QuantkitError):
    """A model that is missing, damaged, or of a kind that is not supported."""


class SchemeError(QuantkitError):
    """A scheme that a format, or the shape of a layer, cannot hold; linears: full names of those it is of, if known."""

    def __init__(self, message: str, linears: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.linears = linears


class EngineError(SchemeError):
    """What an engine that was asked for would not load; each line of the message is one reason."""


class OutputError(QuantkitError):
    """An output folder that cannot be written, is busy, or belongs to another run."""


class NumericsError(QuantkitError):
    """Values that are not finite where they must be."""


class RankError(QuantkitError):
    """Another process of the same run that was lost."""
