# SPDX-License-Identifier: Apache-2.0
"""Module names in the configs of checkpoints: exact regular expressions, and the layers that serving engines fuse.

vLLM and SGLang run q/k/v as one `qkv_proj` and gate/up as one `gate_up_proj`. They look a layer up under the fused
name, so a list or pattern must hold that name too, and they have one scheme for all of it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from quantkit.errors import SchemeError
from quantkit.scheme import Scheme

Fused = Mapping[str, tuple[str, ...]]  # module that engines load several linears into -> their names, by the last part


class QuantizedLayer(NamedTuple):
    """A linear layer that is quantized: its full module name, and how."""

    name: str
    scheme: Scheme


EXPERT = re.compile(r"(.*\bexperts)\.([0-9]+)\.[^.]+")


def expert_of(name: str) -> tuple[str, int] | None:
    """The mixture that a linear is in, and the number of its expert: mlp.experts.3.up_proj -> (mlp.experts, 3)."""
    found = EXPERT.fullmatch(name)
    return (found[1], int(found[2])) if found else None


def fused_name(name: str, groups: Fused) -> str | None:
    """The module that serving engines load this one into: `...self_attn.q_proj` -> `...self_attn.qkv_proj`."""
    parent, _, leaf = name.rpartition(".")
    fused = next((group for group, names in groups.items() if leaf in names), None)
    return f"{parent}.{fused}" if parent and fused else fused


def with_fused(names: Iterable[str], groups: Fused) -> list[str]:
    """The names, followed by the fused modules that they are parts of."""
    names = list(names)
    fused = [fused for name in names if (fused := fused_name(name, groups)) is not None]
    return list(dict.fromkeys([*names, *fused]))


def is_lm_head(name: str) -> bool:
    return name.rpartition(".")[2] == "lm_head"


def check_layers(quantized: Sequence[QuantizedLayer], kept: Sequence[str], groups: Fused) -> None:
    """Check what every format needs: something is quantized, nothing twice, and one scheme within each fused module.

    Raises:
        SchemeError: otherwise, with the names.
    """
    if not quantized:
        raise SchemeError("no linear layer is quantized; give at least one a scheme")
    schemes: dict[str, tuple[str, Scheme | None]] = {}
    seen: set[str] = set()
    layers: list[tuple[str, Scheme | None]] = [*quantized, *((name, None) for name in kept)]
    for name, scheme in layers:
        if name in seen:
            raise SchemeError(f"{name}: listed twice; each linear layer is either quantized once or kept in 16 bit")
        seen.add(name)
        fused = fused_name(name, groups)
        if fused is None:
            continue
        other, expected = schemes.setdefault(fused, (name, scheme))
        if scheme != expected:
            raise SchemeError(
                f"{name}: {scheme or '16 bit'} but {other}: {expected or '16 bit'}; "
                f"engines run them as one {fused.rpartition('.')[2]}: give them one scheme"
            )


def pattern(names: Iterable[str]) -> str:
    """A regular expression, anchored at both ends, that matches exactly these names.

    Names that differ only in the layer's number share one alternative, so the pattern stays short for a whole model.
    It uses nothing beyond what Python's re, regex and PCRE read alike.
    """
    numbers: dict[tuple[str, str], list[str]] = {}  # (before, after the first number) -> the numbers
    plain: list[str] = []
    for name in dict.fromkeys(names):
        match = re.fullmatch(r"(.*?\.)(\d+)(\..+)", name)
        if match:
            numbers.setdefault((match[1], match[3]), []).append(match[2])
        else:
            plain.append(re.escape(name))
    tails: dict[tuple[str, str], list[str]] = {}  # (before, the numbers) -> what comes after
    for (before, after), found in numbers.items():
        tails.setdefault((re.escape(before), _either(found)), []).append(re.escape(after))
    return f"^{_either([*plain, *(f'{before}{found}{_either(after)}' for (before, found), after in tails.items())])}$"


def _either(options: Sequence[str]) -> str:
    return options[0] if len(options) == 1 else f"(?:{'|'.join(options)})"
