# SPDX-License-Identifier: Apache-2.0
"""What is to be decided: the parts of a model, what each may become, and the bytes of any choice.

Nothing here needs more than shapes, so a budget that nothing fits in is refused before a weight is read.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quantkit.allocation.menu import (
    DEFAULT_MENU,
    ENGINES,
    HEAD,
    Entry,
    Part,
    Parts,
    entries_by_part,
    entry_name,
    parse_menu,
)
from quantkit.errors import InputError, SchemeError
from quantkit.formats import Format
from quantkit.methods.table import Options
from quantkit.model.family import Site
from quantkit.model.shapes import Shapes
from quantkit.plan import LinearPlan, Plan, decoder_linears, head_linear, linear_bytes, make_plan
from quantkit.recipe import Recipe
from quantkit.records import Fit
from quantkit.scheme import Scheme
from quantkit.serving.engines import heads_of
from quantkit.serving.fit import fit
from quantkit.settings.defaults import choose_format
from quantkit.settings.request import Request, config_options
from quantkit.units import format_bytes

Choice = dict[Part, Entry]
FEWER_BITS = ((3, 128), (3, 256), (2, 128), (2, -1))


@dataclass(frozen=True)
class Budget:
    """What the user asked for, as far as it decides bytes; see `command.AllocateRequest`.

    serve: the keywords of `fit.fit`
    """

    weights_only: bool
    menu: str | None
    engine: str | None
    also: Sequence[str]
    serve: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        return int(self.serve["budget"])


@dataclass(frozen=True)
class Problem:
    """The parts of a model with their linears, and the entries each may become.

    method, options: of the run; symmetric: of all schemes
    """

    shapes: Shapes
    parts: Parts
    menu: Mapping[Part, tuple[Entry, ...]]
    fmt: Format
    method: str
    options: Options
    symmetric: bool
    budget: Budget

    def plan(self, choice: Mapping[Part, Entry]) -> Plan:
        """The output with each part at its entry."""
        of = {linear.name: entry for part, entry in choice.items() for linear in self.parts[part]}
        options = config_options(self.options)
        return make_plan(self.shapes, lambda name, layer: of.get(name), self.fmt, head=choice.get(HEAD), **options)

    def cost(self, part: Part, entry: Entry) -> int:
        """Bytes of the tensors of a part's linears."""
        return sum(linear_bytes(self.fmt, replace(linear, scheme=entry)) for linear in self.parts[part])

    def size(self, plan: Plan) -> int:
        """The exact bytes of a plan that count against the budget."""
        return plan.served_bytes if self.budget.weights_only else self.fit(plan).total_bytes

    def fit(self, plan: Plan, **changes: Any) -> Fit:
        """The memory that a plan takes when it is served; see `fit.fit`."""
        return fit(self.shapes, plan, **(dict(self.budget.serve) | changes))

    def smallest(self) -> Choice:
        """Every part at its entry of fewest bytes."""
        return {part: min(entries, key=lambda e, p=part: self.cost(p, e)) for part, entries in self.menu.items()}  # type: ignore[misc]


def pose(
    run: Request, recipe: Recipe, budget: Budget, model: Shapes, sites: Sequence[Sequence[Site]]
) -> tuple[Problem, list[str]]:
    """What is to be decided, and one line for each entry of the menu that falls away.

    Raises:
        InputError: see `entries_by_part`; an engine or format that is not known.
    """
    symmetric = True if run.symmetric is None else run.symmetric
    fmt = choose_format(run.format or "compressed-tensors", run.method, Scheme(4, 128, symmetric), recipe)
    if not fmt.holds_mixed:
        raise InputError(f"--format {fmt.name}: holds one scheme; use compressed-tensors or gptq")
    engine = budget.engine or "vllm"
    if engine not in ENGINES:
        raise InputError(f"--engine: expected {', '.join(ENGINES)}, got {engine!r}")
    if fmt.block_bytes is not None and budget.weights_only:
        raise InputError("--weights-only: a .gguf holds the tokenizer too, whose bytes no plan knows; leave it out")
    parts = parts_of(model, sites, budget.also)
    entries = parse_menu(budget.menu or DEFAULT_MENU, symmetric)
    menu, notes = entries_by_part(parts, entries, fmt, engine, heads_of(model.config))
    return Problem(model, parts, menu, fmt, run.method, run.options, symmetric, budget), notes


def parts_of(model: Shapes, sites: Sequence[Sequence[Site]], also: Sequence[str]) -> dict[Part, tuple[LinearPlan, ...]]:
    """The linears of each site of each layer, in 16 bit, and of what is asked for outside the layers.

    Linears that stay in 16 bit are no part, and neither is a site of none but these.

    Raises:
        InputError: something outside that cannot be quantized.
    """
    linears = {(linear.layer, linear.local): linear for linear in decoder_linears(model)}
    found = {
        (layer, number): tuple(linears[layer, name] for name in site.linears)
        for layer in range(len(model.layer_linears))
        for number, site in enumerate(sites[layer])
    }
    free = {part: tuple(x for x in linears if not x.role.sixteen_bit) for part, linears in found.items()}
    parts: dict[Part, tuple[LinearPlan, ...]] = {part: linears for part, linears in free.items() if linears}
    for name in also:
        if name == "embeddings":
            raise InputError("--also embeddings: they stay in 16 bit, as transformers does not load quantized ones")
        if name != "lm_head":
            raise InputError(f"--also: expected lm_head, got {name!r}")
        head = head_linear(model)
        if head is None:
            raise InputError("--also lm_head: the head is the embedding's own matrix (tied), which stays in 16 bit")
        parts[HEAD] = (head,)
    return parts


def require_room(problem: Problem) -> None:
    """Refuse a budget that even the smallest entries do not fit in, or that leaves nothing to decide.

    Raises:
        InputError: by how much it is too small, and what would fit.
    """
    smallest = problem.smallest()
    plan = problem.plan(smallest)
    needed, budget = problem.size(plan), problem.budget
    if needed <= budget.nbytes:
        whole = needed + sum(problem.cost(part, None) - problem.cost(part, entry) for part, entry in smallest.items())
        if whole <= budget.nbytes and all(None in entries for entries in problem.menu.values()):
            raise InputError(
                f"--budget {format_bytes(budget.nbytes)}: the model in 16 bit takes {format_bytes(whole)}, so there is "
                "nothing to quantize; give less, or a --menu without 16bit"
            )
        return
    least = ", ".join(sorted({entry_name(entry) for entry in problem.smallest().values()}))
    kv = f"{budget.serve['context']:,} tokens of {budget.serve['kv']} KV cache"
    what = "as files of weights" if budget.weights_only else f"with {kv} and the engine's workspace"
    would = list(_would_fit(problem, plan))
    raise InputError(
        f"--budget {format_bytes(budget.nbytes)}: the smallest of the menu ({least}) takes {format_bytes(needed)} "
        f"{what}, {format_bytes(needed - budget.nbytes)} too much; "
        f"what would fit: {'; '.join([*would, f'--budget {-(-needed // 2**20)}MiB'])}"
    )


def _would_fit(problem: Problem, plan: Plan) -> Iterator[str]:
    """Less context, half the cache, fewer bits: what each alone, or where that is too little together, makes fit."""
    budget = problem.budget
    halves = not budget.weights_only and budget.serve["kv"] != "fp8"  # whether a smaller cache is an answer
    if not budget.weights_only:
        longest = problem.fit(plan).longest_context
        if longest > 0:
            yield f"--context {longest}"
    if halves:
        eight = problem.fit(plan, kv="fp8")
        if eight.fits:
            halves = False
            yield "--kv fp8"
        elif eight.longest_context > 0:
            yield f"--kv fp8 --context {eight.longest_context}"
    menu = "--menu" if budget.engine in (None, "any", "vllm") else "--engine vllm --menu"
    for bits, group in FEWER_BITS:
        entry = Scheme(bits, group, problem.symmetric)
        try:
            fewer = problem.plan(dict.fromkeys(problem.parts, entry))
        except SchemeError:
            continue
        size = problem.size(fewer)
        if size <= budget.nbytes:
            yield f"{menu} {entry_name(entry)},... ({format_bytes(size)})"
            return
        if halves and problem.fit(fewer, kv="fp8").fits:
            yield f"--kv fp8 {menu} {entry_name(entry)},..."
            return
