# SPDX-License-Identifier: Apache-2.0
"""One branch of one repository on the hub, and how to be patient with it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import TypeVar

from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoFile

from quantkit.errors import OutputError, QuantkitError
from quantkit.network import TRIES, ImpatientError, asked_wait, deepest, is_dropped, reason_of, status_of, wait_before
from quantkit.text import clean_line

T = TypeVar("T")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Branch:
    """One branch of one repository, and how to be patient with it."""

    api: HfApi
    repo_id: str
    branch: str
    token: str = field(repr=False)
    sleep: Callable[[float], None]
    say: Say

    def call(self, what: str, action: Callable[[], T]) -> T:
        """Do it, again after a wait when the hub is busy or the connection drops; `action` must bear repeating.

        Raises:
            OutputError: one line, without the token. It has no cause and no context, which may quote the token.
        """
        for tried in count(1):
            try:
                return action()
            except QuantkitError:
                raise
            except Exception as error:  # each version of the hub's library brings its own network library and errors
                wait, reason = self._judged(error, tried)
            if wait is None:
                raise OutputError(f"{self.repo_id}: {what}: {reason}")
            self.say(f"{what}: {reason}; again in {wait:.0f} s ({TRIES - tried} more tries)")
            self.sleep(wait)
        raise AssertionError("unreachable")

    def files(self, revision: str) -> dict[str, RepoFile]:
        """The files that the hub lists at a branch or commit."""
        return self.call("listing the repository", lambda: self.listing(revision))

    def listing(self, revision: str) -> dict[str, RepoFile]:
        """The same in one try, with the errors of the hub's library."""
        entries = self.api.list_repo_tree(self.repo_id, revision=revision, recursive=True)
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def head(self) -> str:
        info = self.call("reading the branch", lambda: self.api.model_info(self.repo_id, revision=self.branch))
        return self.clean(info.sha)

    def clean(self, text: object) -> str:
        """What the hub said, fit to be shown."""
        return clean_line(text, self.token)

    def _judged(self, error: BaseException, tried: int) -> tuple[float | None, str]:
        """The seconds to wait before the next try (None: there is none), and what to say; nothing is raised here."""
        try:
            wait = wait_before(error, tried)
            if wait is None:
                return None, self._why(error)
            status = status_of(error)
            return wait, "the connection failed" if status is None else f"HTTP {status}"
        except Exception as fault:  # an answer that cannot even be looked at
            return None, f"the hub's answer cannot be read ({type(fault).__name__}); run the same command again later"

    def _why(self, error: BaseException) -> str:
        status, reason, owner = status_of(error), reason_of(error, self.token), self.repo_id.partition("/")[0]
        page = f"{self.api.endpoint}/{self.repo_id}"
        again = "run the same command again: what is up is not sent again"
        if status == 401 or type(deepest(error)).__name__ == "XetAuthenticationError":
            return "the token was not accepted (HTTP 401); run `hf auth login`, or set HF_TOKEN to one that may write"
        if status == 403 and reason:
            return f"not allowed (HTTP 403): {reason}; see {page}"
        if status == 403:
            return f"not allowed (HTTP 403); use a token with the right to write to {owner}, and be a member of it"
        if status == 404:
            return f"not found (HTTP 404); check {self.repo_id} and branch {self.branch}, and that the token sees them"
        if status in (409, 412):
            return f"it conflicts with another change (HTTP {status}); look at the repository, then {again}"
        if status == 429:
            asked = asked_wait(error)
            return f"too many requests (HTTP 429); wait{f' {asked:.0f} seconds' if asked else ' a while'}, then {again}"
        if status is not None and status >= 500:
            return f"the hub failed (HTTP {status}); wait a while, then {again}"
        if status is not None:
            return f"refused (HTTP {status}){f': {reason}' if reason else ''}; see {page}"
        last = deepest(error)
        if is_dropped(error):
            kind = str(last) if isinstance(last, ImpatientError) else type(last).__name__
            return f"the connection failed ({kind}); check the network, then {again}"
        return f"{type(last).__name__}: {self.clean(last)}; {again}"
