# SPDX-License-Identifier: Apache-2.0
"""Which engines load a checkpoint, and why not: what their loaders and kernels take, as data.

A checkpoint is its format's name and the linears of its decoder layers (`plan.LinearPlan`); nothing else is needed, so
the question can be asked before any work. The table was read in, and where a CPU is enough run with, the versions in
`versions.VERSIONS`; newer ones may take more.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quantkit.errors import EngineError, InputError, SchemeError
from quantkit.formats import FORMATS
from quantkit.formats.autoround import METHODS, PACKINGS
from quantkit.formats.names import is_lm_head
from quantkit.plan import LinearPlan
from quantkit.scheme import Scheme
from quantkit.serving.versions import VERSIONS

SIXTEEN_BIT = "16 bit"  # the format of a checkpoint that is not quantized
SERVING = ("vllm", "sglang")  # these fuse q/k/v and gate/up, and cut linears over cards


@dataclass(frozen=True)
class Kernel:
    """What a kernel multiplies with.

    symmetric, asymmetric: the bits it takes with a fixed and with a stored zero point
    groups: the group sizes it takes (-1: whole rows), or a number: every multiple of it
    in_multiple, out_multiple: what must divide in_features and out_features (of one card's part)
    out_by_group: whether the group size must divide out_features too
    """

    name: str
    symmetric: frozenset[int]
    asymmetric: frozenset[int]
    groups: frozenset[int] | int
    in_multiple: int = 1
    out_multiple: int = 1
    out_by_group: bool = False


def _kernel(name: str, symmetric: str, asymmetric: str, groups: Sequence[int] | int, **shape: Any) -> Kernel:
    fixed, stored = (frozenset(map(int, text.split())) for text in (symmetric, asymmetric))
    return Kernel(name, fixed, stored, groups if isinstance(groups, int) else frozenset(groups), **shape)


USUAL = (-1, 32, 64, 128)
MARLIN = _kernel("Marlin", "4 8", "4", USUAL)  # pads its tiles itself
MARLIN_SYMMETRIC = _kernel("Marlin", "4 8", "", USUAL)
EXLLAMA = _kernel("Exllama", "4 8", "", 1, out_multiple=8)
TRITON = _kernel("TritonW4A16", "4", "4", (*USUAL, 256), out_multiple=8)
# Reads the very words of compressed-tensors, dense also at 3, 5, 6 and 7 bits (humming-kernels 0.1.14, which vLLM's
# requirements for CUDA name). Its tiles are of 2^n columns, and it has no zero points for whole rows.
HUMMING_GROUPS = (16, 32, 64, 128, 256, 512, 1024)
HUMMING_SYMMETRIC = _kernel("Humming", "2 3 4 5 6 7 8", "", (-1, *HUMMING_GROUPS))
HUMMING_ASYMMETRIC = _kernel("Humming", "", "2 3 4 5 6 7 8", HUMMING_GROUPS)
AWQ_GEMM = _kernel("AWQ gemm", "4", "4", 32, out_multiple=64, out_by_group=True)
GPTQ_TORCH = _kernel("Torch", "2 3 4 8", "2 3 4 8", (-1, 16, 32, 64, 128, 256, 512, 1024))
GPTQ_TORCH_SYMMETRIC = replace(GPTQ_TORCH, asymmetric=frozenset())
AWQ_TORCH = _kernel("AWQ Torch", "4", "4", (-1, 16, 32, 64, 128), out_multiple=8)
AWQ_TRANSFORMERS = _kernel("AWQ Torch", "4", "4", (*USUAL, 256), out_multiple=8)
DECOMPRESSED = _kernel("decompression", "2 3 4 5 6 8", "", 1)
CONVERTED = _kernel("conversion", "2 4 8", "2 4 8", 1)
BLOCKS = _kernel("blocks", "4 5 6 8", "4 5 6 8", 16)


@dataclass(frozen=True)
class Loader:
    """How an engine reads a format.

    kernels: fastest first; mixed: whether linears may differ in scheme; act_order: whether it reads `desc_act`;
    head: whether a quantized lm_head is read right; hint: what helps where no kernel takes a scheme
    """

    kernels: tuple[Kernel, ...]
    mixed: bool = False
    act_order: bool = False
    head: bool = False
    hint: str = ""


# A text in place of a loader says why the engine does not read the format at all.
LOADERS: dict[str, dict[str, Loader | str]] = {
    "vllm": {
        "awq": Loader((MARLIN, AWQ_GEMM)),
        "gptq": Loader((MARLIN_SYMMETRIC,), mixed=True, head=True),
        "gptq_v2": Loader((MARLIN_SYMMETRIC,), mixed=True, head=True),
        "compressed-tensors": Loader(
            (MARLIN, EXLLAMA, TRITON, HUMMING_SYMMETRIC, HUMMING_ASYMMETRIC), mixed=True, head=True
        ),
        "gguf": "reads gguf through a plugin only",
    },
    "sglang": {
        "awq": Loader((MARLIN, AWQ_GEMM)),
        "gptq": Loader((MARLIN_SYMMETRIC,), mixed=True),
        "gptq_v2": Loader((MARLIN_SYMMETRIC,), mixed=True),
        "compressed-tensors": Loader((MARLIN,), mixed=True),
        "gguf": Loader((BLOCKS,), mixed=True),
    },
    "transformers": {
        "awq": Loader((AWQ_TRANSFORMERS,)),
        "gptq": Loader((GPTQ_TORCH,), act_order=True),  # ignores `dynamic`, so one scheme
        "gptq_v2": Loader((GPTQ_TORCH,), act_order=True),
        "compressed-tensors": Loader((DECOMPRESSED,), mixed=True, head=True, hint="5.22.2 loads asymmetric ones"),
        "gguf": Loader((BLOCKS,), mixed=True, head=True),
    },
    "gptqmodel": {
        "awq": Loader((AWQ_TORCH,)),
        # of asymmetric v1 files it trusts its own only
        "gptq": Loader((GPTQ_TORCH_SYMMETRIC,), mixed=True, act_order=True, head=True),
        "gptq_v2": Loader((GPTQ_TORCH,), mixed=True, act_order=True, head=True),
        "compressed-tensors": "does not read compressed-tensors",
        "gguf": "does not read gguf",
    },
    "llama.cpp": {
        "awq": "does not read awq",
        "gptq": Loader((CONVERTED,), act_order=True, head=True),
        "gptq_v2": Loader((CONVERTED,), act_order=True, head=True),
        "compressed-tensors": Loader((CONVERTED,), head=True),  # of 3, 5, 6 and 7 bits it reads the older, padded words
        "gguf": Loader((BLOCKS,), mixed=True, head=True),
    },
}


@dataclass(frozen=True)
class Heads:
    """The attention heads of a layer: how many ask, how many are kept in the KV cache, and how wide each is."""

    attention: int
    key_value: int
    dim: int


def heads_of(config: Any) -> Heads:
    """The heads that a transformers config describes; none of a model without attention."""
    attention = int(getattr(config, "num_attention_heads", None) or 0)
    if not attention:
        return Heads(0, 0, 0)
    key_value = int(getattr(config, "num_key_value_heads", None) or attention)
    return Heads(attention, key_value, int(getattr(config, "head_dim", None) or config.hidden_size // attention))


# ---------------------------------------------------------------- tensor parallel


def shard(linear: LinearPlan, heads: Heads, cards: int) -> tuple[int, int]:
    """(out_features, in_features) of the part of a linear on one of `cards` cards.

    Attention is cut by heads; key and value heads fewer than the cards are copied, one to each card.

    Raises:
        SchemeError: it cannot be cut evenly, or a group would lie on two cards.
    """
    kind = linear.local.rpartition(".")[2]
    if kind in ("q_proj", "k_proj", "v_proj", "qkv_proj"):
        asking, kept = _even(heads.attention, cards, "attention heads"), kept_heads(heads, cards)
        whole = {"q_proj": heads.attention, "qkv_proj": heads.attention + 2 * heads.key_value}
        part = {"q_proj": asking, "qkv_proj": asking + 2 * kept}
        if linear.out_features == whole.get(kind, heads.key_value) * heads.dim:  # else there is more in it than heads
            return part.get(kind, kept) * heads.dim, linear.in_features
    if not linear.role.by_input:
        return _even(linear.out_features, cards, "out_features"), linear.in_features
    columns = _even(linear.in_features, cards, "in_features")
    scheme = linear.scheme
    if scheme is not None and scheme.group_size != -1 and columns % scheme.group_size:
        fitting = [g for g in (256, 128, 64, 32) if columns % g == 0]
        hint = f"use {' or '.join(map(str, fitting[:2]))}" if fitting else "use fewer cards"
        raise SchemeError(f"{columns} in_features on each are not divisible by group_size {scheme.group_size}; {hint}")
    return linear.out_features, columns


def kept_heads(heads: Heads, cards: int) -> int:
    """The key/value heads on each card.

    Raises:
        SchemeError: they can neither be shared out nor copied evenly.
    """
    if heads.key_value >= cards or heads.key_value == 0:
        return _even(heads.key_value, cards, "key/value heads")
    if cards % heads.key_value:
        raise SchemeError(f"{heads.key_value} key/value heads cannot be copied evenly to {cards} cards")
    return 1


def _even(count: int, cards: int, what: str) -> int:
    if count % cards:
        raise SchemeError(f"{count} {what} are not divisible by {cards} cards")
    return count // cards


# The packings of AutoRound's own configs that an engine reads; a checkpoint in the words of its format has none.
AUTOROUND: dict[str, tuple[str, ...]] = {
    "vllm": ("auto_round:auto_gptq", "auto_round:auto_awq"),
    "sglang": ("auto_round:auto_gptq", "auto_round:auto_awq"),
    "transformers": tuple(PACKINGS),  # through the auto-round library
}


# ---------------------------------------------------------------- the questions


def unloadable(format_name: str, config: Any) -> dict[str, str]:
    """Engine -> why it does not load a format for this architecture, whatever the numbers.

    The classes of transformers for these set initial values of linears that a checkpoint of this format does not have.
    """
    kind = getattr(config, "model_type", None)
    if format_name != "compressed-tensors" or kind not in ("falcon", "gpt_bigcode", "nanochat"):
        return {}
    engine = "transformers"
    return {engine: f"{VERSIONS[engine]} cannot load {kind} as compressed-tensors; use --format gptq or awq"}


def config_refusals(config: Mapping[str, Any], settings: str | None) -> dict[str, str]:
    """Engine -> why it does not find out from config.json how a checkpoint is quantized; the others do.

    config: its quantization_config as written; settings: the file that holds it where config.json does not
    """
    other = "`quantkit convert` to its own format writes it anew"
    refusals = {}
    for engine, version in VERSIONS.items():
        packing = config.get("packing_format", "auto_round:auto_gptq")
        if config.get("quant_method") in METHODS and packing not in AUTOROUND.get(engine, ()):
            refusals[engine] = f"{version} does not read an auto-round config of packing_format {packing}; {other}"
        if settings is not None and (engine, settings) != ("gptqmodel", "quantize_config.json"):
            refusals[engine] = f"{version} looks for quantization_config in config.json, not for {settings}; {other}"
    return refusals


def engines(
    format_name: str, linears: Iterable[LinearPlan], heads: Heads, *, cards: int = 1, act_order: bool = False
) -> dict[str, str | None]:
    """Engine -> None if it loads the checkpoint, else one line: why not, and what would load; see `why_not`."""
    kinds = _kinds(linears)
    return {engine: why_not(engine, format_name, kinds, heads, cards=cards, act_order=act_order) for engine in LOADERS}


def why_not(
    engine: str,
    format_name: str,
    linears: Iterable[LinearPlan],
    heads: Heads,
    *,
    cards: int = 1,
    act_order: bool = False,
) -> str | None:
    """None if the engine loads the checkpoint, else one line: why not, and the nearest that it would load.

    The first of `reasons`, which see.
    """
    found = reasons(engine, format_name, linears, heads, cards=cards, act_order=act_order)
    return found[0] if found else None


def reasons(
    engine: str,
    format_name: str,
    linears: Iterable[LinearPlan],
    heads: Heads,
    *,
    cards: int = 1,
    act_order: bool = False,
) -> list[str]:
    """Every reason why the engine does not load the checkpoint, one line each; the first says what it would load.

    linears: those of the decoder layers, and a quantized lm_head; scheme None is 16 bit, which every engine loads
    cards: over how many each linear is cut (tensor parallel), for the engines that do so
    act_order: whether the file has a g_idx that is not in order (`desc_act`)

    Raises:
        InputError: an engine that is not in the table.
    """
    if engine not in LOADERS:
        raise InputError(f"engine: expected one of {', '.join(LOADERS)}, got {engine!r}")
    kinds = _kinds(linears)
    if all(linear.scheme is None for linear in kinds):  # a 16-bit model, or a format whose tensors say nothing to us
        known = format_name in (SIXTEEN_BIT, *LOADERS[engine])
        return [] if known else [f"{VERSIONS[engine]} is not known to read {format_name}"]
    found = [
        f"{VERSIONS[engine]} {reason}" for reason in _refusals(engine, format_name, kinds, heads, cards, act_order)
    ]
    if found and (other := _instead(engine, format_name, kinds, heads, cards)):
        found[0] += f"; {other} would load"
    return found


def kernels(engine: str, format_name: str, linears: Iterable[LinearPlan]) -> dict[str, str]:
    """Kind of linear -> the kernel that the engine would take for it on one card, "16 bit", or "none".

    vLLM prefers Machete to Marlin on cards of compute capability 9.0.
    """
    loader = LOADERS[engine].get(format_name)
    found: dict[str, str] = {}
    for linear in _kinds(linears):
        name = "none"
        if linear.scheme is None:
            name = SIXTEEN_BIT
        elif isinstance(loader, Loader):
            shape = (linear.out_features, linear.in_features)
            taking = [k.name for k in loader.kernels if _kernel_refuses(k, linear.scheme, *shape) is None]
            name = taking[0] if taking else "none"
        found.setdefault(linear.local, name)
    return found


def require_engine(
    engine: str,
    format_name: str,
    linears: Iterable[LinearPlan],
    heads: Heads,
    *,
    cards: int = 1,
    act_order: bool = False,
) -> None:
    """Refuse what `--for ENGINE` would not load; see `reasons`.

    Raises:
        EngineError: one line a reason.
    """
    if found := reasons(engine, format_name, linears, heads, cards=cards, act_order=act_order):
        raise EngineError("\n".join(found))


def _kinds(linears: Iterable[LinearPlan]) -> list[LinearPlan]:
    """The linears of one layer of each kind: layers repeat each other."""
    layers: dict[int, list[LinearPlan]] = {}
    for linear in linears:
        layers.setdefault(linear.layer, []).append(linear)
    alike: dict[object, list[LinearPlan]] = {}
    for layer in layers.values():
        alike.setdefault(tuple((x.local, x.out_features, x.in_features, x.scheme) for x in layer), layer)
    return [linear for layer in alike.values() for linear in layer]


def _refusals(
    engine: str, format_name: str, kinds: Sequence[LinearPlan], heads: Heads, cards: int, act_order: bool
) -> Iterator[str]:
    loader = LOADERS[engine].get(format_name, f"is not known to read {format_name}")
    if isinstance(loader, str):
        yield loader
        return
    schemes = {linear.scheme for linear in kinds if linear.scheme is not None}
    if len(schemes) > 1 and not loader.mixed:
        yield f"takes one scheme in a {format_name} checkpoint, got {', '.join(sorted(map(str, schemes)))}"
    if act_order and not loader.act_order:
        yield f"takes {format_name} without act-order (desc_act) only"
    if not loader.head and any(linear.scheme and is_lm_head(linear.name) for linear in kinds):
        yield f"is not known to read a quantized lm_head in {format_name}; keep it in 16 bit"
    if engine in SERVING and (differing := _differing(kinds)):
        yield f"fuses {differing}, which must have one scheme"
    told: dict[str, list[str]] = {}
    for linear in kinds:
        reason = _refused(loader, format_name, linear, heads, cards if engine in SERVING else 1)
        if reason and linear.local not in told.setdefault(reason, []):
            told[reason].append(linear.local)
    for reason, names in told.items():
        yield f"{reason} ({names[0]}{f' and {len(names) - 1} more kinds' if len(names) > 1 else ''})"


def _differing(kinds: Sequence[LinearPlan]) -> str | None:
    """Two linears of one layer that are fused, and differ."""
    seen: dict[tuple[int, str], LinearPlan] = {}
    for linear in kinds:
        fused = linear.role.fused
        if fused is not None:
            other = seen.setdefault((linear.layer, fused), linear)
            if other.scheme != linear.scheme:
                return f"{other.local} ({other.scheme or '16 bit'}) and {linear.local} ({linear.scheme or '16 bit'})"
    return None


def _refused(loader: Loader, format_name: str, linear: LinearPlan, heads: Heads, cards: int) -> str | None:
    scheme, shape = linear.scheme, (linear.out_features, linear.in_features)
    where = f"on {cards} cards: " if cards > 1 else ""
    try:
        if cards > 1:
            shape = shard(linear, heads, cards)
    except SchemeError as error:
        return f"{where}{error}"
    if scheme is None:
        return None
    if format_name in FORMATS and (reason := FORMATS[format_name].why_not(scheme, *shape)):
        return f"{where}{reason}"
    reasons = [_kernel_refuses(kernel, scheme, *shape) for kernel in loader.kernels]
    if None in reasons:
        return None
    told = "; ".join(f"{kernel.name} takes {reason}" for kernel, reason in zip(loader.kernels, reasons, strict=True))
    return f"{where}has no kernel for {scheme} in {format_name}: {told}" + (f" ({loader.hint})" if loader.hint else "")


def _kernel_refuses(kernel: Kernel, scheme: Scheme, out_features: int, in_features: int) -> str | None:
    """None, or what the kernel takes where the scheme or the shape has something else."""
    bits = kernel.symmetric if scheme.symmetric else kernel.asymmetric
    group = scheme.columns_per_group(in_features)
    if scheme.bits not in bits:
        count = " and ".join(map(str, sorted(bits))) or "no"
        return f"{count} {'symmetric' if scheme.symmetric else 'asymmetric'} bits"
    if isinstance(kernel.groups, int):
        if group % kernel.groups:
            return f"groups in multiples of {kernel.groups}"
    elif scheme.group_size not in kernel.groups:
        sizes = [str(size) for size in sorted(kernel.groups) if size != -1]
        return f"groups of {', '.join(sizes)}" + (" or whole rows" if -1 in kernel.groups else "")
    if in_features % kernel.in_multiple:
        return f"in_features in multiples of {kernel.in_multiple}, got {in_features}"
    if out_features % kernel.out_multiple:
        return f"out_features in multiples of {kernel.out_multiple}, got {out_features}"
    if kernel.out_by_group and out_features % group:
        return f"out_features in multiples of the group, got {out_features}"
    return None


def _instead(engine: str, format_name: str, kinds: Sequence[LinearPlan], heads: Heads, cards: int) -> str | None:
    """The nearest uniform choice that the engine loads: as few changes as possible."""
    base = next(linear.scheme for linear in kinds if linear.scheme is not None)
    for name, scheme in _candidates(format_name, base):
        changed = [replace(linear, scheme=scheme) if linear.scheme else linear for linear in kinds]
        if not any(_refusals(engine, name, _kinds(changed), heads, cards, False)):
            return str(scheme) if name == format_name else f"{name} {scheme}"
    return None


def _candidates(format_name: str, base: Scheme) -> list[tuple[str, Scheme]]:
    options = [
        (name, Scheme(bits, group, symmetric))
        for name in dict.fromkeys((format_name, *FORMATS))
        for bits in dict.fromkeys((base.bits, 4, 8))
        for group in dict.fromkeys((base.group_size, 128, 64, 32, -1))
        for symmetric in (base.symmetric, not base.symmetric)
    ]

    def changes(option: tuple[str, Scheme]) -> int:
        name, scheme = option
        return (
            (scheme.group_size != base.group_size)
            + 2 * (scheme.symmetric != base.symmetric)
            + 4 * (name != format_name)
            + 8 * (scheme.bits != base.bits)
        )

    return sorted(options, key=changes)
