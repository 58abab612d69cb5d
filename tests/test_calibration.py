# SPDX-License-Identifier: Apache-2.0
"""Calibration sources: what is read, how it is cut, what is refused, and what ships."""

import hashlib
import itertools
import json
import lzma
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import processors
from transformers import PreTrainedTokenizerBase

from quantkit.calibration import load as calibration
from quantkit.calibration import windows
from quantkit.calibration.files import pieces_of
from quantkit.calibration.load import load, load_eval
from quantkit.calibration.sources import BUNDLED, MIX, parse_hub
from quantkit.calibration.tokens import TokenSet, as_asked, notes_of
from quantkit.errors import InputError
from quantkit.resources import calibration_dir
from tests.texts import BOS, CHAT, EOS, KEEPS, STRIPS, USER, make_tokenizer, write_jsonl

PLAIN = make_tokenizer()
BARE = make_tokenizer(bos=False, eos=False)
VOCAB = len(PLAIN)


def get(source: object, tok: PreTrainedTokenizerBase = PLAIN, **options: Any) -> TokenSet:
    """`load` with small defaults."""
    settings = {"samples": 4, "seqlen": 16, "seed": 0, "vocab_size": VOCAB, **options}
    return load(str(source), lambda: tok, **settings)


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    """Forty short documents, each of one word of its own."""
    return write_jsonl(tmp_path / "stories.jsonl", ({"text": f"word{i} " * 12} for i in range(40)))


# What ships


def manifest() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((calibration_dir() / "manifest.json").read_text(encoding="utf-8"))
    return content


def records(name: str) -> list[dict[str, Any]]:
    with lzma.open(calibration_dir() / f"{name}.jsonl.xz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def words(record: dict[str, Any]) -> str:
    return record.get("text") or "\n".join(m["content"] for m in record["messages"])


def test_manifest_tells_the_truth_about_every_file() -> None:
    sets = manifest()["sets"]
    assert {*sets, "mix"} == set(BUNDLED)
    assert {f"{name}.jsonl.xz" for name in sets} == {path.name for path in calibration_dir().glob("*.xz")}
    notices = (calibration_dir() / "README.md").read_text(encoding="utf-8")
    for name, entry in sets.items():
        path = calibration_dir() / entry["file"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"], name
        assert path.stat().st_size <= 400_000, name
        content = records(name)
        assert len(content) == entry["documents"]
        assert sum(len(words(record)) for record in content) == entry["characters"]
        assert {record["source"]: record["license"] for record in content} == entry["sources"]
        assert all(source in notices for source in entry["sources"])


def test_eval_shares_no_document_with_a_calibration_set() -> None:
    def lines(name: str) -> set[str]:
        return {line for record in records(name) for line in words(record).splitlines() if len(line) >= 60}

    measured = lines("eval")
    assert len(measured) > 1000
    for name in MIX:
        assert len(measured & lines(name)) < 0.01 * len(measured)


def test_reasoning_set_holds_traces() -> None:
    answers = [record["messages"][-1]["content"] for record in records("reasoning")]
    assert all(answer.startswith("<think>\n") and "\n</think>\n\n" in answer for answer in answers)


@pytest.mark.parametrize("name", BUNDLED)
def test_every_bundled_set_loads_offline(name: str) -> None:
    found = get(name, make_tokenizer(template=KEEPS), samples=5, seqlen=64, offline=True)
    assert (found.samples, found.seqlen) == found.input_ids.shape == (5, 64)
    assert found.input_ids.dtype == torch.int64
    assert found.notes == ()


def test_mix_takes_the_kinds_in_turn() -> None:
    tok = make_tokenizer(template=KEEPS)
    mixed = get("mix", tok, samples=6, seqlen=32).input_ids
    single = [get(name, tok, samples=2, seqlen=32).input_ids for name in MIX]
    expected = [single[0][0], single[1][0], single[2][0], single[3][0], single[0][1], single[1][1]]
    assert torch.equal(mixed, torch.stack(expected))


def test_default_size_comes_out_of_one_set_for_a_coarse_vocabulary() -> None:
    # Qwen2's tokenizer needs 4.2 characters a token for this prose; the set must hold 128 x 2048 such tokens.
    assert manifest()["sets"]["general"]["characters"] > 4.2 * 128 * 2048


# Windows


def without_added(cut: torch.Tensor, prefix: list[int]) -> list[int]:
    """The stream that windows were cut from, but for its own tokens of the prefix."""
    ids = cut.flatten().tolist()
    assert all(row[: len(prefix)].tolist() == prefix for row in cut)
    return [token for token in ids if token not in prefix]


@pytest.mark.parametrize("kind", ["text", "messages", "txt"])
def test_every_window_begins_as_the_tokenizer_begins_a_text(tmp_path: Path, kind: str) -> None:
    text = "".join(f"Line {i} of the page.\n\n" for i in range(200))
    path = tmp_path / "page.txt"
    path.write_text(text)
    if kind != "txt":
        value: Any = text if kind == "text" else [{"role": "user", "content": text}]
        path = write_jsonl(tmp_path / "page.jsonl", [{kind: value}])
    tok = make_tokenizer(template="{% for m in messages %}{{ m.content }}{% endfor %}")
    plain: list[int] = BARE(text, verbose=False)["input_ids"]
    bos = [PLAIN.bos_token_id]
    found = load_eval(str(path), lambda: tok, seqlen=32, vocab_size=VOCAB)
    stream = without_added(found.input_ids, bos)
    assert len(found.input_ids) > 9
    assert stream == plain[: len(stream)]  # nothing between two windows is lost
    assert found.protocol.endswith("; each window begins with <s>")
    calibrated = get(path, tok)
    without_added(calibrated.input_ids, bos)
    assert calibrated.protocol.endswith("; each window begins with <s>")


def test_windows_begin_with_all_that_the_tokenizer_puts_first(stories: Path) -> None:
    tok = make_tokenizer()
    both = processors.TemplateProcessing(single=f"{BOS} {USER} $A", special_tokens=[(BOS, 0), (USER, 2)])
    tok.backend_tokenizer.post_processor = both
    without_added(get(stories, tok).input_ids, [0, 2])
    with pytest.raises(InputError, match="each window begins with 2 special tokens"):
        get(stories, tok, seqlen=2)


def test_windows_begin_with_nothing_where_the_tokenizer_adds_nothing(stories: Path) -> None:
    assert "begins" not in get(stories, BARE).protocol
    assert BOS not in BARE.decode(get(stories, BARE).input_ids.flatten())


def test_same_seed_same_ids_other_seed_others(stories: Path) -> None:
    first, again, other = get(stories), get(stories), get(stories, seed=1)
    assert torch.equal(first.input_ids, again.input_ids)
    assert first.sha256 == again.sha256 != other.sha256


def test_hash_is_of_shape_and_little_endian_ids(stories: Path) -> None:
    found = get(stories, samples=2, seqlen=3)
    flat = found.input_ids.flatten().tolist()
    assert found.sha256 == hashlib.sha256(struct.pack("<8q", 2, 3, *flat)).hexdigest()


def test_documents_are_whole_and_joined_by_one_eos(stories: Path) -> None:
    text = PLAIN.decode(get(stories, samples=1, seqlen=400).input_ids[0])
    assert isinstance(text, str)
    parts = text.split(EOS)
    assert len(parts) > 4
    assert all(part.startswith(BOS + "word") and part.count(BOS) == 1 for part in parts)
    whole = [set(part.removeprefix(BOS).split()) for part in parts[:-1]]
    assert all(len(names) == 1 for names in whole)
    assert len(set.union(*whole)) == len(whole)


def test_tokenizer_without_bos_and_eos(stories: Path) -> None:
    text = BARE.decode(get(stories, BARE, samples=1, seqlen=200).input_ids[0])
    assert "<" not in text
    assert "word" in text


def test_one_long_document_does_not_crowd_out_the_others(tmp_path: Path) -> None:
    long = {"text": "long story " * 20_000}
    path = write_jsonl(tmp_path / "uneven.jsonl", [long, *({"text": f"tale{i} " * 40} for i in range(20))])
    text = PLAIN.decode(get(path, samples=30, seqlen=64).input_ids.flatten())
    assert sum(f"tale{i} " in text for i in range(20)) >= 5
    # Once every document has had its turn, the long one fills the rest.
    text = PLAIN.decode(get(path, samples=400, seqlen=64).input_ids.flatten())
    assert all(f"tale{i} " in text for i in range(20))
    assert text.count("long story") > 1000


@given(st.text(max_size=400), st.integers(1, 50))
def test_passages_lose_nothing_and_stay_near_their_size(text: str, size: int) -> None:
    passages = windows.passages_of(text, size)
    assert "".join(passages) == text
    assert all(passages) or not text
    assert all(len(passage) <= 2.5 * size + 1 for passage in passages)


@given(st.lists(st.text("ab \n", max_size=60), max_size=6), st.integers(0, 5))
def test_rounds_give_every_passage_once(documents: list[str], seed: int) -> None:
    found = list(windows.in_rounds(documents, 10, random.Random(seed)))
    assert sorted(map(str, found)) == sorted(p for text in documents for p in windows.passages_of(text, 10))


@given(st.lists(st.lists(st.integers(0, 5), max_size=4), max_size=6), st.integers(1, 20))
def test_join_puts_no_two_eos_together(rows: list[list[int]], enough: int) -> None:
    stream = windows.joined(rows, 9, enough).tolist()
    kept = list(itertools.chain.from_iterable(row for row in rows if row))
    without = [i for i in stream if i != 9]
    assert without == kept[: len(without)]
    assert (9, 9) not in itertools.pairwise(stream)
    assert len(stream) >= min(enough, len(kept))


# Kinds of files


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.xz", ".JSONL"])
def test_compression_does_not_change_the_ids(tmp_path: Path, stories: Path, suffix: str) -> None:
    content = [json.loads(line) for line in stories.read_text().splitlines()]
    assert get(write_jsonl(tmp_path / f"same{suffix}", content)).sha256 == get(stories).sha256


@pytest.mark.parametrize("field", ["text", "messages"])
def test_parquet_equals_jsonl(tmp_path: Path, field: str) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    values: list[Any] = [CHAT] * 20 if field == "messages" else [f"word{i} " * 12 for i in range(20)]
    content = [{field: value, "id": i} for i, value in enumerate(values)]
    parquet.write_table(arrow.Table.from_pylist(content), tmp_path / "set.parquet")
    tok = make_tokenizer(template=STRIPS)
    lines = write_jsonl(tmp_path / "set.jsonl", content)
    assert get(tmp_path / "set.parquet", tok).sha256 == get(lines, tok).sha256


def test_text_file_is_one_document_of_many_passages(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("\ufeff" + "".join(f"Line {i} of the book.\n" for i in range(500)), encoding="utf-8")
    assert get(path, samples=8, seqlen=32).sha256 != get(path, samples=8, seqlen=32, seed=1).sha256
    assert "\ufeff" not in PLAIN.decode(load_eval(str(path), lambda: PLAIN, seqlen=8, vocab_size=VOCAB).input_ids[0])


def test_half_a_surrogate_pair_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text('{"text": "half \\ud83d of it"}\n' * 9)
    assert "half ? of it" in PLAIN.decode(get(path, samples=1, seqlen=64).input_ids[0])


def test_token_file_is_used_as_it_is(tmp_path: Path) -> None:
    ids = torch.arange(12, dtype=torch.int32).reshape(3, 4)
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")

    def no_tokenizer() -> PreTrainedTokenizerBase:
        raise AssertionError("a token file needs no tokenizer")

    path = str(tmp_path / "ids.safetensors")
    found = load(path, no_tokenizer, samples=99, seqlen=99, seed=0, vocab_size=12)
    assert torch.equal(found.input_ids, ids.long())
    assert load_eval(path, no_tokenizer, seqlen=99, vocab_size=12).sha256 == found.sha256
    assert as_asked(found, samples=3, seqlen=4).notes == as_asked(found).notes == ()
    some = as_asked(found, samples=2)
    assert torch.equal(some.input_ids, ids[:2].long())
    assert (some.notes, some.protocol) == ((), "the first 2 windows of the file, as they are")
    assert some.sha256 == load_eval(path, no_tokenizer, seqlen=4, samples=2, vocab_size=12).sha256
    assert notes_of(None, as_asked(found, samples=99)) == [
        f"{path}: --samples 99 was left out here: the file is used as it is, 3 x 4 tokens"
    ]


def test_fewer_windows_of_a_token_file_can_be_evaluated(tmp_path: Path) -> None:
    ids = torch.arange(12).reshape(3, 4)
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    save_file({"input_ids": ids[:2].contiguous()}, tmp_path / "two.safetensors")
    path, two = str(tmp_path / "ids.safetensors"), str(tmp_path / "two.safetensors")
    found = load_eval(path, lambda: PLAIN, seqlen=4, samples=2, vocab_size=12)
    assert torch.equal(found.input_ids, ids[:2])
    assert found.sha256 == load_eval(two, lambda: PLAIN, seqlen=4, vocab_size=12).sha256
    assert "first 2 windows" in found.protocol
    with pytest.raises(InputError, match="use --eval-samples 3"):
        load_eval(path, lambda: PLAIN, seqlen=4, samples=4, vocab_size=12)


def test_long_text_gives_no_warning(stories: Path, caplog: pytest.LogCaptureFixture, capfd: Any) -> None:
    get(stories, samples=1, seqlen=64)
    assert "longer than" not in caplog.text + "".join(capfd.readouterr())


# Evaluation


def whole_and_parts(text: str, tok: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """(the ids of a text tokenized at once, those of its parts)"""
    pieces = [text[i : i + 100] for i in range(0, len(text), 100)]
    return tok(text, add_special_tokens=False, verbose=False)["input_ids"], [
        token for row in windows.ids_of_text(pieces, tok) for token in row
    ]


TEXTS = ["", "a", "the layer " * 400, " " * 3000, "a" * 3000, "ab\n" * 900, "日本語のテキスト。" * 300]
WORDS = ["the model ", "reads", " ", "\n", "\n\n", "  layer", "é", "字", "\t", "1234", "!?"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_in_parts_has_the_ids_of_the_whole(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(windows, "SPAN", 300)
    monkeypatch.setattr(windows, "OVERLAP", 100)
    whole, parts = whole_and_parts(text, BARE)
    assert parts == whole


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(WORDS), max_size=400), st.integers(60, 200))
def test_any_text_in_parts_has_its_ids(monkeypatch: pytest.MonkeyPatch, words: list[str], span: int) -> None:
    monkeypatch.setattr(windows, "SPAN", span)
    monkeypatch.setattr(windows, "OVERLAP", 50)
    whole, parts = whole_and_parts("".join(words), BARE)
    assert parts == whole


def test_no_more_is_read_than_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "the model reads one layer at a time. "
    path = tmp_path / "large.txt"
    path.write_text(text * 60_000)
    read: list[str] = []

    def counted(path: Path) -> Iterator[str]:
        for piece in pieces_of(path):
            read.append(piece)
            yield piece

    monkeypatch.setattr("quantkit.calibration.sources.pieces_of", counted)
    found = load_eval(str(path), lambda: BARE, seqlen=64, samples=8, vocab_size=VOCAB)
    assert len(read) == 1
    assert found.input_ids.flatten().tolist() == BARE(text * 100)["input_ids"][: 8 * 64]
    monkeypatch.setattr(calibration, "MOST_CHARACTERS", 100_000)
    assert get(path, BARE).notes == ("only its beginning was read, as it is very large",)
    assert len(read) == 2


def test_a_very_long_document_is_tokenized_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": "the model reads one layer at a time\n" * n} for n in (3, 400, 5)]
    path = write_jsonl(tmp_path / "long.jsonl", [*rows, {"messages": [{"role": "user", "content": "layer " * 3000}]}])
    tok = make_tokenizer(template=KEEPS)

    def hashes() -> list[str]:
        return [load_eval(str(path), lambda: tok, seqlen=16, samples=n, vocab_size=VOCAB).sha256 for n in (4, None)]

    usual = hashes()
    monkeypatch.setattr(windows, "LONG", 200)
    monkeypatch.setattr(windows, "SPAN", 300)
    monkeypatch.setattr(windows, "OVERLAP", 100)
    assert hashes() == usual


def test_documents_are_read_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = write_jsonl(tmp_path / "long.jsonl", [{"text": f"Document {i}. " + "words " * 99} for i in range(400)])
    with rows.open("a") as file:
        file.write("{cut")
    found = load_eval(str(rows), lambda: PLAIN, seqlen=64, samples=8, vocab_size=VOCAB)  # the damage is not reached
    assert found.samples == 8
    with pytest.raises(InputError, match="line 401"):
        load_eval(str(rows), lambda: PLAIN, seqlen=64, vocab_size=VOCAB)
    monkeypatch.setattr(calibration, "MOST_CHARACTERS", 50_000)
    assert get(rows).notes == ("only its beginning was read, as it is very large",)


def test_text_is_evaluated_by_the_wikitext_protocol(tmp_path: Path) -> None:
    path = tmp_path / "wiki.txt"
    path.write_text("".join(f"Line {i} of the page.\n\n" for i in range(50)))
    whole = BARE(path.read_text(), verbose=False)["input_ids"]
    found = load_eval(str(path), lambda: BARE, seqlen=32, vocab_size=VOCAB)
    assert found.input_ids.flatten().tolist() == whole[: len(whole) // 32 * 32]
    first = load_eval(str(path), lambda: BARE, seqlen=32, samples=3, vocab_size=VOCAB)
    assert torch.equal(first.input_ids, found.input_ids[:3])
    assert first.protocol == "whole file tokenized as one text; the first 3 windows of 32 without overlap"


def test_documents_are_evaluated_in_order(stories: Path) -> None:
    found = load_eval(str(stories), lambda: PLAIN, seqlen=16, vocab_size=VOCAB)
    text = PLAIN.decode(found.input_ids.flatten())
    assert isinstance(text, str)
    assert text.startswith(BOS + "word0 ")
    assert [text.index(f"word{i} ") for i in range(39)] == sorted(text.index(f"word{i} ") for i in range(39))


def test_of_the_bundled_set_no_more_is_evaluated_than_a_kl_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "EVAL_TOKENS", 1000)
    short = load_eval("eval", lambda: PLAIN, seqlen=64, vocab_size=VOCAB)
    assert (short.samples, short.protocol.split("; ")[1]) == (15, "the first 15 windows of 64 without overlap")
    asked = load_eval("eval", lambda: PLAIN, seqlen=64, samples=20, vocab_size=VOCAB)
    assert torch.equal(asked.input_ids[:15], short.input_ids)
    assert load_eval("eval", lambda: PLAIN, seqlen=2000, vocab_size=VOCAB).samples == 1


# What is refused, in one line that says what to do


def refusal(source: object, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        get(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith((str(source), repr(source), "--"))
    return message


def test_missing_and_unknown_sources(tmp_path: Path) -> None:
    message = refusal(tmp_path / "nothing.txt")
    assert "no such file" in message
    assert all(name in message for name in BUNDLED)
    assert "no such file" in refusal("wikitext")
    assert "no such file" in refusal("nothing.safetensors")
    assert "a folder" in refusal(tmp_path)
    (tmp_path / "set.pkl").write_bytes(b"\x80\x04.")
    assert "unknown kind of source; expected a bundled set" in refusal(tmp_path / "set.pkl")
    refusal("")


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl"])
def test_empty_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("\n \n")
    assert "expected text, got none" in refusal(tmp_path / name)


@pytest.mark.parametrize("name", ["bad.jsonl.gz", "bad.jsonl.xz", "bad.parquet", "bad.safetensors"])
def test_damaged_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\xff\xfe\x00damage" * 9)
    assert "check or replace the file" in refusal(tmp_path / name)


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_truncated_files(tmp_path: Path, stories: Path, suffix: str) -> None:
    path = write_jsonl(tmp_path / f"cut.jsonl{suffix}", [{"text": f"word{i}"} for i in range(500)])
    path.write_bytes(path.read_bytes()[:-30])
    assert "check or replace the file" in refusal(path)


@pytest.mark.parametrize(
    "line",
    [
        '{"question": "text?"}',
        '{"text": 3}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": "user", "content": 5}], "text": "a"}',
        '{"messages": "a"}',
        "[1]",
        '"text"',
        "{cut",
        "[" * 100_000,
    ],
)
def test_bad_lines_are_named_by_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n")
    assert f"{path}: line 3: expected" in refusal(path)


def test_too_few_tokens(stories: Path) -> None:
    tokens = (
        sum(
            len(PLAIN(json.loads(line)["text"], verbose=False)["input_ids"])
            for line in stories.read_text().splitlines()
        )
        + 39
    )
    message = refusal(stories, samples=1000, seqlen=64)
    assert f"got {tokens} tokens, expected 1000 x 64 = 64000; use --samples 52," in message
    get(stories, samples=52, seqlen=64)
    with pytest.raises(InputError):
        get(stories, samples=53, seqlen=64)
    assert f"use --seqlen {tokens} or less" in refusal(stories, seqlen=100_000)
    with pytest.raises(InputError, match="expected 1 x 100000"):
        load_eval(str(stories), lambda: PLAIN, seqlen=100_000, vocab_size=VOCAB)


def test_mix_says_which_kind_is_short() -> None:
    assert "mix (general): got" in refusal("mix", samples=400_000, seqlen=16)


def test_id_outside_the_vocabulary(stories: Path, tmp_path: Path) -> None:
    top = int(get(stories).input_ids.max())
    assert f"token id {top} is outside the vocabulary, expected 0 to {top - 1}" in refusal(stories, vocab_size=top)
    save_file({"input_ids": torch.tensor([[1, -2]])}, tmp_path / "ids.safetensors")
    assert "token id -2" in refusal(tmp_path / "ids.safetensors")


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"ids": torch.ones(2, 2, dtype=torch.int64)},
        {"input_ids": torch.ones(2, 2, dtype=torch.int64), "attention_mask": torch.ones(2, 2)},
        {"input_ids": torch.ones(2, 2)},
        {"input_ids": torch.ones(2, 2, dtype=torch.bool)},
        {"input_ids": torch.ones(4, dtype=torch.int64)},
        {"input_ids": torch.ones(0, 4, dtype=torch.int64)},
    ],
)
def test_wrong_token_files(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, tmp_path / "ids.safetensors")
    assert "expected one integer tensor input_ids [samples, seqlen], got" in refusal(tmp_path / "ids.safetensors")


@pytest.mark.parametrize("option", ["samples", "seqlen"])
def test_sizes_are_positive(stories: Path, option: str) -> None:
    assert refusal(stories, **{option: 0}) == f"--{option}: expected at least 1, got 0"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("hf:org/name", ("org/name", None, "train")),
        ("hf:org/name:test", ("org/name", None, "test")),
        ("hf:org/name/main", ("org/name", "main", "train")),
        ("hf:org/na-me.1/2024-10:train_sft", ("org/na-me.1", "2024-10", "train_sft")),
    ],
)
def test_hub_names(source: str, expected: tuple[str, str | None, str]) -> None:
    assert parse_hub(source) == expected


@pytest.mark.parametrize(
    "source", ["hf:", "hf:name", "hf:../name", "hf:/etc/passwd", "hf:a/b/c/d", "hf:a/b:", "hf:a/b:c:d"]
)
def test_wrong_hub_names(source: str) -> None:
    assert "expected hf:ORG/NAME[/CONFIG][:SPLIT]" in refusal(source)


def test_hub_is_not_reached_offline() -> None:
    assert "this run is offline; use a bundled set" in refusal("hf:org/name", offline=True)
