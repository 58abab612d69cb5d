# SPDX-License-Identifier: Apache-2.0
"""From a verified output folder to a repository on the Hugging Face hub, and a check that the same bytes arrived.

The order is: choose the files, hash them, hold them against the verification, upload what the branch lacks, publish
everything in one commit, and compare what the hub then lists with the local hashes. So a reader of the repository sees
the whole checkpoint or none of it, and `push` is its own resume: contents that the hub holds already (by sha256,
committed or not) are not sent again. That is why this does not use `HfApi.upload_folder`, which publishes a large
folder in several commits.

Messages never hold the token, a signed address, or a server's text as it came; see `_safe`.
"""

import builtins
import hashlib
import html
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from quantkit.checkpoint.reader import INDEX, SINGLE, shorten
from quantkit.checkpoint.source import HUB_ID
from quantkit.errors import InputError, OutputError, QuantkitError
from quantkit.jsonfile import read_object
from quantkit.units import format_bytes

RESULT, CARD, JOURNAL = "quantkit.json", "README.md", "journal.jsonl"
REQUIRED = ("config.json",)
OPTIONAL = tuple(
    f"{RESULT} {CARD} report.html generation_config.json quantize_config.json tokenizer.json tokenizer_config.json "
    "tokenizer.model special_tokens_map.json added_tokens.json vocab.json merges.txt vocab.txt spiece.model "
    "chat_template.jinja chat_template.json".split()
)
WEIGHTS = (".safetensors", ".gguf")

MAX_REPO_ID = 96  # the hub's own limit
TRIES = 6
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between tries, doubling
LONGEST_ASKED_WAIT = 600.0  # seconds; a hub that asks for more is told "later" by the user, not by a sleeping program
BUSY = {408, 425, 429, 500, 502, 503, 504}
DROPPED = {"TransportError", "ConnectionError", "Timeout", "TimeoutError", "ChunkedEncodingError", "JSONDecodeError"}
BRANCH = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)*", re.ASCII)

T = TypeVar("T")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Upload:
    """A file of the checkpoint: where it is, and what must arrive. `content` is sent in place of the file's bytes."""

    path: Path
    bytes: int
    sha256: str
    content: builtins.bytes | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """The name in the repository: checkpoints are flat."""
        return self.path.name


@dataclass(frozen=True)
class PushResult:
    """What a push did, or would do.

    files:    everything that the repository now has of the checkpoint (with dry_run: would have)
    sent:     the names that the branch lacked, or had with other content, when the push began
    left_out: what lies in the output folder and did not go up
    others:   top-level files of the branch that are not of this checkpoint, as a former push may have left them
    reasons:  why the push had to be forced; empty when it was not
    """

    repo_id: str
    revision: str
    url: str
    files: tuple[Upload, ...]
    left_out: tuple[str, ...]
    reasons: tuple[str, ...]
    dry_run: bool
    commit: str | None = None
    sent: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def forced(self) -> bool:
        return bool(self.reasons)

    @property
    def total_bytes(self) -> int:
        return sum(upload.bytes for upload in self.files)


# ------------------------------------------------------------------------------------------------ which files, and why


def files_to_push(out: Path) -> list[Upload]:
    """The checkpoint's own files with their sizes and hashes, sorted by name.

    They are the weights that the index (or quantkit.json) names, whatever else quantkit.json lists under `files`, and
    the well-known files of a checkpoint. Never the journal, hidden files, sub-folders, links that leave the folder, or
    a file that nothing names.

    Raises:
        OutputError: a file that the checkpoint needs is missing or lies elsewhere, or a name is not a plain file name.
    """
    required, optional = _names(out)
    if missing := [name for name in required if _inside(out, name) is None]:
        raise OutputError(
            f"{out}: {shorten(missing)} is part of the checkpoint but not a file in it; finish the run or copy it there"
        )
    paths = [path for name in sorted({*required, *optional}) if (path := _inside(out, name)) is not None]
    return [_hashed(path) for path in paths]


def check_verified(out: Path, *, force: bool) -> dict[str, Any]:
    """Hold the files against quantkit.json: {"forced", "reasons", "verdict", "result"}.

    `forced` says whether `force` was needed, `reasons` why, `verdict` is what the verification said (None without one),
    and `result` is the content of quantkit.json.

    Raises:
        OutputError: the checkpoint is incomplete; or it has no passing verification, or a file is not the one that was
            verified, and force is False.
    """
    return _check(out, files_to_push(out), force=force)


def _check(out: Path, uploads: Sequence[Upload], *, force: bool) -> dict[str, Any]:
    result = _result(out)
    reasons = _objections(result, {upload.name: upload for upload in uploads})
    if reasons and not force:
        more = f" (and {len(reasons) - 3} more)" if len(reasons) > 3 else ""
        raise OutputError(
            f"{out}: not pushed: {'; '.join(reasons[:3])}{more}; "
            f"run `quantkit verify {out}`, or push with --force, which the model card will say"
        )
    verification = result.get("verification")
    verdict = verification.get("verdict") if isinstance(verification, dict) else None
    return {"forced": bool(reasons), "reasons": reasons, "verdict": verdict, "result": result}


def _objections(result: Mapping[str, Any], uploads: Mapping[str, Upload]) -> list[str]:
    if not result:
        return [f"no {RESULT}, so nothing says that it was verified"]
    reasons = []
    verification = result.get("verification")
    if not isinstance(verification, dict):
        reasons.append(f"{RESULT} holds no verification")
    elif verification.get("verdict") != "pass":
        why = verification.get("reasons")
        said = f" ({'; '.join(map(_line, why[:3]))})" if isinstance(why, list) and why else ""
        reasons.append(f"the verdict is {_line(verification.get('verdict'))}, not pass{said}")
    listed = _manifest(result)
    for name, (size, sha256) in listed.items():
        found = uploads[name]
        if found.bytes != size:
            reasons.append(f"{name} is not the file that was verified: expected {size} bytes, got {found.bytes}")
        elif found.sha256 != sha256:
            reasons.append(f"{name} is not the file that was verified: its sha256 is another")
    unknown = [name for name in uploads if name.endswith(WEIGHTS) and name not in listed]
    return reasons + [f"{name} is not among the files of {RESULT}, so it was not verified" for name in unknown]


def _names(out: Path) -> tuple[list[str], list[str]]:
    """The files that must be there, and those that go up when they are."""
    listed = list(_manifest(_result(out)))
    if (out / INDEX).exists():
        weight_map = _read_json(out / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise OutputError(f"{out / INDEX}: expected a weight_map; write the checkpoint again")
        weights = [INDEX, *(_plain(name, out / INDEX) for name in weight_map.values())]
    elif any(name.endswith(WEIGHTS) for name in listed):
        weights = []
    else:
        weights = [SINGLE]
    return sorted({*REQUIRED, *weights, *listed}), list(OPTIONAL)


def _manifest(result: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    """quantkit.json's `files`: name -> (bytes, sha256)."""
    listed = result.get("files", [])
    if not isinstance(listed, list):
        raise OutputError(f"{RESULT}: files: expected a list, got {type(listed).__name__}; run the command again")
    manifest = {}
    for entry in listed:
        fields = entry if isinstance(entry, dict) else {}
        size, sha256 = fields.get("bytes"), fields.get("sha256")
        if not isinstance(size, int) or not isinstance(sha256, str):
            raise OutputError(f"{RESULT}: files: expected name, bytes and sha256, got {_line(entry)}")
        manifest[_plain(fields.get("name"), Path(RESULT))] = (size, sha256)
    return manifest


def _plain(name: Any, where: Path) -> str:
    if (
        not isinstance(name, str)
        or not name.isprintable()
        or name.startswith(".")
        or name in ("", JOURNAL)
        or set(name) & set('/\\:*?"<>|')
    ):
        raise OutputError(f"{where}: {_line(name)} is not a plain name of a file of the checkpoint; it must not go up")
    return name


def _inside(out: Path, name: str) -> Path | None:
    """The file of this name, unless it is missing, not a regular file, or a link that leads elsewhere."""
    path = out / name
    return path if path.is_file() and path.resolve().parent == out.resolve() else None


def _hashed(path: Path) -> Upload:
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            return Upload(path, file.tell(), sha256)
    except OSError as error:
        raise OutputError(f"{path}: cannot be read: {error.strerror}; repair the folder") from error


def _result(out: Path) -> dict[str, Any]:
    return _read_json(out / RESULT) if _inside(out, RESULT) else {}


def _read_json(path: Path) -> dict[str, Any]:
    return read_object(path, "the run must write it again", OutputError)


# ----------------------------------------------------------------------------------------------------------- the card


def with_note(card: str, reasons: Sequence[str]) -> str:
    """The model card with a note on top, below its metadata, that says the push was forced, and why."""
    header = re.match(r"---\n.*?\n---\n", card, re.DOTALL)
    end = header.end() if header else 0
    lines = [f"> - {html.escape(_line(reason), quote=False)}" for reason in reasons]
    note = "\n".join(["> [!WARNING]", "> Pushed with `--force`, without a passing and matching verification:", *lines])
    return f"{card[:end]}\n{note}\n\n{card[end:].lstrip()}"


def _forced_card(out: Path, facts: Mapping[str, Any], card: Callable[[dict[str, Any]], str] | None) -> Upload:
    reasons = facts["reasons"]
    if card is not None and facts["result"]:
        text = card({**facts["result"], "forced": reasons})
    else:
        path = _inside(out, CARD)
        text = with_note(path.read_text(encoding="utf-8") if path else "", reasons)
    return _instead(out / CARD, text)


def _named(card: Upload, placeholder: str, repo_id: str) -> Upload:
    """The card as it lies there, which its owner may have changed, with the repository's name in its commands."""
    return _instead(card.path, card.path.read_text(encoding="utf-8").replace(placeholder, repo_id))


def _instead(path: Path, text: str) -> Upload:
    """A text that goes up in place of what the file holds."""
    content = text.encode()
    return Upload(path, len(content), hashlib.sha256(content).hexdigest(), content)


# ------------------------------------------------------------------------------------------------------------ the push


def push(
    out: Path,
    repo_id: str,
    *,
    private: bool,
    revision: str | None,
    dry_run: bool,
    force: bool,
    token: str | None = None,
    endpoint: str | None = None,
    say: Say | None = None,
    bars: bool = False,
    card: Callable[[dict[str, Any]], str] | None = None,
    placeholder: str | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> PushResult:
    """Upload the checkpoint in `out` to the hub's model repository `repo_id`, which is created if need be.

    revision is a branch, created from main if need be (None: main). private applies to a new repository; one that
    exists and is public is refused rather than published to. dry_run checks and lists, without any network. force goes
    ahead without a passing, matching verification and says so on the card that goes up: `card` makes it from the
    content of quantkit.json with the reasons added as "forced" (None: a note on top of README.md). Where README.md
    holds `placeholder`, what goes up names the repository. Nothing in `out` is changed. token: None takes HF_TOKEN or
    the login's. say(line) is told what happens, one line for each step and each wait; bars: the hub's library shows the
    bytes that travel, and how fast, on stderr. sleep(seconds) waits between tries.

    Raises:
        InputError: repo_id, revision or the token cannot be used.
        OutputError: what `check_verified` raises; or the hub refused, failed for good, or lists other content than was
            sent. Running it again goes on from where it stopped.
    """
    require_names(repo_id, revision)
    say = say or _silent
    say(f"hashing the files of {out}")
    uploads = files_to_push(out)
    facts = _check(out, uploads, force=force)
    if facts["forced"]:
        uploads = sorted(
            [*(upload for upload in uploads if upload.name != CARD), _forced_card(out, facts, card)],
            key=lambda upload: upload.name,
        )
    elif placeholder:
        uploads = [_named(upload, placeholder, repo_id) if upload.name == CARD else upload for upload in uploads]
    branch = revision or constants.DEFAULT_REVISION
    address = endpoint or constants.ENDPOINT
    names = {upload.name for upload in uploads}
    plan = PushResult(
        repo_id=repo_id,
        revision=branch,
        url=f"{address}/{repo_id}" + (f"/tree/{branch}" if revision else ""),
        files=tuple(uploads),
        left_out=tuple(sorted(path.name for path in out.iterdir() if path.name not in names)),
        reasons=tuple(facts["reasons"]),
        dry_run=dry_run,
    )
    if dry_run:
        return plan
    if constants.HF_HUB_OFFLINE:
        raise InputError("HF_HUB_OFFLINE is set, and a push needs the hub; unset it, or use --dry-run")
    secret = token or _token()
    hub = _Hub(HfApi(endpoint=address, token=secret), repo_id, branch, secret, sleep, say)
    with _library(bars=bars):
        return _push(hub, plan, private=private)


def require_names(repo_id: str, revision: str | None) -> None:
    """Check a repository's and a branch's name before anything else is done.

    Raises:
        InputError: either is not a name that the hub or git takes.
    """
    if (
        not HUB_ID.fullmatch(repo_id)
        or len(repo_id) > MAX_REPO_ID
        or repo_id.endswith(("-", ".", ".git"))
        or "--" in repo_id
        or ".." in repo_id
    ):
        raise InputError(f"{_line(repo_id)}: expected a repository as org/name (letters, digits and single - _ .)")
    if revision is not None and (
        not BRANCH.fullmatch(revision) or ".." in revision or revision.endswith((".", ".lock")) or len(revision) > 200
    ):
        raise InputError(f"--revision {_line(revision)}: expected the name of a branch, as `w4-g128`")


@dataclass(frozen=True)
class _Hub:
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
            OutputError: one line, without the token. The cause is cut off, for it may quote the token.
        """
        for tried in count(1):
            try:
                return action()
            except QuantkitError:
                raise
            except Exception as error:  # each version of the hub's library brings its own network library and errors
                wait = _wait(error, tried)
                if wait is None:
                    raise OutputError(f"{self.repo_id}: {what}: {self._why(error)}") from None
                status = _status(error)
                said = "the connection dropped" if status is None else f"HTTP {status}"
                self.say(f"{what}: {said}; again in {wait:.0f} s ({TRIES - tried} more tries)")
            self.sleep(wait)
        raise AssertionError("unreachable")

    def files(self, revision: str) -> dict[str, RepoFile]:
        """The top-level files that the hub lists at a branch or commit."""
        listing = self.call(
            "listing the repository", lambda: list(self.api.list_repo_tree(self.repo_id, revision=revision))
        )
        return {entry.path: entry for entry in listing if isinstance(entry, RepoFile)}

    def head(self) -> str:
        info = self.call("reading the branch", lambda: self.api.model_info(self.repo_id, revision=self.branch))
        return str(info.sha)

    def _why(self, error: BaseException) -> str:
        status, owner = _status(error), self.repo_id.partition("/")[0]
        again = "run the same command again: what is up is not sent again"
        if status == 401 or type(_deepest(error)).__name__ == "XetAuthenticationError":
            return "the token was not accepted (HTTP 401); run `hf auth login`, or set HF_TOKEN to one that may write"
        if status == 403:
            return f"not allowed (HTTP 403); use a token with the right to write to {owner}, and be a member of it"
        if status == 404:
            return f"not found (HTTP 404); check {self.repo_id} and branch {self.branch}, and that the token sees them"
        if status in (409, 412):
            return f"it conflicts with another change (HTTP {status}); look at the repository, then {again}"
        if status == 429:
            asked = _asked_wait(error)
            return f"too many requests (HTTP 429); wait{f' {asked:.0f} seconds' if asked else ' a while'}, then {again}"
        if status is not None and status >= 500:
            return f"the hub failed (HTTP {status}); wait a while, then {again}"
        if status is not None:
            said = _line(getattr(error, "server_message", None) or "", self.token)
            return f"refused (HTTP {status}){f': {said}' if said else ''}; see {self.api.endpoint}/{self.repo_id}"
        kind = type(_deepest(error)).__name__
        if _is_dropped(error):
            return f"the connection failed ({kind}); check the network, then {again}"
        return f"{kind}: {_line(_deepest(error), self.token)}; {again}"


def _push(hub: _Hub, plan: PushResult, *, private: bool) -> PushResult:
    _open_repository(hub, private=private)
    there = hub.files(hub.branch)
    lacking = [upload for upload in plan.files if _difference(upload, there.get(upload.name))]
    size = sum(upload.bytes for upload in lacking)
    hub.say(f"{len(lacking)} of {len(plan.files)} files are to be sent, {format_bytes(size)}")
    commit = _publish(hub, plan, _send(hub, lacking)) if lacking else hub.head()
    hub.say(f"comparing the hashes of commit {commit}")
    published = hub.files(commit)
    for upload in plan.files:
        if difference := _difference(upload, published.get(upload.name)):
            raise OutputError(
                f"{hub.repo_id}: {upload.name} is not on the hub as it is here: {difference} (commit {commit}); "
                "do not use that commit; run the same command again"
            )
    names = {upload.name for upload in plan.files} | {".gitattributes"}
    others = tuple(sorted(name for name in published if name not in names))
    return replace(plan, commit=commit, sent=tuple(upload.name for upload in lacking), others=others)


def _open_repository(hub: _Hub, *, private: bool) -> None:
    api, repo_id = hub.api, hub.repo_id
    hub.call(
        "creating the repository", lambda: api.create_repo(repo_id, private=True if private else None, exist_ok=True)
    )
    if private and not hub.call("reading the repository", lambda: api.model_info(repo_id)).private:
        raise OutputError(
            f"{repo_id}: exists and is public, but --private was asked for; make it private in its settings first"
        )
    if hub.branch != constants.DEFAULT_REVISION:
        hub.call("creating the branch", lambda: api.create_branch(repo_id, branch=hub.branch, exist_ok=True))


def _send(hub: _Hub, lacking: Sequence[Upload]) -> list[CommitOperationAdd]:
    """Upload the contents of large files (the hub skips what it holds by hash); small ones travel in the commit."""
    operations = [
        CommitOperationAdd(upload.name, upload.content if upload.content is not None else str(upload.path))
        for upload in lacking
    ]
    hub.call(
        "uploading",
        lambda: hub.api.preupload_lfs_files(
            hub.repo_id, operations, revision=hub.branch, free_memory=False, num_threads=1
        ),
    )
    return operations


def _publish(hub: _Hub, plan: PushResult, operations: Sequence[CommitOperationAdd]) -> str:
    """One commit for everything. The answer to a first try may have been lost, so a second looks at what is there."""
    title = f"Upload {plan.total_bytes} bytes in {len(plan.files)} files with quantkit"
    attempts = count()

    def commit() -> str:
        if next(attempts):
            there = {
                entry.path: entry
                for entry in hub.api.list_repo_tree(hub.repo_id, revision=hub.branch)
                if isinstance(entry, RepoFile)
            }
            if not any(_difference(upload, there.get(upload.name)) for upload in plan.files):
                return str(hub.api.model_info(hub.repo_id, revision=hub.branch).sha)
        return hub.api.create_commit(
            hub.repo_id, list(operations), commit_message=title, revision=hub.branch, num_threads=1
        ).oid

    return hub.call("committing", commit)


def _difference(upload: Upload, remote: RepoFile | None) -> str | None:
    """How the hub's file differs from the local one; None: they are the same by hash.

    Large files are listed with their sha256, small ones with git's name of a blob, sha1("blob <size>\\0" + content).
    """
    if remote is None:
        return "it is missing there (does a .gitignore in the repository name it?)"
    size = remote.lfs.size if remote.lfs else remote.size
    if size != upload.bytes:
        return f"expected {upload.bytes} bytes, got {size}"
    if remote.lfs:
        return (
            None if remote.lfs.sha256 == upload.sha256 else f"expected sha256 {upload.sha256}, got {remote.lfs.sha256}"
        )
    try:
        content = upload.content if upload.content is not None else upload.path.read_bytes()
    except OSError as error:
        raise OutputError(f"{upload.path}: cannot be read: {error.strerror}; repair the folder") from error
    if hashlib.sha256(content).hexdigest() != upload.sha256:
        raise OutputError(f"{upload.path}: changed while it was being pushed; run the same command again")
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return None if remote.blob_id == blob else f"expected git blob {blob}, got {remote.blob_id}"


# ------------------------------------------------------------------------------------------------- patience and errors


def _wait(error: BaseException, tried: int) -> float | None:
    """Seconds to wait before the next try; None: another try is of no use."""
    asked = _asked_wait(error) or 0.0
    if tried >= TRIES or asked > LONGEST_ASKED_WAIT:
        return None
    status = _status(error)
    if status in BUSY if status is not None else _is_dropped(error):
        return max(asked, min(FIRST_WAIT * 2.0 ** (tried - 1), LONGEST_WAIT))
    return None


def _asked_wait(error: BaseException) -> float | None:
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
        return float(limit[1]) if limit and _status(error) == 429 else None


def _status(error: BaseException) -> int | None:
    """The HTTP status at the root of an error; None: there was no answer."""
    statuses = (getattr(getattr(link, "response", None), "status_code", None) for link in _chain(error))
    return next((status for status in statuses if isinstance(status, int)), None)


def _is_dropped(error: BaseException) -> bool:
    return any(kind.__name__ in DROPPED for link in _chain(error) for kind in type(link).__mro__)


def _deepest(error: BaseException) -> BaseException:
    return list(_chain(error))[-1]


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, its cause, its cause's cause, ..."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__


def _line(text: object, token: str = "") -> str:
    """Foreign text made fit for a message: one line, not long, no token, no query of an address (it may be signed)."""
    line = " ".join(str(text).split())
    if token:
        line = line.replace(token, "***")
    line = re.sub(r"\bhf_[A-Za-z0-9_]{8,}|(?i:bearer)\s+\S+", "***", line)
    line = re.sub(r"(https?://[^\s?]*)\?\S*", r"\1", line)
    return line if len(line) <= 200 else line[:199] + "…"


def _token() -> str:
    try:
        token = get_token()
    except Exception as error:
        raise InputError(f"the token cannot be read ({type(error).__name__}); run `hf auth login`") from None
    if not token:
        raise InputError("no token; run `hf auth login`, or set HF_TOKEN to a token that may write")
    return token


@contextmanager
def _library(*, bars: bool) -> Iterator[None]:
    """The hub's library with or without its progress bars, and without its warnings, which quote signed addresses.

    Both are settings of the whole process, which the library knows no other way for; they are put back.
    """
    verbosity, silence = hub_logging.get_verbosity(), not bars and not are_progress_bars_disabled()
    hub_logging.set_verbosity(logging.ERROR)
    if silence:
        disable_progress_bars()
    try:
        yield
    finally:
        hub_logging.set_verbosity(verbosity)
        if silence:
            enable_progress_bars()


def _silent(line: str) -> None:
    pass
