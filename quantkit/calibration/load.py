# SPDX-License-Identifier: Apache-2.0
"""Every source of text or tokens -> token ids [samples, seqlen] with a content hash.

A set for calibration should show a layer many kinds of input, so documents are shuffled, long ones are cut into
passages, and passages are taken in rounds: one of every document before a second of any. They are joined with the
end-of-text token and cut into windows without padding. `mix` gives each of its four kinds the same number of windows,
in turn.

A set for evaluation keeps the order of its documents and cuts nothing out, so that its perplexity can be compared.

Conversations are rendered with the model's own chat template. Templates of reasoning models drop the `<think>` part of
an assistant's turn, because it is not sent back in a conversation; for calibration it is the part that matters, so such
a turn is appended to the generation prompt instead, which is how the model writes it.
"""

import gzip
import hashlib
import itertools
import json
import lzma
import random
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from jinja2 import TemplateError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quantkit.errors import InputError
from quantkit.network import patient_library
from quantkit.resources import calibration_dir
from quantkit.text import clean_line

MIX = ("general", "code", "chinese", "reasoning")
DEFAULT_EVAL = "eval"
BUNDLED = ("mix", *MIX, DEFAULT_EVAL)
EVAL_TOKENS = 1 << 16  # of the bundled set, if nobody says how many: by then a KL is known to about 1%

Conversation = list[dict[str, Any]]
Document = str | Conversation
Tokenizer = Callable[[], PreTrainedTokenizerBase]

_EXPECTED = (
    f"a bundled set ({', '.join(BUNDLED)}), a file (.txt, .jsonl, .jsonl.gz, .jsonl.xz, .parquet, .safetensors), "
    "or hf:ORG/NAME[/CONFIG][:SPLIT]"
)
_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
_INTEGERS = {"I8", "I16", "I32", "I64", "U8", "U16", "U32"}
_BATCH = 32  # documents tokenized together: enough to use every core, few enough to stop early
_CHARACTERS_PER_TOKEN = 12  # more than any language and tokenizer need: bounds what is streamed from the hub


@dataclass(frozen=True, eq=False)
class TokenSet:
    """Token ids ready for a model, and where they come from.

    `sha256` is over the shape and then the ids, all as little-endian int64. `protocol` says in words how the windows
    were cut; `notes` holds every fallback that was taken.
    """

    input_ids: Tensor  # int64 [samples, seqlen]
    source: str
    sha256: str
    protocol: str
    notes: tuple[str, ...] = ()

    @property
    def samples(self) -> int:
        """Number of windows."""
        return self.input_ids.shape[0]

    @property
    def seqlen(self) -> int:
        """Tokens of one window."""
        return self.input_ids.shape[1]


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
    if _is_token_file(source):
        return _token_file(source, vocab_size)
    _check_positive(samples=samples, seqlen=seqlen)
    parts = MIX if source == "mix" else (source,)
    shares = [samples // len(parts) + (i < samples % len(parts)) for i in range(len(parts))]
    need = samples * seqlen
    size = max(4 * seqlen, 512)  # characters of a passage: about one window of English
    texts = [list(_documents(part, offline=offline, shuffle=seed, enough=need, size=size)) for part in parts]
    tok = tokenizer()
    fallbacks: Counter[str] = Counter()
    kinds: list[Tensor] = []
    for part, share, documents in zip(parts, shares, texts, strict=True):
        rng = random.Random(seed)
        rng.shuffle(documents)
        stream = _join(_encode(_in_rounds(documents, size, rng), tok, fallbacks), tok.eos_token_id, share * seqlen)
        if len(stream) < share * seqlen:
            name = source if part == source else f"{source} ({part})"
            raise _too_short(name, len(stream), share, seqlen, len(parts))
        kinds.append(_windows(stream, share, seqlen))
    ids = torch.stack([kind[row] for row in range(max(shares)) for kind in kinds if row < len(kind)])
    protocol = f"documents shuffled with seed {seed}, passages joined by the end-of-text token, windows of {seqlen}"
    return _token_set(ids, source, vocab_size, protocol, _notes(fallbacks))


def require_positions(tokens: TokenSet, limit: int | None) -> None:
    """Windows must not be longer than the model has positions (None: not known).

    Raises:
        InputError: they are.
    """
    if limit and tokens.seqlen > limit:
        raise InputError(f"{tokens.source}: windows of {tokens.seqlen} tokens, but the model has {limit} positions")


def note_left_out(tokens: TokenSet, *, samples: int | None = None, seqlen: int | None = None) -> TokenSet:
    """The same, with a note of what was asked for and is otherwise in the file, whose windows are used as they are."""
    asked = {"--samples": (samples, tokens.samples), "--seqlen": (seqlen, tokens.seqlen)}
    notes = tuple(
        f"{option} {wanted} was left out here: the file is used as it is, {tokens.samples} x {tokens.seqlen} tokens"
        for option, (wanted, found) in asked.items()
        if wanted not in (None, found)
    )
    return replace(tokens, notes=tokens.notes + notes)


def record_of(tokens: TokenSet | None) -> dict[str, Any] | None:
    """What quantkit.json says of a token set."""
    if tokens is None:
        return None
    return {
        "source": tokens.source,
        "sha256": tokens.sha256,
        "samples": tokens.samples,
        "seqlen": tokens.seqlen,
        "protocol": tokens.protocol,
        "notes": list(tokens.notes),
    }


def notes_of(*sets: TokenSet | None) -> list[str]:
    """The notes of token sets, each with where it is from."""
    return [f"{tokens.source}: {note}" for tokens in sets if tokens is not None for note in tokens.notes]


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
    and cut into windows that do not overlap, the remainder dropped. Documents of other sources are joined in
    their order by the end-of-text token and cut alike. The windows of a `.safetensors` source are used as they are.
    Raises as `load`.
    """
    if _is_token_file(source):
        return _first_windows(_token_file(source, vocab_size), samples)
    _check_positive(samples=1 if samples is None else samples, seqlen=seqlen)
    parts = MIX if source == "mix" else (source,)
    most = max(1, EVAL_TOKENS // seqlen) * seqlen if source == DEFAULT_EVAL else sys.maxsize
    need = most if samples is None else samples * seqlen
    texts = [list(_documents(part, offline=offline, shuffle=None, enough=need, size=sys.maxsize)) for part in parts]
    tok = tokenizer()
    fallbacks: Counter[str] = Counter()
    stream = _join(_encode(_in_turn(texts), tok, fallbacks), tok.eos_token_id, need)
    count = min(len(stream), need) // seqlen if samples is None else samples
    if len(stream) < max(count, 1) * seqlen:
        raise _too_short(source, len(stream), max(count, 1), seqlen, option="--eval-samples")
    whole = source.lower().endswith(".txt") and source not in BUNDLED
    start = "whole file tokenized as one text" if whole else "documents in order, joined by the end-of-text token"
    kept = "all windows" if samples is None and len(stream) < need else f"the first {count} windows"
    protocol = f"{start}; {kept} of {seqlen} without overlap"
    return _token_set(_windows(stream, count, seqlen), source, vocab_size, protocol, _notes(fallbacks))


# Documents -> ids


def render(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> str:
    """Text of a conversation by the tokenizer's chat template, the last assistant turn kept with its reasoning.

    The template's own rendering is taken unless words of the last turn are missing from it. Raises what the template
    raises: jinja2.TemplateError, TypeError or ValueError.
    """
    text = _apply(conversation, tokenizer, generation=False)
    *history, last = conversation
    if last["role"] != "assistant" or not history or _squeeze(last["content"]) in _squeeze(text):
        return text
    prompt, reply = _apply(history, tokenizer, generation=True), str(last["content"])
    if prompt.rstrip().endswith("<think>"):
        if "</think>" not in reply:
            return text
        reply = reply.lstrip().removeprefix("<think>")
        reply = reply.lstrip("\n") if prompt.endswith("\n") else reply
    return prompt + reply + str(tokenizer.eos_token or "")


def _apply(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, *, generation: bool) -> str:
    text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=generation)
    return str(text)


def _squeeze(text: str) -> str:
    """Drop white space, which templates add and strip freely."""
    return "".join(text.split())


def _rendered(document: Document, tok: PreTrainedTokenizerBase, fallbacks: Counter[str]) -> tuple[str, bool]:
    """Text of a document, and whether the tokenizer is to add its special tokens (a template writes its own)."""
    if isinstance(document, str):
        return document, True
    reason = "the tokenizer has no chat template"
    if tok.chat_template:
        try:
            return render(document, tok), False
        except (TemplateError, TypeError, ValueError) as error:
            reason = f"the chat template refused them ({_first_line(error)})"
    fallbacks[reason] += 1
    return "\n".join(f"{message['role']}: {message['content']}" for message in document), True


def _encode(
    documents: Iterable[Document], tok: PreTrainedTokenizerBase, fallbacks: Counter[str]
) -> Iterator[list[int]]:
    """Token ids of each document, tokenized in batches."""
    documents = iter(documents)
    while batch := list(itertools.islice(documents, _BATCH)):
        rendered = [_rendered(document, tok, fallbacks) for document in batch]
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


def _windows(stream: list[int], samples: int, seqlen: int) -> Tensor:
    return torch.tensor(stream[: samples * seqlen], dtype=torch.int64).reshape(samples, seqlen)


def _token_set(ids: Tensor, source: str, vocab_size: int, protocol: str, notes: tuple[str, ...] = ()) -> TokenSet:
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise InputError(
            f"{source}: token id {bad} is outside the vocabulary, expected 0 to {vocab_size - 1}; "
            "use the tokenizer that belongs to the model"
        )
    return TokenSet(ids, source, _sha256(ids), protocol, notes)


def _sha256(ids: Tensor) -> str:
    content = torch.cat([torch.tensor(ids.shape), ids.flatten()]).numpy().astype("<i8").tobytes()
    return hashlib.sha256(content).hexdigest()


# Sources -> documents


def _documents(source: str, *, offline: bool, shuffle: int | None, enough: int, size: int) -> Iterator[Document]:
    """All documents of a source that hold something; of the hub's, no more than `enough` tokens can need."""
    found = False
    for document in _read(source, offline=offline, shuffle=shuffle, enough=enough, size=size):
        if not isinstance(document, str) or document.strip():
            found = True
            yield document
    if not found:
        raise InputError(f"{source}: expected text, got none; use another source: {_EXPECTED}")


def _read(source: str, *, offline: bool, shuffle: int | None, enough: int, size: int) -> Iterator[Document]:
    if source in BUNDLED:
        yield from _jsonl(calibration_dir() / f"{source}.jsonl.xz")
        return
    if source.startswith("hf:"):
        yield from _hub(source, offline=offline, shuffle=shuffle, enough=enough, size=size)
        return
    path = _existing(source)
    name = path.name.lower()
    if name.endswith(".txt"):
        yield _text(path)
    elif name.endswith((".jsonl", ".jsonl.gz", ".jsonl.xz")):
        yield from _jsonl(path)
    elif name.endswith(".parquet"):
        yield from _parquet(path)
    else:
        raise InputError(f"{source}: unknown kind of source; expected {_EXPECTED}")


def _existing(source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_file():
        return path
    found = "a folder" if path.is_dir() else "no such file"
    raise InputError(f"{source or repr(source)}: {found}; expected {_EXPECTED}")


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")  # not read_text: line ends stay as they are
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, "UTF-8 text", error) from None


def _jsonl(path: Path) -> Iterator[Document]:
    opener = _OPENERS.get(path.suffix.lower(), open)
    try:
        with opener(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                where = f"{path}: line {number}"
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise InputError(f"{where}: expected one JSON record, got {_first_line(error)}; mend it") from None
                yield _document(record, where)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise _unreadable(path, "JSON lines", error) from None


def _parquet(path: Path) -> Iterator[Document]:
    import pyarrow as arrow  # only here: it is slow to import
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            columns = [name for name in ("messages", "text") if name in file.schema_arrow.names]
            if not columns:
                got = ", ".join(file.schema_arrow.names)
                raise InputError(f"{path}: expected a column 'text' or 'messages', got {got}; rename one")
            rows = (row for batch in file.iter_batches(columns=columns) for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                yield _document(row, f"{path}: row {number}")
    except (arrow.ArrowException, OSError) as error:
        raise _unreadable(path, "a parquet file", error) from None


def _document(record: object, where: str) -> Document:
    """Text or messages of a record; messages where it has both, as text may be another model's template."""
    fields = record if isinstance(record, dict) else {}
    messages, text = fields.get("messages"), fields.get("text")
    if isinstance(messages, list) and messages and all(map(_is_message, messages)):
        return messages
    if isinstance(text, str) and messages is None:
        return text
    got = f"the fields {', '.join(map(str, fields))}" if fields else type(record).__name__
    raise InputError(
        f"{where}: expected 'text' (a string) or 'messages' (a list of role and content, both strings), got {got}; "
        "mend or remove it"
    )


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def parse_hub(source: str) -> tuple[str, str | None, str]:
    """`hf:ORG/NAME[/CONFIG][:SPLIT]` -> (dataset id, config or None, split). Raises InputError."""
    part = r"[A-Za-z0-9_][\w.-]*"
    match = re.fullmatch(rf"hf:({part}/{part})(?:/({part}))?(?::({part}))?", source)
    if match is None:
        raise InputError(f"{source}: expected hf:ORG/NAME[/CONFIG][:SPLIT]; for example hf:openai/gsm8k/main:train")
    return match[1], match[2], match[3] or "train"


def _hub(source: str, *, offline: bool, shuffle: int | None, enough: int, size: int) -> Iterator[Document]:
    """Stream a dataset, in an order shuffled within a buffer, until `enough` tokens are surely there."""
    dataset, config, split = parse_hub(source)
    if offline or constants.HF_HUB_OFFLINE:
        raise InputError(
            f"{source}: a dataset of the hub needs the network, and this run is offline; use a bundled set "
            f"({', '.join(BUNDLED)}) or a file"
        )
    import datasets  # only here: it is slow to import

    fault = ""
    try:
        with patient_library():
            stream = datasets.load_dataset(dataset, config, split=split, streaming=True)
            if shuffle is not None:
                stream = stream.shuffle(seed=shuffle, buffer_size=1000)
            characters = 0
            for number, record in enumerate(stream, 1):
                document = _document(record, f"{source}: row {number}")
                yield document
                length = len(document) if isinstance(document, str) else sum(len(m["content"]) for m in document)
                characters += min(length, size)
                if characters >= enough * _CHARACTERS_PER_TOKEN:
                    return
    except InputError:
        raise
    except Exception as error:  # the library raises a dozen unrelated types for a wrong name or a lost connection
        fault = f"{type(error).__name__}: {clean_line(error)}"
    if fault:  # raised here, so that it carries no error of the library, which may quote a token
        raise InputError(
            f"{source}: expected a dataset with split {split!r}, got {fault}; "
            "check the name, the config and the connection"
        )


# Token files


def _is_token_file(source: str) -> bool:
    return source.lower().endswith(".safetensors") and not source.startswith("hf:")


def _token_file(source: str, vocab_size: int) -> TokenSet:
    path = _existing(source)
    expected = "one integer tensor input_ids [samples, seqlen]"
    try:
        with safe_open(path, framework="pt") as file:
            names = sorted(file.keys())
            if names != ["input_ids"]:
                raise InputError(
                    f"{source}: expected {expected}, got the tensors {', '.join(names) or 'none'}; save it alone"
                )
            part = file.get_slice("input_ids")
            dtype, shape = part.get_dtype(), part.get_shape()
            if dtype not in _INTEGERS or len(shape) != 2 or 0 in shape:
                raise InputError(
                    f"{source}: expected {expected}, got {dtype} {shape}; save it as int64 [samples, seqlen]"
                )
            ids = file.get_tensor("input_ids").to(torch.int64)
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, f"a safetensors file with {expected}", error) from None
    return _token_set(ids, source, vocab_size, "the windows of the file, as they are")


def _first_windows(tokens: TokenSet, samples: int | None) -> TokenSet:
    _check_positive(samples=1 if samples is None else samples)
    if samples is None or samples == tokens.samples:
        return tokens
    if samples > tokens.samples:
        raise _too_short(tokens.source, tokens.input_ids.numel(), samples, tokens.seqlen, option="--eval-samples")
    ids = tokens.input_ids[:samples].contiguous()
    protocol = f"the first {samples} windows of the file, as they are"
    return replace(tokens, input_ids=ids, sha256=_sha256(ids), protocol=protocol)


# Errors and notes


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise InputError(f"--{name}: expected at least 1, got {number}")


def _too_short(
    source: str, tokens: int, samples: int, seqlen: int, parts: int = 1, option: str = "--samples"
) -> InputError:
    hint = f"{option} {tokens // seqlen * parts}" if tokens >= seqlen else f"--seqlen {tokens} or less"
    need = f"{samples} x {seqlen} = {samples * seqlen}"
    return InputError(f"{source}: got {tokens} tokens, expected {need}; use {hint}, or a longer source")


def _unreadable(path: Path, expected: str, error: Exception) -> InputError:
    return InputError(f"{path}: expected {expected}, got {_first_line(error)}; check or replace the file")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _notes(fallbacks: Counter[str]) -> tuple[str, ...]:
    return tuple(
        f"{n} of the conversations joined as plain 'role: content' lines: {reason}"
        for reason, n in sorted(fallbacks.items())
    )
