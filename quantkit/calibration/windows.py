# SPDX-License-Identifier: Apache-2.0
"""Documents -> token ids -> windows of the same length.

Where the tokenizer puts tokens before a text (`<s>`, `<bos>`), every window begins with them, as every text did in
training. A window from the middle of a text gets them in front: without them Gemma 7B's perplexity is 6e9 instead of 3.
"""

import itertools
import random
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quantkit.calibration.chat import ChatTemplate
from quantkit.calibration.shapes import Document
from quantkit.errors import InputError
from quantkit.text import clean_line, one_line

BATCH = 32  # documents tokenized together: enough to use every core, few enough to stop early
LONG = 1 << 20  # characters of a document from which on it is tokenized part by part
SPAN, OVERLAP = 1 << 15, 1 << 11  # characters of a text tokenized together; those that two spans share
AGREEING = 8  # tokens on both sides of a place that must be the same in two spans, to go from one to the other there

T = TypeVar("T")


# ---------------------------------------------------------------- documents -> ids


def ids_of(
    documents: Iterable[Document], tok: PreTrainedTokenizerBase, template: ChatTemplate, enough: int
) -> Iterator[list[int]]:
    """Token ids of each document, tokenized in batches; no more than about `enough` of a very long one."""
    for rendered in _batches(map(template.as_text, documents)):
        for (special, long), group in itertools.groupby(rendered, key=lambda pair: (pair[1], len(pair[0]) > LONG)):
            texts = [_encodable(text) for text, _ in group]
            if long:
                front = prefix_of(tok) if special else []
                yield from (front + joined(ids_of_text([text], tok), None, enough).tolist() for text in texts)
            else:
                rows: list[list[int]] = _tokenize(tok, texts, special=special)["input_ids"]
                yield from rows


def _batches(texts: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """Texts in lists of a few, and no more in one than is little."""
    batch: list[tuple[str, bool]] = []
    for text in texts:
        batch.append(text)
        if len(batch) == BATCH or sum(len(each) for each, _ in batch) > LONG:
            yield batch
            batch = []
    if batch:
        yield batch


def ids_of_text(pieces: Iterable[str], tok: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Token ids of one text, part by part, without special tokens: those of the text tokenized as a whole.

    Spans that overlap are tokenized one after the other. In the middle of what two of them share there is a place where
    both have the same tokens before and behind: there the second goes on for the first. If there is none, the two are
    tokenized together.
    """
    if not tok.is_fast:  # it tells no places of tokens
        yield _tokenize(tok, [_encodable("".join(pieces))], special=False)["input_ids"][0]
        return
    place = 0
    before = _Span("", 0, [], [])
    for text, start in _spans(pieces):
        span = _span(tok, text, start)
        meeting = _meeting(before, span) if before.ids else 0
        if meeting is None:
            span = _span(tok, before.text + text[before.end - start :], before.start)
        else:
            yield before.between(place, meeting)
            place = meeting
        before = span
    yield before.between(place, before.end + 1)


@dataclass(frozen=True)
class _Span:
    """A part of a text, its tokens, and where each of these begins in the whole text."""

    text: str
    start: int
    ids: list[int]
    places: list[int]

    @property
    def end(self) -> int:
        return self.start + len(self.text)

    def between(self, first: int, last: int) -> list[int]:
        """The tokens from one place up to another."""
        return self.ids[bisect_left(self.places, first) : bisect_left(self.places, last)]


def _span(tok: PreTrainedTokenizerBase, text: str, start: int) -> _Span:
    encoded = _tokenize(tok, [text], special=False, places=True)
    return _Span(text, start, encoded["input_ids"][0], [start + place for place, _ in encoded["offset_mapping"][0]])


def _spans(pieces: Iterable[str]) -> Iterator[tuple[str, int]]:
    """(text, place) of each span; the last one reaches the end."""
    text, start = "", 0
    for piece in pieces:
        text += _encodable(piece)
        while len(text) > SPAN + OVERLAP:
            yield text[: SPAN + OVERLAP], start
            text, start = text[SPAN:], start + SPAN
    yield text, start


def _meeting(before: _Span, span: _Span) -> int | None:
    """The place nearest to the middle of what two spans share around which they have the same tokens."""
    middle = (span.start + before.end) // 2
    shared = range(bisect_left(before.places, span.start), len(before.ids))
    for i in sorted(shared, key=lambda i: abs(before.places[i] - middle)):
        place = before.places[i]
        j = bisect_left(span.places, place)
        around, same = slice(i - AGREEING, i + AGREEING), slice(j - AGREEING, j + AGREEING)
        whole = j >= AGREEING and i + AGREEING <= len(before.ids) and before.places[i - 1] < place
        if whole and before.ids[around] == span.ids[same] and before.places[around] == span.places[same]:
            return place
    return None


def _encodable(text: str) -> str:
    """The text with half surrogate pairs, which JSON can hold and a tokenizer cannot, as question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _tokenize(tok: PreTrainedTokenizerBase, texts: list[str], *, special: bool, places: bool = False) -> Any:
    # verbose=False: longer than the model's maximum is as expected, the windows are cut afterwards
    options = {"return_offsets_mapping": True} if places else {}
    try:
        return tok(texts, add_special_tokens=special, return_attention_mask=False, verbose=False, **options)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the library is no Exception
        raise InputError(
            f"{tok.name_or_path}: the tokenizer failed ({clean_line(error) or type(error).__name__}); "
            "give --calib and --eval as .safetensors files of token ids"
        ) from None


# ---------------------------------------------------------------- the order of calibration


def in_rounds(documents: Iterable[Document], size: int, rng: random.Random) -> Iterator[Document]:
    """Give one passage of every document, then a second of every one that has more, and so on; chats stay whole."""
    others: list[list[str]] = []
    for document in documents:
        if not isinstance(document, str):
            yield document
            continue
        passages = passages_of(document, size)
        rng.shuffle(passages)
        yield passages.pop()
        if passages:
            others.append(passages)
    yield from in_turn(others)


def passages_of(text: str, size: int) -> list[str]:
    """Cut a text into pieces of about `size` characters, after a line break or a space where there is one."""
    count = max(1, round(len(text) / size))
    cuts = [0]
    for target in (i * len(text) // count for i in range(1, count)):
        found = text.find("\n", target, target + size // 2) + 1
        cuts.append(found or text.find(" ", target, target + size // 2) + 1 or target)
    return [text[start:end] for start, end in itertools.pairwise((*cuts, len(text)))]


def in_turn(lists: Iterable[Iterable[T]]) -> Iterator[T]:
    """The first of each list, then the second of each, until all are used up."""
    for row in itertools.zip_longest(*lists):
        yield from (item for item in row if item is not None)


# ---------------------------------------------------------------- ids -> windows


def joined(rows: Iterable[list[int]], eos: int | None, enough: int) -> "array[int]":
    """Concatenate rows with one `eos` between them, until there are `enough` tokens; None: nothing between them."""
    stream = array("q")
    for row in rows:
        if not row:
            continue
        # A chat template ends its last turn itself, perhaps with a newline after the token; bos may be eos.
        if stream and eos is not None and eos not in (*stream[-2:], row[0]):
            stream.append(eos)
        stream.extend(row)
        if len(stream) >= enough:
            break
    return stream


def windows_of(stream: "array[int]", most: int, seqlen: int, prefix: Sequence[int]) -> Tensor:
    """Up to `most` windows of a stream [windows, seqlen]; those that do not begin with the prefix get it in front."""
    first = array("q", prefix)
    windows = array("q")
    start = 0
    while len(windows) < most * seqlen:
        front = array("q") if stream[start : start + len(first)] == first else first
        end = start + seqlen - len(front)
        if end > len(stream):
            break
        windows += front + stream[start:end]
        start = end
    return torch.from_numpy(np.asarray(windows)).reshape(-1, seqlen)


def prefix_of(tok: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the tokenizer puts before every text."""
    bare, whole = (_tokenize(tok, ["a"], special=special)["input_ids"][0] for special in (False, True))
    return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(bare)] == bare), [])


def require_room(seqlen: int, prefix: Sequence[int]) -> None:
    """Raise InputError if a window has no room beside the tokens that it begins with."""
    if seqlen <= len(prefix):
        raise InputError(f"--seqlen {seqlen}: each window begins with {len(prefix)} special tokens; use a larger one")


def told_of(prefix: list[int], tok: PreTrainedTokenizerBase) -> str:
    """What the protocol says of the tokens before every window, if there are any."""
    return f"; each window begins with {one_line(''.join(tok.convert_ids_to_tokens(prefix)))}" if prefix else ""
