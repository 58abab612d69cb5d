# SPDX-License-Identifier: Apache-2.0
"""Will it fit? Bytes before compute: weights, KV cache and workspace against the memory of one card.

The weights are exact. The KV cache is exact for one sequence: 2 (key and value) x key/value heads x head width x bytes,
for each layer and token; a layer with a sliding window stops growing at it. The workspace is a model of an engine that
prefills in chunks and serves one sequence:

    activations   PREFILL_TOKENS x (HIDDEN_COPIES x hidden + widest output + widest input of a layer) in 16 bit: the
                  peak lies in the MLP, where gate and up [chunk, 2 x intermediate] and their product [chunk,
                  intermediate] live beside a few hidden states. 2048 is vLLM's DEFAULT_MAX_NUM_BATCHED_TOKENS
                  (vllm/config/scheduler.py); an engine that prefills in larger chunks takes proportionally more.
    logits        one sequence x vocabulary in float32, for sampling
    engine        ENGINE_BYTES for the CUDA context, the libraries' workspaces, and captured graphs: vLLM reports 0.16
                  to 0.33 GiB outside PyTorch (vllm pull requests 12126 and 14447, issue 15815) and 0.13 to 0.36 GiB of
                  graphs at small batch sizes
    communication COMMUNICATION_BYTES of NCCL buffers where there are several cards

With tensor parallel each card has its part of every linear and of the vocabulary, and all of the norms; the budget is
the memory of one card.

What quantizing itself needs is counted by `needs`.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quantkit.checkpoint.header import spec_bytes
from quantkit.checkpoint.reader import Checkpoint, open_checkpoint
from quantkit.dtypes import ITEMSIZE
from quantkit.errors import EngineError, InputError, SchemeError
from quantkit.formats.reading import quant_methods
from quantkit.jsonfile import read_object
from quantkit.model.family import evaluate
from quantkit.model.shapes import Shapes, shapes_of
from quantkit.plan import DISK_MARGIN, OUTSIDE, STORED, LinearPlan, Plan, decoder_linears
from quantkit.quantized import quantization_of, read_config, settings_file, stored_linears
from quantkit.serving.engines import (
    SIXTEEN_BIT,
    Heads,
    config_refusals,
    engines,
    heads_of,
    kept_heads,
    require_engine,
    shard,
)
from quantkit.serving.needs import HIDDEN_COPIES, Work, needs

MIB = 2**20
KV_BYTES = {"fp16": 2, "fp8": 1}

PREFILL_TOKENS = 2048
CALIBRATION_SEQLEN = 2048  # of a run's defaults
CALIBRATION_TOKENS = 128 * CALIBRATION_SEQLEN
ENGINE_BYTES = 512 * MIB
COMMUNICATION_BYTES = 256 * MIB

FARTHEST = 2**30  # tokens; what fits this many has no limit

KINDS = {
    "embeddings": "embeddings",
    "lm_head": "lm_head",
    "codes": "codes",
    "blocks": "blocks of codes and scales",
    "scales": "scales",
    "zeros": "zero points",
    "indices": "indices, shapes",
    "linears_16bit": "linears kept in 16 bit",
    "norms": "norms",
    "biases": "biases",
    "other": "other",
}
_KIND_OF_KEY = {
    **dict.fromkeys(("qweight", "weight_packed"), "codes"),
    **dict.fromkeys(("scales", "weight_scale"), "scales"),
    **dict.fromkeys(("qzeros", "weight_zero_point"), "zeros"),
    **dict.fromkeys(("g_idx", "weight_g_idx", "weight_shape"), "indices"),
    "bias": "biases",
}


@dataclass(frozen=True)
class Stored:
    """A checkpoint, planned or there: the bytes of its tensors by name, of its files, and what its linears are.

    head: the lm_head, if it is quantized; refusals: engine -> why it does not read this config
    """

    tensors: Mapping[str, int]
    file_bytes: int
    linears: tuple[LinearPlan, ...]
    format: str
    act_order: bool = False
    head: tuple[LinearPlan, ...] = ()
    refusals: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Cache:
    """Layers that keep keys and values alike: their number, bytes per token of one, and the window (None: none).

    A state that does not grow with the context, as of linear attention, is kept as a window of one token.
    """

    layers: int
    bytes_per_token: int
    window: int | None

    def bytes_at(self, context: int) -> int:
        return self.layers * self.bytes_per_token * (context if self.window is None else min(context, self.window))


def fit(
    model: Shapes,
    plan: Plan,
    *,
    budget: int,
    context: int,
    kv: str = "fp16",
    tensor_parallel: int = 1,
    engine: str | None = None,
) -> dict[str, Any]:
    """Memory of a checkpoint that does not exist yet, as a JSON-able document.

    budget: bytes of one card; context: tokens of one sequence; kv: "fp16" or "fp8"; tensor_parallel: number of cards;
    engine: one that must load it

    weights: bytes by kind and "total"; weights_16bit; file_bytes (of a .gguf: without its header); kv_bytes,
    kv_bytes_per_token (while no window is full), kv_layers; workspace: bytes by part and "total"; tensor_parallel:
    {cards, weights_bytes, kv_bytes, kv_bytes_per_token, workspace_bytes: on one card, shards, problems}; total_bytes
    (on one card), budget_bytes, fits, margin_bytes; longest_context that fits and the model allows,
    longest_context_in_memory (None: no limit), max_position_embeddings; context, kv; disk_bytes, ram_bytes,
    device_bytes, hidden_states_bytes, quantizing: see `_quantizing`; engines: name -> None or why not; model: the
    constants of the workspace.

    Raises:
        InputError: a context, number of cards, or kind of cache that makes no sense.
        EngineError: the engine would not load it.
    """
    head = tuple(linear for linear in plan.quantized if linear.layer == OUTSIDE)
    stored = Stored(plan.loaded, plan.served_bytes, plan.linears, plan.format.name, head=head)
    result = _serving(model, stored, budget, context, kv, tensor_parallel, engine)
    return result | _quantizing(model, plan)


def fit_checkpoint(
    out: Path, *, budget: int, context: int, kv: str = "fp16", tensor_parallel: int = 1, engine: str | None = None
) -> dict[str, Any]:
    """The same for a checkpoint that is there, from its config.json and the headers of its files; see `fit`.

    It may be of ours, or another AWQ, GPTQ, compressed-tensors or 16-bit one. What quantizing needs is left out.

    Raises:
        InputError: see `fit`. ModelError: a damaged checkpoint, or a model of a kind that is not supported.
    """
    raw = read_config(out)
    plain = read_object(out / "config.json", "expected the folder of a checkpoint")
    settings = settings_file(out, plain)
    checkpoint = open_checkpoint(out)
    model = shapes_in(raw, checkpoint)
    quantization = quantization_of(raw)
    format_name, linears = _stored_linears(model, checkpoint, quantization)
    stored = Stored(
        tensors={name: entry.nbytes for name, entry in checkpoint.entries.items()},
        file_bytes=sum((out / name).stat().st_size for name in checkpoint.files),
        linears=tuple(linear for linear in linears if linear.layer != OUTSIDE),
        format=format_name,
        act_order=bool(quantization.get("desc_act")),
        refusals=config_refusals(plain.get("quantization_config") or {}, settings.name if settings else None),
        head=tuple(linear for linear in linears if linear.layer == OUTSIDE and linear.scheme is not None),
    )
    return _serving(model, stored, budget, context, kv, tensor_parallel, engine)


def fit_stored(
    model: Shapes,
    stored: Stored,
    *,
    budget: int,
    context: int,
    kv: str,
    tensor_parallel: int = 1,
    engine: str | None = None,
) -> dict[str, Any]:
    """The same for tensors that are described otherwise than by safetensors; see `fit`."""
    return _serving(model, stored, budget, context, kv, tensor_parallel, engine)


def shapes_in(raw: Mapping[str, Any], checkpoint: Checkpoint | None = None) -> Shapes:
    """What a config.json's content says of a model's tensors; how it is quantized is ignored.

    checkpoint: its tensors, where they are there

    Raises:
        ModelError: see `model.config.config_from_dict` and `model.streaming.build`.
    """
    plain = {key: value for key, value in raw.items() if key not in ("quantization_config", "compression_config")}
    known = shapes_of(plain)
    if known is not None:
        return known
    from quantkit.model.config import config_from_dict  # takes seconds, and is seldom needed
    from quantkit.model.streaming import build

    return build(config_from_dict(plain), checkpoint)


# ---------------------------------------------------------------- serving


def _serving(
    model: Shapes, stored: Stored, budget: int, context: int, kv: str, cards: int, engine: str | None
) -> dict[str, Any]:
    if kv not in KV_BYTES:
        raise InputError(f"--kv: expected {' or '.join(KV_BYTES)}, got {kv!r}")
    for option, value in (("--context", context), ("--tensor-parallel", cards), ("--budget", budget)):
        if value < 1:
            raise InputError(f"{option}: expected at least 1, got {value}")
    heads = heads_of(model.config)
    linears = (*stored.linears, *stored.head)
    if engine is not None and engine in stored.refusals:
        raise EngineError(stored.refusals[engine])
    if engine is not None:
        require_engine(engine, stored.format, linears, heads, cards=cards, act_order=stored.act_order)
    kinds = _kinds(model, stored)
    weights = {kind: sum(stored.tensors[n] for n, k in kinds.items() if k == kind) for kind in KINDS}
    whole = _caches(model, heads.key_value, KV_BYTES[kv], 1)
    shards, problems = _shards(stored.linears, heads, cards)
    here = _caches(model, _kept_heads(heads, cards), KV_BYTES[kv], cards)
    workspace = _workspace(model, stored.linears, cards)
    card_weights = _card_weights(stored, kinds, shards, cards)

    fixed = card_weights + workspace["total"]
    total = fixed + _cache_bytes(here, context)
    room = _longest(here, budget - fixed)
    allowed = getattr(model.config, "max_position_embeddings", None)
    return {
        "format": stored.format,
        "weights": weights | {"total": sum(stored.tensors.values())},
        "weights_16bit": _bytes_16bit(model),
        "file_bytes": stored.file_bytes,
        "kv": kv,
        "kv_bytes_per_token": _bytes_per_token(whole),
        "kv_bytes": _cache_bytes(whole, context),
        "kv_layers": [vars(cache) for cache in here],
        "workspace": workspace,
        "model": {
            "prefill_tokens": PREFILL_TOKENS,
            "hidden_copies": HIDDEN_COPIES,
            "sequences": 1,
            "engine_bytes": ENGINE_BYTES,
            "communication_bytes": COMMUNICATION_BYTES if cards > 1 else 0,
        },
        "tensor_parallel": {
            "cards": cards,
            "weights_bytes": card_weights,
            "kv_bytes_per_token": _bytes_per_token(here),
            "kv_bytes": _cache_bytes(here, context),
            "workspace_bytes": workspace["total"],
            "shards": _shard_rows(stored.linears, shards),
            "problems": problems,
        },
        "context": context,
        "total_bytes": total,
        "budget_bytes": budget,
        "fits": total <= budget,
        "margin_bytes": budget - total,
        "longest_context": min((n for n in (room, allowed) if n is not None), default=FARTHEST),
        "longest_context_in_memory": room,
        "max_position_embeddings": allowed,
        "engines": {
            **engines(stored.format, linears, heads, cards=cards, act_order=stored.act_order),
            **stored.refusals,
        },
    }


def _kinds(model: Shapes, stored: Stored) -> dict[str, str]:
    """Tensor name -> a key of KINDS."""
    linears = {linear.name: linear.scheme for linear in stored.linears}
    head = model.head_name

    def kind(name: str) -> str:
        owner, _, key = name.rpartition(".")
        if owner == head:
            return "lm_head"
        if owner in model.embeddings:
            return "embeddings"
        if key in _KIND_OF_KEY:
            return _KIND_OF_KEY[key]
        if owner in linears:
            return "linears_16bit" if linears[owner] is None else "blocks"
        return "norms" if owner in model.norms else "other"

    return {name: kind(name) for name in stored.tensors}


def _bytes_16bit(model: Shapes) -> int:
    layers = [model.layer_shapes(index) for index in range(len(model.layer_tensors))]
    numbers = sum(_count(shape) for shapes in (model.outside(), *layers) for shape in shapes.values())
    return ITEMSIZE[STORED] * numbers + sum(map(spec_bytes, model.copied.values()))


def _count(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


# ---------------------------------------------------------------- KV cache


def _caches(model: Shapes, heads: int, itemsize: int, cards: int) -> list[Cache]:
    """What layers keep of a sequence on one of `cards` cards, alike ones together; heads: of keys and values there."""
    family, config, count = model.family, model.config, len(model.layer_tensors)
    types = family.types(config, count)
    numbers = {kind: evaluate(family.per_token(kind), config, num_key_value_heads=heads) for kind in set(types)}
    states = {kind: -(-evaluate(family.state(kind), config) // cards) for kind in set(types)}
    growing = [(numbers[kind] * itemsize, window) for kind, window in zip(types, _windows(config, count), strict=True)]
    kept = [part for part in [*growing, *((states[kind], 1) for kind in types)] if part[0]]
    return [Cache(kept.count(alike), *alike) for alike in dict.fromkeys(kept)]


def _windows(config: Any, layers: int) -> list[int | None]:
    """The sliding window of each layer, None where all of the context is kept."""
    window = getattr(config, "sliding_window", None)
    if not window or getattr(config, "use_sliding_window", True) is False:
        return [None] * layers
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return [window if kind == "sliding_attention" else None for kind in kinds]
    first = getattr(config, "max_window_layers", 0)  # older transformers: Qwen2's first layers see everything
    return [None if index < first else window for index in range(layers)]


def _cache_bytes(caches: Sequence[Cache], context: int) -> int:
    return sum(cache.bytes_at(context) for cache in caches)


def _bytes_per_token(caches: Sequence[Cache]) -> int:
    """What each further token takes, while no window is full."""
    return _cache_bytes(caches, 2) - _cache_bytes(caches, 1)


def _longest(caches: Sequence[Cache], room: int) -> int | None:
    """The longest context whose cache takes at most `room` bytes; None if there is no limit."""
    longest = bisect_right(range(1, FARTHEST + 1), room, key=lambda context: _cache_bytes(caches, context))
    return None if longest == FARTHEST else longest


# ---------------------------------------------------------------- workspace and cards


def _workspace(model: Shapes, linears: Sequence[LinearPlan], cards: int) -> dict[str, int]:
    config = model.config
    width = HIDDEN_COPIES * config.hidden_size + (_widest_output(linears) + _widest_input(linears)) // cards
    parts = {
        "activations": PREFILL_TOKENS * width * ITEMSIZE[STORED],
        "logits": config.vocab_size * 4,
        "engine": ENGINE_BYTES,
        "communication": COMMUNICATION_BYTES if cards > 1 else 0,
    }
    return parts | {"total": sum(parts.values())}


def _widest_input(linears: Sequence[LinearPlan]) -> int:
    return max(linear.in_features for linear in linears)


def _widest_output(linears: Sequence[LinearPlan]) -> int:
    """Of linears that engines run as one, the sum."""
    widths: dict[tuple[int, str], int] = {}
    for linear in linears:
        key = (linear.layer, linear.role.fused or linear.local)
        widths[key] = widths.get(key, 0) + linear.out_features
    return max(widths.values())


def _kept_heads(heads: Heads, cards: int) -> int:
    try:
        return kept_heads(heads, cards)
    except SchemeError:  # told as a problem; the next larger whole number of heads
        return -(-heads.key_value // cards)


Shards = dict[str, tuple[int, int] | str]


def _shards(linears: Sequence[LinearPlan], heads: Heads, cards: int) -> tuple[Shards, list[str]]:
    """Full name -> (out_features, in_features) on one card, or why it cannot be cut; and each such reason once."""
    parts: Shards = {}
    problems: dict[str, None] = {}
    for linear in linears:
        try:
            parts[linear.name] = shard(linear, heads, cards)
        except SchemeError as error:
            parts[linear.name] = str(error)
            problems[f"{linear.local}: {error}"] = None
    return parts, list(problems)


def _shard_rows(linears: Sequence[LinearPlan], shards: Shards) -> list[dict[str, Any]]:
    """One row for each kind of linear: its shape, the shape on one card (None if it cannot be cut), and why not."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for linear in linears:
        part = shards[linear.name]
        whole = [linear.out_features, linear.in_features]
        scheme = str(linear.scheme) if linear.scheme else "16 bit"
        cut = None if isinstance(part, str) else list(part)
        row = {"linear": linear.local, "scheme": scheme, "shape": whole, "on_card": cut}
        row["why_not"] = part if isinstance(part, str) else None
        rows.setdefault((linear.local, scheme, *whole), row | {"layers": 0})["layers"] += 1
    return list(rows.values())


def _card_weights(stored: Stored, kinds: Mapping[str, str], shards: Shards, cards: int) -> int:
    """The bytes of the weights on one card. What cannot be cut evenly is counted as if it could, rounded up."""
    if cards == 1:
        return sum(stored.tensors.values())
    linears = {linear.name: linear for linear in stored.linears}
    return sum(
        _on_card(name, size, kinds[name], linears.get(name.rpartition(".")[0]), shards, cards)
        for name, size in stored.tensors.items()
    )


def _on_card(name: str, size: int, kind: str, linear: LinearPlan | None, shards: Shards, cards: int) -> int:
    if kind in ("embeddings", "lm_head"):  # cut by rows of the vocabulary
        return -(-size // cards)
    if linear is None or name.endswith("weight_shape"):
        return size
    by_input = linear.role.by_input
    if kind == "indices":  # one for each input column
        return -(-size // cards) if by_input else size
    whole_rows = linear.scheme is not None and linear.scheme.groups(linear.in_features) == 1
    if by_input and (kind == "biases" or (whole_rows and kind in ("scales", "zeros"))):
        return size
    part = shards[linear.name]
    if isinstance(part, str):
        return -(-size // cards)
    share, whole = (part[1], linear.in_features) if by_input else (part[0], linear.out_features)
    return -(-size * share // whole)


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
