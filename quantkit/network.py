# SPDX-License-Identifier: Apache-2.0
"""The hub's library, made to answer in time, and what its errors mean: whether to try again, and words to show.

Each version of the library brings its own network library and errors, so these are told apart by status and name.
"""

import logging
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any

from quantkit.text import clean_line

TRIES = 6
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between tries, doubling
LONGEST_ASKED_WAIT = 600.0  # seconds; a hub that asks for more is told "later" by the user, not by a sleeping program
CONNECT_SECONDS, ANSWER_SECONDS = 20.0, 60.0  # of silence, after which a request has failed
BUSY = {408, 425, 429, 500, 502, 503, 504}
DROPPED = {"TransportError", "ConnectionError", "Timeout", "TimeoutError", "ChunkedEncodingError", "JSONDecodeError"}


class ImpatientError(Exception):
    """The hub answers nothing, or (`response`) asks for more patience than a program should have."""

    def __init__(self, message: str, response: Any = None) -> None:
        super().__init__(message)
        self.response = response


# ---------------------------------------------------------------- what an error means


def wait_before(error: BaseException, tried: int) -> float | None:
    """Seconds to wait before the next try; None: another try is of no use."""
    asked = asked_wait(error) or 0.0
    if tried >= TRIES or asked > LONGEST_ASKED_WAIT or isinstance(deepest(error), ImpatientError):
        return None
    status = status_of(error)
    if status in BUSY if status is not None else is_dropped(error):
        return max(asked, min(FIRST_WAIT * 2.0 ** (tried - 1), LONGEST_WAIT))
    return None


def asked_wait(error: BaseException) -> float | None:
    """The seconds that the answer asks to wait."""
    answer = _answer(error)
    return None if answer is None else _asked_in(answer)


def status_of(error: BaseException) -> int | None:
    """The HTTP status at the root of an error; None: there was no answer."""
    status = getattr(_answer(error), "status_code", None)
    return status if isinstance(status, int) else None


def is_dropped(error: BaseException) -> bool:
    """Whether the connection failed, or never answered."""
    silent = isinstance(deepest(error), ImpatientError)
    return silent or any(kind.__name__ in DROPPED for link in chain(error) for kind in type(link).__mro__)


def reason_of(error: BaseException, *secrets: str) -> str:
    """What the hub itself gave as the reason, cleaned; empty if it gave none."""
    texts = (getattr(link, "server_message", None) for link in chain(error))
    return clean_line(next((text for text in texts if text), ""), *secrets)


def deepest(error: BaseException) -> BaseException:
    return list(chain(error))[-1]


def chain(error: BaseException) -> Iterator[BaseException]:
    """The error, its cause, its cause's cause, ..."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _answer(error: BaseException) -> Any:
    return next((answer for link in chain(error) if (answer := getattr(link, "response", None)) is not None), None)


def _asked_in(answer: Any) -> float | None:
    """Retry-After, in seconds or as a date, or the hub's `RateLimit: ..;t=55`; None: nothing that can be read."""
    headers: Mapping[str, str] = answer.headers
    asked = headers.get("retry-after", "").strip()
    if re.fullmatch(r"[0-9]+", asked):
        return float(asked)
    try:
        wait: float = (parsedate_to_datetime(asked) - datetime.now(UTC)).total_seconds()
        return max(0.0, wait)
    except (TypeError, ValueError, OverflowError):  # no date either
        limit = re.search(r";\s*t=([0-9]+)", headers.get("ratelimit", ""))
        return float(limit[1]) if limit and answer.status_code == 429 else None


# ---------------------------------------------------------------- the library


@contextmanager
def patient_library(*, bars: bool = False) -> Iterator[None]:
    """Within this context no request of the hub's library waits for ever, and its warnings are not shown: they quote
    signed addresses.

    These are settings of the whole process, which the library knows no other way for. They are put back.

    Args:
        bars: whether the library may show its progress bars
    """
    from huggingface_hub.utils import _http
    from huggingface_hub.utils import logging as hub_logging
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    verbosity, silence = hub_logging.get_verbosity(), not bars and not are_progress_bars_disabled()
    patience = _Patience()
    library: Any = _http
    modern = hasattr(library, "set_client_factory")  # from 1.0 on
    usual = library._GLOBAL_CLIENT_FACTORY if modern else library._GLOBAL_BACKEND_FACTORY
    configure = library.set_client_factory if modern else library.configure_http_backend
    limit = patience.limit_client if modern else patience.limit_session
    configure(lambda: limit(usual()))
    hub_logging.set_verbosity(logging.ERROR)
    if silence:
        disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="huggingface_hub")
            yield
    finally:
        configure(usual)
        hub_logging.set_verbosity(verbosity)
        if silence:
            enable_progress_bars()


class _Patience:
    """Counts requests in a row without an answer: the library tries again by itself, and would do so for hours.

    Files are downloaded side by side, so many requests may be under way before the first answer. Only silence as long
    as one request may take is held against the hub.
    """

    def __init__(self) -> None:
        self.unanswered, self.silent_since = 0, 0.0

    def begin(self, request: Any) -> None:
        now = time.monotonic()
        if self.unanswered >= TRIES and now - self.silent_since >= ANSWER_SECONDS:
            raise ImpatientError(f"no answer to {TRIES} requests in a row")
        if self.unanswered == 0:
            self.silent_since = now
        self.unanswered += 1

    def end(self, answer: Any) -> None:
        self.unanswered = 0
        asked = _asked_in(answer) or 0.0
        if answer.status_code in BUSY and asked > LONGEST_ASKED_WAIT:
            raise ImpatientError("the hub asks for a long wait", answer)

    def limit_client(self, client: Any) -> Any:
        """httpx: many calls say `timeout=None`, so the limit is put into each request."""

        def begin(request: Any) -> None:
            self.begin(request)
            said = request.extensions.get("timeout") or {}
            limits = {"connect": CONNECT_SECONDS, **dict.fromkeys(("read", "write", "pool"), ANSWER_SECONDS)}
            request.extensions["timeout"] = {kind: said.get(kind) or limit for kind, limit in limits.items()}

        hooks = client.event_hooks
        client.event_hooks = {"request": [*hooks["request"], begin], "response": [*hooks["response"], self.end]}
        return client

    def limit_session(self, session: Any) -> Any:
        """requests: the adapter is where each request passes with its limit."""
        for adapter in session.adapters.values():
            adapter.send = partial(self._send, adapter.send)
        return session

    def _send(self, send: Callable[..., Any], request: Any, *, timeout: Any = None, **options: Any) -> Any:
        self.begin(request)
        answer = send(request, timeout=timeout or (CONNECT_SECONDS, ANSWER_SECONDS), **options)
        self.end(answer)
        return answer
