# SPDX-License-Identifier: Apache-2.0
"""What an error of the hub's library means: whether and when to try again, and words that are safe to show.

Each version of the library brings its own network library and errors, so they are told apart by status and name.
"""

import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

TRIES = 6
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between tries, doubling
LONGEST_ASKED_WAIT = 600.0  # seconds; a hub that asks for more is told "later" by the user, not by a sleeping program
BUSY = {408, 425, 429, 500, 502, 503, 504}
DROPPED = {"TransportError", "ConnectionError", "Timeout", "TimeoutError", "ChunkedEncodingError", "JSONDecodeError"}


def wait_before(error: BaseException, tried: int) -> float | None:
    """Seconds to wait before the next try; None: another try is of no use."""
    asked = asked_wait(error) or 0.0
    if tried >= TRIES or asked > LONGEST_ASKED_WAIT:
        return None
    status = status_of(error)
    if status in BUSY if status is not None else is_dropped(error):
        return max(asked, min(FIRST_WAIT * 2.0 ** (tried - 1), LONGEST_WAIT))
    return None


def asked_wait(error: BaseException) -> float | None:
    """The seconds that the answer asks to wait: Retry-After (seconds or a date), or the hub's `RateLimit: ..;t=55`."""
    answers = (getattr(link, "response", None) for link in _chain(error))
    headers: Mapping[str, str] = next((answer.headers for answer in answers if answer is not None), {})
    asked = headers.get("retry-after", "").strip()
    if asked.isdigit():
        return float(asked)
    try:
        left: float = (parsedate_to_datetime(asked) - datetime.now(UTC)).total_seconds()
        return max(0.0, left)
    except (TypeError, ValueError):  # no date either
        limit = re.search(r";\s*t=(\d+)", headers.get("ratelimit", ""))
        return float(limit[1]) if limit and status_of(error) == 429 else None


def status_of(error: BaseException) -> int | None:
    """The HTTP status at the root of an error; None: there was no answer."""
    statuses = (getattr(getattr(link, "response", None), "status_code", None) for link in _chain(error))
    return next((status for status in statuses if isinstance(status, int)), None)


def is_dropped(error: BaseException) -> bool:
    return any(kind.__name__ in DROPPED for link in _chain(error) for kind in type(link).__mro__)


def deepest(error: BaseException) -> BaseException:
    return list(_chain(error))[-1]


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, its cause, its cause's cause, ..."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__


def safe_line(text: object, token: str = "") -> str:
    """Foreign text made fit for a message: one line, not long, no token, no query of an address (it may be signed)."""
    line = " ".join(str(text).split())
    if token:
        line = line.replace(token, "***")
    line = re.sub(r"\bhf_[A-Za-z0-9_]{8,}|(?i:bearer)\s+\S+", "***", line)
    line = re.sub(r"(https?://[^\s?]*)\?\S*", r"\1", line)
    return line if len(line) <= 200 else line[:199] + "…"
