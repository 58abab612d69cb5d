# SPDX-License-Identifier: Apache-2.0
"""Bits under a budget: the solver against trying everything, swaps against whole models, and bytes against files."""

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from quantkit.allocation.knapsack import solve
from quantkit.allocation.menu import HEAD, entry_name, parse_menu
from quantkit.allocation.problem import Problem, pose
from quantkit.allocation.sensitivity import Measured, Swap, measure_choice, measure_menu
from quantkit.allocation.table import choose, corrected, table_of
from quantkit.calibration.load import load
from quantkit.calibration.tokens import TokenSet
from quantkit.checkpoint.journal import Unit, open_journal
from quantkit.commands import allocate as allocating
from quantkit.commands.allocate import AllocateRequest, allocate, attempts, budget_of, split
from quantkit.commands.quantize import quantize
from quantkit.errors import InputError, QuantkitError
from quantkit.methods.table import Options
from quantkit.model.sites import sites_of
from quantkit.model.streaming import open_model
from quantkit.pipeline import memory
from quantkit.pipeline import run as pipeline
from quantkit.pipeline.job import Job
from quantkit.pipeline.runtime import Runtime, Silent
from quantkit.recipe import Recipe, read_recipe, resolver
from quantkit.records import Verification
from quantkit.report.terminal.screen import Terminal
from quantkit.scheme import Scheme
from quantkit.settings.request import Request
from tests.conftest import make_qwen2
from tests.result_document import example

QUIET = Terminal(quiet=True)
CPU = torch.device("cpu")
MENU = "W3g32,W4g32,W8g32,16bit"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen2(tmp_path_factory.mktemp("allocated"), layers=3, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "ids.safetensors"
    save_file({"input_ids": torch.randint(0, 96, (16, 32), generator=torch.Generator().manual_seed(1))}, path)
    return path


def asked(model: Path, tokens: Path, out: Path, budget: int, **changes: Any) -> AllocateRequest:
    run = Request(
        method="gptq",
        model=str(model),
        command="quantkit allocate",
        calib=str(tokens),
        samples=16,
        seqlen=32,
        evaluation=str(tokens),
        budget=budget,
        out=out / "run",
        offline=True,
        max_ppl_increase=9.0,
    )
    fixed: dict[str, Any] = {
        "weights_only": True,
        "menu": MENU,
        "probe_samples": 4,
        "out": out / "recipe.yaml",
    }
    own = AllocateRequest.__dataclass_fields__
    run = replace(run, **{key: value for key, value in changes.items() if key not in own})
    return AllocateRequest(run, **(fixed | {key: value for key, value in changes.items() if key in own}))


def posed(request: AllocateRequest) -> tuple[Problem, list[str]]:
    model = open_model(Path(request.run.model))
    return pose(request.run, Recipe(), budget_of(request, Recipe(), model), model, sites_of(model))


def load_tokens(path: Path) -> TokenSet:
    return load(str(path), pytest.fail, samples=16, seqlen=32, seed=0, vocab_size=96, offline=True)


def uniform_bytes(model: Path, scheme: Scheme, tokens: Path, out: Path) -> int:
    problem, _ = posed(asked(model, tokens, out, 1))
    return problem.size(problem.plan(dict.fromkeys(problem.parts, scheme)))


# ---------------------------------------------------------------- the solver

ROWS = st.lists(
    st.lists(st.tuples(st.floats(0, 10), st.integers(0, 60)), min_size=1, max_size=4), min_size=1, max_size=5
)


@given(rows=ROWS, unit=st.sampled_from([1, 3, 4096]), budget=st.integers(0, 300))
def test_no_other_choice_within_the_budget_is_better(
    rows: list[list[tuple[float, int]]], unit: int, budget: int
) -> None:
    values = [[value for value, _ in row] for row in rows]
    costs = [[cost * unit for _, cost in row] for row in rows]
    everything = itertools.product(*(range(len(row)) for row in rows))
    possible = [
        sum(value[i] for value, i in zip(values, chosen, strict=True))
        for chosen in everything
        if sum(cost[i] for cost, i in zip(costs, chosen, strict=True)) <= budget * unit
    ]
    found = solve(values, costs, budget * unit)
    if not possible:
        assert found is None
    else:
        assert found is not None
        assert sum(cost[i] for cost, i in zip(costs, found, strict=True)) <= budget * unit
        assert sum(value[i] for value, i in zip(values, found, strict=True)) <= min(possible) + 1e-8


def test_the_solver_keeps_stdout_clean(capfd: pytest.CaptureFixture[str]) -> None:
    """One of these makes the HiGHS of scipy 1.17.1 print, and `--json` promises one document and nothing else."""
    bits = (2.1, 3, 3.06, 3.125, 3.25, 4, 4.06, 4.125, 4.25, 4.5, 5.125, 6.125, 8.125)
    for seed in range(40):
        draw = random.Random(seed)
        losses = [10 ** draw.uniform(-3, -1) for _ in range(24)]
        sizes = [draw.choice([64, 512, 768, 393, 1536]) for _ in range(24)]
        values = [[loss * 4 ** -(b - 2) * draw.uniform(0.9, 1.1) for b in bits] for loss in losses]
        costs = [[int(size * b * 8) * 4 for b in bits] for size in sizes]
        assert solve(values, costs, int(sum(size * 4.125 * 8 * 4 for size in sizes))) is not None
    assert capfd.readouterr().out == ""


# ---------------------------------------------------------------- the menu


def test_menu() -> None:
    assert parse_menu("W3g128, w4rows,16bit,W3g128", True) == (Scheme(3, 128, True), Scheme(4, -1, True), None)
    assert [entry_name(entry) for entry in parse_menu("W3g128,W4rows,16bit", False)] == ["W3g128", "W4rows", "16bit"]


@pytest.mark.parametrize("text", ["W9g128", "4g128", "W4", "W4g0", "W4-128", "", "16"])
def test_menu_refuses(text: str) -> None:
    with pytest.raises((InputError, Exception), match=r"menu|group_size"):
        parse_menu(text, True)


def test_engine_drops_what_it_has_no_kernel_for(model: Path, tokens: Path, tmp_path: Path) -> None:
    request = asked(model, tokens, tmp_path, 10**9, engine="sglang")
    problem, notes = posed(request)
    assert set(problem.menu[0, 0]) == {Scheme(4, 32, True), Scheme(8, 32, True), None}
    assert any("W3g32 left out" in note and "SGLang" in note for note in notes)


# ---------------------------------------------------------------- measuring


def test_a_swap_is_the_model_with_that_part_rounded(model: Path, tokens: Path, tmp_path: Path) -> None:
    """The swapped streams against whole models of transformers, for a part in the middle and one at the end."""
    streamed = open_model(model)
    request = asked(model, tokens, tmp_path, 10**9)
    problem, _ = posed(request)
    ids = load_file(tokens)["input_ids"]
    calibration, probe = split(load_tokens(tokens), 4)
    swaps = [((1, 3), Scheme(3, 32, True)), ((2, 0), Scheme(4, 32, True))]
    plan = problem.plan(problem.smallest())
    job = Job(Runtime(streamed, CPU, tmp_path), plan, "gptq", Options(refine=0, correct=0.0), calibration)
    found = measure_menu(job, probe, problem.menu, swaps, Silent())
    assert found.kl == 0
    assert set(found.losses[1, 3]) == {None, *problem.menu[1, 3]}
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for part, scheme in swaps:
        whole = rounded_whole(model, streamed, problem, part, scheme, calibration.input_ids)
        with torch.no_grad():
            p, q = (m(ids[12:]).logits[:, :-1].double().log_softmax(-1) for m in (reference, whole))
        assert found.swapped[part, scheme] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)


def rounded_whole(
    model: Path, streamed: Any, problem: Any, part: tuple[int, int], scheme: Scheme, ids: torch.Tensor
) -> torch.nn.Module:
    """The model with one part rounded by GPTQ on its own inputs, everything in memory at once."""
    from quantkit.grids.registry import dequantize
    from quantkit.methods.site import QUANTIZE, SiteInput
    from quantkit.stats import add_inputs, empty_stats, shrink_

    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    layer = whole.get_submodule(streamed.layer_name(part[0]))
    linears = {linear.local: layer.get_submodule(linear.local) for linear in problem.parts[part]}
    first = next(iter(linears.values()))
    stats = empty_stats(first.get_parameter("weight").shape[1], CPU)
    handle = first.register_forward_pre_hook(lambda module, args: add_inputs(stats, args[0]))
    with torch.no_grad():
        whole(ids)
        handle.remove()
        weights = {name: linear.get_parameter("weight").data for name, linear in linears.items()}
        site = SiteInput(weights, dict.fromkeys(weights, scheme), shrink_(stats), None)
        for name, quantized in QUANTIZE["gptq"](site, Options(refine=0)).quantized.items():
            linears[name].weight.data = dequantize(quantized)
    return whole


def test_layers_between_probed_ones_are_interpolated(model: Path, tokens: Path, tmp_path: Path) -> None:
    problem, _ = posed(asked(model, tokens, tmp_path, 10**9))
    w4 = Scheme(4, 32, True)
    losses: dict[Any, Any] = {
        part: {entry: 0.5 for entry in row if entry} | {None: 0.0} for part, row in problem.menu.items()
    }
    swapped: dict[Swap, float] = {((layer, site), w4): kl for layer, kl in ((0, 0.01), (2, 0.04)) for site in range(4)}
    table = table_of(problem, Measured(losses, 0.0, swapped))
    assert [table[layer, 1][w4] for layer in range(3)] == pytest.approx([0.01, 0.02, 0.04])
    assert table[1, 1][None] == 0


def test_the_corrected_table_sums_to_what_was_measured(model: Path, tokens: Path, tmp_path: Path) -> None:
    problem, _ = posed(asked(model, tokens, tmp_path, 10**9))
    w3, w4 = Scheme(3, 32, True), Scheme(4, 32, True)
    table = {part: {w3: 0.04, w4: 0.01, Scheme(8, 32, True): 0.0001, None: 0.0} for part in problem.parts}
    choice = dict.fromkeys(problem.parts, w4)
    swapped: dict[Swap, float] = {(part, None): 0.2 - (0.03 if part == (1, 2) else 0.01) for part in problem.parts}
    found = corrected(table, Measured({}, 0.2, swapped), choice)
    assert sum(found[part][w4] for part in problem.parts) == pytest.approx(0.2)
    assert found[1, 2][w4] == pytest.approx(3 * found[0, 0][w4])
    assert found[1, 2][w3] == pytest.approx(4 * found[1, 2][w4])


def test_the_head_says_nothing_of_a_layer(model: Path, tokens: Path, tmp_path: Path) -> None:
    problem, _ = posed(asked(model, tokens, tmp_path, 10**9, also=("lm_head",)))
    w4 = Scheme(4, 32, True)
    table = {part: {w4: 0.01, None: 0.0} for part in problem.parts}
    choice = dict.fromkeys(problem.parts, w4) | {(0, 0): None}  # whose own fall is not known
    swapped: dict[Swap, float] = {(part, None): 0.2 - (0.1 if part == HEAD else 0.01) for part in problem.parts}
    found = corrected(table, Measured({}, 0.2, swapped), choice)
    assert found[0, 0][w4] == pytest.approx(found[1, 0][w4])


# ---------------------------------------------------------------- the command


def test_bytes_recipe_and_files_agree(model: Path, tokens: Path, tmp_path: Path) -> None:
    budget = uniform_bytes(model, Scheme(4, 32, True), tokens, tmp_path) + 2000
    result = allocate(asked(model, tokens, tmp_path, budget, quantize=True, check=True), QUIET)
    out = Path(result["run"]["out"])
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert result["total_bytes"] == result["counted_bytes"] == size <= budget
    assert size > budget - 4000
    recipe = read_recipe(tmp_path / "recipe.yaml")
    written = json.loads((out / "quantkit.json").read_text())
    resolve = resolver(recipe, Scheme(4, 32, True))
    for layer in written["layers"]:
        assert resolve(layer["name"], layer["layer"]) == Scheme(layer["bits"], layer["group_size"], layer["symmetric"])
    chosen = {(part["layer"], name): part["entry"] for part in result["parts"] for name in part["linears"]}
    for layer in written["layers"]:
        local = layer["name"].partition(f"layers.{layer['layer']}.")[2]
        assert chosen[layer["layer"], local] == f"W{layer['bits']}g{layer['group_size']}"
    assert written["engines"]["transformers"] is None
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert torch.isfinite(loaded(load_file(tokens)["input_ids"][:1]).logits).all()


def test_a_table_serves_other_budgets(model: Path, tokens: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    small = uniform_bytes(model, Scheme(4, 32, True), tokens, tmp_path)
    first = allocate(asked(model, tokens, tmp_path, small, table=table, check=False), QUIET)
    before = table.read_bytes()
    again = allocate(asked(model, tokens, tmp_path, small, table=table, check=False), QUIET)
    assert again == first
    larger = allocate(asked(model, tokens, tmp_path, small + 9000, table=table, check=False), QUIET)
    assert larger["predicted_kl"] < first["predicted_kl"]
    assert table.read_bytes() == before
    fewer = allocate(asked(model, tokens, tmp_path, small, table=table, check=False, menu="W3g32,W8g32"), QUIET)
    assert {part["entry"] for part in fewer["parts"]} <= {"W3g32", "W8g32"}
    with pytest.raises(InputError, match="was measured with another probe_samples; choose"):
        allocate(asked(model, tokens, tmp_path, small, table=table, probe_samples=5), QUIET)
    older = json.loads(before)
    table.write_text(json.dumps(older | {"identity": older["identity"] | {"quantkit": "0.0.1", "device": "cuda"}}))
    with pytest.raises(InputError, match="was measured with another device, quantkit; choose"):
        allocate(asked(model, tokens, tmp_path, small, table=table), QUIET)
    table.write_bytes(before)
    with pytest.raises(InputError, match=r"has no W5g32 of model.layers.0"):
        allocate(asked(model, tokens, tmp_path, small, table=table, menu="W3g32,W5g32"), QUIET)
    with pytest.raises(InputError, match=r"has no .* of lm_head"):
        allocate(asked(model, tokens, tmp_path, small, table=table, also=("lm_head",)), QUIET)


def test_a_quarter_of_few_windows_measures(model: Path, tokens: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    size = uniform_bytes(model, Scheme(4, 32, True), tokens, tmp_path)
    request = asked(model, tokens, tmp_path, size, table=table, check=False, probe_samples=None, samples=9)
    allocate(request, QUIET)
    assert json.loads(table.read_text())["identity"]["probe_samples"] == 2  # of 9 windows, the first of the file


def test_more_budget_is_never_worse(model: Path, tokens: Path, tmp_path: Path) -> None:
    problem, _ = posed(asked(model, tokens, tmp_path, 10**9))
    generator = torch.Generator().manual_seed(3)
    table: Any = {
        part: dict(
            zip(row, torch.rand(len(row), generator=generator).sort(descending=True).values.tolist(), strict=True)
        )
        for part, row in problem.menu.items()
    }
    least = problem.size(problem.plan(dict.fromkeys(problem.parts, Scheme(3, 32, True))))
    sums = []
    for budget in range(least, least + 60_000, 6_000):
        serve = dict(problem.budget.serve) | {"budget": budget}
        choice = choose(replace(problem, budget=replace(problem.budget, serve=serve)), table)
        assert choice is not None
        assert problem.size(problem.plan(choice)) <= budget
        sums.append(sum(table[part][entry] for part, entry in choice.items()))
    assert sums == sorted(sums, reverse=True)


def test_infeasible_budgets_say_by_how_much_and_what_would_fit(model: Path, tokens: Path, tmp_path: Path) -> None:
    least = uniform_bytes(model, Scheme(3, 32, True), tokens, tmp_path)
    with pytest.raises(InputError) as refused:
        allocate(asked(model, tokens, tmp_path, least - 5000), QUIET)
    assert "W3g32" in str(refused.value)
    assert "too much" in str(refused.value)
    assert f"{least - 5000} B" in str(refused.value) or "KiB" in str(refused.value)
    memory = asked(model, tokens, tmp_path, 1, weights_only=False, context=128)
    problem, _ = posed(memory)
    needed = problem.size(problem.plan(dict.fromkeys(problem.parts, Scheme(3, 32, True))))
    with pytest.raises(InputError, match=r"what would fit: --context \d+; --kv fp8"):
        allocate(asked(model, tokens, tmp_path, needed - 1000, weights_only=False, context=128), QUIET)


def test_another_recipe_redoes_only_what_follows_its_first_change(model: Path, tokens: Path, tmp_path: Path) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    run = replace(
        asked(model, tokens, tmp_path, 10**9).run, recipe=recipe, format="compressed-tensors", out=out, amend=True
    )
    recipe.write_text("default: {bits: 4, group_size: 32, symmetric: true}\nrules: [{kind: o_proj, bits: 8}]\n")
    quantize(run, QUIET)
    journal = (out / "journal.jsonl").read_text().splitlines()
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    recipe.write_text(recipe.read_text().replace("bits: 8}", "bits: 8}, {kind: down_proj, layers: '1', bits: 8}"))
    with pytest.raises(Exception, match="another recipe"):
        quantize(replace(run, amend=False), QUIET)
    changed = quantize(run, QUIET)[0].content()
    assert (out / "journal.jsonl").read_text().splitlines()[:3] == journal[:3]
    assert kept["model-00002-of-00005.safetensors"] == (out / "model-00002-of-00005.safetensors").stat().st_mtime_ns
    fresh = quantize(replace(run, out=tmp_path / "fresh"), QUIET)[0].content()
    assert {f["name"]: f["sha256"] for f in changed["files"]} == {f["name"]: f["sha256"] for f in fresh["files"]}


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_the_check_is_what_a_run_leaves(tokens: Path, tmp_path: Path, method: str) -> None:
    """KL of an allocation as checked, head and drift included, against the run of its recipe on the same windows."""
    model = make_qwen2(tmp_path / "model", layers=3)  # in bfloat16, which files hold as it is
    request = asked(model, tokens, tmp_path, 10**9, method=method, also=("lm_head",))
    problem, _ = posed(request)
    w3, w4 = Scheme(3, 32, True), Scheme(4, 32, True)
    choice: Any = {part: w3 if part[1] == 2 else w4 for part in problem.parts} | {HEAD: w4}
    streamed = open_model(model)
    given = load_tokens(tokens)
    calibration, probe = split(given, 4)
    runtime = Runtime(streamed, CPU, tmp_path)
    job = Job(runtime, problem.plan(choice), method, Options(drift_samples=5), calibration)
    parts = [(1, 1), (0, 0), (2, 3), HEAD]
    checked = measure_choice(job, probe, given.input_ids[:3], parts, Silent())

    def ran(choice: Any, name: str, windows: torch.Tensor) -> float:
        elsewhere = replace(runtime, folder=tmp_path / name)
        evaluation = replace(probe, input_ids=windows)
        whole = replace(job, plan=problem.plan(choice), runtime=elsewhere, evaluation=evaluation)
        outcome = pipeline.run(whole, Silent())
        assert outcome is not None
        assert outcome.measured is not None
        return float(outcome.measured["kl_divergence"])

    assert checked.kl == pytest.approx(ran(choice, "whole", probe.input_ids), rel=1e-5)
    assert checked.kl_elsewhere == pytest.approx(ran(choice, "elsewhere", given.input_ids[:3]), rel=1e-5)
    back = ran(choice | {HEAD: None}, "back", probe.input_ids)
    assert back < checked.kl
    assert checked.swapped[HEAD, None] == pytest.approx(back, rel=1e-5)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_part_back_in_16_bit_costs_nothing(model: Path, tokens: Path, tmp_path: Path, method: str) -> None:
    """Whatever was folded into what is around it: with only one part quantized, putting it back gives the original."""
    problem, _ = posed(asked(model, tokens, tmp_path, 10**9, method=method, also=("lm_head",)))
    calibration, probe = split(load_tokens(tokens), 4)
    for part in ((0, 0), (1, 1), (1, 2), (2, 3), HEAD):
        choice: Any = dict.fromkeys(problem.parts, None) | {part: Scheme(3, 32, True)}
        job = Job(Runtime(open_model(model), CPU, tmp_path), problem.plan(choice), method, Options(), calibration)
        found = measure_choice(job, probe, None, [part], Silent())
        assert found.swapped[part, None] < 1e-3 * found.kl


def test_the_head_is_a_part_when_asked(model: Path, tokens: Path, tmp_path: Path) -> None:
    budget = uniform_bytes(model, Scheme(4, 32, True), tokens, tmp_path)
    without = allocate(asked(model, tokens, tmp_path, budget), QUIET)
    result = allocate(asked(model, tokens, tmp_path, budget, also=("lm_head",), quantize=True), QUIET)
    assert result["parts"][-1]["linears"] == ["lm_head"]
    assert result["parts"][-1]["entry"] in ("W3g32", "W4g32", "W8g32")  # 16 bit would be a waste
    assert result["predicted_kl"] < without["predicted_kl"]
    written = json.loads((Path(result["run"]["out"]) / "quantkit.json").read_text())
    assert written["layers"][-1]["name"] == "lm_head"
    assert result["total_bytes"] == written["total_bytes"] <= budget
    assert written["engines"]["transformers"] is None


def test_what_lies_outside_is_refused_with_its_reason(model: Path, tokens: Path, tmp_path: Path) -> None:
    for also, told in (("embeddings", "transformers does not load"), ("norms", "expected lm_head")):
        with pytest.raises(InputError, match=told):
            posed(asked(model, tokens, tmp_path, 10**9, also=(also,)))
    tied = make_qwen2(tmp_path / "tied", tie_word_embeddings=True)
    with pytest.raises(InputError, match="tied"):
        posed(asked(tied, tokens, tmp_path, 10**9, also=("lm_head",)))


def test_a_failing_verdict_is_repaired_within_the_budget(model: Path, tokens: Path, tmp_path: Path) -> None:
    """A recipe worse than it must be, as if measured wrongly: repairing raises what hurts, and takes no more bytes."""
    budget = uniform_bytes(model, Scheme(4, 32, True), tokens, tmp_path)
    request = asked(model, tokens, tmp_path, budget, also=("lm_head",), check=False)
    honest = allocate(replace(request, quantize=True), QUIET)["run"]["verification"]["kl_divergence"]
    table = tmp_path / "table.json"
    allocate(replace(request, table=table), QUIET)
    kept = json.loads(table.read_text())
    for part in ("1.2", "2.2"):  # as if gate and up of two layers mattered most, and their down hardly
        kept["swapped"] = {key: x * (100 if key.startswith(f"{part} ") else 1) for key, x in kept["swapped"].items()}
    for part in ("1.3", "2.3"):
        kept["swapped"] = {key: x * (0.01 if key.startswith(f"{part} ") else 1) for key, x in kept["swapped"].items()}
    table.write_text(json.dumps(kept))
    misled = replace(request, table=table, quantize=True, run=replace(request.run, out=tmp_path / "misled"))
    worse = allocate(misled, QUIET)["run"]["verification"]["kl_divergence"]
    assert worse > 1.5 * honest
    limit = (honest * worse) ** 0.5
    result = allocate(replace(misled, run=replace(misled.run, max_kl=limit)), QUIET)
    assert result["run"]["repairs"][0]["kl_divergence"] == worse
    assert result["run"]["verification"]["verdict"] == "pass"
    assert result["run"]["verification"]["kl_divergence"] <= limit
    assert result["total_bytes"] == result["run"]["total_bytes"] <= budget


@pytest.mark.parametrize(
    ("kls", "improved", "runs"),
    [
        ([0.3, 0.1, 0.2], 2, "0 1 2 1"),  # the second was the best: back to it
        ([0.3, 0.2, 0.1], 2, "0 1 2"),
        ([0.3, 0.5], 1, "0 1 0"),
        ([0.3], 0, "0"),  # nothing that was measured is better
        ([None, 0.5], 1, "0 1"),  # a KL that was not finite
        ([0.3, None], 1, "0 1 0"),
        ([0.3, 0.2, 0.1, 0.05], 3, "0 1 2"),  # enough is enough
    ],
)
def test_the_best_of_all_attempts_stays(kls: list[float | None], improved: int, runs: str) -> None:
    states: list[Any] = [({}, {(0, 0): number}) for number in range(len(kls))]
    ran: list[str] = []

    def attempt(state: Any) -> Verification:
        number = states.index(state)
        ran.append(str(number))
        return judged("fail", kls[number])

    def improve(state: Any) -> Any:
        number = states.index(state)
        return states[number + 1] if number < improved else None

    said: list[str] = []
    tried = attempts(states[0], attempt, improve, said.append)
    assert " ".join(ran) == runs
    assert tried[-1][0] is states[int(runs[-1])]
    assert [line for line in said if "back to it" in line] == [line for line in said if "earlier" in line]
    passed = judged("pass", 1.0)
    assert attempts(states[0], lambda state: passed, improve, said.append) == [(states[0], passed)]


def judged(verdict: str, kl: float | None) -> Verification:
    return Verification.model_validate(example()["verification"] | {"verdict": verdict, "kl_divergence": kl})


def test_a_repair_is_measured_before_it_is_run_and_starts_nothing_anew(
    model: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = uniform_bytes(model, Scheme(4, 32, True), tokens, tmp_path)
    request = asked(model, tokens, tmp_path, budget, also=("lm_head",), check=False, quantize=True)
    request = replace(request, run=replace(request.run, max_kl=1e-9, fresh=True))
    runs: list[Request] = []

    def noted(run: Request, terminal: Terminal) -> Any:
        runs.append(run)
        return quantize(run, terminal)

    monkeypatch.setattr(allocating, "quantize", noted)
    monkeypatch.setattr(allocating, "choose", lambda problem, table: _other(choose(problem, table), bool(runs)))
    checks = iter([2.0, 3.0])  # where it stands, and what another choice comes to: worse
    monkeypatch.setattr(allocating, "check", lambda work, choice, parts: Measured({}, next(checks), {}))
    monkeypatch.setattr(allocating, "corrected", lambda table, stands, choice: table)
    result = allocate(request, QUIET)["run"]
    assert [run.fresh for run in runs] == [True]
    assert result["repairs"] == []
    checks = iter([2.0, 1.0, 2.0, 3.0])  # better, and then worse
    runs.clear()
    result = allocate(request, QUIET)["run"]
    assert [run.fresh for run in runs[:2]] == [True, False]
    assert len(result["repairs"]) == len(runs) - 1
    written = json.loads((request.run.out / "quantkit.json").read_text()) if request.run.out else {}
    assert result["verification"]["kl_divergence"] == written["verification"]["kl_divergence"]
    assert written["verification"]["kl_divergence"] <= min(r["kl_divergence"] for r in result["repairs"])


def _other(choice: Any, change: bool) -> Any:
    """Another choice: the first part's entry, where that is asked for, is one that it did not have."""
    part = next(iter(choice))
    return choice | {part: Scheme(3, 32, True) if change else choice[part]}


@pytest.mark.parametrize("name", ["config.json", "notes.yaml"])
def test_a_recipe_takes_no_other_files_place(model: Path, tokens: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("default: {bits: 4}\n")
    with pytest.raises(InputError, match=r"--out .*: (expected a name that ends in .yaml|is there, and not a recipe)"):
        allocate(replace(asked(model, tokens, tmp_path, 10**6), out=tmp_path / name), QUIET)
    assert (tmp_path / name).read_text() == "default: {bits: 4}\n"


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ({"out": "file/recipe.yaml"}, "cannot be written: .*choose another --out"),
        ({"out": "n" * 260 + ".yaml"}, "cannot be written: File name too long"),
        ({"table": "file/table.json"}, "cannot be written: .*choose another --table"),
        ({"table": "folder"}, "cannot be written: Is a directory"),
        ({"run_out": "file/run"}, "cannot be written"),
        ({"run_out": "folder"}, "not empty and not the output of a quantkit run"),
        ({"run_out": "other"}, "holds a run with other settings"),
    ],
)
def test_what_cannot_be_written_is_said_before_anything_is_measured(
    model: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: dict[str, str], reason: str
) -> None:
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes").write_text("not of a run")
    if place.get("run_out") == "other":
        with open_journal(tmp_path / "other", {"model": "another"}, fresh=False) as journal:
            (tmp_path / "other" / "shard").write_text("a")
            journal.append(Unit("layer.0", "shard", "0", {}))
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(allocating, "measure_menu", lambda *_: pytest.fail("measured"))
    size = uniform_bytes(model, Scheme(4, 32, True), tokens, tmp_path)
    request = asked(model, tokens, tmp_path, size, quantize="run_out" in place)
    paths: dict[str, Any] = {name: tmp_path / path for name, path in place.items()}
    if "run_out" in paths:
        request = replace(request, run=replace(request.run, out=paths.pop("run_out")))
    with pytest.raises(QuantkitError, match=reason):
        allocate(replace(request, **paths), QUIET)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_budget_that_16_bit_fits_leaves_nothing_to_decide(model: Path, tokens: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the model in 16 bit takes .*; give less, or a --menu without 16bit"):
        allocate(asked(model, tokens, tmp_path, 10**9), QUIET)
    assert not (tmp_path / "recipe.yaml").exists()


def test_a_kept_table_serves_micro_batches_of_any_size(
    model: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, whose micro-batches are of several samples."""
    laid_out = memory.lay_out_job
    monkeypatch.setattr(allocating, "lay_out_job", lambda *a, **k: replace(laid_out(*a, **k), batch=3))
    size = uniform_bytes(model, Scheme(4, 32, True), tokens, tmp_path)
    request = asked(model, tokens, tmp_path, size, table=tmp_path / "table.json", check=True)
    first = allocate(request, QUIET)
    assert allocate(request, QUIET) == first


def test_gguf_is_allocated_by_the_memory_that_it_takes(model: Path, tokens: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--weights-only: a \.gguf holds the tokenizer too"):
        posed(asked(model, tokens, tmp_path, 10**9, format="gguf"))
