# SPDX-License-Identifier: Apache-2.0
"""Sizes, counts and times as people write them. Binary units are binary, everywhere."""

import re

from quantkit.errors import InputError

_BYTES = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def parse_bytes(text: str, option: str) -> int:
    """Read a size: "22GiB", "500MiB", "123456B".

    Raises:
        InputError: anything else.
    """
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)\s*(B|KiB|MiB|GiB|TiB)", text.strip())
    if not match:
        raise InputError(f"{option}: expected a size such as 22GiB, 500MiB or 123456B, got {text!r:.60}")
    return int(float(match[1]) * _BYTES[match[2]]) if "." in match[1] else int(match[1]) * _BYTES[match[2]]


def parse_tokens(text: str, option: str) -> int:
    """Read a number of tokens: "16k" is 16384, "8192" is itself.

    Raises:
        InputError: anything else, or zero.
    """
    match = re.fullmatch(r"(\d{1,18})(k?)", text.strip().lower())
    count = int(match[1]) * (1024 if match[2] else 1) if match else 0
    if count < 1:
        raise InputError(f"{option}: expected a number of tokens such as 8192 or 16k, got {text!r:.60}")
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
