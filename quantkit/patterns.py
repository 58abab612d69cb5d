# SPDX-License-Identifier: Apache-2.0
"""Regular expressions from recipes and other tools' configs: those of Python's `re`, matched in bounded time.

`re` has no time limit, and a pattern such as `(([a-z]+)+)+x` may take it years. The `regex` library, which transformers
brings along, matches the same patterns and stops. Engines that cannot backtrack (RE2) lack what people use: `(?!...)`.
"""

import re
from functools import lru_cache
from typing import Protocol, cast

import regex

from quantkit.errors import InputError

SECONDS = 1.0  # of the processor, for one name: patterns of names take microseconds
LONGEST = 100_000  # characters: a second to compile


class Pattern(Protocol):
    """A compiled expression of the `regex` library."""

    def match(self, string: str, *, timeout: float) -> object | None: ...

    def fullmatch(self, string: str, *, timeout: float) -> object | None: ...


@lru_cache(maxsize=4096)
def compiled(text: str) -> Pattern:
    """A regular expression.

    Raises:
        InputError: it is not one that `re` takes, or it is too long.
    """
    if len(text) > LONGEST:
        raise InputError(f"a regular expression of {len(text):,} characters; at most {LONGEST:,} are read")
    try:
        re.compile(text)  # the libraries differ in what else they take: recursion, fuzzy counts
        return cast(Pattern, regex.compile(text))
    except (re.error, regex.error, OverflowError, RecursionError, MemoryError) as error:
        raise InputError(f"{text!r:.60}: not a regular expression ({str(error) or type(error).__name__})") from error


def matches(pattern: Pattern, name: str, *, whole: bool = False) -> bool:
    """Whether the pattern matches at the start of a name, or the whole of it.

    Raises:
        InputError: the answer takes more than a second, as nested repeats may.
    """
    try:
        return (pattern.fullmatch if whole else pattern.match)(name, timeout=SECONDS) is not None
    except (TimeoutError, MemoryError, RecursionError) as error:
        text = getattr(pattern, "pattern", "")
        raise InputError(
            f"the regular expression {text!r:.60} takes too long on {name}; write it without repeats within repeats"
        ) from error
