# SPDX-License-Identifier: Apache-2.0
"""From the words of an option to the value that is meant. The imports wait until a command runs."""

from quantkit.errors import InputError
from quantkit.methods.table import METHODS, Options


def size(text: str | None, option: str) -> int | None:
    """The bytes of "22GiB"; None where nothing is given."""
    from quantkit.units import parse_bytes

    return parse_bytes(text, option) if text else None


def tokens(text: str | None, option: str) -> int | None:
    """The tokens of "16k"; None where nothing is given."""
    from quantkit.units import parse_tokens

    return parse_tokens(text, option) if text else None


def percent(text: str | None) -> float | None:
    """The share that "5%" is; None where nothing is given."""
    from quantkit.verdict import parse_percent

    return parse_percent(text) if text else None


def sources(calib: str | None, evaluation: str | None, field: str | None) -> tuple[str | None, str | None]:
    """--calib and --eval, with what --field says."""
    if not field:
        return calib, evaluation
    from quantkit.calibration.sources import with_field

    calib, evaluation = with_field(field, calib, evaluation)
    return calib, evaluation


def place(states: str) -> str | None:
    """Where hidden states live; None: what fits decides."""
    return None if states == "auto" else states


def require_possible(method: str, options: Options) -> None:
    """Refuse options that the method does not have.

    Raises:
        InputError: one of them is set.
    """
    if options.tune and not METHODS[method].calibrates:
        raise InputError(f"--quality best: {method} uses no calibration; use awq or gptq")
    if options.rounding == "nearest" and not METHODS[method].nearest:
        raise InputError(f"--rounding nearest: {method} rounds with error compensation; use awq or rtn")


def listed(text: str, option: str) -> tuple[str, ...]:
    """The words of a list with commas, each once."""
    words = tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not words:
        raise InputError(f"{option}: expected at least one value, got {text!r}")
    return words


def numbers(text: str, option: str) -> tuple[int, ...]:
    """The whole numbers of a list with commas, each once."""
    try:
        return tuple(int(word) for word in listed(text, option))
    except ValueError:
        raise InputError(f"{option}: expected whole numbers with commas between them, got {text!r}") from None
