# SPDX-License-Identifier: Apache-2.0
"""Texts as people have them: every usual shape of a row and kind of file, and what is no such thing in one line."""

import bz2
import csv
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantkit.calibration.load import load, load_eval
from quantkit.calibration.shapes import Document, document_of, plain_text
from quantkit.calibration.sources import open_corpus, split_field, with_field
from quantkit.errors import InputError
from tests.texts import CHAT, KEEPS, make_tokenizer, write_jsonl

TOKENIZER = make_tokenizer(template=KEEPS)
TALK = [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue."}]
CALLS = [
    {"role": "user", "content": "How warm?"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "warmth", "arguments": "{}"}}]},
    {"role": "assistant", "content": "Twenty."},
]
PARTS = [{"type": "text", "text": "Name a "}, {"type": "text", "text": "colour."}]


def documents(source: object) -> list[Document]:
    corpus = open_corpus(str(source), offline=False, shuffle=None)
    return ["".join(map(str, corpus.documents))] if corpus.one_text else list(corpus.documents)


def sha256(source: object) -> str:
    return load(str(source), lambda: TOKENIZER, samples=3, seqlen=16, seed=0, vocab_size=400).sha256


def refusal(source: object) -> str:
    with pytest.raises(InputError) as caught:
        documents(source)
    message = str(caught.value)
    assert message.isprintable()
    return message


def asked(question: str) -> Document:
    return [{"role": "user", "content": question}, TALK[1]]


# Rows


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "Words."}, "Words."),
        ({"content": "Words."}, "Words."),
        ({"messages": TALK}, TALK),
        ({"messages": TALK, "text": "another model's form"}, TALK),
        ({"messages": None, "text": "Words."}, "Words."),
        ({"conversations": TALK}, TALK),
        (
            {"conversations": [{"from": "human", "value": "Name a colour."}, {"from": "gpt", "value": "Blue."}]},
            TALK,
        ),
        (
            {"conversations": [{"from": "human", "value": "Name a colour."}, {"from": "gpt", "value": "Blue."}]}
            | {"system": "Be brief."},
            [{"role": "system", "content": "Be brief."}, *TALK],
        ),
        ({"instruction": "Name a colour.", "input": "", "output": "Blue."}, TALK),
        (
            {"instruction": "Name a colour.", "input": "Of the sky.", "output": "Blue."},
            asked("Name a colour.\n\nOf the sky."),
        ),
        (
            {"instruction": "Name a colour.", "context": "A sky.", "response": "Blue."},
            asked("Name a colour.\n\nA sky."),
        ),
        ({"prompt": "Name a colour.", "response": "Blue."}, TALK),
        ({"prompt": "Name a colour.", "completion": "Blue."}, TALK),
        ({"prompt": TALK[:1], "completion": TALK[1:]}, TALK),
        ({"prompt": "Name a colour.", "chosen": TALK, "rejected": TALK[:1]}, TALK),
        ({"question": "Name a colour.", "answer": "Blue."}, TALK),
        (
            {"problem": "Six and six?", "answer": 12},
            [TALK[0] | {"content": "Six and six?"}, TALK[1] | {"content": "12"}],
        ),
        ({"input": "Name a colour.", "output": "Blue."}, TALK),
        ({"messages": CALLS}, CALLS),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": "Name a "}, {"type": "text", "text": "colour."}],
                    }
                ]
            },
            TALK[:1],
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image"}, "Name a colour."]}]}, TALK[:1]),
        # nothing to read
        ({"text": None}, None),
        ({"text": " \n"}, None),
        ({"messages": None}, None),
        ({"messages": []}, None),
        ({"messages": [TALK[0], {"role": "assistant", "content": None}]}, None),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, None),
        ({"question": "Name a colour.", "answer": None}, None),
        ({"instruction": "", "input": "", "output": ""}, None),
    ],
)
def test_rows_of_usual_shapes(row: Any, expected: Document | None) -> None:
    assert document_of(json.loads(json.dumps(row)), "here", None) == expected


@pytest.mark.parametrize(
    ("value", "expected"), [("Words.", "Words."), (TALK, TALK), (None, None), ("", None), ([], None)]
)
def test_a_field_by_name(value: Any, expected: Document | None) -> None:
    assert document_of({"text": "another", "story": value}, "here", "story") == expected


def test_what_is_no_such_row_says_what_is() -> None:
    for row in ({"title": "a", "question": "b"}, {"text": 5}, {}, [1], None, 3, {"messages": {"role": "user"}}):
        with pytest.raises(
            InputError, match=r"here: expected text, messages .*conversations.*instruction.*--field NAME"
        ):
            document_of(row, "here", None)
    with pytest.raises(InputError, match="expected a field 'story', got the fields text, title"):
        document_of({"text": "a", "title": "b"}, "here", "story")


KEYS = ["role", "from", "content", "value", "text", "tool_calls", "type"]
NAMES = ["messages", "conversations", "text", "prompt", "chosen", "question", "answer", "input", "output", "system"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=6,
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), JSON, max_size=5), st.sampled_from([None, "text", "messages"]))
def test_any_row_is_a_document_or_one_line(row: dict[str, Any], field: str | None) -> None:
    message = ""
    try:
        document = document_of(row, "here", field)
        if document is not None:
            with_template = make_text(document)
            assert with_template.strip()
    except InputError as error:
        message = str(error)
    assert message.isprintable()


def make_text(document: Document) -> str:
    return document if isinstance(document, str) else plain_text(document)


# Files


ROWS = [{"question": f"What is {i} and {i}?", "answer": f"That is, of course,\n{2 * i}."} for i in range(20)]


def write_json(path: Path) -> None:
    path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8-sig")


def write_csv(path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        table = csv.DictWriter(file, ["id", *ROWS[0]], delimiter="\t" if path.suffix == ".tsv" else ",")
        table.writeheader()
        table.writerows({"id": i, **row} for i, row in enumerate(ROWS))


def write_parquet(path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(ROWS), path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("set.json", write_json),
        ("lines.json", lambda path: write_jsonl(path, ROWS)),
        ("set.ndjson", lambda path: write_jsonl(path, ROWS)),
        ("set.json.gz", lambda path: write_jsonl(path, ROWS)),
        ("set.csv", write_csv),
        ("set.tsv", write_csv),
        ("set.parquet", write_parquet),
    ],
)
def test_the_same_rows_in_any_file_give_the_same_ids(tmp_path: Path, name: str, write: Callable[[Path], Any]) -> None:
    turns = [
        [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}] for row in ROWS
    ]
    plain = write_jsonl(tmp_path / "plain.jsonl", [{"messages": pair} for pair in turns])
    write(tmp_path / name)
    assert documents(tmp_path / name) == turns
    assert sha256(tmp_path / name) == sha256(plain)


@pytest.mark.parametrize(
    "name", ["wiki.test.raw", "wiki.test.tokens", "page.md", "page.TXT", "page.txt.gz", "page.txt.bz2"]
)
def test_texts_by_other_names(tmp_path: Path, name: str) -> None:
    content = "".join(f"Line {i} of the page.\r\n" for i in range(99)).encode()
    packed = (
        gzip.compress(content) if name.endswith(".gz") else bz2.compress(content) if name.endswith(".bz2") else content
    )
    (tmp_path / name).write_bytes(packed)
    assert documents(tmp_path / name) == [content.decode()]


def test_rows_without_text_are_counted(tmp_path: Path) -> None:
    rows = [{"text": f"Words number {i} of these."} for i in range(12)]
    path = write_jsonl(tmp_path / "some.jsonl", [*rows, {"text": None}, {"text": ""}, *rows])
    found = load(str(path), lambda: TOKENIZER, samples=3, seqlen=16, seed=0, vocab_size=400)
    assert found.notes == ("2 of 26 rows hold no text and were left out",)
    assert found.sha256 == sha256(write_jsonl(tmp_path / "all.jsonl", rows * 2))


def test_a_source_may_name_the_field(tmp_path: Path) -> None:
    rows = [{"story": f"Story {i} of many.", "text": "other"} for i in range(30)]
    path = write_jsonl(tmp_path / "a#b.jsonl", rows)
    assert split_field(f"{path}#story") == (str(path), "story")
    assert split_field(str(path)) == (str(path), None)
    assert split_field("hf:org/name:test#story") == ("hf:org/name:test", "story")
    assert documents(f"{path}#story") == [row["story"] for row in rows]
    assert "expected a field 'nothing', got the fields story, text" in refusal(f"{path}#nothing")
    found = load_eval(f"{path}#story", lambda: TOKENIZER, seqlen=16, vocab_size=400)
    assert found.source == f"{path}#story"


def test_one_option_names_the_field_of_all_sources() -> None:
    sources = ("a.jsonl", "b.csv#own", "hf:org/name", "mix", "page.txt", "ids.safetensors", None)
    named = ("a.jsonl#story", "b.csv#own", "hf:org/name#story", "mix", "page.txt", "ids.safetensors", None)
    assert with_field("story", *sources) == named
    with pytest.raises(InputError, match="--field story: no source with rows"):
        with_field("story", "mix", None)


def test_columns_without_a_known_name_are_named(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist([{"title": "a", "body": "b"}]), tmp_path / "set.parquet")
    (tmp_path / "set.csv").write_text("title,body\na,b\n")
    for path in (tmp_path / "set.parquet", tmp_path / "set.csv"):
        message = refusal(path)
        assert "got title, body; name the one to take with --field NAME" in message
        assert "instruction and output" in message
        assert documents(f"{path}#body") == ["b"]


def test_our_own_example_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library takes a folder of that name for the data set, and loads it in the same way."""
    folder = tmp_path / "openai" / "gsm8k"
    (folder / "main").mkdir(parents=True)
    write_parquet(folder / "main" / "train-00000-of-00001.parquet")
    configs = "configs:\n- config_name: main\n  data_files:\n  - split: train\n    path: main/train-*\n"
    (folder / "README.md").write_text(f"---\n{configs}---\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    source = "hf:openai/gsm8k/main:train"
    assert [turns[0]["content"] for turns in documents(source)] == [row["question"] for row in ROWS]  # type: ignore[index]
    assert documents(f"{source}#answer") == [row["answer"] for row in ROWS]
    found = load(source, lambda: TOKENIZER, samples=3, seqlen=16, seed=0, vocab_size=400)
    assert (found.source, found.notes) == (source, ())


# Lines of a text


WIKI = [" \n", " = Title = \n", " \n", " The first paragraph . \n", " It goes on . \n", " \n", " = Part = \n", " \n"]
ROW_OF: dict[str, Callable[[str], str]] = {
    "whole lines": str,
    "as on the hub": lambda line: line if line.strip() else "",
    "without ends": lambda line: line.removesuffix("\n"),
}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix != ".parquet":
        return write_jsonl(path, rows)
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
@pytest.mark.parametrize("form", ROW_OF)
def test_rows_that_are_lines_are_evaluated_as_the_text(tmp_path: Path, suffix: str, form: str) -> None:
    lines = [*WIKI, *[line.replace("first", str(i)) for i in range(60) for line in WIKI]]
    (tmp_path / "wiki.txt").write_text("".join(lines))
    rows = write_rows(tmp_path / f"wiki{suffix}", [{"text": ROW_OF[form](line)} for line in lines])
    assert documents(rows) == documents(tmp_path / "wiki.txt")

    def evaluated(path: Path) -> Any:
        return load_eval(str(path), lambda: TOKENIZER, seqlen=32, vocab_size=400)

    assert evaluated(rows).sha256 == evaluated(tmp_path / "wiki.txt").sha256
    assert evaluated(rows).protocol.startswith("rows joined as the lines of one text, tokenized as a whole; ")
    assert sha256(rows) == sha256(tmp_path / "wiki.txt")


@pytest.mark.parametrize(
    "texts",
    [
        ["One document.", "Another one.", "", *["More of them."] * 30],
        ["One document.\n", "Another one.\n"],
        ["A document\nof two lines.", "", "A document.", ""],
        ["", ""],
    ],
)
def test_rows_that_are_documents_stay_so(tmp_path: Path, texts: list[str]) -> None:
    corpus = open_corpus(
        str(write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])), offline=True, shuffle=0
    )
    assert not corpus.one_text


def test_wikitext_of_the_hub_is_in_the_order_of_its_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "wiki").mkdir(parents=True)
    write_rows(
        tmp_path / "org" / "wiki" / "train.parquet", [{"text": line if line.strip() else ""} for line in WIKI * 99]
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for seed in (None, 1):
        corpus = open_corpus("hf:org/wiki", offline=False, shuffle=seed)
        assert "".join(map(str, corpus.documents)) == "".join(WIKI * 99)


# What cannot be read


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", b'[{"text": "a"}, {"text": "b"', "expected JSON"),
        ("a.json", b'[{"text": "a"}, ', "the file may be cut short"),
        ("a.json", b'[{"text": "a"} {"text": "b"}]', "expected ','"),
        ("a.json", b"[" * 200_000, "expected JSON"),
        ("a.json", b'{"version": 1, "rows": []}', "expected text, messages"),
        ("a.json", b"", "expected text, got none"),
        ("a.json", b"[]", "expected text, got none"),
        ("a.json", b'["a"]', "got str"),
        ("a.csv", b"", "got none"),
        ("a.csv", b"text\n", "expected text, got none"),
        ("a.csv", b"text,id\na,b,c\n", "row 2: expected 2 fields, got 3"),
        ("a.csv", b'text\n"' + b"a" * 100, "got 1"),
        ("a.csv", b"text\n\xff\xfe\n", "save it as UTF-8"),
        ("a.txt", "Wörter".encode("utf-16"), "save it as UTF-8"),
        ("a.txt", "Wörter".encode("latin-1"), "save it as UTF-8"),
        ("a.txt", b"", "expected text, got none"),
        ("a.txt", b"\xef\xbb\xbf", "expected text, got none"),
        ("a.txt.gz", b"plain", "check or replace the file"),
        ("a.csv.xz", b"plain", "check or replace the file"),
        ("a.parquet", b"PAR1" + b"\0" * 40 + b"PAR1", "check or replace the file"),
        ("a.jsonl.zst", b"", "unknown kind of source"),
        ("a.parquet.gz", b"", "check or replace the file"),
        ("a", b"words", "unknown kind of source"),
        (".txt", b"words", "unknown kind of source"),
    ],
)
def test_files_that_are_not_what_they_seem(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    if reason == "got 1":  # a quote that is never closed is the rest of the file, as for every reader of tables
        assert documents(tmp_path / name) == ["a" * 100]
        return
    message = refusal(tmp_path / name)
    assert reason in message
    assert str(tmp_path / name) in message


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    assert "neither a file nor a folder" in refusal(tmp_path / "pipe.txt")
    assert "a folder, not a file" in refusal(tmp_path)
    for name in ("loop.txt", "a" * 300 + ".txt", "file.txt/more.txt"):
        assert "; expected a bundled set" in refusal(tmp_path / name)
    assert "; expected a bundled set" in refusal("~nobody-of-this-name/a.txt")


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["a.json", "a.jsonl", "a.csv", "a.txt", "a.jsonl.gz", "a.txt.xz", "a.parquet"]),
    st.binary(max_size=80),
)
def test_any_bytes_are_text_or_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    message = ""
    try:
        assert documents(tmp_path / name)
    except InputError as error:
        message = str(error)
    assert message.isprintable()


def test_a_record_is_not_read_beyond_all_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantkit.calibration.files.LONGEST", 10_000)
    for name in ("long.jsonl", "long.json", "long.jsonl.xz"):
        path = write_jsonl(tmp_path / name, [{"text": "short"}, {"text": "a" * 50_000}])
        refusal(path)
    (tmp_path / "long.csv").write_text("text\n" + "a" * 50_000)
    assert "longer than" in refusal(tmp_path / "long.csv")


def test_a_parquet_file_is_not_unpacked_beyond_all_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("quantkit.calibration.files.LONGEST", 100_000)
    same = {"text": ["many words " * 1000] * 99}
    turn = {"role": "user", "content": "many words " * 1000}
    parquet.write_table(arrow.table(same), tmp_path / "swells.parquet", compression="zstd", use_dictionary=False)
    parquet.write_table(arrow.table(same), tmp_path / "shared.parquet", compression="zstd")
    parquet.write_table(arrow.table({"messages": [[turn] * 3, [turn] * 99]}), tmp_path / "nested.parquet")
    assert "bytes of text unpack to 1089" in refusal(tmp_path / "swells.parquet")
    assert documents(tmp_path / "shared.parquet") == same["text"]
    assert "nested.parquet: row 2: longer than" in refusal(tmp_path / "nested.parquet")
    corpus = open_corpus(str(tmp_path / "shared.parquet"), offline=True, shuffle=None)
    assert next(corpus.documents) == same["text"][0]


def test_conversations_of_all_shapes_are_rendered(tmp_path: Path) -> None:
    share = [{"from": "human", "value": CHAT[0]["content"]}, {"from": "gpt", "value": CHAT[1]["content"]}]
    rows: list[Any] = [{"messages": CHAT}, {"conversations": share}, {"prompt": CHAT[:1], "completion": CHAT[1:]}]
    hashes = {sha256(write_jsonl(tmp_path / f"{i}.jsonl", [row] * 9)) for i, row in enumerate(rows)}
    assert len(hashes) == 1
