# SPDX-License-Identifier: Apache-2.0
"""Bits under a budget: which scheme each part of a model gets, so that all fits and the expected KL is least.

    1. measure   one pass over the model: the loss of every part at every entry of the menu, and the KL of swapping
                 each part alone to one entry (`sensitivity`). KL(part, entry) = KL(swap) x loss(entry) / loss(swap):
                 for small errors the KL is quadratic in them, and so is the loss.
    2. solve     the entries of least summed KL within the bytes, exactly (`knapsack`).
    3. check     a second pass with all the chosen roundings in place, as a run makes them: the true KL, and what it
                 falls by when one part goes back to 16 bit. These correct the table, and it is solved again.

Bytes are those of `plan` and `fit`: the recipe is planned as a run plans it. The windows that measure KL are taken from
the end of the calibration tokens and do not calibrate.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor, nn

from quantkit.calibration import TokenSet
from quantkit.checkpoint.reader import fingerprint
from quantkit.checkpoint.writer import write_json, write_text
from quantkit.choices import choose_format, choose_recipe, find_model
from quantkit.errors import InputError, SchemeError
from quantkit.fit import fit
from quantkit.formats import Format
from quantkit.knapsack import solve
from quantkit.loaders import LOADERS, heads_of, why_not
from quantkit.model.families import Site
from quantkit.model.sites import sites_of
from quantkit.model.streaming import StreamedModel, open_model
from quantkit.plan import LinearPlan, Plan, linear_bytes, make_plan, number_ranges
from quantkit.progress import display
from quantkit.quantize.methods import Options
from quantkit.recipe import BITS, Recipe
from quantkit.runs import Request, config_options, quantize, serving, tokens_of
from quantkit.scheme import Scheme
from quantkit.sensitivity import Entry, Measured, Part, Settings, Swap, measure
from quantkit.units import format_bytes

DEFAULT_MENU = "W2g128,W3rows,W3g256,W3g128,W3g64,W4rows,W4g256,W4g128,W4g64,W4g32,W5g128,W6g128,W8g128,16bit"
PROBE_SAMPLES = 16
ENGINES = (*LOADERS, "any")
MAX_REPAIRS = 2

Choice = dict[Part, Entry]
Table = dict[Part, dict[Entry, float]]  # the KL that a part adds at an entry


@dataclass(frozen=True)
class AllocateRequest:
    """What the user asked for beside what a run is asked for.

    run: the request of the quantizing run, its `budget`, `context` and `kv` included; weights_only: the budget counts
    the files of weights alone; engine: whose kernels must run every entry ("any": none asked for; None: vllm where the
    menu is the default one and the budget is a card's); every: probe each n-th layer and interpolate; check: measure
    the result and correct the table; table: where measurements are kept for other budgets
    """

    run: Request
    weights_only: bool = False
    menu: str | None = None
    engine: str | None = None
    probe_samples: int = PROBE_SAMPLES
    every: int = 1
    check: bool = True
    quantize: bool = False
    out: Path | None = None
    table: Path | None = None


@dataclass(frozen=True)
class Problem:
    """What is to be decided: the parts of a model, and how each entry would be stored.

    size: the exact bytes that count against the budget, for a plan
    """

    model: StreamedModel
    sites: tuple[Site, ...]
    fmt: Format
    method: str
    options: Options
    menu: dict[Part, tuple[Entry, ...]]
    size: Callable[[Plan], int]
    budget: int

    @property
    def parts(self) -> list[Part]:
        return list(self.menu)

    def plan(self, choice: Mapping[Part, Entry]) -> Plan:
        """The output with each part at its entry."""
        of = {(part[0], name): entry for part, entry in choice.items() for name in self.sites[part[1]].linears}
        prefix = {index: f"{self.model.layer_name(index)}." for index in range(len(self.model.layers))}
        return make_plan(
            self.model,
            lambda name, layer: of[layer, name.removeprefix(prefix[layer])],
            self.fmt,
            **config_options(self.options),
        )

    def cost(self, part: Part, entry: Entry) -> int:
        """Bytes of the tensors of a part's linears."""
        shapes = [shape_of(self.model, part[0], name) for name in self.sites[part[1]].linears]
        return sum(linear_bytes(self.fmt, LinearPlan("", part[0], "", *shape, entry)) for shape in shapes)


def shape_of(model: StreamedModel, layer: int, name: str) -> tuple[int, int]:
    """(out_features, in_features) of a linear."""
    linear = model.layers[layer].get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear.out_features, linear.in_features


# ---------------------------------------------------------------- the menu


def parse_menu(text: str, symmetric: bool) -> tuple[Entry, ...]:
    """Read "W3g128,W4rows,16bit" into schemes; None is 16 bit.

    Raises:
        InputError: an entry that cannot be.
    """
    entries: list[Entry] = []
    for word in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"[wW](\d+)(?:g(\d+)|(rows))", word)
        if word.lower() == "16bit":
            entries.append(None)
        elif match and int(match[1]) in BITS:
            entries.append(Scheme(int(match[1]), -1 if match[3] else int(match[2]), symmetric))
        else:
            raise InputError(f"--menu: expected entries such as W4g128, W4rows or 16bit, got {word!r}")
    if not entries:
        raise InputError("--menu: expected at least one entry such as W4g128")
    return tuple(dict.fromkeys(entries))


def entry_name(entry: Entry) -> str:
    """The menu's word for an entry."""
    if entry is None:
        return "16bit"
    return f"W{entry.bits}{'rows' if entry.group_size == -1 else f'g{entry.group_size}'}"


def entries_by_part(
    model: StreamedModel, sites: Sequence[Site], menu: Sequence[Entry], fmt: Format, engine: str
) -> tuple[dict[Part, tuple[Entry, ...]], list[str]]:
    """What of the menu each part can be, and one line for each entry that falls away somewhere.

    Raises:
        InputError: a part for which nothing is left.
    """
    possible: dict[Part, tuple[Entry, ...]] = {}
    refused: dict[str, str] = {}
    for index in range(len(model.layers)):
        for number, site in enumerate(sites):
            kept: list[Entry] = []
            for entry in menu:
                reason = None
                for name in site.linears:
                    reason = reason or _refused(model, fmt, engine, index, name, entry)
                if reason is None:
                    kept.append(entry)
                else:
                    refused.setdefault(entry_name(entry), reason)
            if not kept:
                raise InputError(
                    f"--menu: nothing of it can be for {model.layer_name(index)}.{site.linears[0]}: {reason}"
                )
            possible[index, number] = tuple(kept)
    return possible, [f"{name} left out: {reason}" for name, reason in refused.items()]


def _refused(model: StreamedModel, fmt: Format, engine: str, index: int, name: str, entry: Entry) -> str | None:
    if entry is None:
        return None
    shape = shape_of(model, index, name)
    reason = fmt.why_not(entry, *shape)
    if reason is not None or engine == "any":
        return reason and f"{name}: {reason}"
    linear = LinearPlan(f"{model.layer_name(index)}.{name}", index, name, *shape, entry)
    reason = why_not(engine, fmt.name, [linear], heads_of(model.config))
    return reason and reason.partition("; ")[0]


# ---------------------------------------------------------------- the table, and solving it


def probe_entries(problem: Problem, average: float, every: int) -> list[Swap]:
    """Which part to swap to what: the entry whose bits per weight are nearest to what the budget allows on average."""
    layers = len(problem.model.layers)
    probed = {*range(0, layers, every), layers - 1}

    def bits(part: Part, entry: Entry) -> float:
        return 16 * problem.cost(part, entry) / problem.cost(part, None)

    swaps: list[Swap] = []
    for part, entries in problem.menu.items():
        schemes = [entry for entry in entries if entry is not None]
        if part[0] in probed and schemes:
            swaps.append((part, min(schemes, key=lambda entry, part=part: abs(bits(part, entry) - average))))  # type: ignore[misc]
    return swaps


def table_of(problem: Problem, measured: Measured) -> Table:
    """KL by part and entry: each part's losses times what a unit of loss does to the logits."""
    slope = {
        part: kl / measured.losses[part][entry]
        for (part, entry), kl in measured.swapped.items()
        if measured.losses[part][entry] > 0
    }
    return {
        part: {entry: measured.losses[part][entry] * _interpolated(slope, part) for entry in entries}
        for part, entries in problem.menu.items()
    }


def _interpolated(slope: Mapping[Part, float], part: Part) -> float:
    """The slope of a part, geometrically between the nearest probed layers of its kind; 0 where nothing is known."""
    if part in slope:
        return slope[part]
    layer, kind = part
    below = max((at for at, k in slope if k == kind and at < layer), default=None)
    above = min((at for at, k in slope if k == kind and at > layer), default=None)
    if below is None or above is None:
        nearest = below if below is not None else above
        return 0.0 if nearest is None else slope[nearest, kind]
    share = (layer - below) / (above - below)
    low, high = (max(slope[at, kind], 1e-30) for at in (below, above))
    return math.exp((1 - share) * math.log(low) + share * math.log(high))


def choose(problem: Problem, table: Table) -> Choice | None:
    """The entries of least summed KL within the budget, in exact bytes; None when nothing fits."""
    parts = problem.parts
    values = [[table[part][entry] for entry in problem.menu[part]] for part in parts]
    costs = [[problem.cost(part, entry) for entry in problem.menu[part]] for part in parts]
    cheapest = [min(range(len(row)), key=row.__getitem__) for row in costs]
    headers = _size(problem, cheapest) - sum(row[i] for row, i in zip(costs, cheapest, strict=True))
    best: list[int] | None = None

    def worth(chosen: Sequence[int]) -> float:
        return sum(row[i] for row, i in zip(values, chosen, strict=True))

    tried: set[int] = set()
    while headers not in tried:  # what is not tensors depends a little on the choice: the lengths of headers
        tried.add(headers)
        chosen = solve(values, costs, problem.budget - headers)
        if chosen is None:
            break
        size = _size(problem, chosen)
        if size <= problem.budget and (best is None or worth(chosen) < worth(best)):
            best = chosen
        headers = size - sum(row[i] for row, i in zip(costs, chosen, strict=True))
    return None if best is None else _as_choice(problem, best)


def _as_choice(problem: Problem, chosen: Sequence[int]) -> Choice:
    return {part: problem.menu[part][i] for part, i in zip(problem.parts, chosen, strict=True)}


def _size(problem: Problem, chosen: Sequence[int]) -> int:
    return problem.size(problem.plan(_as_choice(problem, chosen)))


def smallest(problem: Problem) -> Choice:
    """Every part at its entry of fewest bytes."""
    return {
        part: min(entries, key=lambda entry, part=part: problem.cost(part, entry))  # type: ignore[misc]
        for part, entries in problem.menu.items()
    }


def corrected(problem: Problem, table: Table, checked: Measured, choice: Mapping[Part, Entry]) -> Table:
    """The table at the allocation: what each part really adds there, with the other parts quantized too.

    The parts' own shares of the measured KL do not sum up to it exactly; what is left over is spread over them.
    """
    alone = {part: checked.kl - checked.swapped[part, None] for part in choice if (part, None) in checked.swapped}
    known = {
        part: max(fall, 0.1 * table[part][choice[part]]) / table[part][choice[part]]
        for part, fall in alone.items()
        if table[part][choice[part]] > 0
    }
    factors = {part: _interpolated(known, part) or 1.0 for part in choice}
    total = sum(factors[part] * table[part][choice[part]] for part in choice)
    scale = checked.kl / total if total > 0 else 1.0
    return {part: {entry: kl * factors[part] * scale for entry, kl in row.items()} for part, row in table.items()}


# ---------------------------------------------------------------- the command


def allocate(request: AllocateRequest, console: Console) -> dict[str, Any]:
    """Measure, solve, check, write the recipe, and with `quantize` run it; returns what there is to report.

    Raises:
        InputError: a budget that nothing of the menu fits in, with by how much and what would; a menu that cannot be.
    """
    run = request.run
    if run.method == "rtn":
        raise InputError("--method: expected gptq or awq; rtn needs no calibration and is not measured")
    recipe = choose_recipe(None, run.model)
    directory = find_model(run.model, offline=run.offline)
    model = open_model(directory)
    problem, notes = pose(request, recipe, model)
    serve = serving(run, recipe, model.config)
    _require_room(request, problem, serve)
    calibrated, evaluated = tokens_of(run, recipe, model, directory, {run.method})
    assert calibrated is not None
    calibration, probe = split(calibrated, request.probe_samples)
    for line in notes:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    identity = _identity(request, problem, calibrated)
    measured = _stored(request.table, identity, problem)
    if measured is None:
        swaps = probe_entries(problem, _average_bits(problem), request.every)
        cheap = replace(run.options, refine=0)
        measured = _measure(request, problem, calibration, probe, problem.menu, {}, swaps, cheap, console)
        if request.table is not None:
            write_json(request.table, _table_document(identity, problem, measured))
    table = table_of(problem, measured)
    choice = choose(problem, table)
    if choice is None:
        raise InputError(f"--budget: nothing of the menu fits in {format_bytes(problem.budget)}")
    predicted = sum(table[part][entry] for part, entry in choice.items())
    document: dict[str, Any] = {"predicted_by_sum": predicted, "text_ratio": 1.0}
    elsewhere = None
    if evaluated is not None and evaluated.seqlen == probe.seqlen:
        elsewhere = evaluated.input_ids[: request.probe_samples]
    if request.check:
        checked = check(request, problem, calibration, probe, elsewhere, choice, console)
        if checked.kl_elsewhere is not None and checked.kl > 0:
            document["text_ratio"] = checked.kl_elsewhere / checked.kl
        table = corrected(problem, table, checked, choice)
        document |= {"checked_kl": checked.kl, "additivity": checked.kl / predicted if predicted > 0 else None}
        first, choice = choice, choose(problem, table) or choice
        predicted = sum(table[part][entry] for part, entry in choice.items())
        document["mended"] = sum(first[part] != entry for part, entry in choice.items())
    out = request.out or Path(f"{Path(run.model).name}-allocated.yaml")
    plan = problem.plan(choice)
    document |= _document(problem, choice, table, plan, predicted, document["text_ratio"], serve)
    write_text(out, recipe_text(request, problem, choice, table, document, calibrated, serve))
    document["recipe"] = str(out)
    if request.quantize:

        def again(table: Table, choice: Choice) -> Table:
            return corrected(problem, table, check(request, problem, calibration, probe, None, choice, console), choice)

        def write(table: Table, choice: Choice) -> None:
            predicted = sum(table[part][entry] for part, entry in choice.items())
            ratio = document["text_ratio"]
            document.update(_document(problem, choice, table, problem.plan(choice), predicted, ratio, serve))
            write_text(out, recipe_text(request, problem, choice, table, document, calibrated, serve))

        document["run"] = _run_and_repair(request, problem, table, choice, out, again, write, console)
    return document


def check(
    request: AllocateRequest,
    problem: Problem,
    calibration: TokenSet,
    probe: TokenSet,
    elsewhere: Tensor | None,
    choice: Choice,
    console: Console,
) -> Measured:
    """The true KL of an allocation, rounded as a run rounds it, and of the same with each part back in 16 bit.

    elsewhere: windows of the evaluation text, to tell the KL that is to be expected there; they decide nothing
    """
    swaps: list[Swap] = [(part, None) for part in choice if _probed(problem, part[0], request.every)]
    return _measure(request, problem, calibration, probe, {}, choice, swaps, request.run.options, console, elsewhere)


def pose(request: AllocateRequest, recipe: Recipe, model: StreamedModel) -> tuple[Problem, list[str]]:
    """What is to be decided, and one line for each entry of the menu that falls away.

    Raises:
        InputError: see `entries_by_part`; an engine or format that is not known.
    """
    run = request.run
    symmetric = True if run.symmetric is None else run.symmetric
    fmt = choose_format(run.format or "compressed-tensors", run.method, Scheme(4, 128, symmetric), recipe)
    if not fmt.holds_mixed:
        raise InputError(f"--format {fmt.name}: holds one scheme; use compressed-tensors or gptq")
    engine = request.engine or ("any" if request.menu or request.weights_only else "vllm")
    if engine not in ENGINES:
        raise InputError(f"--engine: expected {', '.join(ENGINES)}, got {engine!r}")
    sites = sites_of(model)
    menu, notes = entries_by_part(model, sites, parse_menu(request.menu or DEFAULT_MENU, symmetric), fmt, engine)
    serve = serving(run, recipe, model.config)

    def size(plan: Plan) -> int:
        if request.weights_only:
            return plan.file_bytes
        return int(fit(model, plan, **serve)["total_bytes"])

    budget = serve["budget"]
    return Problem(model, sites, fmt, run.method, run.options, menu, size, budget), notes


def _require_room(request: AllocateRequest, problem: Problem, serve: Mapping[str, Any]) -> None:
    """Refuse a budget that even the smallest entries do not fit in.

    Raises:
        InputError: by how much it is too small, and what would fit.
    """
    plan = problem.plan(smallest(problem))
    needed = problem.size(plan)
    if needed <= problem.budget:
        return
    least = sorted({entry_name(entry) for entry in smallest(problem).values()})
    what = "files of weights" if request.weights_only else f"{serve['context']:,} tokens of {serve['kv']} KV cache"
    with_what = f"as {what}" if request.weights_only else f"with {what} and the engine's workspace"
    would = list(_would_fit(request, problem, plan, serve))
    raise InputError(
        f"--budget {format_bytes(problem.budget)}: the smallest of the menu ({', '.join(least)}) takes "
        f"{format_bytes(needed)} {with_what}, {format_bytes(needed - problem.budget)} too much; "
        + (f"what would fit: {'; '.join(would)}" if would else f"a budget of {format_bytes(needed)} would fit")
    )


def _would_fit(request: AllocateRequest, problem: Problem, plan: Plan, serve: Mapping[str, Any]) -> list[str]:
    would = []
    if not request.weights_only:
        longest = fit(problem.model, plan, **serve)["longest_context"]
        if longest > 0:
            would.append(f"--context {longest}")
        if serve["kv"] != "fp8":
            eight = fit(problem.model, plan, **(dict(serve) | {"kv": "fp8"}))
            if eight["fits"]:
                would.append("--kv fp8")
            elif longest == 0 and eight["longest_context"] > 0:
                would.append(f"--kv fp8 --context {eight['longest_context']}")
    symmetric = True if request.run.symmetric is None else request.run.symmetric
    for bits, group in ((3, 128), (3, 256), (2, 128), (2, -1)):
        entry = Scheme(bits, group, symmetric)
        try:
            size = problem.size(problem.plan(dict.fromkeys(problem.parts, entry)))
        except SchemeError:
            continue
        if size <= problem.budget:
            would.append(f"--menu {entry_name(entry)},... ({format_bytes(size)})")
            break
    return would


def split(tokens: TokenSet, probes: int) -> tuple[TokenSet, TokenSet]:
    """(the windows that calibrate, the last `probes` windows, which measure).

    Raises:
        InputError: no window would be left to calibrate with.
    """
    if not 0 < probes < tokens.samples:
        raise InputError(
            f"--probe-samples {probes}: expected 1 to {tokens.samples - 1}, as there are {tokens.samples} windows of "
            "calibration in all"
        )
    at = tokens.samples - probes
    return replace(tokens, input_ids=tokens.input_ids[:at]), replace(tokens, input_ids=tokens.input_ids[at:])


def _probed(problem: Problem, index: int, every: int) -> bool:
    return index % every == 0 or index == len(problem.model.layers) - 1


def _average_bits(problem: Problem) -> float:
    """Bits per weight that the budget leaves to the parts."""
    choice = smallest(problem)
    room = problem.budget - problem.size(problem.plan(choice))
    bytes_now = sum(problem.cost(part, entry) for part, entry in choice.items())
    return 16 * (bytes_now + room) / sum(problem.cost(part, None) for part in choice)


def _measure(
    request: AllocateRequest,
    problem: Problem,
    calibration: TokenSet,
    probe: TokenSet,
    menu: Mapping[Part, Sequence[Entry]],
    base: Mapping[Part, Entry],
    swaps: Sequence[Swap],
    options: Options,
    console: Console,
    elsewhere: Tensor | None = None,
) -> Measured:
    run = request.run
    entries = {entry for row in problem.menu.values() for entry in row if entry is not None}
    folder = (request.out or Path()).parent
    folder.mkdir(parents=True, exist_ok=True)
    settings = Settings(run.method, options, run.device, folder, max(map(problem.fmt.min_zero, entries)))
    what = "the allocation" if base else "the menu"
    roundings = sum(map(len, menu.values())) or len(base)
    console.print(
        f"measuring {what}: one pass over {len(problem.model.layers)} layers with {calibration.samples} x "
        f"{calibration.seqlen} tokens, {roundings} roundings, {len(swaps)} swaps on {probe.samples} other windows",
        highlight=False,
        soft_wrap=True,
    )
    with display(console, run.device) as progress:
        return measure(problem.model, calibration, probe, menu, base, swaps, settings, progress, elsewhere)


# ---------------------------------------------------------------- what is written


def _identity(request: AllocateRequest, problem: Problem, tokens: TokenSet) -> dict[str, Any]:
    menu = {f"{layer}.{site}": [entry_name(e) for e in entries] for (layer, site), entries in problem.menu.items()}
    return {
        "model": fingerprint(problem.model.checkpoint),
        "calibration": tokens.sha256,
        "probe_samples": request.probe_samples,
        "every": request.every,
        "method": problem.method,
        "options": vars(problem.options),
        "format": problem.fmt.name,
        "menu": hashlib.sha256(json.dumps(menu, sort_keys=True).encode()).hexdigest(),
        "symmetric": request.run.symmetric is not False,
    }


def _table_document(identity: Mapping[str, Any], problem: Problem, measured: Measured) -> dict[str, Any]:
    def key(part: Part) -> str:
        return f"{part[0]}.{part[1]}"

    return {
        "identity": dict(identity),
        "sites": [list(site.linears) for site in problem.sites],
        "losses": {key(p): {entry_name(e): x for e, x in row.items()} for p, row in measured.losses.items()},
        "swapped": {f"{key(p)} {entry_name(e)}": x for (p, e), x in measured.swapped.items()},
        "tokens": measured.tokens,
    }


def _stored(path: Path | None, identity: Mapping[str, Any], problem: Problem) -> Measured | None:
    """Measurements kept by an earlier call; None when there are none.

    Raises:
        InputError: the file is of another model, calibration or menu.
    """
    if path is None or not path.exists():
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["identity"] != json.loads(json.dumps(identity)):
            raise InputError(f"--table {path}: of another model, calibration, menu or method; choose another file")
        named = {entry_name(entry): entry for row in problem.menu.values() for entry in row} | {"16bit": None}

        def part(text: str) -> Part:
            layer, _, site = text.partition(".")
            return int(layer), int(site)

        losses = {part(p): {named[e]: float(x) for e, x in row.items()} for p, row in raw["losses"].items()}
        swapped = {(part(p), named[e]): float(x) for (p, _, e), x in _pairs(raw["swapped"])}
        return Measured(losses, 0.0, swapped, int(raw["tokens"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"--table {path}: damaged ({type(error).__name__}); delete it, or choose another file"
        ) from error


def _pairs(swapped: Mapping[str, float]) -> list[tuple[tuple[str, str, str], float]]:
    return [(key.partition(" "), value) for key, value in swapped.items()]


def _document(
    problem: Problem,
    choice: Choice,
    table: Table,
    plan: Plan,
    predicted: float,
    ratio: float,
    serve: Mapping[str, Any],
) -> dict[str, Any]:
    """What is told of an allocation; ratio: of the evaluation text's KL to the probing windows'."""
    uniform = []
    for entry in dict.fromkeys(entry for row in problem.menu.values() for entry in row):
        if all(entry in row for row in problem.menu.values()) and entry is not None:
            alike = problem.plan(dict.fromkeys(problem.parts, entry))
            kl = sum(table[part][entry] for part in problem.parts)
            uniform.append({"entry": entry_name(entry), "total_bytes": alike.file_bytes, "predicted_kl": kl * ratio})
    memory = fit(problem.model, plan, **serve)
    return {
        "predicted_kl": predicted * ratio,
        "total_bytes": plan.file_bytes,
        "bits_per_weight": plan.bits_per_weight,
        "budget_bytes": problem.budget,
        "counted_bytes": problem.size(plan),
        "longest_context": memory["longest_context"],
        "engines": memory["engines"],
        "uniform": uniform,
        "parts": [
            {
                "layer": layer,
                "linears": list(problem.sites[number].linears),
                "entry": entry_name(entry),
                "predicted_kl": table[layer, number][entry],
                "bytes": problem.cost((layer, number), entry),
            }
            for (layer, number), entry in choice.items()
        ],
    }


def recipe_text(
    request: AllocateRequest,
    problem: Problem,
    choice: Choice,
    table: Table,
    document: Mapping[str, Any],
    tokens: TokenSet,
    serve: Mapping[str, Any],
) -> str:
    """The recipe file, with the reasons as comments. Its default is the most common scheme."""
    run = request.run
    schemes = [entry for entry in choice.values() if entry is not None]
    default = max(dict.fromkeys(schemes), key=schemes.count)
    counted = (
        "files of weights" if request.weights_only else f"{serve['context']} tokens of {serve['kv']} cache counted"
    )
    lines = [
        f"# {document['total_bytes']:,} bytes of weights, {document['bits_per_weight']:.3f} bits per weight; budget "
        f"{problem.budget:,} bytes ({counted})",
        f"# expected KL {document['predicted_kl']:.5f} nats"
        + (f"; the first choice was checked: {document['checked_kl']:.5f} on" if "checked_kl" in document else "")
        + (" windows kept from calibration" if "checked_kl" in document else ""),
        *(
            f"# uniform {u['entry']}: {u['total_bytes']:,} bytes, expected KL {u['predicted_kl']:.5f}"
            for u in document["uniform"]
        ),
        f"# to run: quantkit {run.method} {run.model} --recipe THIS --format {problem.fmt.name}",
        f"default: {{bits: {default.bits}, group_size: {default.group_size}, "
        f"symmetric: {'true' if default.symmetric else 'false'}}}",
        *_calibration_lines(run, tokens),
    ]
    if not request.weights_only:
        lines.append(f"budget: {{memory: {problem.budget}B, context: {serve['context']}, kv: {serve['kv']}}}")
    lines.append(
        "rules: # the KL that each layer's part adds on those windows, and what the next smaller entry would add"
    )
    groups: dict[tuple[int, Entry], list[int]] = {}
    for (layer, number), entry in choice.items():
        if entry != default:
            groups.setdefault((number, entry), []).append(layer)
    for (number, entry), layers in sorted(groups.items(), key=lambda item: (item[0][0], item[1])):
        names = "|".join(re.escape(name) for name in problem.sites[number].linears).replace("\\", "\\\\")
        what = (
            "keep: 16bit"
            if entry is None
            else f"bits: {entry.bits}, group_size: {entry.group_size}, symmetric: {str(entry.symmetric).lower()}"
        )
        lines += [
            "  # " + "; ".join(_reason(problem, table, (layer, number), entry) for layer in layers),
            f'  - {{match: "re:.*[.]({names})", layers: "{number_ranges(layers)}", {what}}}',
        ]
    if not groups:
        lines[-1] = "rules: []"
    return "\n".join(lines) + "\n"


def _reason(problem: Problem, table: Table, part: Part, entry: Entry) -> str:
    smaller = [e for e in problem.menu[part] if problem.cost(part, e) < problem.cost(part, entry)]
    text = f"layer {part[0]}: {table[part][entry]:.2g}"
    if not smaller:
        return text
    below = max(smaller, key=lambda e: problem.cost(part, e))
    return f"{text} ({entry_name(below)} {table[part][below]:.2g})"


def _calibration_lines(run: Request, tokens: TokenSet) -> list[str]:
    source = json.dumps(str(run.calib), ensure_ascii=False) if run.calib else None
    if source is None:
        return [f"calibration: {{samples: {tokens.samples}, seqlen: {tokens.seqlen}}}"]
    return [f"calibration: {{source: {source}, samples: {tokens.samples}, seqlen: {tokens.seqlen}}}"]


# ---------------------------------------------------------------- running it


def _run_and_repair(
    request: AllocateRequest,
    problem: Problem,
    table: Table,
    choice: Choice,
    out: Path,
    again: Callable[[Table, Choice], Table],
    write: Callable[[Table, Choice], None],
    console: Console,
) -> dict[str, Any]:
    """Quantize with the recipe; while the verdict fails, measure where the allocation stands and solve again.

    Layers before the first that changes are taken from the run before.
    """
    run = replace(
        request.run,
        recipe=out,
        format=problem.fmt.name,
        amend=True,
        budget=None if request.weights_only else request.run.budget,  # of files, not of the card they are for
        out=request.run.out or Path("outputs") / f"{Path(request.run.model).name}-{out.stem}",
    )
    repairs: list[dict[str, Any]] = []
    while True:
        result, folder = quantize(run, console)
        found = result["verification"]
        if found is None or found["verdict"] == "pass" or len(repairs) == MAX_REPAIRS:
            break
        table = again(table, choice)
        better = choose(problem, table) or choice
        changed = sum(choice[part] != entry for part, entry in better.items())
        if changed == 0:
            break
        repairs.append({"reasons": found["reasons"], "kl_divergence": found["kl_divergence"], "changed": changed})
        console.print(f"the verdict is FAIL; {changed} parts changed", highlight=False)
        choice = better
        write(table, choice)
    return {"out": str(folder), "repairs": repairs, "verification": found, "total_bytes": result["total_bytes"]}
