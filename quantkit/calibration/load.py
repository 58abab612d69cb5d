# SPDX-License-Identifier: Apache-2.0
"""A source of text or tokens -> windows of token ids.

Calibration should show a layer many kinds of input. So documents are shuffled, long ones are cut into passages, and
passages are taken in rounds: one of every document before a second of any. They are joined with the end-of-text token
and cut into windows without padding. `mix` gives each of its four kinds the same number of windows, in turn.

Evaluation keeps the order of the documents and drops nothing between them, so that perplexities can be compared.
"""

import random
import sys
from collections.abc import Callable, Iterable

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
from quantkit.calibration.windows import (
    ids_of,
    ids_of_text,
    in_rounds,
    in_turn,
    joined,
    prefix_of,
    require_room,
    told_of,
    windows_of,
)

EVAL_TOKENS = 1 << 16  # of the bundled set, if nobody says how many: by then a KL is known to about 1%
MOST_CHARACTERS = 1 << 26  # of a source that are read for calibration, unless the samples need more
DOCUMENT = 64  # characters that a document counts as beside its own, as that is what it takes in memory

STARTS = {  # of the protocol of an evaluation, by the form of its source
    "documents": "documents in order, joined by the end-of-text token",
    "text": "whole file tokenized as one text",
    "lines": "rows joined as the lines of one text, tokenized as a whole",
}

Tokenizer = Callable[[], PreTrainedTokenizerBase]


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
    size = max(4 * seqlen, 512)  # characters of a passage: about one window of English
    corpora = [open_corpus(part, offline=offline, shuffle=seed) for part in parts]
    texts = [_some(corpus, samples * seqlen, size) for corpus in corpora]
    tok = tokenizer()
    prefix = prefix_of(tok)
    require_room(seqlen, prefix)
    kinds: list[Tensor] = []
    with ChatTemplate(tok) as template:
        for part, share, documents in zip(parts, shares, texts, strict=True):
            rng = random.Random(seed)
            rng.shuffle(documents)
            rows = ids_of(in_rounds(documents, size, rng), tok, template, share * seqlen)
            stream = joined(rows, tok.eos_token_id, share * seqlen)
            windows = windows_of(stream, share, seqlen, prefix)
            if len(windows) < share:
                name = source if part == source else f"{source} ({part})"
                raise too_short(name, len(stream), share, seqlen, windows=len(windows) * len(parts))
            kinds.append(windows)
    protocol = "rows joined as the lines of one text; " if corpora[0].form == "lines" else ""
    protocol += f"documents shuffled with seed {seed}, passages joined by the end-of-text token, windows of {seqlen}"
    protocol += told_of(prefix, tok) + template.protocol()
    return token_set(torch.stack(list(in_turn(kinds))), source, vocab_size, protocol, _notes(corpora, template))


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
    are joined in their order by the end-of-text token and cut alike. No more is read than is needed. The windows of a
    `.safetensors` source are used as they are. Raises as `load`.
    """
    if is_token_file(source):
        return first_windows(read_token_file(source, vocab_size), samples)
    check_positive(samples=1 if samples is None else samples, seqlen=seqlen)
    parts = MIX if source == "mix" else (source,)
    most = max(1, EVAL_TOKENS // seqlen) * seqlen if source == DEFAULT_EVAL else sys.maxsize
    need = most if samples is None else samples * seqlen
    corpora = [open_corpus(part, offline=offline, shuffle=None) for part in parts]
    tok = tokenizer()
    prefix = prefix_of(tok)
    require_room(seqlen, prefix)
    with ChatTemplate(tok) as template:
        documents = in_turn(corpus.documents for corpus in corpora)
        if corpora[0].one_text:
            stream = joined(ids_of_text(map(str, documents), tok), None, need)
        else:
            stream = joined(ids_of(documents, tok, template, need), tok.eos_token_id, need)
    windows = windows_of(stream, need // seqlen, seqlen, prefix)
    if len(windows) < (samples or 1):
        raise too_short(source, len(stream), samples or 1, seqlen, windows=len(windows), option="--eval-samples")
    kept = "all windows" if samples is None and len(stream) < need else f"the first {len(windows)} windows"
    protocol = f"{STARTS[corpora[0].form]}; {kept} of {seqlen} without overlap"
    protocol += told_of(prefix, tok) + template.protocol()
    return token_set(windows, source, vocab_size, protocol, _notes(corpora, template))


def _some(corpus: Corpus, enough: int, size: int) -> list[Document]:
    """The first documents of a source, no more than memory can hold.

    Of the hub's no more are taken than `enough` tokens can need from passages of `size` characters.
    """
    documents: list[Document] = []
    characters = passages = 0
    need = enough * CHARACTERS_PER_TOKEN
    for document in corpus.documents:
        documents.append(document)
        length = _length(document)
        characters += length + DOCUMENT
        passages += min(length, size)
        if characters >= max(need, MOST_CHARACTERS):
            corpus.cut = True
            break
        if corpus.remote and passages >= need:
            break
    return ["".join(map(str, documents))] if corpus.one_text else documents


def _length(document: Document) -> int:
    return len(document) if isinstance(document, str) else sum(len(turn["content"] or "") for turn in document)


def _notes(corpora: Iterable[Corpus], template: ChatTemplate) -> tuple[str, ...]:
    return (*(note for corpus in corpora for note in corpus.notes()), *template.notes())
