# SPDX-License-Identifier: Apache-2.0
"""The linter against what real clients did: results.json of the interop suite, pair by pair."""

import json
from pathlib import Path

import pytest

from interop.pairs import CASES, GROUPS, HEADS, KEEP, KNOWN, MIXED, READERS, RESULTS, Case, outcome, reason, runs_here
from interop.run import pairs
from interop.tables import BEGIN, END, PAGE, TABLE, render, summary, unexpected
from quantkit.formats import FORMATS
from quantkit.formats.gguf import GGUF
from quantkit.model.config import config_from_dict
from quantkit.model.skeleton import build
from quantkit.plan import OUTSIDE, make_plan
from quantkit.recipe import read_recipe, resolver
from quantkit.scheme import Scheme
from quantkit.serving.engines import heads_of, reasons

FOUND = json.loads(RESULTS.read_text(encoding="utf-8"))
ENGINES = {  # the clients that the linter speaks of
    "vLLM (CPU)": "vllm",
    "transformers + gptqmodel": "transformers",
    "transformers + compressed-tensors": "transformers",
    "transformers + gguf": "transformers",
    "GPTQModel": "gptqmodel",
    "llama.cpp": "llama.cpp",
    "llama.cpp's converter": "llama.cpp",
}
DEMO = Path(__file__).parents[1] / "quantkit" / "demo" / "config.json"


def linted(case: Case, engine: str, tmp_path: Path) -> list[str]:
    (tmp_path / "recipe.yaml").write_text(case.recipe or "{}")
    scheme = Scheme(case.bits, case.group_size, case.kind == "sym")
    raw = json.loads(DEMO.read_text()) | {"tie_word_embeddings": case.model == "demo"}
    model = build(config_from_dict(raw))
    fmt = GGUF if case.format == "gguf" else FORMATS[case.format]
    resolve = resolver(read_recipe(tmp_path / "recipe.yaml"), scheme)
    plan = make_plan(model, resolve, fmt, head=resolve(model.head_name or "", OUTSIDE))
    linears = (*plan.linears, *(linear for linear in plan.quantized if linear.layer == OUTSIDE))
    return reasons(engine, case.format, linears, heads_of(model.config))


PAIRS = [(case, reader.name) for case in CASES for reader in READERS if reader.name in ENGINES and reader.reads(case)]


@pytest.mark.parametrize(("case", "client"), PAIRS, ids=lambda value: getattr(value, "name", value))
def test_the_linter_says_what_the_client_did(case: Case, client: str, tmp_path: Path) -> None:
    result = FOUND.get(f"{case.name} < {client}")
    if result is None:
        pytest.skip("not run")
    if not runs_here(f"{case.name} < {client}", result):
        pytest.skip("not runnable on the machine that it was tried on")
    loads = outcome("", result).startswith("ok")
    assert bool(linted(case, ENGINES[client], tmp_path)) != loads


def test_everything_is_as_known() -> None:
    assert unexpected(FOUND) == []


def test_every_known_failure_is_of_a_pair_that_exists() -> None:
    asked = set(pairs())
    for known in KNOWN:
        assert any(known.is_about(pair) for pair in asked), known
    assert reason("awq W4 g128 asym (demo) < GPTQModel") is None
    assert {case.recipe for case in CASES} == {None, KEEP, MIXED, GROUPS, *HEADS}


def test_the_tables_are_made_from_the_results() -> None:
    assert TABLE.read_text(encoding="utf-8") == render(FOUND)
    page = PAGE.read_text(encoding="utf-8")
    assert page.partition(BEGIN)[2].partition(END)[0] == f"\n{summary(FOUND)}"
