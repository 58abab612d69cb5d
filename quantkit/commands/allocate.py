# SPDX-License-Identifier: Apache-2.0
"""The allocate command: measure, solve, check, write the recipe; and with `--run`, quantize with it and repair."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from quantkit.allocation import table_file
from quantkit.allocation.menu import Part
from quantkit.allocation.problem import Budget, Choice, Problem, pose, require_room
from quantkit.allocation.recipe_file import MADE_BY, document_of, recipe_text
from quantkit.allocation.sensitivity import Measured, measure_choice, measure_menu
from quantkit.allocation.table import Table, choose, corrected, is_probed, probe_entries, scaled, table_of, total
from quantkit.calibration.tokens import TokenSet, notes_of
from quantkit.checkpoint.journal import require_folder
from quantkit.checkpoint.scan import require_finite_weights
from quantkit.checkpoint.writer import require_writable, write_text
from quantkit.commands.quantize import quantize
from quantkit.errors import InputError
from quantkit.methods.table import METHODS, Options
from quantkit.model.opening import open_planned
from quantkit.model.shapes import Shapes
from quantkit.model.sites import sites_of
from quantkit.model.streaming import StreamedModel
from quantkit.pipeline.job import Job
from quantkit.pipeline.layer import require_no_experts
from quantkit.pipeline.memory import Allowance, keep, laid_out, lay_out_job
from quantkit.pipeline.runtime import Runtime
from quantkit.quantized import parameters, shapes_in
from quantkit.recipe import Recipe
from quantkit.records import Result, Verification
from quantkit.report.terminal.screen import Terminal
from quantkit.results.folder import require_another
from quantkit.settings.defaults import choose_recipe, find_source
from quantkit.settings.request import Request, limits_of, serving
from quantkit.settings.tokens import tokens_of
from quantkit.units import format_bytes

PROBE_SAMPLES = 16
MAX_REPAIRS = 2


@dataclass(frozen=True)
class AllocateRequest:
    """What the user asked for beside what a run is asked for.

    run: the request of the quantizing run, its `budget`, `context` and `kv` included; weights_only: the budget counts
    the files of weights alone; also: parts outside the layers to choose for, too ("lm_head"); engine: whose kernels
    must run every entry (None: vllm; "any": the format must hold it, no more); every: probe each n-th layer and
    interpolate; check: measure the result and correct the table; table: where measurements are kept for other budgets
    """

    run: Request
    weights_only: bool = False
    also: Sequence[str] = ()
    menu: str | None = None
    engine: str | None = None
    probe_samples: int | None = None
    every: int = 1
    check: bool = True
    quantize: bool = False
    out: Path | None = None
    table: Path | None = None

    @property
    def recipe(self) -> Path:
        """The file to write."""
        return self.out or Path(f"{Path(self.run.model).name}-allocated.yaml")

    @property
    def run_folder(self) -> Path:
        """The folder of the run at the end."""
        return self.run.out or Path("outputs") / f"{Path(self.run.model).name}-{self.recipe.stem}"


@dataclass(frozen=True)
class Work:
    """What every pass of one command needs."""

    request: AllocateRequest
    model: StreamedModel
    problem: Problem
    calibration: TokenSet
    probe: TokenSet
    elsewhere: Tensor | None
    terminal: Terminal


def allocate(request: AllocateRequest, terminal: Terminal) -> dict[str, Any]:
    """Measure, solve, check, write the recipe, and with `quantize` run it; returns what there is to report.

    Raises:
        InputError: a budget that nothing of the menu fits in, with by how much and what would; a menu that cannot be.
    """
    run = request.run
    if not METHODS[run.method].calibrates:
        raise InputError("--method: expected gptq or awq; rtn needs no calibration and is not measured")
    recipe = choose_recipe(None, run.model)
    _require_place(request.recipe)
    if request.table is not None:
        require_writable(request.table, "--table")
    limits_of(run, recipe)  # what they cannot be is told before anything is measured
    _refuse_early(request, recipe)
    source = find_source(run.model, offline=run.offline)
    model, budget = open_planned(source, lambda model: budget_of(request, recipe, model))
    sites = sites_of(model)
    require_no_experts(sites, "allocate")
    problem, notes = pose(run, recipe, budget, model, sites)
    require_room(problem)
    calibrated, evaluated = tokens_of(run, recipe, model, model.directory, {run.method})
    assert calibrated is not None
    calibration, probe = split(calibrated, request.probe_samples or min(PROBE_SAMPLES, max(1, calibrated.samples // 4)))
    elsewhere = None
    if evaluated is not None and evaluated.seqlen == probe.seqlen:
        elsewhere = evaluated.input_ids[: probe.samples]
    fallbacks = notes_of(calibrated, evaluated)
    for line in (*notes, *(f"note: {note}" for note in fallbacks)):
        terminal.say(line)
    work = Work(request, model, problem, calibration, probe, elsewhere, terminal)
    if request.quantize:
        _require_run_folder(work, calibrated)

    require_finite_weights(model.checkpoint, parameters(model))
    table = table_of(problem, sensitivities(work, calibrated))
    choice = choose(problem, table)
    if choice is None:
        raise InputError(f"--budget: nothing of the menu fits in {format_bytes(budget.nbytes)}")
    figures: dict[str, Any] = {
        "predicted_by_sum": total(table, choice),
        "text_ratio": 1.0,
        "fallbacks": fallbacks,
    }
    if request.check:
        choice, table, checked = mend(work, table, choice)
        figures |= checked

    def write(table: Table, choice: Choice) -> dict[str, Any]:
        document = figures | document_of(problem, choice, table, figures["text_ratio"])
        write_text(request.recipe, recipe_text(problem, choice, table, document, run, calibrated))
        return document | {"recipe": str(request.recipe)}

    document = write(table, choice)
    return _run_and_repair(work, table, choice, document, write) if request.quantize else document


def _require_place(path: Path) -> None:
    """The recipe goes to a .yaml file that is not there yet, or that this command has written.

    Raises:
        InputError: it would take the place of something else.
    """
    if path.suffix not in (".yaml", ".yml"):
        raise InputError(f"--out {path}: expected a name that ends in .yaml; --run-out is the folder of --run")
    require_writable(path, "--out")
    if path.exists() and not (path.is_file() and MADE_BY in path.read_text(encoding="utf-8", errors="replace")):
        raise InputError(f"--out {path}: is there, and not a recipe of this command; choose another name")


def _require_run_folder(work: Work, calibrated: TokenSet) -> None:
    """The run at the end can begin, or continue, in its folder.

    Raises:
        OutputError: it cannot.
    """
    run, folder = work.request.run, work.request.run_folder
    require_another(folder, work.model.directory)
    plan = work.problem.plan(work.problem.smallest())
    job = Job(Runtime(work.model, run.device, folder), plan, run.method, run.options, calibrated, amend=True)
    require_folder(folder, None if run.fresh else job.identity())


def _refuse_early(request: AllocateRequest, recipe: Recipe) -> None:
    """Before a model is looked for, or downloaded: what its recipe says of its sizes tells whether anything fits."""
    if recipe.config is None:
        return
    shapes = shapes_in(recipe.config)
    if sites := shapes.known_sites():
        require_room(pose(request.run, recipe, budget_of(request, recipe, shapes), shapes, sites)[0])


def budget_of(request: AllocateRequest, recipe: Recipe, model: Shapes) -> Budget:
    """The budget of a request for this model."""
    serve = serving(request.run, recipe, model)
    return Budget(request.weights_only, request.menu, request.engine, request.also, serve)


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


# ---------------------------------------------------------------- the passes


def sensitivities(work: Work, calibrated: TokenSet) -> Measured:
    """The first pass, or what an earlier one has left in the table's file."""
    request, problem = work.request, work.problem
    who = table_file.identity(problem, work.model, calibrated, work.probe.samples, request.every, request.run.device)
    measured = None if request.table is None else table_file.read_table(request.table, who, problem)
    if measured is None:
        swaps = probe_entries(problem, request.every)
        job = _job(work, problem.smallest(), replace(request.run.options, refine=0, correct=0.0), len(swaps))
        _announce(work, f"the menu, {sum(map(len, problem.menu.values()))} roundings", len(swaps))
        with work.terminal.progress(request.run.device) as progress:
            measured = measure_menu(job, work.probe, problem.menu, swaps, progress)
        if request.table is not None:
            table_file.write_table(request.table, who, problem, measured)
    return measured


def mend(work: Work, table: Table, choice: Choice) -> tuple[Choice, Table, dict[str, Any]]:
    """Check a choice as a whole, solve again by what that says, and keep what is truly better on the probing windows.

    Returns the choice, the table at it, and what is told of it. The falls that correct the table are of parts put back
    beside others that were rounded to make up for them, so a second choice is believed only when it was measured.
    """
    first = check(work, choice, probed(work, choice))
    predicted = total(table, choice)
    table = corrected(table, first, choice)
    other = choose(work.problem, table) or choice
    second = first if other == choice else check(work, other, [])
    better, measured = (other, second) if second.kl < first.kl else (choice, first)
    return (
        better,
        scaled(table, better, measured.kl),
        {
            "checked_kl": measured.kl,
            "additivity": first.kl / predicted if predicted > 0 else None,
            "text_ratio": measured.kl_elsewhere / measured.kl
            if measured.kl_elsewhere is not None and measured.kl > 0
            else 1.0,
            "other_kl": second.kl if better is choice else first.kl,
            "mended": sum(choice[part] != entry for part, entry in better.items()),
        },
    )


def probed(work: Work, choice: Choice) -> list[Part]:
    """The parts to put back when a choice is checked."""
    return [part for part in choice if is_probed(work.problem, part, work.request.every)]


def check(work: Work, choice: Choice, parts: Sequence[Part]) -> Measured:
    """The true KL of what a run would leave of an allocation, and of the same with each of some parts back in 16 bit.

    Windows of the evaluation text run through it as well, to tell the KL that is to be expected there; they decide
    nothing.
    """
    job = _job(work, choice, work.request.run.options, len(parts))
    _announce(work, "the allocation", len(parts))
    with work.terminal.progress(work.request.run.device) as progress:
        return measure_choice(job, work.probe, work.elsewhere, parts, progress)


def _announce(work: Work, what: str, swaps: int) -> None:
    calibration = work.calibration
    work.terminal.say(
        f"measuring {what}: one pass over {len(work.model.layers)} layers with {calibration.samples} x "
        f"{calibration.seqlen} tokens, and {swaps} swaps on {work.probe.samples} other windows",
    )


def _job(work: Work, choice: Choice, options: Options, swaps: int) -> Job:
    """A run of a choice, on the windows that calibrate, with the hidden states of all swaps laid out in memory."""
    run, probe, calibration = work.request.run, work.probe, work.calibration
    runtime = Runtime(work.model, run.device, work.request.recipe.parent)
    job = Job(runtime, work.problem.plan(choice), run.method, options, calibration)
    streams = 2 + swaps + (0 if work.elsewhere is None else 2)
    probes = [(probe.samples, probe.seqlen)] * streams
    layout = lay_out_job(job, probes, Allowance(run.vram, run.ram, run.place), keeps=False)
    work.terminal.say(f"memory: {layout}")
    keep(layout, run.device)
    return laid_out(job, layout)


# ---------------------------------------------------------------- running it


State = tuple[Table, Choice]


def _run_and_repair(
    work: Work,
    table: Table,
    choice: Choice,
    document: dict[str, Any],
    write: Callable[[Table, Choice], dict[str, Any]],
) -> dict[str, Any]:
    """Quantize with the recipe; while the verdict fails, measure where the allocation stands and solve again.

    Layers before the first that changes are taken from the run before. A repair is believed only when it was measured.
    """
    request = work.request
    run = replace(
        request.run,
        recipe=request.recipe,
        format=work.problem.fmt.name,
        amend=True,
        budget=None if request.weights_only else request.run.budget,  # of files, not of the card they are for
        out=request.run_folder,
    )
    runs: list[tuple[dict[str, Any], Result, Path]] = []  # the recipe's document, the run's result and folder

    def attempt(state: State) -> Verification | None:
        written = write(*state) if runs else document
        result, folder = quantize(replace(run, fresh=run.fresh and not runs), work.terminal)
        runs.append((written, result, folder))
        return result.verification

    def improve(state: State) -> State | None:
        stands = check(work, state[1], probed(work, state[1]))
        table = corrected(state[0], stands, state[1])
        better = choose(work.problem, table) or state[1]
        return None if better == state[1] or check(work, better, []).kl >= stands.kl else (table, better)

    def tell(line: str) -> None:
        work.terminal.say(line)

    tried = attempts((table, choice), attempt, improve, tell)
    repairs = [
        {
            "reasons": verification.reasons,
            "kl_divergence": verification.kl_divergence,
            "changed": _changed(before, after),
        }
        for (before, verification), (after, _) in pairwise(tried)
        if verification is not None
    ]
    document, result, folder = runs[-1]
    last = tried[-1][1]
    measured = last.content() if last else None
    ran = {"out": str(folder), "repairs": repairs, "verification": measured, "total_bytes": result.total_bytes}
    return document | {"run": ran}


def attempts(
    first: State,
    attempt: Callable[[State], Verification | None],
    improve: Callable[[State], State | None],
    tell: Callable[[str], None],
) -> list[tuple[State, Verification | None]]:
    """The allocations that were run, each with its verification; the last is what is there: it passes, or is the best.

    attempt: runs one, and returns the verification, if there is one; improve: one that is better, or None
    """
    tried: list[tuple[State, Verification | None]] = []
    state: State | None = first
    while state is not None:
        verification = attempt(state)
        tried.append((state, verification))
        if verification is None or verification.verdict == "pass":
            return tried
        tell(f"the verdict is FAIL, at a KL of {_kl(tried[-1]):.5f}")
        state = improve(state) if len(tried) <= MAX_REPAIRS else None
        if state is not None:
            tell(f"{_changed(tried[-1][0], state)} parts change")
        elif len(tried) <= MAX_REPAIRS:
            tell("no other allocation within these bytes measures better")
    best = min(tried, key=_kl)
    if _kl(best) < _kl(tried[-1]):
        tell(f"an earlier allocation was better, at a KL of {_kl(best):.5f}: back to it")
        tried.append((best[0], attempt(best[0])))
    return tried


def _kl(attempt: tuple[State, Verification | None]) -> float:
    """Infinite where it was not finite."""
    measured = attempt[1]
    return math.inf if measured is None or measured.kl_divergence is None else measured.kl_divergence


def _changed(before: State, after: State) -> int:
    return sum(before[1][part] != entry for part, entry in after[1].items())
