# SPDX-License-Identifier: Apache-2.0
"""A SOURCE of text -> its documents.

general                        a bundled set
hf:ORG/NAME[/CONFIG][:SPLIT]   a data set of the hub
data.jsonl                     a file
data.jsonl#NAME                the same, and the field of its rows to take
"""

import itertools
import re
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub import constants

from quantkit.calibration.files import READERS, TEXTS, Row, existing_file, kind_of, pieces_of, rows_of
from quantkit.calibration.shapes import TURNS, Document, document_of
from quantkit.errors import InputError
from quantkit.network import patient_library
from quantkit.resources import calibration_dir
from quantkit.text import clean_line

MIX = ("general", "code", "chinese", "reasoning")
DEFAULT_EVAL = "eval"
BUNDLED = ("mix", *MIX, DEFAULT_EVAL)
EXPECTED = (
    f"a bundled set ({', '.join(BUNDLED)}), a file ({', '.join((*TEXTS, *READERS, '.safetensors'))}; .gz, .xz or .bz2 "
    "behind it), or hf:ORG/NAME[/CONFIG][:SPLIT]"
)
LOOK = 64  # first rows that tell whether rows are documents or lines
BLANK = 1 / 8  # share of blank rows by which rows without line ends are lines, too
CHARACTERS_PER_TOKEN = 12  # more than any language and tokenizer need: bounds what is streamed from the hub


@dataclass
class Corpus:
    """The documents of a source, in order.

    source: as the user named it
    documents: each is read when it is asked for
    form: what they are: "documents", the pieces of one "text", or its "lines"
    remote: they come from the hub, so that no more should be asked for than is needed
    rows: what was seen of the rows so far: how many were "read", and how many of these are "empty"
    cut: whether there is more than memory should hold, and only the beginning was read
    """

    source: str
    documents: Iterator[Document]
    form: str = "documents"
    remote: bool = False
    rows: Counter[str] = field(default_factory=Counter)
    cut: bool = False

    @property
    def one_text(self) -> bool:
        """Whether the documents are parts of one text."""
        return self.form != "documents"

    def notes(self) -> tuple[str, ...]:
        """What was left out of what was read, and that not all was read."""
        empty = self.rows["empty"]
        notes = [f"{empty} of {self.rows['read']} rows hold no text and were left out"] if empty else []
        return (*notes, *(["only its beginning was read, as it is very large"] if self.cut else []))


def open_corpus(source: str, *, offline: bool, shuffle: int | None) -> Corpus:
    """The documents of a source; those of the hub are shuffled within a buffer, if there is a seed for it.

    Raises:
        InputError: no such source, or of an unknown kind; while documents are read: it is damaged, or holds no text.
    """
    if source in BUNDLED:
        return _of_documents(source, rows_of(calibration_dir() / f"{source}.jsonl.xz", None), None)
    place, name = split_field(source)
    if place.startswith("hf:"):
        return replace(_of_hub(source, place, name, offline=offline, shuffle=shuffle), remote=True)
    path = existing_file(place, EXPECTED)
    if kind_of(path) in TEXTS:
        return Corpus(source, _with_words(source, pieces_of(path)), "text")
    if kind_of(path) not in READERS:
        raise InputError(f"{source}: unknown kind of source; expected {EXPECTED}")
    return _of_rows(source, rows_of(path, name), name)


def split_field(source: str) -> tuple[str, str | None]:
    """`SOURCE#NAME` -> (source, name of the field); a file whose own name has a # is no such thing."""
    place, mark, name = source.rpartition("#")
    if not mark or not name or Path(source).expanduser().exists():
        return source, None
    return place, name


def with_field(field: str, *sources: str | None) -> tuple[str | None, ...]:
    """The sources, with the field to take behind each that has rows and names none itself.

    Raises:
        InputError: there is no such source.
    """
    named = tuple(f"{source}#{field}" if source and _has_rows(source) else source for source in sources)
    if named == sources:
        raise InputError(
            f"--field {field}: no source with rows and without a field of its own; name one with --calib or --eval"
        )
    return named


def _has_rows(source: str) -> bool:
    return split_field(source)[1] is None and (source.startswith("hf:") or kind_of(Path(source)) in READERS)


def _of_rows(source: str, rows: Iterator[Row], name: str | None) -> Corpus:
    first = list(itertools.islice(rows, LOOK))
    every = itertools.chain(first, rows)
    blank = blank_line(first, name)
    return _of_documents(source, every, name) if blank is None else _of_lines(source, every, name or "text", blank)


def _of_documents(source: str, rows: Iterable[Row], name: str | None) -> Corpus:
    counts: Counter[str] = Counter()

    def documents() -> Iterator[Document]:
        for record, where in rows:
            document = document_of(record, where, name)
            counts.update(read=1, empty=document is None)
            if document is not None:
                yield document

    return Corpus(source, _with_words(source, documents()), rows=counts)


def _of_lines(source: str, rows: Iterable[Row], name: str, blank: str) -> Corpus:
    counts: Counter[str] = Counter()

    def lines() -> Iterator[Document]:
        for record, where in rows:
            line = record.get(name) if isinstance(record, dict) else None
            if not isinstance(line, str) and document_of(record, where, name) is not None:
                raise InputError(f"{where}: expected a line of text, as the rows before it; mend or remove it")
            counts.update(read=1, empty=line is None)
            if line is not None:
                yield blank if not line else line if line.endswith("\n") else f"{line}\n"

    return Corpus(source, _with_words(source, lines()), "lines", rows=counts)


def blank_line(rows: Sequence[Row], name: str | None) -> str | None:
    """A blank line of the text whose lines the rows are; None if each row is a document.

    The rows of WikiText are lines: none holds a line break but at its end, and many are blank. As documents they would
    be another test, with a perplexity of 29 instead of 23. Where all lines begin with a space the blank ones did, too,
    before the data set was made of them.
    """
    records = [record if isinstance(record, dict) else {} for record, _ in rows]
    texts = [
        None if name is None and any(turns in record for turns in TURNS) else record.get(name or "text")
        for record in records
    ]
    lines = [text for text in texts if isinstance(text, str) and "\n" not in text.removesuffix("\n")]
    full = [line for line in lines if line.strip()]
    blank = len(lines) - len(full)
    ended = all(line.endswith("\n") for line in full)
    if len(lines) < len(texts) or not full or not blank or not (ended or blank >= BLANK * len(lines)):
        return None
    return " \n" if all(line.startswith(" ") for line in full) else "\n"


def _with_words(source: str, documents: Iterable[Document]) -> Iterator[Document]:
    """The same documents. Raises InputError when there are none with words in them."""
    words = False
    for document in documents:
        words = words or not isinstance(document, str) or bool(document.strip())
        yield document
    if not words:
        raise InputError(f"{source}: expected text, got none; use another source: {EXPECTED}")


# ---------------------------------------------------------------- the hub


def parse_hub(source: str) -> tuple[str, str | None, str]:
    """`hf:ORG/NAME[/CONFIG][:SPLIT]` -> (dataset id, config or None, split). Raises InputError."""
    part = r"[A-Za-z0-9_][\w.-]*"
    match = re.fullmatch(rf"hf:({part}/{part})(?:/({part}))?(?::({part}))?", source)
    if match is None:
        raise InputError(f"{source}: expected hf:ORG/NAME[/CONFIG][:SPLIT]; for example hf:openai/gsm8k/main:train")
    return match[1], match[2], match[3] or "train"


def _of_hub(source: str, place: str, name: str | None, *, offline: bool, shuffle: int | None) -> Corpus:
    """A data set; documents come in an order that is shuffled within a buffer, if there is a seed for it."""
    dataset, config, split = parse_hub(place)
    if offline or constants.HF_HUB_OFFLINE:
        raise InputError(
            f"{source}: a dataset of the hub needs the network, and this run is offline; use a bundled set "
            f"({', '.join(BUNDLED)}) or a file"
        )
    rows = _hub_rows(source, dataset, config, split, None)
    if shuffle is None:
        return _of_rows(source, rows, name)
    blank = blank_line(list(itertools.islice(rows, LOOK)), name)
    rows.close()
    if blank is not None:
        return _of_rows(source, _hub_rows(source, dataset, config, split, None), name)
    return _of_documents(source, _hub_rows(source, dataset, config, split, shuffle), name)


def _hub_rows(source: str, dataset: str, config: str | None, split: str, shuffle: int | None) -> Generator[Row]:
    import datasets  # only here: it is slow to import

    fault = ""
    try:
        with patient_library():
            stream = datasets.load_dataset(dataset, config, split=split, streaming=True)
            if shuffle is not None:
                stream = stream.shuffle(seed=shuffle, buffer_size=1000)
            for number, record in enumerate(stream, 1):
                yield record, f"{source}: row {number}"
    except InputError:
        raise
    except Exception as error:  # the library raises a dozen unrelated types for a wrong name or a lost connection
        fault = f"{type(error).__name__}: {clean_line(error)}"
    if fault:  # raised here, so that it carries no error of the library, which may quote a token
        raise InputError(
            f"{source}: expected a dataset with split {split!r}, got {fault}; "
            "check the name, the config and the connection"
        )
