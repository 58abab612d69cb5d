# SPDX-License-Identifier: Apache-2.0
"""A source of text or tokens -> windows of token ids.

Calibration should show a layer many kinds of input. So documents are shuffled, long ones are cut into passages, and
passages are taken in rounds: one of every document before a second of any. They are joined with the end-of-text token
and cut into windows without padding. `mix` gives each of its four kinds the same number of windows, in turn.

Evaluation keeps the order of the documents and drops nothing between them, so that perplexities can be compared.

Where the tokenizer puts tokens before a text (`<s>`, `<bos>`), every window begins with them, as every text did in
training. A window from the middle of a text gets them in front: without them Gemma 7B's perplexity is 6e9 instead of 3.
"""

import itertools
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quantkit.calibration.chat import ChatTemplate
from quantkit.calibration.shapes import Document
from quantkit.calibration.sources import CHARACTERS_PER_TOKEN, DEFAULT_EVAL, MIX, Corpus, open_corpus
from quantkit.calibration.tokens import (
    TokenSet,
    check_positive,
    first_windows,
    is_token_file,
    read_token_file,
    token_set,
    too_short,
)
from quantkit.errors import InputError
from quantkit.text import one_line

EVAL_TOKENS = 1 << 16  # of the bundled set, if nobody says how many: by then a KL is known to about 1%

STARTS = {  # of the protocol of an evaluation, by the form of its source
    "documents": "documents in order, joined by the end-of-text token",
    "text": "whole file tokenized as one text",
    "lines": "rows joined as the lines of one text, tokenized as a whole",
}

Tokenizer = Callable[[], PreTrainedTokenizerBase]

_BATCH = 32  # documents tokenized together: enough to use every core, few enough to stop early


def load(
    source: str,
    tokenizer: Tokenizer,
    *,
    samples: int,
    seqlen: int,
    seed: int,
    vocab_size: int,
    offline: bool = False,
) -> TokenSet:
    """Give `samples` windows of `seqlen` tokens for calibration; the same arguments give the same ids.

    `tokenizer` is called only when the source is text. A `.safetensors` source is used as it is, whatever `samples`
    and `seqlen` say. Raises InputError when the source is missing, damaged, of an unknown kind or too short, or holds
    an id outside the vocabulary.
    """
    if is_token_file(source):
        return read_token_file(source, vocab_size)
    check_positive(samples=samples, seqlen=seqlen)
    parts = MIX if source == "mix" else (source,)
    shares = [samples // len(parts) + (i < samples % len(parts)) for i in range(len(parts))]
    need = samples * seqlen
    size = max(4 * seqlen, 512)  # characters of a passage: about one window of English
    corpora = [open_corpus(part, offline=offline, shuffle=seed) for part in parts]
    texts = [_some(corpus, need, size) for corpus in corpora]
    tok = tokenizer()
    prefix = _prefix(tok, seqlen)
    kinds: list[Tensor] = []
    with ChatTemplate(tok) as template:
        for part, share, documents in zip(parts, shares, texts, strict=True):
            rng = random.Random(seed)
            rng.shuffle(documents)
            rows = _encode(_in_rounds(documents, size, rng), tok, template)
            stream = _join(rows, tok.eos_token_id, share * seqlen)
            windows = _windows(stream, share, seqlen, prefix)
            if len(windows) < share:
                name = source if part == source else f"{source} ({part})"
                raise too_short(name, len(stream), share, seqlen, windows=len(windows) * len(parts))
            kinds.append(windows)
    ids = torch.stack([kind[row] for row in range(max(shares)) for kind in kinds if row < len(kind)])
    protocol = "rows joined as the lines of one text; " if corpora[0].form == "lines" else ""
    protocol += f"documents shuffled with seed {seed}, passages joined by the end-of-text token, windows of {seqlen}"
    protocol += _begin(prefix, tok) + template.protocol()
    return token_set(ids, source, vocab_size, protocol, _notes(corpora, template))


def load_eval(
    source: str,
    tokenizer: Tokenizer,
    *,
    seqlen: int,
    samples: int | None = None,
    vocab_size: int,
    offline: bool = False,
) -> TokenSet:
    """Give windows for evaluation: nothing shuffled, the first `samples` windows of `seqlen` tokens.

    samples None: all there are; of the bundled set no more than `EVAL_TOKENS` hold.

    A `.txt` file follows the usual WikiText protocol (GPTQ, arXiv 2210.17323): the whole file is tokenized as one text
    and cut into windows that do not overlap, the remainder dropped. So do rows that are the lines of a text. Documents
    are joined in their order by the end-of-text token and cut alike. The windows of a `.safetensors` source are used as
    they are.
    Raises as `load`.
    """
    if is_token_file(source):
        return first_windows(read_token_file(source, vocab_size), samples)
    check_positive(samples=1 if samples is None else samples, seqlen=seqlen)
    parts = MIX if source == "mix" else (source,)
    most = max(1, EVAL_TOKENS // seqlen) * seqlen if source == DEFAULT_EVAL else sys.maxsize
    need = most if samples is None else samples * seqlen
    corpora = [open_corpus(part, offline=offline, shuffle=None) for part in parts]
    texts = [_some(corpus, need, sys.maxsize) for corpus in corpora]
    tok = tokenizer()
    prefix = _prefix(tok, seqlen)
    with ChatTemplate(tok) as template:
        stream = _join(_encode(_in_turn(texts), tok, template), tok.eos_token_id, need)
    windows = _windows(stream, need // seqlen, seqlen, prefix)
    if len(windows) < (samples or 1):
        raise too_short(source, len(stream), samples or 1, seqlen, windows=len(windows), option="--eval-samples")
    start = STARTS[corpora[0].form]
    kept = "all windows" if samples is None and len(stream) < need else f"the first {len(windows)} windows"
    protocol = f"{start}; {kept} of {seqlen} without overlap" + _begin(prefix, tok) + template.protocol()
    return token_set(windows, source, vocab_size, protocol, _notes(corpora, template))


def _some(corpus: Corpus, enough: int, size: int) -> list[Document]:
    """The documents of a source; of the hub's, no more than `enough` tokens can need from passages of `size`."""
    if corpus.one_text:
        return ["".join(map(str, corpus.documents))]
    documents: list[Document] = []
    characters = 0
    for document in corpus.documents:
        documents.append(document)
        characters += min(_length(document), size)
        if corpus.remote and characters >= enough * CHARACTERS_PER_TOKEN:
            break
    return documents


def _length(document: Document) -> int:
    return len(document) if isinstance(document, str) else sum(len(turn["content"] or "") for turn in document)


def _notes(corpora: Iterable[Corpus], template: ChatTemplate) -> tuple[str, ...]:
    return (*(note for corpus in corpora for note in corpus.notes()), *template.notes())


# Documents -> ids


def _encode(documents: Iterable[Document], tok: PreTrainedTokenizerBase, template: ChatTemplate) -> Iterator[list[int]]:
    """Token ids of each document, tokenized in batches."""
    documents = iter(documents)
    while batch := list(itertools.islice(documents, _BATCH)):
        rendered = [template.as_text(document) for document in batch]
        for special, group in itertools.groupby(rendered, key=lambda pair: pair[1]):
            # Half of a surrogate pair, which JSON can hold and a tokenizer cannot, becomes a question mark.
            texts = [text.encode("utf-8", "replace").decode("utf-8") for text, _ in group]
            # verbose=False: longer than the model's maximum is as expected, the windows are cut afterwards
            encoded = tok(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)
            rows: list[list[int]] = encoded["input_ids"]
            yield from rows


def _join(rows: Iterable[list[int]], eos: int | None, enough: int) -> list[int]:
    """Concatenate rows with one `eos` between them, until there are `enough` tokens."""
    stream: list[int] = []
    for row in rows:
        if not row:
            continue
        # A chat template ends its last turn itself, perhaps with a newline after the token; bos may be eos.
        if stream and eos is not None and eos not in (*stream[-2:], row[0]):
            stream.append(eos)
        stream += row
        if len(stream) >= enough:
            break
    return stream


def _passages(text: str, size: int) -> list[str]:
    """Cut a text into pieces of about `size` characters, after a line break or a space where there is one."""
    count = max(1, round(len(text) / size))
    cuts = [0]
    for target in (i * len(text) // count for i in range(1, count)):
        found = text.find("\n", target, target + size // 2) + 1
        cuts.append(found or text.find(" ", target, target + size // 2) + 1 or target)
    return [text[start:end] for start, end in itertools.pairwise((*cuts, len(text)))]


def _in_rounds(documents: Iterable[Document], size: int, rng: random.Random) -> Iterator[Document]:
    """Give one passage of every document, then a second of every one that has more, and so on; chats stay whole."""
    others: list[list[str]] = []
    for document in documents:
        if not isinstance(document, str):
            yield document
            continue
        passages = _passages(document, size)
        rng.shuffle(passages)
        yield passages.pop()
        if passages:
            others.append(passages)
    yield from _in_turn(others)


def _in_turn(lists: Sequence[Sequence[Document]]) -> Iterator[Document]:
    """The first of each list, then the second of each, until all are used up."""
    for row in itertools.zip_longest(*lists):
        yield from (item for item in row if item is not None)


def _windows(stream: list[int], most: int, seqlen: int, prefix: list[int]) -> Tensor:
    """Up to `most` windows of a stream [windows, seqlen]; those that do not begin with the prefix get it in front."""
    rows: list[list[int]] = []
    start = 0
    while len(rows) < most:
        front = [] if stream[start : start + len(prefix)] == prefix else prefix
        end = start + seqlen - len(front)
        if end > len(stream):
            break
        rows.append(front + stream[start:end])
        start = end
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), seqlen)


def _prefix(tok: PreTrainedTokenizerBase, seqlen: int) -> list[int]:
    """The tokens that the tokenizer puts before every text.

    Raises:
        InputError: a window has no room beside them.
    """
    bare, whole = (tok("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    prefix: list[int] = next((whole[:i] for i in range(len(whole)) if whole[i : i + len(bare)] == bare), [])
    if seqlen <= len(prefix):
        raise InputError(f"--seqlen {seqlen}: each window begins with {len(prefix)} special tokens; use a larger one")
    return prefix


def _begin(prefix: list[int], tok: PreTrainedTokenizerBase) -> str:
    """What the protocol says of the tokens before every window, if there are any."""
    return f"; each window begins with {one_line(''.join(tok.convert_ids_to_tokens(prefix)))}" if prefix else ""
