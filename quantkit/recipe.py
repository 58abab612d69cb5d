# SPDX-License-Identifier: Apache-2.0
"""A recipe says which model, and how each of its linears is represented.

model: deepseek-ai/DeepSeek-R1-Distill-Qwen-32B     # optional: makes the file usable as MODEL
default: {bits: 4, group_size: 128, symmetric: false}
config: {model_type: qwen2, hidden_size: 5120, ...} # optional: lets `fit` answer before the model is here
rules:                                              # the last rule that matches a linear decides
  - {kind: down_proj, layers: 0-7, bits: 8}
  - {match: "model.layers.63.*", keep: 16bit}
"""

import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from quantkit.errors import InputError, QuantkitError, SchemeError
from quantkit.formats.names import FUSED
from quantkit.resources import recipes_dir
from quantkit.scheme import Scheme

BITS = (2, 3, 4, 8)


class SchemeSpec(BaseModel):
    """What a rule may set; unset fields come from the rules before it, and in the end from the default."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    bits: Literal[2, 3, 4, 8] | None = None
    group_size: int | None = None
    symmetric: bool | None = None

    @field_validator("group_size")
    @classmethod
    def _positive(cls, value: int | None) -> int | None:
        if value is not None and value != -1 and value < 1:
            raise ValueError("expected a positive number, or -1 for whole rows")
        return value


class Rule(SchemeSpec):
    """Picks linears by a glob over the full name (`match`), by the last part of it (`kind`), by layer numbers."""

    match: str | None = None
    kind: str | None = None
    layers: str | None = None
    keep: Literal["16bit"] | None = None

    @field_validator("layers")
    @classmethod
    def _range(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[0-9]{1,6}(-[0-9]{1,6})?(,[0-9]{1,6}(-[0-9]{1,6})?)*", value):
            raise ValueError("expected layer numbers such as '0-7' or '0,3,60-63'")
        for low, _, high in (part.partition("-") for part in (value or "").split(",")):
            if high and int(high) < int(low):
                raise ValueError(f"expected the lower layer number first in {low}-{high}")
        return value

    def applies(self, name: str, layer: int) -> bool:
        """Whether the linear `name` in decoder layer number `layer` is meant."""
        if self.match is not None and not fnmatchcase(name, self.match):
            return False
        if self.kind is not None and name.rpartition(".")[2] != self.kind:
            return False
        return self.layers is None or any(
            int(low) <= layer <= int(high or low)
            for low, _, high in (part.partition("-") for part in self.layers.split(","))
        )


class CalibrationSpec(BaseModel):
    """Which text, and how much of it, when the command line does not say."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    source: str | None = None
    samples: int | None = Field(default=None, ge=1)
    seqlen: int | None = Field(default=None, ge=2)


class LimitsSpec(BaseModel):
    """The verdict's limits when the command line does not say: shares (0.05 is 5%) and nats."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    max_ppl_increase: float | None = Field(default=None, ge=0)
    max_kl: float | None = Field(default=None, ge=0)


class Recipe(BaseModel):
    """A validated recipe file."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: str | None = None
    description: str = ""
    license: str | None = None
    config: dict[str, Any] | None = None  # what of the model's config.json decides sizes, for `fit` before any download
    default: SchemeSpec = Field(default_factory=SchemeSpec)
    rules: tuple[Rule, ...] = Field(default=(), strict=False)
    calibration: CalibrationSpec = Field(default_factory=CalibrationSpec)
    limits: LimitsSpec = Field(default_factory=LimitsSpec)


def read_recipe(path: Path) -> Recipe:
    """Read and validate a recipe file.

    Raises:
        InputError: unreadable, not YAML, or a field that is unknown or has a wrong value, with its place in the file.
    """
    try:
        raw: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"recipe {path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or a date that cannot be
        raise InputError(f"recipe {path}: not YAML ({' '.join(str(error).split())[:200]})") from error
    try:
        return Recipe.model_validate(raw if raw is not None else {})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "file"
        raise InputError(f"recipe {path}: {place}: {first['msg']}, got {repr(first['input'])[:80]}") from error


def resolver(recipe: Recipe, default: Scheme) -> Callable[[str, int], Scheme | None]:
    """(full name, layer number) -> the linear's scheme, or None to keep it in 16 bit."""

    def resolve(name: str, layer: int) -> Scheme | None:
        chosen: dict[str, Any] = {
            "bits": default.bits,
            "group_size": default.group_size,
            "symmetric": default.symmetric,
        }
        kept = False
        for rule in recipe.rules:
            if rule.applies(name, layer):
                fields = ("bits", "group_size", "symmetric")
                chosen |= {key: value for key in fields if (value := getattr(rule, key)) is not None}
                kept = rule.keep is not None
        return None if kept else Scheme(**chosen)

    return resolve


def check_fused(schemes: dict[str, Scheme | None]) -> None:
    """Serving engines run q/k/v as one matrix, and gate/up as another: each must have one scheme.

    schemes: local name within one decoder layer -> scheme.

    Raises:
        SchemeError: naming the two that differ.
    """
    for parts in FUSED.values():
        present = [(name, scheme) for name, scheme in schemes.items() if name.rpartition(".")[2] in parts]
        for name, scheme in present[1:]:
            if scheme != present[0][1]:
                told = [str(s) if s else "16 bit" for s in (present[0][1], scheme)]
                raise SchemeError(
                    f"{present[0][0]} is {told[0]} but {name} is {told[1]}; engines fuse them, so give both one scheme"
                )


def shipped() -> dict[str, Recipe]:
    """The recipes that come with quantkit, by name."""
    try:
        return {path.stem: read_recipe(path) for path in sorted(recipes_dir().glob("*.yaml"))}
    except QuantkitError as error:
        raise InputError(f"the shipped recipes are damaged: {error}; reinstall quantkit") from error
