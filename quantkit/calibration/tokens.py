# SPDX-License-Identifier: Apache-2.0
"""Token ids ready for a model, where they come from, and files of them."""

import hashlib
from dataclasses import dataclass, replace

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantkit.calibration.files import existing_file, unreadable
from quantkit.calibration.sources import EXPECTED
from quantkit.errors import InputError
from quantkit.records import Tokens

_INTEGERS = {"I8", "I16", "I32", "I64", "U8", "U16", "U32"}


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


def require_positions(tokens: TokenSet, limit: int | None) -> None:
    """Windows must not be longer than the model has positions (None: not known).

    Raises:
        InputError: they are.
    """
    if limit and tokens.seqlen > limit:
        raise InputError(f"{tokens.source}: windows of {tokens.seqlen} tokens, but the model has {limit} positions")


def as_asked(tokens: TokenSet, *, samples: int | None = None, seqlen: int | None = None) -> TokenSet:
    """The first `samples` windows of a file of windows, with a note of what was asked for and cannot be had of it."""
    if samples is not None and samples < tokens.samples:
        tokens = first_windows(tokens, samples)
    asked = {"--samples": (samples, tokens.samples), "--seqlen": (seqlen, tokens.seqlen)}
    notes = tuple(
        f"{option} {wanted} was left out here: the file is used as it is, {tokens.samples} x {tokens.seqlen} tokens"
        for option, (wanted, there) in asked.items()
        if wanted not in (None, there)
    )
    return replace(tokens, notes=tokens.notes + notes)


def record_of(tokens: TokenSet | None) -> Tokens | None:
    """What quantkit.json says of a token set."""
    if tokens is None:
        return None
    return Tokens(
        source=tokens.source,
        sha256=tokens.sha256,
        samples=tokens.samples,
        seqlen=tokens.seqlen,
        protocol=tokens.protocol,
        notes=list(tokens.notes),
    )


def notes_of(*sets: TokenSet | None) -> list[str]:
    """The notes of token sets, each with where it is from."""
    return [f"{tokens.source}: {note}" for tokens in sets if tokens is not None for note in tokens.notes]


def token_set(ids: Tensor, source: str, vocab_size: int, protocol: str, notes: tuple[str, ...] = ()) -> TokenSet:
    """A token set of ids that were checked against the vocabulary.

    Raises:
        InputError: an id is outside the vocabulary.
    """
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


def is_token_file(source: str) -> bool:
    """Whether a source holds token ids instead of text."""
    return source.lower().endswith(".safetensors") and not source.startswith("hf:")


def read_token_file(source: str, vocab_size: int) -> TokenSet:
    """All windows of a file of token ids.

    Raises:
        InputError: the file is missing or damaged, holds something else, or an id outside the vocabulary.
    """
    path = existing_file(source, EXPECTED)
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
        raise unreadable(path, f"a safetensors file with {expected}", error) from None
    return token_set(ids, source, vocab_size, "the windows of the file, as they are")


def first_windows(tokens: TokenSet, samples: int | None) -> TokenSet:
    """The first `samples` windows of a token file (None: all).

    Raises:
        InputError: it has fewer.
    """
    check_positive(samples=1 if samples is None else samples)
    if samples is None or samples == tokens.samples:
        return tokens
    if samples > tokens.samples:
        raise too_short(
            tokens.source,
            tokens.input_ids.numel(),
            samples,
            tokens.seqlen,
            windows=tokens.samples,
            option="--eval-samples",
        )
    ids = tokens.input_ids[:samples].contiguous()
    protocol = f"the first {samples} windows of the file, as they are"
    return replace(tokens, input_ids=ids, sha256=_sha256(ids), protocol=protocol)


def check_positive(**numbers: int) -> None:
    """Raise InputError for a size below one, by the name of its option."""
    for name, number in numbers.items():
        if number < 1:
            raise InputError(f"--{name}: expected at least 1, got {number}")


def too_short(
    source: str, tokens: int, samples: int, seqlen: int, *, windows: int, option: str = "--samples"
) -> InputError:
    """The error for a source that has too few tokens, with what to ask for instead; windows: how many there are."""
    hint = f"{option} {windows}" if windows else f"--seqlen {tokens} or less"
    need = f"{samples} x {seqlen} = {samples * seqlen}"
    return InputError(f"{source}: got {tokens} tokens, expected {need}; use {hint}, or a longer source")
