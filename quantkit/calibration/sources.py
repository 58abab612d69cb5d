# SPDX-License-Identifier: Apache-2.0
"""A SOURCE of text -> its documents.

general                        a bundled set
hf:ORG/NAME[/CONFIG][:SPLIT]   a data set of the hub
data.jsonl                     a file
data.jsonl#NAME                the same, and the field of its rows to take
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub import constants

from quantkit.calibration.files import READERS, TEXTS, Row, existing_file, kind_of, pieces_of, rows_of
from quantkit.calibration.shapes import Document, document_of
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
CHARACTERS_PER_TOKEN = 12  # more than any language and tokenizer need: bounds what is streamed from the hub


@dataclass
class Corpus:
    """The documents of a source, in order.

    source: as the user named it
    documents: each is read when it is asked for
    one_text: they are the pieces of one text
    remote: they come from the hub, so that no more should be asked for than is needed
    rows: what was seen of the rows so far: how many were "read", and how many of these are "empty"
    """

    source: str
    documents: Iterator[Document]
    one_text: bool = False
    remote: bool = False
    rows: Counter[str] = field(default_factory=Counter)

    def notes(self) -> tuple[str, ...]:
        """What was left out of the rows that were read."""
        empty = self.rows["empty"]
        return (f"{empty} of {self.rows['read']} rows hold no text and were left out",) if empty else ()


def open_corpus(source: str, *, offline: bool, shuffle: int | None) -> Corpus:
    """The documents of a source; those of the hub are shuffled within a buffer, if there is a seed for it.

    Raises:
        InputError: no such source, or of an unknown kind; while documents are read: it is damaged, or holds no text.
    """
    if source in BUNDLED:
        return _corpus(source, rows_of(calibration_dir() / f"{source}.jsonl.xz", None), None)
    place, name = split_field(source)
    if place.startswith("hf:"):
        return replace(_corpus(source, _hub(place, name, offline=offline, shuffle=shuffle), name), remote=True)
    path = existing_file(place, EXPECTED)
    if kind_of(path) in TEXTS:
        return Corpus(source, _with_words(source, pieces_of(path)), one_text=True)
    if kind_of(path) not in READERS:
        raise InputError(f"{source}: unknown kind of source; expected {EXPECTED}")
    return _corpus(source, rows_of(path, name), name)


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


def _corpus(source: str, rows: Iterable[Row], name: str | None) -> Corpus:
    counts: Counter[str] = Counter()

    def documents() -> Iterator[Document]:
        for record, where in rows:
            document = document_of(record, where, name)
            counts.update(read=1, empty=document is None)
            if document is not None:
                yield document

    return Corpus(source, _with_words(source, documents()), rows=counts)


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


def _hub(source: str, name: str | None, *, offline: bool, shuffle: int | None) -> Iterator[Row]:
    """The rows of a data set, in an order that is shuffled within a buffer if there is a seed for it."""
    dataset, config, split = parse_hub(source)
    if offline or constants.HF_HUB_OFFLINE:
        raise InputError(
            f"{source}: a dataset of the hub needs the network, and this run is offline; use a bundled set "
            f"({', '.join(BUNDLED)}) or a file"
        )
    return _hub_rows(source, dataset, config, split, shuffle)


def _hub_rows(source: str, dataset: str, config: str | None, split: str, shuffle: int | None) -> Iterator[Row]:
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
