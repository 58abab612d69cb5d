# SPDX-License-Identifier: Apache-2.0
"""Will it fit? Bytes before compute: weights, KV cache and workspace against the memory of one card.

The weights are exact (`stored`), so is the KV cache of one sequence (`cache`). The workspace is that of the engine that
is to load the checkpoint, with flags that reach the context (`engine_memory`). What quantizing itself needs is in
`needs`. The budget is the memory of one card.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantkit.checkpoint.reader import Checkpoint, open_checkpoint
from quantkit.errors import EngineError, InputError
from quantkit.formats.reading import quant_methods
from quantkit.hardware.card import Card
from quantkit.jsonfile import read_object
from quantkit.model.shapes import Shapes, with_embedding
from quantkit.plan import DISK_MARGIN, OUTSIDE, LinearPlan, Plan, decoder_linears
from quantkit.quantized import quantization_of, read_config, settings_file, shapes_in, stored_linears
from quantkit.records import Cache as CacheRecord
from quantkit.records import Card as CardRecord
from quantkit.records import EngineBatch, EngineFlag, EngineUse, Fit
from quantkit.serving.cache import FARTHEST, KV_BYTES, bytes_per_token, cache_bytes, caches
from quantkit.serving.engine_memory import MEMORY, Choice, Load, choices, choose
from quantkit.serving.engines import SIXTEEN_BIT, config_refusals, engines, heads_of, require_engine, unloadable
from quantkit.serving.flags import Flag, Served, flags_of, words
from quantkit.serving.needs import HIDDEN_COPIES, Work, needs
from quantkit.serving.stored import (
    KINDS,
    Stored,
    bytes_in_16_bit,
    card_weights,
    kinds_of,
    shard_rows,
    shards_of,
)

CALIBRATION_SEQLEN = 2048  # of a run's defaults
CALIBRATION_TOKENS = 128 * CALIBRATION_SEQLEN


def fit(
    model: Shapes,
    plan: Plan,
    *,
    budget: int,
    context: int,
    kv: str = "fp16",
    tensor_parallel: int = 1,
    engine: str | None = None,
    card: Card | None = None,
) -> Fit:
    """Memory of a checkpoint that does not exist yet.

    Args:
        budget: bytes of one card
        context: tokens of one sequence
        kv: "fp16" or "fp8"
        tensor_parallel: number of cards
        engine: one that must load it, and whose memory is counted; None: the first of the table that loads it
        card: the GPU that it is for, where it is known

    Raises:
        InputError: a context, number of cards, or kind of cache that makes no sense.
        EngineError: the engine would not load it.
    """
    head = tuple(linear for linear in plan.quantized if linear.layer == OUTSIDE)
    stored = Stored(plan.loaded, plan.served_bytes, plan.linears, plan.format.name, head=head)
    asked = _Asked(budget, context, kv, tensor_parallel, engine, card)
    return _serving(model, stored, asked).having(**_quantizing(model, plan))


def fit_checkpoint(
    out: Path,
    *,
    headers: Checkpoint | None = None,
    budget: int,
    context: int,
    kv: str = "fp16",
    tensor_parallel: int = 1,
    engine: str | None = None,
    card: Card | None = None,
) -> Fit:
    """The same for a checkpoint that is there, from its config.json and the headers of its files; see `fit`.

    It may be of ours, or another AWQ, GPTQ, compressed-tensors or 16-bit one. What quantizing needs is left out.

    headers: its tensors, where its files need not be here

    Raises:
        InputError: see `fit`. ModelError: a damaged checkpoint, or a model of a kind that is not supported.
    """
    raw = read_config(out)
    plain = read_object(out / "config.json", "expected the folder of a checkpoint")
    settings = settings_file(out, plain)
    checkpoint = open_checkpoint(out) if headers is None else headers
    model = shapes_in(raw, checkpoint)
    checkpoint = with_embedding(model, checkpoint)
    quantization = quantization_of(raw)
    format_name, linears = _stored_linears(model, checkpoint, quantization)
    stored = Stored(
        tensors={name: entry.nbytes for name, entry in checkpoint.entries.items()},
        file_bytes=sum(checkpoint.file_bytes.values()),
        linears=tuple(linear for linear in linears if linear.layer != OUTSIDE),
        format=format_name,
        act_order=bool(quantization.get("desc_act")),
        refusals=config_refusals(plain.get("quantization_config") or {}, settings.name if settings else None),
        head=tuple(linear for linear in linears if linear.layer == OUTSIDE and linear.scheme is not None),
    )
    return _serving(model, stored, _Asked(budget, context, kv, tensor_parallel, engine, card))


def fit_stored(
    model: Shapes,
    stored: Stored,
    *,
    budget: int,
    context: int,
    kv: str,
    tensor_parallel: int = 1,
    engine: str | None = None,
    card: Card | None = None,
) -> Fit:
    """The same for tensors that are described otherwise than by safetensors; see `fit`."""
    return _serving(model, stored, _Asked(budget, context, kv, tensor_parallel, engine, card))


# ---------------------------------------------------------------- serving


@dataclass(frozen=True)
class _Asked:
    """What the user asks of `fit`."""

    budget: int
    context: int
    kv: str
    cards: int
    engine: str | None
    card: Card | None

    def check(self) -> None:
        if self.kv not in KV_BYTES:
            raise InputError(f"--kv: expected {' or '.join(KV_BYTES)}, got {self.kv!r}")
        options = (("--context", self.context), ("--tensor-parallel", self.cards), ("--budget", self.budget))
        for option, value in options:
            if value < 1:
                raise InputError(f"{option}: expected at least 1, got {value}")


def _serving(model: Shapes, stored: Stored, asked: _Asked) -> Fit:
    asked.check()
    cards, context = asked.cards, asked.context
    heads = heads_of(model.config)
    loads = _engines(model, stored, asked)
    load = load_of(model, stored, asked.kv, cards, asked.card)
    weights = {kind: sum(stored.tensors[n] for n, k in load.kinds.items() if k == kind) for kind in KINDS}
    whole, here = caches(model, KV_BYTES[asked.kv], 1), load.caches
    shards, problems = shards_of(stored.linears, heads, cards)
    engine = asked.engine or _usual_engine(stored.format, loads)
    found = choices(engine, load, asked.budget)
    choice = choose(found, context)
    allowed = getattr(model.config, "max_position_embeddings", None)
    longest = _within(choice.room, allowed)
    total = load.weights + choice.workspace["total"] + cache_bytes(here, context)
    return Fit(
        format=stored.format,
        weights=weights | {"total": sum(stored.tensors.values())},
        weights_16bit=bytes_in_16_bit(model),
        file_bytes=stored.file_bytes,
        kv=asked.kv,
        kv_bytes_per_token=bytes_per_token(whole),
        kv_bytes=cache_bytes(whole, context),
        kv_layers=[CacheRecord(**vars(cache)) for cache in here],
        workspace=dict(choice.workspace),
        model={
            "prefill_tokens": choice.batch.tokens,
            "hidden_copies": HIDDEN_COPIES,
            "sequences": choice.batch.sequences,
            "engine_bytes": choice.workspace["engine"],
            "communication_bytes": choice.workspace["communication"],
        },
        tensor_parallel=CardRecord(
            cards=cards,
            weights_bytes=load.weights,
            kv_bytes_per_token=bytes_per_token(here),
            kv_bytes=cache_bytes(here, context),
            workspace_bytes=choice.workspace["total"],
            shards=shard_rows(stored.linears, shards),
            problems=problems,
        ),
        context=context,
        total_bytes=total,
        budget_bytes=asked.budget,
        fits=total <= asked.budget,
        margin_bytes=asked.budget - total,
        longest_context=longest,
        longest_context_in_memory=choice.room,
        max_position_embeddings=allowed,
        engine=_use(engine, load, asked, found, choice),
        engines=loads,
    )


def load_of(model: Shapes, stored: Stored, kv: str, cards: int = 1, card: Card | None = None) -> Load:
    """A checkpoint as an engine has it on one of several cards."""
    heads = heads_of(model.config)
    kinds = kinds_of(model, stored)
    shards, _ = shards_of(stored.linears, heads, cards)
    here = caches(model, KV_BYTES[kv], cards)
    return Load(model, stored, kinds, here, card_weights(stored, kinds, shards, cards), cards, card)


def _usual_engine(format_name: str, loads: Mapping[str, str | None]) -> str:
    """The engine that memory is counted for where none is named: llama.cpp for its files, else the first that loads."""
    if format_name == "gguf":
        return "llama.cpp"
    return next((name for name in MEMORY if loads[name] is None), "vllm")


def _within(room: int | None, allowed: int | None) -> int:
    """Tokens that both memory and the model allow; None: no limit."""
    return min((n for n in (room, allowed) if n is not None), default=FARTHEST)


def _engines(model: Shapes, stored: Stored, asked: _Asked) -> dict[str, str | None]:
    """Engine -> None if it loads the checkpoint, else why not.

    Raises:
        EngineError: the one that was asked for does not.
    """
    heads, linears, engine = heads_of(model.config), (*stored.linears, *stored.head), asked.engine
    refusals = {**unloadable(stored.format, model.config), **stored.refusals}
    if engine is not None and engine in refusals:
        raise EngineError(refusals[engine])
    if engine is not None:
        require_engine(engine, stored.format, linears, heads, cards=asked.cards, act_order=stored.act_order)
    found = engines(stored.format, linears, heads, cards=asked.cards, act_order=stored.act_order)
    return {**found, **refusals}


def _use(engine: str, load: Load, asked: _Asked, found: list[Choice], choice: Choice) -> EngineUse:
    """The engine and its flags; the context is the longest that they reach."""
    row, allowed = MEMORY[engine], getattr(load.model.config, "max_position_embeddings", None)
    longest = _within(choice.room, allowed)
    context = asked.context if longest == FARTHEST else longest
    kept = cache_bytes(load.caches, context)
    served = Served(context, asked.budget, asked.kv, asked.cards, asked.card, choice.workspace, kept)
    flags: list[Flag] = flags_of(engine, choice.batch, served)
    plain = not load.model.copied and all(cache.window is None for cache in load.caches)
    alike = load.cards == 1 and plain
    return EngineUse(
        name=engine,
        version=row.version,
        measured=choice.batch.measured and alike,
        source=row.source,
        flags=words(flags),
        costs=[EngineFlag(words=list(flag.words), note=flag.note) for flag in flags],
        context=context,
        batches=[
            EngineBatch(
                batched_tokens=each.batch.tokens,
                sequences=each.batch.sequences,
                eager=each.batch.eager,
                measured=each.batch.measured and alike,
                workspace_bytes=each.workspace["total"],
                context=_within(each.room, allowed),
            )
            for each in found
        ],
        card=asked.card.name if asked.card else None,
    )


# ---------------------------------------------------------------- quantizing


def _quantizing(model: Shapes, plan: Plan) -> dict[str, Any]:
    """What the run itself will need at its defaults, for the method that needs most: see `needs`.

    On a CPU all is in RAM, in float32; on a GPU the layer lies in its memory, in 16 bit (device_bytes, with one sample
    at a time). Hidden states lie where they fit, and on the disk if nowhere: hidden_states_bytes for each stream of
    CALIBRATION_TOKENS in float32; they are part of neither.
    """
    head = next((linear for linear in plan.quantized if linear.unit == "head"), None)
    work = Work(
        linears=plan.linears,
        on_gpu=False,
        itemsize=4,
        longest=CALIBRATION_SEQLEN,
        compared=True,
        calibrated=True,
        follows_original=True,
        head=head,
    )
    return {
        "disk_bytes": plan.file_bytes + plan.beside_bytes + DISK_MARGIN,
        "ram_bytes": needs(model, work).ram,
        "device_bytes": needs(model, replace(work, on_gpu=True, itemsize=2)).device,
        "hidden_states_bytes": 4 * CALIBRATION_TOKENS * model.config.hidden_size,
        "quantizing": {"calibration_tokens": CALIBRATION_TOKENS, "seqlen": CALIBRATION_SEQLEN},
    }


# ---------------------------------------------------------------- checkpoints that are there


def _stored_linears(
    model: Shapes, checkpoint: Checkpoint, quantization: Mapping[str, Any]
) -> tuple[str, tuple[LinearPlan, ...]]:
    """The format's name and the linears, see `stored_linears`; bytes are counted also where a format is not known."""
    method = quantization.get("quant_method")
    if isinstance(method, str) and method in quant_methods():
        fmt, linears = stored_linears(model, checkpoint, quantization)
        return fmt.name, linears
    return str(method or SIXTEEN_BIT), decoder_linears(model)
