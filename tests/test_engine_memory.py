# SPDX-License-Identifier: Apache-2.0
"""What an engine takes, against what was measured: `fit` promises no token too many, and at most a tenth too few."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quantkit.formats import FORMATS
from quantkit.hardware.card import Card
from quantkit.model.shapes import shapes_of
from quantkit.plan import make_plan
from quantkit.recipe import shipped
from quantkit.records import Fit
from quantkit.scheme import Scheme
from quantkit.serving.cache import cache_bytes, longest_context
from quantkit.serving.engine_memory import MEMORY, Batch, captured, workspace
from quantkit.serving.fit import fit, load_of
from quantkit.serving.stored import Stored
from quantkit.units import parse_bytes

GIB = 2**30
KEPT = json.loads((Path(__file__).parents[1] / "docs" / "engine_memory.json").read_text())
H200 = Card("NVIDIA H200", 150_110_011_392, (9, 0))
RTX4090 = Card("NVIDIA GeForce RTX 4090", 25_393_692_672, (8, 9))


def measured() -> Iterator[Any]:
    for case in KEPT["cases"]:
        yield pytest.param(case | {"layers": KEPT["layers"]}, id=f"{KEPT['layers']} layers of {named(case)}")
    for case in KEPT["whole_models"]["cases"]:
        yield pytest.param(case, id=named(case))


def named(case: dict[str, Any]) -> str:
    eager = ", eager" if case["eager"] else ""
    return f"{case['recipe']} {' '.join(case['words'])}, {case['tokens']}/{case['sequences']}{eager}"


def planned(recipe: str, words: list[str], layers: int | None = None) -> tuple[Any, Any]:
    config = dict(shipped()[recipe].config or {}) | {"vocab_size": 152064}
    if layers is not None:
        config["num_hidden_layers"] = layers
    model = shapes_of(config)
    assert model is not None
    bits = int(words[words.index("--w-bit") + 1]) if "--w-bit" in words else 4
    scheme = Scheme(bits, 128, "--sym" in words)
    return model, make_plan(model, lambda *_: scheme, FORMATS[words[words.index("--format") + 1]])


@pytest.mark.parametrize("case", list(measured()))
def test_the_promise_is_kept_and_not_timid(case: dict[str, Any]) -> None:
    model, plan = planned(case["recipe"], case["words"], case.get("layers"))
    card = RTX4090 if case.get("kernel") == "Marlin" else H200
    load = load_of(model, Stored(plan.loaded, plan.served_bytes, plan.linears, plan.format.name), "fp16", card=card)
    parts = workspace(MEMORY["vllm"], load, Batch(case["tokens"], case["sequences"], case["eager"]))
    loaded = (load.weights + parts["loading"]) / GIB
    assert 0 <= loaded - float(case["model_gib"]) + 0.005 < 0.04  # the log rounds to a hundredth
    room = parse_bytes(KEPT["budget"], "budget") - load.weights - parts["total"]
    promised = longest_context(load.caches, room) or 0
    if case["kv_tokens"] is None:  # it did not start: there must be no room for more than was there
        assert cache_bytes(load.caches, promised) <= float(case["kv_gib"]) * GIB
    else:
        assert 0.9 * int(case["kv_tokens"]) <= promised <= int(case["kv_tokens"])


def whole_32b(**asked: Any) -> Fit:
    model, plan = planned("deepseek-r1-32b", ["--format", "awq"])
    options: dict[str, Any] = {"budget": 22 * GIB, "context": 8192, "card": H200} | asked
    return fit(model, plan, **options)


def test_flags_are_those_that_reach_the_context() -> None:
    short, asked = whole_32b(context=4096), whole_32b()
    assert short.engine is not None
    assert asked.engine is not None
    assert "--enforce-eager" not in short.engine.flags
    assert "--enforce-eager" in asked.engine.flags
    assert short.fits
    assert asked.fits
    assert 4096 <= short.longest_context <= 6912
    assert 8192 <= asked.longest_context <= 11680
    assert asked.engine.flags[:2] == ["--max-model-len", str(asked.longest_context)]
    granted = float(asked.engine.flags[asked.engine.flags.index("--gpu-memory-utilization") + 1])
    assert 0 <= 22 * GIB - granted * H200.memory_bytes < 2**20
    assert asked.engine.measured
    assert asked.engine.name == "vllm"


def test_a_context_beyond_all_flags_does_not_fit() -> None:
    far = whole_32b(context=16384)
    assert not far.fits
    assert far.total_bytes > far.budget_bytes
    assert far.engine is not None
    assert far.longest_context == max(batch.context for batch in far.engine.batches)
    assert whole_32b(context=16384, kv="fp8").fits


def test_zero_points_are_unpacked_by_the_kernel_of_hopper_alone() -> None:
    hopper, ada, unknown = whole_32b(card=H200), whole_32b(card=RTX4090), whole_32b(card=None)
    grown = 31_205_621_760 // 128 * (2 - 0.5)
    assert hopper.workspace["loading"] - ada.workspace["loading"] == grown
    assert unknown.workspace == ada.workspace  # the usual budget is that of such a card
    told = whole_32b(card=replace(H200, disabled=("MacheteLinearKernel",)))
    assert told.workspace["loading"] == ada.workspace["loading"]


def test_other_engines_are_not_called_measured() -> None:
    model, plan = planned("deepseek-r1-14b", ["--format", "gptq", "--sym"])
    for engine in ("sglang", "transformers", "gptqmodel"):
        use = fit(model, plan, budget=22 * GIB, context=8192, engine=engine).engine
        assert use is not None
        assert (use.name, use.measured) == (engine, False)
    assert not whole_32b(tensor_parallel=2).engine.measured  # type: ignore[union-attr]


def test_graphs_are_captured_for_the_sizes_of_vllm() -> None:
    assert [captured(n) for n in (1, 4, 8, 16, 32)] == [2, 4, 5, 7, 11]
    assert captured(1024) == 3 + 31 + 17


def test_nothing_is_promised_below_the_weights() -> None:
    none = whole_32b(budget=18 * GIB)
    assert none.longest_context == 0
    assert none.engine is not None
    assert none.engine.flags == []
    assert math.isfinite(none.margin_bytes)
