# SPDX-License-Identifier: Apache-2.0
"""Methods and formats are rows that know their properties: nobody else asks one for its name."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from quantkit.formats import FORMATS
from quantkit.methods.table import METHODS
from quantkit.recipe import Recipe, Rule
from quantkit.scheme import Scheme
from quantkit.settings.defaults import AskedScheme, choose_format, choose_scheme

PACKAGE = Path(__file__).resolve().parents[1] / "quantkit"
NAMES = METHODS.keys() | FORMATS.keys()

# What is left, by file: each to be mended with the work that is under way there.
ALLOWED = {
    "serving/fit.py": "which engine memory is counted for",
    "serving/engines.py": "a format that a class of transformers cannot load",
    "serving/engine_memory.py": "zero points that an engine adds",
    "checkpoint/original.py": "the quant_method of another tool's config, which is not a format here",
    "commands/convert_gguf.py": "a unit of the journal, which is called as the format is",
}


def compared(tree: ast.Module) -> Iterator[str]:
    """Names of methods and formats that a file compares something with."""
    for node in ast.walk(tree):
        sides: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("startswith", "endswith"):
            sides = node.args
        elif isinstance(node, ast.MatchValue):
            sides = [node.value]
        for side in sides:
            for leaf in side.elts if isinstance(side, ast.Tuple | ast.List | ast.Set) else [side]:
                if isinstance(leaf, ast.Constant) and leaf.value in NAMES:
                    yield f"line {leaf.lineno}: {leaf.value}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_method_or_format_is_compared_by_name(path: Path) -> None:
    name = path.relative_to(PACKAGE).as_posix()
    places = list(compared(ast.parse(path.read_text(encoding="utf-8"))))
    if name.startswith(("methods/", "formats/")):
        return
    assert not places or name in ALLOWED, places


def test_comparisons_are_seen() -> None:
    code = 'a == "awq"; b in ("gptq", "x"); c.startswith("gguf"); say("awq"); d = {"rtn": 1}'
    assert [place.rpartition(" ")[2] for place in compared(ast.parse(code))] == ["awq", "gptq", "gguf"]


@pytest.mark.parametrize(
    ("method", "scheme", "rules", "expected"),
    [
        ("awq", Scheme(4, 128, False), False, "awq"),
        ("awq", Scheme(3, 128, True), False, "compressed-tensors"),
        ("awq", Scheme(4, 128, False), True, "compressed-tensors"),
        ("gptq", Scheme(4, 128, True), False, "gptq"),
        ("gptq", Scheme(4, 128, False), False, "gptq_v2"),
        ("gptq", Scheme(4, 128, True), True, "compressed-tensors"),
        ("rtn", Scheme(8, 128, True), False, "compressed-tensors"),
        ("rtn", Scheme(4, 32, False, "q4_k"), False, "gguf"),
    ],
)
def test_a_scheme_is_stored_in_the_first_usual_format_that_suits_it(
    method: str, scheme: Scheme, rules: bool, expected: str
) -> None:
    recipe = Recipe(rules=(Rule(match="layers.0", bits=8),) if rules else ())
    assert choose_format(None, method, scheme, recipe).name == expected


def test_the_groups_and_zero_points_of_gguf_are_its_row_s() -> None:
    assert choose_scheme("rtn", Recipe(), AskedScheme(), "gguf") == Scheme(4, 32, False)
    assert choose_scheme("rtn", Recipe(), AskedScheme(bits=8), "gguf") == Scheme(8, 32, True)
