# SPDX-License-Identifier: Apache-2.0
"""A recipe says which model, and how each of its linears is represented.

model: deepseek-ai/DeepSeek-R1-Distill-Qwen-32B     # optional: makes the file usable as MODEL
default: {bits: 4, group_size: 128, symmetric: false}
config: {model_type: qwen2, hidden_size: 5120, ...} # optional: lets `fit` answer before the model is here
rules:                                              # the last rule that matches a linear decides
  - {kind: down_proj, layers: 0-7, bits: 8}
  - {match: "model.layers.63.*", keep: 16bit}        # a glob over the whole name
  - {match: "re:.*[.](q|k|v)_proj", method: awq}     # or, after re:, a regular expression
  - {kind: lm_head, bits: 8}                         # 16 bit unless a rule names it: no pattern reaches it
calibration: {source: mix, samples: 128, seqlen: 2048}
budget: {memory: 22GiB, context: 16k, kv: fp16}
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from quantkit.errors import InputError, QuantkitError, SchemeError
from quantkit.files import read_bytes
from quantkit.formats.names import Fused, expert_of, fused_name
from quantkit.patterns import compiled, matches
from quantkit.records import Limits
from quantkit.resources import recipes_dir
from quantkit.scheme import NAMED, Scheme
from quantkit.units import parse_bytes, parse_tokens

BITS = (2, 3, 4, 5, 6, 7, 8)  # a format may hold fewer
SCHEME_FIELDS = ("bits", "group_size", "symmetric")
LARGEST_FILE, DEEPEST, MOST_VALUES = 2**22, 50, 300_000  # bytes, levels, values: room for a rule for each linear
REGEX = "re:"  # what makes of a pattern a regular expression


class SchemeSpec(BaseModel):
    """What a rule may set; unset fields come from the rules before it, and in the end from the default."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    bits: Literal[2, 3, 4, 5, 6, 7, 8] | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    scheme: str | None = None  # a name in NAMED, instead of the three

    @field_validator("scheme")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None and value not in NAMED:
            raise ValueError(f"expected a scheme: {', '.join(NAMED)}")
        return value

    @model_validator(mode="after")
    def _one_way(self) -> "SchemeSpec":
        if self.scheme is not None and self.model_fields_set & {"bits", "group_size", "symmetric"}:
            raise ValueError("scheme says bits, group_size and symmetric; leave these out")
        return self

    def over(self, scheme: Scheme) -> Scheme:
        """The scheme with what is set here in its place."""
        if self.scheme is not None:
            return NAMED[self.scheme]
        fields = {key: value for key in SCHEME_FIELDS if (value := getattr(self, key)) is not None}
        return replace(scheme, grid="integer", **fields) if fields else scheme

    @field_validator("group_size")
    @classmethod
    def _positive(cls, value: int | None) -> int | None:
        if value is not None and value != -1 and value < 1:
            raise ValueError("expected a positive number, or -1 for whole rows")
        return value


class Rule(SchemeSpec):
    """Picks linears by a pattern of the full name (`match`), by the last part of it (`kind`), by layer numbers."""

    match: str | None = None
    kind: str | None = None
    layers: str | None = None
    keep: Literal["16bit"] | None = None
    method: Literal["awq", "gptq", "rtn"] | None = None

    @field_validator("match", "kind")
    @classmethod
    def _no_embedding(cls, value: str | None) -> str | None:
        if value is not None and value.rpartition(".")[2] == "embed_tokens":
            raise ValueError("embeddings stay in 16 bit: transformers does not load quantized ones")
        return value

    @field_validator("match")
    @classmethod
    def _pattern(cls, value: str | None) -> str | None:
        if value is not None and value.startswith(REGEX):
            try:
                compiled(value.removeprefix(REGEX))
            except InputError as error:  # pydantic tells ValueErrors, with their place
                raise ValueError(f"expected a regular expression after {REGEX} ({error})") from error
        return value

    @field_validator("layers")
    @classmethod
    def _range(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[0-9]{1,6}(-[0-9]{1,6})?(,[0-9]{1,6}(-[0-9]{1,6})?)*", value):
            raise ValueError("expected layer numbers such as '0-7' or '0,3,60-63'")
        for low, _, high in (part.partition("-") for part in (value or "").split(",")):
            if high and int(high) < int(low):
                raise ValueError(f"expected the lower layer number first in {low}-{high}")
        return value

    def names(self, kind: str) -> bool:
        """Whether the rule says the very name of a kind of linear."""
        return self.kind == kind or (self.match is not None and kind in self.match)

    def applies(self, name: str, layer: int) -> bool:
        """Whether the linear `name` in decoder layer number `layer` is meant; the head (-1) only by its very name."""
        if layer < 0:
            return name in (self.match, self.kind) and self.layers is None
        if self.match is not None and not _matches(self.match, name):
            return False
        if self.kind is not None and name.rpartition(".")[2] != self.kind:
            return False
        return self.layers is None or any(
            int(low) <= layer <= int(high or low)
            for low, _, high in (part.partition("-") for part in self.layers.split(","))
        )


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith(REGEX):
        return matches(compiled(pattern.removeprefix(REGEX)), name, whole=True)
    return fnmatchcase(name, pattern)


class CalibrationSpec(BaseModel):
    """Which text, and how much of it, when the command line does not say."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    source: str | None = None
    samples: int | None = Field(default=None, ge=1)
    seqlen: int | None = Field(default=None, ge=2)


class LimitsSpec(Limits):
    """The verdict's limits when the command line does not say: shares (0.05 is 5%) and nats."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    max_ppl_increase: float | None = Field(default=None, ge=0)
    max_kl: float | None = Field(default=None, ge=0)


class BudgetSpec(BaseModel):
    """The memory to fit in, the context that must fit, and the KV cache's type, when the command line does not say."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    memory: str | None = None
    context: str | int | None = None
    kv: Literal["fp16", "fp8"] | None = None

    @field_validator("memory", "context")
    @classmethod
    def _readable(cls, value: str | int | None, info: ValidationInfo) -> str | int | None:
        parse = parse_bytes if info.field_name == "memory" else parse_tokens
        try:
            if value is not None:
                parse(str(value), "")
        except InputError as error:  # pydantic tells ValueErrors, with their place
            raise ValueError(str(error).removeprefix(": ")) from error
        return value

    @property
    def memory_bytes(self) -> int | None:
        return None if self.memory is None else parse_bytes(self.memory, "budget.memory")

    @property
    def context_tokens(self) -> int | None:
        return None if self.context is None else parse_tokens(str(self.context), "budget.context")


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
    budget: BudgetSpec = Field(default_factory=BudgetSpec)
    limits: LimitsSpec = Field(default_factory=LimitsSpec)
    _rule_lines: tuple[int, ...] = PrivateAttr(default=())

    @property
    def rule_lines(self) -> tuple[int, ...]:
        """The line of its file at which each rule begins; empty for a recipe that is not from a file."""
        return self._rule_lines


def over(recipe: Recipe, under: Recipe) -> Recipe:
    """A recipe with what it leaves out taken from another: `default` and `rules` belong together."""
    found: dict[str, Any] = {}
    together = {"default", "rules"} if {"default", "rules"} & recipe.model_fields_set else set()
    for name in Recipe.model_fields.keys() - together:
        mine, theirs = getattr(recipe, name), getattr(under, name)
        if name not in recipe.model_fields_set:
            found[name] = theirs
        elif isinstance(mine, BaseModel):
            left_out = type(mine).model_fields.keys() - mine.model_fields_set
            found[name] = mine.model_copy(update={key: getattr(theirs, key) for key in left_out})
    return recipe.model_copy(update=found)


def read_recipe(path: Path) -> Recipe:
    """Read and validate a recipe file.

    Raises:
        InputError: unreadable, not YAML, or a field that is unknown or has a wrong value, with its line in the file.
    """
    try:
        root, raw = _parse(path)
    except OSError as error:
        raise InputError(f"recipe {path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or a date that cannot be
        raise InputError(f"recipe {path}: not YAML ({' '.join(str(error).split())[:200]})") from error
    try:
        recipe = Recipe.model_validate(raw if raw is not None else {})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "file"
        line = _line(root, first["loc"])
        said = f"{first['msg'].removeprefix('Value error, ')}, got {repr(first['input'])[:80]}"
        if first["type"] == "extra_forbidden":
            said = f"no such key{_meant(str(first['loc'][-1]), _keys(first['loc']))}"
        raise InputError(f"recipe {path}, line {line}: {place}: {said}") from error
    recipe._rule_lines = tuple(_line(root, ("rules", index)) for index in range(len(recipe.rules)))
    return recipe


def _parse(path: Path) -> tuple[yaml.Node | None, Any]:
    """The file as nodes, which know their lines, and as plain values."""
    loader = yaml.SafeLoader(read_bytes(path, LARGEST_FILE).decode("utf-8"))
    try:
        root = loader.get_single_node()
        for number, (node, depth) in enumerate(_walk(root, 0), 1):
            if depth > DEEPEST or number > MOST_VALUES:
                fault = "too many values, or too deep, with its aliases written out; write it shorter"
                raise InputError(f"recipe {path}, line {node.start_mark.line + 1}: {fault}")
            if (key := _repeated(node)) is not None:
                line = key.start_mark.line + 1
                raise InputError(f"recipe {path}, line {line}: {key.value!r} is there twice; keep one")
        return root, None if root is None else loader.construct_document(root)
    finally:
        loader.dispose()


def _walk(node: yaml.Node | None, depth: int) -> Iterator[tuple[yaml.Node, int]]:
    """The values of a file as if its aliases were written out, which may be endless, and how deep each is."""
    if node is None:
        return
    yield node, depth
    if isinstance(node, yaml.CollectionNode):
        for item in node.value:
            yield from _walk(item[1] if isinstance(node, yaml.MappingNode) else item, depth + 1)


def _repeated(node: yaml.Node) -> yaml.ScalarNode | None:
    """A key that a mapping has twice: YAML takes the last, without a word."""
    seen: set[str] = set()
    for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
        if isinstance(key, yaml.ScalarNode):
            if key.value in seen:
                return key
            seen.add(key.value)
    return None


def _keys(place: Sequence[str | int]) -> Sequence[str]:
    """The keys that there are at a place of a recipe."""
    parts: dict[str | int, type[BaseModel]] = {
        "rules": Rule,
        "default": SchemeSpec,
        "calibration": CalibrationSpec,
        "budget": BudgetSpec,
        "limits": LimitsSpec,
    }
    return list((parts.get(place[0], Recipe) if len(place) > 1 else Recipe).model_fields)


def _meant(word: str, known: Sequence[str]) -> str:
    close = get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; expected one of {', '.join(known)}"


def _line(node: yaml.Node | None, place: Iterable[str | int]) -> int:
    """The line of the file at which the value at this place begins, or the nearest thing around it that is there."""
    line = 1
    for step in place:
        if isinstance(node, yaml.MappingNode):
            pair = next(((key, value) for key, value in node.value if key.value == str(step)), None)
            if pair is None:
                break
            line, node = pair[0].start_mark.line + 1, pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            line = node.start_mark.line + 1
    return line


def resolver(
    recipe: Recipe, default: Scheme, sixteen_bit: frozenset[str] = frozenset()
) -> Callable[[str, int], Scheme | None]:
    """(full name, layer number) -> the linear's scheme, or None to keep it in 16 bit.

    sixteen_bit: kinds that stay in 16 bit unless a rule names them, as the head (-1) does
    """

    def resolve(name: str, layer: int) -> Scheme | None:
        kind = name.rpartition(".")[2]
        by_name = layer < 0 or kind in sixteen_bit
        chosen = default
        kept: bool | None = None  # no rule has said
        for rule in recipe.rules:
            if rule.applies(name, layer) and (kind not in sixteen_bit or rule.names(kind)):
                chosen = rule.over(chosen)
                if rule.keep is not None or any(getattr(rule, key) is not None for key in (*SCHEME_FIELDS, "scheme")):
                    kept = rule.keep is not None
                elif by_name and kept is None:
                    kept = False  # it is enough to be named
        return None if kept or (kept is None and by_name) else chosen

    return resolve


def method_resolver(recipe: Recipe, default: str) -> Callable[[str, int], str]:
    """(full name, layer number) -> the method that rounds the linear: of the last rule that says one."""

    def resolve(name: str, layer: int) -> str:
        said = [rule.method for rule in recipe.rules if rule.method is not None and rule.applies(name, layer)]
        return said[-1] if said else default

    return resolve


@contextmanager
def explained(recipe: Recipe) -> Iterator[None]:
    """A SchemeError from within also tells which rules gave the linears it names what they have."""
    try:
        yield
    except SchemeError as error:
        if not recipe.rules or not error.linears:
            raise
        told = "; ".join(f"{name.rpartition('.')[2]} by {_decided_by(recipe, name)}" for name in error.linears)
        raise SchemeError(f"{error} (recipe: {told})", error.linears) from error


def _decided_by(recipe: Recipe, name: str) -> str:
    """The rules that say anything of a linear's scheme: "rule 2, line 7", or "the default"."""
    number = re.search(r"\.([0-9]+)\.", name)
    layer = int(number[1]) if number else -1
    found = [
        _place(recipe, index)
        for index, rule in enumerate(recipe.rules)
        if rule.applies(name, layer) and rule.model_dump(exclude_none=True, include={*SCHEME_FIELDS, "scheme", "keep"})
    ]
    return " and ".join(found) or "the default"


def unmatched(recipe: Recipe, linears: Iterable[tuple[str, int]]) -> list[str]:
    """One line for each rule that applies to none of the linears (full name, layer number): most likely a typo."""
    names = list(linears)
    kinds = sorted({name.rpartition(".")[2] for name, _ in names})
    found = []
    for index, rule in enumerate(recipe.rules):
        if not any(rule.applies(name, layer) for name, layer in names):
            said = ", ".join(f"{key}: {value}" for key, value in rule.model_dump(exclude_none=True).items())
            meant = _meant(rule.kind, kinds) if rule.kind is not None and rule.kind not in kinds else ""
            found.append(f"recipe {_place(recipe, index)} ({said}) matches no linear{meant}")
    return found


def _place(recipe: Recipe, index: int) -> str:
    return f"rule {index + 1}, line {recipe.rule_lines[index]}" if recipe.rule_lines else f"rule {index + 1}"


def check_fused(schemes: dict[str, Scheme | None], fused: Fused) -> None:
    """Serving engines run q/k/v as one matrix, gate/up as another, and all experts of a layer as one kernel: each must
    have one scheme.

    schemes: name -> scheme, of one decoder layer; fused: what engines load several linears into

    Raises:
        SchemeError: naming the two that differ.
    """
    first: dict[str, str] = {}
    for name, scheme in schemes.items():
        expert = expert_of(name)
        other = first.setdefault(expert[0] if expert else fused_name(name, fused) or name, name)
        if scheme != schemes[other]:
            told = [str(s) if s else "16 bit" for s in (schemes[other], scheme)]
            raise SchemeError(
                f"{other} is {told[0]} but {name} is {told[1]}; engines fuse them, so give both one scheme",
                (other, name),
            )


@cache
def shipped() -> Mapping[str, Recipe]:
    """The recipes that come with quantkit, by name; read once in a process."""
    try:
        return {path.stem: read_recipe(path) for path in sorted(recipes_dir().glob("*.yaml"))}
    except QuantkitError as error:
        raise InputError(f"the shipped recipes are damaged: {error}; reinstall quantkit") from error
