# SPDX-License-Identifier: Apache-2.0
"""Sizes, counts and times as people write them. Binary units are binary, everywhere."""

import re

from quantkit.errors import InputError

_BYTES = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SIZES = {
    **{name.lower(): size for name, size in _BYTES.items()},
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,  # decimal, as disks and cards are sold
    "k": 2**10,
    "m": 2**20,
    "g": 2**30,
    "t": 2**40,
}
_TOKENS = {"": 1, "k": 2**10, "m": 2**20}


def parse_bytes(text: str, option: str) -> int:
    """Read a size: "22GiB", "500MiB", "123456B"; "24GB" is 24 x 10**9, and "24G" is 24GiB.

    Raises:
        InputError: anything else.
    """
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)\s*([kmgt]?i?b|[kmgt])", text.strip().lower())
    if not match or match[2] not in _SIZES:
        raise InputError(f"{option}: expected a size such as 22GiB, 500MiB or 123456B, got {text!r:.60}")
    unit = _SIZES[match[2]]
    return int(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit


def parse_tokens(text: str, option: str) -> int:
    """Read a number of tokens: "16k" is 16384, "1M" is 1048576, "8192" is itself.

    Raises:
        InputError: anything else, or zero.
    """
    match = re.fullmatch(r"(\d{1,18})([km]?)", text.strip().lower())
    count = int(match[1]) * _TOKENS[match[2]] if match else 0
    if count < 1:
        raise InputError(f"{option}: expected a number of tokens such as 8192, 16k or 1M, got {text!r:.60}")
    return count


def format_bytes(count: int) -> str:
    """22.00 GiB, 500.0 MiB, 12 B: the largest unit that leaves at least 1."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if count >= _BYTES[unit]:
            return f"{count / _BYTES[unit]:.2f} {unit}"
    return f"{count} B"


def format_seconds(seconds: float) -> str:
    """1:02:03, 4:05, 0:07."""
    whole = int(seconds + 0.5)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
