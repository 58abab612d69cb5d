# SPDX-License-Identifier: Apache-2.0
"""Pushing to a hub (a local one, see fake_hub.py): what goes up, what is refused, and what survives a bad network."""

import hashlib
import json
import logging
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, snapshot_download
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from quantkit import network
from quantkit.errors import InputError, OutputError
from quantkit.hub.files import WEIGHTS, check, files_to_push, with_note
from quantkit.hub.push import PushResult, push, require_names
from quantkit.units import format_bytes
from tests.fake_hub import FakeHub

# The hub's library sends files the way its network library no longer likes.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

TOKEN = "hf_RECOGNISABLEfakeTOKEN0123456789"
REPO = "someone/mini-awq"
CARD_TEXT = "---\nlicense: apache-2.0\n---\n# A model\n"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_result(out: Path, **changes: Any) -> None:
    """quantkit.json as a run leaves it: the hash of each file, and a passing verification."""
    paths = [path for path in sorted(out.iterdir()) if path.suffix in WEIGHTS or path.name == "config.json"]
    files = [{"name": p.name, "bytes": p.stat().st_size, "sha256": sha256(p.read_bytes())} for p in paths]
    result = {"model": "mini", "files": files, "verification": {"verdict": "pass", "reasons": []}, **changes}
    (out / "quantkit.json").write_text(json.dumps(result))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Qwen2 in several shards."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    folder = tmp_path_factory.mktemp("model")
    Qwen2ForCausalLM(config).save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) >= 3
    return folder


@pytest.fixture
def out(model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "README.md").write_text(CARD_TEXT)
    (folder / "report.html").write_text("<!doctype html>")
    write_result(folder)
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)  # the fake speaks plain LFS
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with FakeHub(TOKEN) as fake:
        yield fake
        getattr(huggingface_hub, "close_session", lambda: None)()


@dataclass
class Pusher:
    """Pushes to the fake hub, and keeps what was waited for and reported."""

    out: Path
    endpoint: str
    waits: list[float] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def __call__(self, **options: Any) -> PushResult:
        defaults: dict[str, Any] = {"private": False, "revision": None, "dry_run": False, "force": False}
        defaults |= {"endpoint": self.endpoint, "sleep": self.waits.append, "say": self.said.append}
        return push(self.out, options.pop("repo_id", REPO), **{**defaults, **options})


@pytest.fixture
def pusher(out: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> Pusher:
    made = Pusher(out, hub.endpoint)
    monkeypatch.setattr(time, "sleep", made.waits.append)  # the hub library itself waits too, on some routes
    return made


def contents(out: Path) -> dict[str, bytes]:
    return {upload.name: upload.path.read_bytes() for upload in files_to_push(out)}


def first_shard(out: Path) -> Path:
    return min(out.glob("*.safetensors"))


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# ----------------------------------------------------------------------------------------------------- the whole way


def test_push_download_load(out: Path, hub: FakeHub, pusher: Pusher, tmp_path: Path) -> None:
    result = pusher()
    assert hub.files(REPO) == contents(out)
    assert result.commit == hub.repos[REPO].branches["main"]
    assert result.sent == tuple(sorted(contents(out)))
    assert (result.forced, result.others, pusher.waits) == (False, (), [])
    assert result.total_bytes == sum(map(len, contents(out).values()))

    downloaded = Path(snapshot_download(REPO, cache_dir=tmp_path / "cache", endpoint=hub.endpoint, token=TOKEN))
    assert {path.name: path.read_bytes() for path in downloaded.iterdir() if path.name[0] != "."} == contents(out)

    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():
        here, there = (
            AutoModelForCausalLM.from_pretrained(folder, dtype="auto")(ids).logits for folder in (out, downloaded)
        )
    assert torch.equal(here, there)


def test_a_second_push_sends_nothing_and_makes_no_commit(hub: FakeHub, pusher: Pusher) -> None:
    first = pusher()
    hub.calls.clear()
    second = pusher()
    assert (second.commit, second.sent) == (first.commit, ())
    assert not hub.calls.keys() & {"preupload", "batch", "put", "commit"}


def test_progress_is_told_in_lines_and_the_bytes_of_each_file_in_bars(
    out: Path, hub: FakeHub, pusher: Pusher, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.fail("create", 503)
    result = pusher(bars=True)
    sizes = [len(data) for data in contents(out).values()]
    assert pusher.said == [
        f"hashing the files of {out}",
        "creating the repository: HTTP 503; again in 1 s (5 more tries)",
        f"{len(sizes)} of {len(sizes)} files are to be sent, {format_bytes(sum(sizes))}",
        f"comparing the hashes of commit {result.commit}",
    ]
    shown = capfd.readouterr().err
    for shard in out.glob("*.safetensors"):
        assert f"{shard.name}: 100%" in shown
    assert "B/s" in shown


def test_a_branch_leaves_main_alone(out: Path, hub: FakeHub, pusher: Pusher) -> None:
    pusher()
    main = hub.repos[REPO].branches["main"]
    (out / "README.md").write_text("# Another\n")
    result = pusher(revision="w4/g128")
    assert hub.repos[REPO].branches["main"] == main
    assert hub.files(REPO, "w4/g128")["README.md"] == b"# Another\n"
    assert result.sent == ("README.md",)
    assert pusher(revision="w4/g128").commit == result.commit  # the branch exists by now


def test_private(hub: FakeHub, pusher: Pusher) -> None:
    pusher(private=True)
    assert hub.repos[REPO].private
    pusher(repo_id="someone/open")
    assert not hub.repos["someone/open"].private
    with pytest.raises(OutputError, match="exists and is public, but --private"):
        pusher(repo_id="someone/open", private=True)


def test_files_of_a_former_push_are_reported(out: Path, hub: FakeHub, pusher: Pusher) -> None:
    (out / "vocab.txt").write_text("a")
    pusher()
    (out / "vocab.txt").unlink()
    assert pusher().others == ("vocab.txt",)


def test_a_dry_run_needs_no_network_and_no_token(out: Path, hub: FakeHub, pusher: Pusher, monkeypatch: Any) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(out / "none"))
    result = pusher(dry_run=True)
    assert {(u.name, u.bytes, u.sha256) for u in result.files} == {
        (name, len(data), sha256(data)) for name, data in contents(out).items()
    }
    assert (result.dry_run, result.commit, hub.calls.total()) == (True, None, 0)
    flip(first_shard(out))
    with pytest.raises(OutputError, match="not the file that was verified"):
        pusher(dry_run=True)


# --------------------------------------------------------------------------------------------------- which files go up


def test_only_files_of_the_checkpoint_go_up(out: Path, hub: FakeHub, pusher: Pusher, tmp_path: Path) -> None:
    expected = contents(out)
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (out / "sub").mkdir()
    (out / "sub" / "config.json").write_text("{}")
    (out / "tokenizer.model").symlink_to(secret)
    (out / "merges.txt").symlink_to("/etc/passwd")
    (out / "added_tokens.json").mkdir()
    planted = {"sub", "tokenizer.model", "merges.txt", "added_tokens.json"}
    for name in ("journal.jsonl", ".hidden", ".config.json.tmp", "foreign.safetensors", "notes.txt", "model.bin"):
        (out / name).write_bytes(b"x")
        planted.add(name)
    (out / "vocab.json").symlink_to("tokenizer_config.json")  # a link that stays inside is as good as a file
    result = pusher()
    assert hub.files(REPO) == {**expected, "vocab.json": b"{}"}
    assert set(result.left_out) == planted


def test_a_file_that_quantkit_lists_goes_up(out: Path, hub: FakeHub, pusher: Pusher) -> None:
    (out / "LICENSE").write_text("Apache")
    result = json.loads((out / "quantkit.json").read_text())
    listed = [*result["files"], {"name": "LICENSE", "bytes": 6, "sha256": sha256(b"Apache")}]
    write_result(out, files=listed)
    pusher()
    assert hub.files(REPO)["LICENSE"] == b"Apache"


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "sub/x", ".netrc", "journal.jsonl", "a\nb", "", 3, None])
@pytest.mark.parametrize("where", ["files", "index"])
def test_a_name_that_is_not_plain_is_refused(out: Path, name: Any, where: str) -> None:
    if where == "files":
        write_result(out, files=[{"name": name, "bytes": 1, "sha256": "0"}])
    else:
        (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(OutputError, match="not a plain name"):
        files_to_push(out)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", ["missing", "link", "folder"])
def test_an_incomplete_checkpoint_is_refused_even_by_force(out: Path, tmp_path: Path, kind: str, force: bool) -> None:
    shard = first_shard(out)
    elsewhere = shard.rename(tmp_path / "elsewhere")
    if kind == "link":
        shard.symlink_to(elsewhere)
    elif kind == "folder":
        shard.mkdir()
    with pytest.raises(OutputError, match=f"{shard.name} is part of the checkpoint but not a file in it"):
        check(out, files_to_push(out), force=force)


def test_a_gguf_needs_nothing_beside_it(out: Path) -> None:
    for path in out.iterdir():
        path.unlink()
    (out / "model.gguf").write_bytes(b"GGUF")
    write_result(out)
    assert "model.gguf" in contents(out)


def test_a_single_file_without_an_index(out: Path) -> None:
    for path in [*out.glob("*.safetensors"), out / "model.safetensors.index.json"]:
        path.unlink()
    (out / "model.safetensors").write_bytes(b"weights")
    (out / "model-00001-of-00002.safetensors").write_bytes(b"of an older run")
    write_result(out, files=[])
    assert [u.name for u in files_to_push(out) if u.name.endswith(".safetensors")] == ["model.safetensors"]


# ----------------------------------------------------------------------------------------------- what was not verified


def damage_flip(out: Path) -> str:
    flip(first_shard(out))
    return f"{first_shard(out).name} is not the file that was verified: its sha256 is another"


def damage_length(out: Path) -> str:
    with (out / "config.json").open("a") as file:
        file.write("\n")
    return r"config.json is not the file that was verified: expected \d+ bytes, got \d+"


def damage_absent(out: Path) -> str:
    (out / "quantkit.json").unlink()
    return "no quantkit.json"


def damage_unverified(out: Path) -> str:
    write_result(out, verification=None)
    return "holds no verification"


def damage_failed(out: Path) -> str:
    write_result(out, verification={"verdict": "fail", "reasons": ["perplexity +31%"]})
    return r"the verdict is fail, not pass \(perplexity \+31%\)"


def damage_unlisted(out: Path) -> str:
    write_result(out, files=[])
    return "is not among the files of quantkit.json"


DAMAGES = [damage_flip, damage_length, damage_absent, damage_unverified, damage_failed, damage_unlisted]


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_was_not_verified_needs_force(
    out: Path, hub: FakeHub, pusher: Pusher, damage: Callable[[Path], str]
) -> None:
    message = damage(out)
    with pytest.raises(OutputError, match=message):
        pusher()
    assert hub.calls.total() == 0

    before = {path.name: path.read_bytes() for path in out.iterdir()}
    result = pusher(force=True)
    assert result.forced
    card = hub.files(REPO)["README.md"].decode()
    assert card.startswith("---\nlicense: apache-2.0\n---\n\n> [!WARNING]\n> Pushed with `--force`")
    assert card.endswith("# A model\n")
    assert all(reason.replace("<", "&lt;") in card for reason in result.reasons)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert pusher(force=True).sent == ()  # the same card again: nothing to send


def test_force_that_is_not_needed_says_nothing(hub: FakeHub, pusher: Pusher) -> None:
    assert not pusher(force=True).forced
    assert hub.files(REPO)["README.md"] == CARD_TEXT.encode()


def test_a_card_made_by_the_caller_is_used_when_forced(out: Path, hub: FakeHub, pusher: Pusher) -> None:
    write_result(out, verification=None)
    (out / "README.md").unlink()
    pusher(force=True, card=lambda reasons: f"mine: {reasons[0]}")
    assert hub.files(REPO)["README.md"] == b"mine: quantkit.json holds no verification"


def test_the_card_that_goes_up_names_the_repository(out: Path, hub: FakeHub, pusher: Pusher) -> None:
    (out / "README.md").write_text("vllm serve HERE # mine\n")
    pusher(named=lambda text: text.replace("HERE", REPO))
    assert hub.files(REPO)["README.md"] == f"vllm serve {REPO} # mine\n".encode()
    assert (out / "README.md").read_text() == "vllm serve HERE # mine\n"
    assert pusher(named=lambda text: text.replace("HERE", REPO)).sent == ()


def test_a_note_on_a_card_without_metadata() -> None:
    note = with_note("# Title\n---\nrule\n---\n", ["a <b>", "two\nlines"])
    assert note.endswith("> - a &lt;b>\n> - two lines\n\n# Title\n---\nrule\n---\n".replace("b>", "b&gt;"))


@pytest.mark.parametrize("text", ["{", "[]", '{"files": 3}', '{"files": [{"name": "config.json"}]}', "\ud800"])
def test_a_damaged_quantkit_json_is_refused_even_by_force(out: Path, text: str) -> None:
    (out / "quantkit.json").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(OutputError, match=r"quantkit\.json"):
        check(out, files_to_push(out), force=True)


@pytest.mark.parametrize("repo_id", ["name", "a/b/c", "../x", "a/..", "a/b--c", "a/x.git", "", "a b/c", "a/b-", "/x"])
def test_a_bad_repository_name(repo_id: str) -> None:
    with pytest.raises(InputError, match="expected a repository as org/name"):
        require_names(repo_id, None)


@pytest.mark.parametrize("revision", ["", "-x", "a..b", "a b", "/a", "a/", "a.lock", "a//b", "x~1", "a/.b"])
def test_a_bad_branch_name(revision: str) -> None:
    with pytest.raises(InputError, match="expected the name of a branch"):
        require_names(REPO, revision)


# ------------------------------------------------------------------------------------------------------- a bad network

ROUTES = ["create", "preupload", "batch", "put", "tree", "commit"]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_hub_is_waited_for(out: Path, hub: FakeHub, pusher: Pusher, route: str, status: int) -> None:
    hub.fail(route, status, times=2)
    pusher()
    assert hub.files(REPO) == contents(out)
    assert pusher.waits == [1.0, 2.0]  # exponential


@pytest.mark.parametrize("route", [*ROUTES, "yaml"])
def test_a_dropped_connection_is_made_again(out: Path, hub: FakeHub, pusher: Pusher, route: str) -> None:
    hub.cut(route, times=2)
    pusher()
    assert hub.files(REPO) == contents(out)
    assert len(pusher.waits) == 2


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub: FakeHub, pusher: Pusher) -> None:
    hub.cut("commit", how="lost")
    result = pusher()
    assert len(hub.repos[REPO].commits) == 2  # the first is the empty repository
    assert result.commit == hub.repos[REPO].branches["main"]


@pytest.mark.parametrize("after", ["7", "date"])
def test_retry_after_is_respected(hub: FakeHub, pusher: Pusher, after: str) -> None:
    header = formatdate(time.time() + 30, usegmt=True) if after == "date" else after
    hub.fail("create", 429, headers={"Retry-After": header})
    hub.fail("create", 429, headers={"RateLimit": '"api";r=0;t=11'})
    pusher()
    assert len(pusher.waits) == 2
    assert (20 < pusher.waits[0] <= 30) if after == "date" else pusher.waits[0] == 7
    assert pusher.waits[1] == 11


def test_a_wait_of_hours_is_left_to_the_user(hub: FakeHub, pusher: Pusher) -> None:
    hub.fail("create", 429, headers={"Retry-After": "7200"})
    with pytest.raises(OutputError, match=r"too many requests \(HTTP 429\); wait 7200 seconds, then run"):
        pusher()
    assert pusher.waits == []


@pytest.mark.parametrize("fault", ["status", "cut"])
def test_patience_ends(hub: FakeHub, pusher: Pusher, fault: str) -> None:
    if fault == "status":
        hub.fail("create", 500, times=100)
    else:
        hub.cut("create", times=100)
    with pytest.raises(OutputError, match=r"the hub failed \(HTTP 500\)" if fault == "status" else "connection failed"):
        pusher()
    assert pusher.waits == [1.0, 2.0, 4.0, 8.0, 16.0]


@pytest.mark.parametrize("route", [*ROUTES, "yaml", "info"])
def test_a_silent_hub_is_asked_again(
    out: Path, hub: FakeHub, pusher: Pusher, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    monkeypatch.setattr(network, "ANSWER_SECONDS", 0.1)
    hub.cut(route, times=2, how="silent")
    pusher(private=True)  # which asks for "info" too
    assert hub.files(REPO) == contents(out)
    assert len(pusher.waits) == 2


@pytest.mark.parametrize("route", ["create", "tree", "put"])
def test_a_hub_that_stays_silent_is_left(
    hub: FakeHub, pusher: Pusher, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    """Whether the library tries again by itself, or only we do."""
    monkeypatch.setattr(network, "ANSWER_SECONDS", 0.05)
    hub.cut(route, times=1000, how="silent")
    with pytest.raises(OutputError, match=r"the connection failed \(.*\); check the network, then run the same"):
        pusher()
    assert hub.calls[route] == network.TRIES


def test_a_wait_of_hours_is_not_slept_by_the_library(hub: FakeHub, pusher: Pusher) -> None:
    hub.fail("tree", 429, headers={"Retry-After": "86400"})
    with pytest.raises(OutputError, match=r"too many requests \(HTTP 429\); wait 86400 seconds"):
        pusher()
    assert pusher.waits == []


def test_an_interrupted_push_goes_on_with_what_is_missing(out: Path, hub: FakeHub, pusher: Pusher) -> None:
    shards = sorted(out.glob("*.safetensors"))
    hub.cut("put", times=1000)
    with pytest.raises(OutputError, match=f"{REPO}: uploading: the connection failed"):
        pusher()
    assert hub.files(REPO) == {}  # nothing is published by halves
    hub.heal()

    hub.fail("commit", 403)
    with pytest.raises(OutputError, match="committing"):
        pusher()
    assert sorted(hub.stored) == sorted(sha256(path.read_bytes()) for path in shards)
    hub.blobs.pop(sha256(shards[1].read_bytes()))
    hub.stored.clear()

    pusher()
    assert hub.stored == [sha256(shards[1].read_bytes())]  # only what was missing
    assert hub.files(REPO) == contents(out)


def test_a_changed_shard_alone_is_sent(out: Path, hub: FakeHub, pusher: Pusher) -> None:
    pusher()
    flip(first_shard(out))
    write_result(out)
    hub.stored.clear()
    assert pusher().sent == (first_shard(out).name, "quantkit.json")
    assert hub.stored == [sha256(first_shard(out).read_bytes())]


@pytest.mark.parametrize("name", ["config.json", "model-00001-of"])
def test_a_hub_that_holds_other_content_is_caught(out: Path, hub: FakeHub, pusher: Pusher, name: str) -> None:
    name = next(path.name for path in sorted(out.iterdir()) if path.name.startswith(name))
    hub.lies.add(name)
    with pytest.raises(OutputError, match=f"{REPO}: {name} is not on the hub as it is here: expected (git|sha256)"):
        pusher()


def test_a_file_that_changes_during_the_push_is_caught(out: Path, hub: FakeHub, pusher: Pusher) -> None:
    shard = sorted(out.glob("*.safetensors"))[1]

    hub.fail("create", 503)
    with pytest.raises(OutputError, match=f"{shard.name} is not on the hub as it is here: expected sha256"):
        pusher(sleep=lambda seconds: flip(shard))


# ------------------------------------------------------------------------------------------------- refusals and secrets

REFUSALS = [
    ("create", 401, "the token was not accepted (HTTP 401); run `hf auth login`"),
    ("create", 403, "not allowed (HTTP 403); use a token with the right to write to someone"),
    ("preupload", 403, "uploading: not allowed (HTTP 403)"),
    ("tree", 404, "listing the repository: not found (HTTP 404); check someone/mini-awq and branch main"),
    ("commit", 409, "committing: it conflicts with another change (HTTP 409)"),
    ("commit", 412, "committing: it conflicts with another change (HTTP 412)"),
    ("commit", 413, "committing: refused (HTTP 413)"),
]


@pytest.mark.parametrize(("route", "status", "message"), REFUSALS)
def test_a_refusal_is_one_line_and_not_tried_again(
    hub: FakeHub, pusher: Pusher, route: str, status: int, message: str
) -> None:
    hub.fail(route, status, times=2)
    with pytest.raises(OutputError) as caught:
        pusher()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert pusher.waits == []


def test_no_token(out: Path, hub: FakeHub, pusher: Pusher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(out / "none"))
    with pytest.raises(InputError, match=r"no token; run `hf auth login`"):
        pusher()
    (out.parent / "login").write_text(TOKEN)  # where a login leaves it
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(out.parent / "login"))
    assert pusher().commit


def test_offline(hub: FakeHub, pusher: Pusher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        pusher()


@pytest.mark.parametrize(
    ("route", "status"),
    [("create", 400), ("create", 401), ("preupload", 403), ("put", 400), ("commit", 422), ("yaml", 400), ("put", 500)],
)
def test_the_token_is_never_repeated(
    hub: FakeHub,
    pusher: Pusher,
    route: str,
    status: int,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Even when the hub quotes it in its answer."""
    said = f"Authorization: Bearer {TOKEN} of {TOKEN} at https://x.test/a?sig=SIGNED"
    hub.fail(
        route, status, times=100, headers={"X-Error-Message": said}, body=json.dumps({"errors": [{"message": said}]})
    )
    with caplog.at_level(logging.INFO), pytest.raises(OutputError) as caught:
        pusher()
    shown = "".join(traceback.format_exception(caught.value)) + str(caught.value) + repr(caught.value)
    captured = capfd.readouterr()
    for text in (shown, caplog.text, captured.out, captured.err):
        assert TOKEN not in text
        assert TOKEN[3:] not in text
    assert "SIGNED" not in shown
    assert "\n" not in str(caught.value)


ODD_WAITS = ["\u00b2", "9" * 400, "-5", "inf", "nan", "1_0", "Thu, 99 Foo", "Mon, 01 Jan 99999 00:00:00 GMT", ";t=9"]


@pytest.mark.parametrize("after", ODD_WAITS)
@pytest.mark.parametrize("route", ["create", "tree", "put", "commit"])
def test_an_odd_answer_escapes_nowhere(hub: FakeHub, pusher: Pusher, route: str, after: str) -> None:
    """No error that is raised has one before it, in which the hub might have quoted the token."""
    hub.fail(route, 429, times=100, headers={"Retry-After": after, "RateLimit": after, "X-Error-Message": TOKEN})
    with pytest.raises(OutputError) as caught:
        pusher()
    assert caught.value.__cause__ is caught.value.__context__ is None
    assert TOKEN not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("reason", "shown"),
    [
        ("Private repository storage limit reached", "(HTTP 403): Private repository storage limit reached; see http"),
        (f"\x9b2J not by Bearer {TOKEN}", "(HTTP 403): \ufffd2J not by ***; see http"),
        (f"not by {TOKEN[8:-2]}", "(HTTP 403): not by ***; see http"),
    ],
)
def test_the_hubs_own_reason_is_told(hub: FakeHub, pusher: Pusher, reason: str, shown: str) -> None:
    hub.fail("preupload", 403, headers={"X-Error-Message": reason})
    with pytest.raises(OutputError) as caught:
        pusher()
    assert shown in str(caught.value)


def test_what_the_hub_calls_things_is_cleaned(hub: FakeHub, pusher: Pusher) -> None:
    pusher()
    repo = hub.repos[REPO]
    files = repo.commits[repo.branches["main"]]
    repo.commit("main", {**files, f"a\x1b{TOKEN}": files["config.json"]})
    assert pusher().others == ("a\ufffd***",)


def test_a_successful_push_never_shows_the_token(
    pusher: Pusher, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.DEBUG):
        result = pusher()
    captured = capfd.readouterr()
    assert TOKEN not in caplog.text + captured.out + captured.err + repr(result)
    assert captured.err == ""  # the caller's progress is the only one


def test_a_signed_address_is_never_shown(
    hub: FakeHub, pusher: Pusher, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.cut("put", times=2)
    pusher()
    captured = capfd.readouterr()
    assert hub.calls["put"] >= 5
    assert "X-Amz-Signature" not in caplog.text + captured.out + captured.err + "".join(pusher.said)
