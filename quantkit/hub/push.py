# SPDX-License-Identifier: Apache-2.0
"""From a verified output folder to a repository on the Hugging Face hub, and a check that the same bytes arrived.

The order is: choose the files, hash them, hold them against the verification, upload what the branch lacks, publish
everything in one commit, and compare what the hub then lists with the local hashes. So a reader of the repository sees
the whole checkpoint or none of it, and `push` is its own resume: contents that the hub holds already (by sha256,
committed or not) are not sent again. That is why this does not use `HfApi.upload_folder`, which publishes a large
folder in several commits.

Messages never hold the token, a signed address, or a server's text as it came; see `text.clean_line`.
"""

import hashlib
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.hf_api import RepoFile

from quantkit.checkpoint.source import HUB_ID
from quantkit.errors import InputError, OutputError
from quantkit.hub.branch import Branch, Say
from quantkit.hub.files import CARD, Upload, check, files_to_push, forced_card, named_card
from quantkit.network import patient_library
from quantkit.text import clean_line
from quantkit.units import format_bytes

MAX_REPO_ID = 96  # the hub's own limit
BRANCH = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)*", re.ASCII)


@dataclass(frozen=True)
class PushResult:
    """What a push did, or would do.

    files:    everything that the repository now has of the checkpoint (with dry_run: would have)
    sent:     the names that the branch lacked, or had with other content, when the push began
    left_out: what lies in the output folder and did not go up
    others:   files of the branch that are not of this checkpoint, as a former push may have left them
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
    card: Callable[[Sequence[str]], str] | None = None,
    named: Callable[[str], str] | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> PushResult:
    """Upload the checkpoint in `out` to the hub's model repository `repo_id`, which is created if need be.

    revision is a branch, created from main if need be (None: main). private applies to a new repository; one that
    exists and is public is refused rather than published to. dry_run checks and lists, without any network. force goes
    ahead without a passing, matching verification and says so on the card that goes up: `card` makes it from the
    content of quantkit.json with the reasons added as "forced" (None: a note on top of README.md). What goes up
    as README.md is `named` of it, whose commands name the repository. Nothing in `out` is changed. token: None takes
    HF_TOKEN or the login's. say(line) is told what happens, one line for each step and each wait; bars: the hub's
    library shows the bytes that travel, and how fast, on stderr. sleep(seconds) waits between tries.

    Raises:
        InputError: repo_id, revision or the token cannot be used.
        OutputError: what `files.check` raises; or the hub refused, failed for good, or lists other content than was
            sent. Running it again goes on from where it stopped.
    """
    require_names(repo_id, revision)
    say = say or _silent
    say(f"hashing the files of {out}")
    uploads = files_to_push(out)
    facts = check(out, uploads, force=force)
    if facts["forced"]:
        uploads = sorted(
            [*(upload for upload in uploads if upload.name != CARD), forced_card(out, facts, card)],
            key=lambda upload: upload.name,
        )
    elif named:
        uploads = [named_card(upload, named) if upload.name == CARD else upload for upload in uploads]
    branch = revision or constants.DEFAULT_REVISION
    address = endpoint or constants.ENDPOINT
    names = {upload.name.partition("/")[0] for upload in uploads}
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
    hub = Branch(HfApi(endpoint=address, token=secret), repo_id, branch, secret, sleep, say)
    with patient_library(bars=bars):
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
        raise InputError(f"{clean_line(repo_id)}: expected a repository as org/name (letters, digits and single - _ .)")
    if revision is not None and (
        not BRANCH.fullmatch(revision) or ".." in revision or revision.endswith((".", ".lock")) or len(revision) > 200
    ):
        raise InputError(f"--revision {clean_line(revision)}: expected the name of a branch, as `w4-g128`")


def _push(hub: Branch, plan: PushResult, *, private: bool) -> PushResult:
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
                f"{hub.repo_id}: {upload.name} is not on the hub as it is here: {hub.clean(difference)} "
                f"(commit {commit}); "
                "do not use that commit; run the same command again"
            )
    names = {upload.name for upload in plan.files} | {".gitattributes"}
    others = tuple(sorted(hub.clean(name) for name in published if name not in names))
    return replace(plan, commit=commit, sent=tuple(upload.name for upload in lacking), others=others)


def _open_repository(hub: Branch, *, private: bool) -> None:
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


def _send(hub: Branch, lacking: Sequence[Upload]) -> list[CommitOperationAdd]:
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


def _publish(hub: Branch, plan: PushResult, operations: Sequence[CommitOperationAdd]) -> str:
    """One commit for everything. The answer to a first try may have been lost, so a second looks at what is there."""
    title = f"Upload {plan.total_bytes} bytes in {len(plan.files)} files with quantkit"
    attempts = count()

    def commit() -> str:
        if next(attempts):
            there = hub.listing(hub.branch)
            if not any(_difference(upload, there.get(upload.name)) for upload in plan.files):
                return str(hub.api.model_info(hub.repo_id, revision=hub.branch).sha)
        return hub.api.create_commit(
            hub.repo_id, list(operations), commit_message=title, revision=hub.branch, num_threads=1
        ).oid

    return hub.clean(hub.call("committing", commit))


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


def _token() -> str:
    try:
        token, fault = get_token(), "no token"
    except Exception as error:
        token, fault = None, f"the token cannot be read ({type(error).__name__})"
    if not token:
        raise InputError(f"{fault}; run `hf auth login`, or set HF_TOKEN to a token that may write")
    return token


def _silent(line: str) -> None:
    pass
