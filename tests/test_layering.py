# SPDX-License-Identifier: Apache-2.0
"""Imports point one way. The tables below are the architecture; a new module needs a row in the first."""

import ast
from collections.abc import Iterator, Sequence
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "quantkit"

# What each part of quantkit may import of the others. `quantkit.__version__` is free to all.
ALLOWED: dict[str, str] = {
    "errors": "",
    # the words of the subject: numbers, sums, sizes
    "products": "",
    "ranks": "errors",
    "portions": "",
    "dtypes": "errors",
    "jsonfile": "errors",
    "scheme": "errors",
    "stats": "errors products ranks",
    "units": "errors",
    "resources": "errors",
    "machine": "errors products",
    # pure functions on tensors; the two never meet
    "quantize": "errors products ranks portions scheme stats",
    "formats": "errors dtypes scheme",
    # one concern each
    "checkpoint": "errors dtypes",
    "calibration": "errors resources",
    "pipeline.activations": "errors portions machine",
    "pipeline.background": "",
    "verify": "errors units",
    "recipe": "errors scheme units resources formats",
    "model": "errors products jsonfile checkpoint",
    "plan": "errors dtypes scheme formats checkpoint recipe model",
    "loaders": "errors scheme formats plan",
    "stored": "errors jsonfile scheme formats checkpoint model plan",
    "pipeline.needs": "portions formats model plan",
    "fit": "errors dtypes jsonfile formats checkpoint model plan loaders stored pipeline.needs",
    "pipeline.memory": "errors portions units model pipeline.needs pipeline.job",
    "commands.models": "errors resources checkpoint recipe",
    "gguf": (
        "errors portions dtypes scheme stats quantize formats checkpoint calibration pipeline.activations model"
        " plan stored fit pipeline.evaluation"
    ),
    # the loop
    "pipeline.evaluation": (
        "errors products ranks portions dtypes stats machine calibration pipeline.activations verify model"
    ),
    "pipeline.resample": "calibration pipeline.activations model pipeline.evaluation",
    "pipeline.fisher": "errors products portions calibration pipeline.activations model pipeline.evaluation",
    "pipeline.passage": "pipeline.activations model pipeline.evaluation",
    "pipeline.job": "ranks machine quantize checkpoint calibration model plan pipeline.evaluation",
    "pipeline.layer": (
        "errors products portions dtypes scheme stats quantize pipeline.activations model plan pipeline.evaluation"
        " pipeline.passage pipeline.job"
    ),
    "pipeline.head": "ranks portions scheme stats quantize formats pipeline.activations model pipeline.evaluation",
    "pipeline.tuning": (
        "portions scheme quantize checkpoint calibration pipeline.activations model pipeline.evaluation"
        " pipeline.resample pipeline.fisher pipeline.job pipeline.layer"
    ),
    "pipeline.run": (
        "errors dtypes stats machine quantize checkpoint calibration pipeline.activations pipeline.background"
        " model plan stored pipeline.evaluation pipeline.passage pipeline.job pipeline.layer pipeline.head"
        " pipeline.tuning"
    ),
    "pipeline.remeasure": (
        "errors formats checkpoint calibration pipeline.activations model plan stored pipeline.evaluation"
    ),
    # what is shown and written for people
    "progress": "units",
    "report.summary": "units hub",
    "report.wording": "units",
    "report.charts": "",
    "report.rendering": "",
    "report.parts": "report.wording report.charts",
    "report.run": "report.wording report.charts report.rendering report.parts",
    "report.fit": "report.wording report.rendering report.parts",
    "report.fit_table": "units fit",
    "report.sweep": "report.wording report.charts report.rendering report.parts",
    "report.card": "report.wording report.rendering",
    "document": "errors jsonfile",
    "commands.inspect": "errors scheme units formats checkpoint plan stored fit gguf document",
    "hub": "errors jsonfile units checkpoint",
    "folder": "errors formats checkpoint report.run report.card document",
    "tokenizer": "errors",
    # what a command does, and the commands
    "commands.defaults": "errors scheme formats checkpoint recipe commands.models",
    "commands.fit": (
        "errors jsonfile checkpoint recipe model plan stored fit gguf report.fit document commands.defaults"
    ),
    "commands.quantize": (
        "errors ranks scheme units machine quantize formats checkpoint calibration verify recipe model plan fit"
        " pipeline.memory gguf pipeline.job pipeline.run progress report.summary document folder tokenizer"
        " commands.defaults"
    ),
    "allocation": (
        "errors scheme stats units machine quantize formats checkpoint calibration pipeline.activations recipe"
        " model plan loaders stored fit pipeline.memory pipeline.evaluation pipeline.passage pipeline.job"
        " pipeline.layer pipeline.head progress commands.defaults commands.quantize"
    ),
    "commands.sweep": (
        "errors dtypes stats units machine quantize checkpoint calibration pipeline.activations recipe model plan"
        " fit pipeline.memory pipeline.evaluation pipeline.job pipeline.layer progress report.sweep folder"
        " commands.defaults commands.quantize"
    ),
    "commands.verify": (
        "errors machine checkpoint calibration verify model pipeline.needs fit pipeline.memory gguf"
        " pipeline.evaluation pipeline.remeasure progress document folder tokenizer commands.defaults"
    ),
    "commands.repack": "errors dtypes scheme machine quantize formats checkpoint model plan stored",
    "commands.convert": (
        "errors machine formats checkpoint verify plan loaders stored fit document folder commands.defaults"
        " commands.verify commands.repack"
    ),
    "commands.export_gguf": (
        "errors machine formats checkpoint calibration model plan stored gguf progress document folder tokenizer"
        " commands.defaults commands.verify"
    ),
    "cli": (
        "errors ranks units machine quantize verify commands.models report.summary report.fit_table report.card"
        " document commands.inspect hub commands.fit commands.quantize allocation commands.sweep commands.verify"
        " commands.convert commands.export_gguf"
    ),
    "__main__": "cli",
    "__init__": "",
}

# Where a part may import only one module of another.
NARROW = {("recipe", "formats"): "quantkit.formats.names"}

# Libraries with effects, and the only parts that may import them.
LIBRARIES: dict[str, str] = {
    "huggingface_hub": "calibration checkpoint hub",
    "datasets": "calibration",
    "requests": "",
    "httpx": "",
    "urllib": "",
    "socket": "",
    "subprocess": "",
    "pickle": "",
    "transformers": "gguf calibration model tokenizer cli",
    "accelerate": "model",
    "typer": "cli",
    "rich": (
        "progress report.summary report.fit_table commands.quantize commands.verify commands.convert"
        " commands.export_gguf commands.sweep commands.inspect commands.models allocation cli"
    ),
}

# Pure parts: tensors in, tensors out.
PURE = ("errors", "products", "scheme", "stats", "units", "quantize", "formats")
FILES = {"pathlib", "os", "io", "shutil", "tempfile", "safetensors", "mmap", "glob", "fcntl"}


APART = ("commands", "pipeline", "report")  # folders whose files are parts of their own


def part_of(path: Path) -> str:
    """The part of quantkit a file belongs to: its name, or the folder it is in."""
    return part_named(path.relative_to(PACKAGE).with_suffix("").parts)


def part_named(names: Sequence[str]) -> str:
    apart = len(names) > 1 and names[0] in APART and names[1] != "__init__"
    return ".".join(names[: 2 if apart else 1])


def sources() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def imports(tree: ast.Module) -> Iterator[str]:
    """Full names of the modules that a file imports anywhere in it, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; write the full name"
            assert node.module is not None
            # `from quantkit import recipe` names the module after the import
            whole = node.module in ("quantkit", *(f"quantkit.{folder}" for folder in APART))
            yield from (f"{node.module}.{alias.name}" if whole else node.module for alias in node.names)


def inner_imports() -> list[tuple[Path, str, str, str]]:
    """(file, its part, the module of quantkit that it imports, that module's part)"""
    return [
        (path, part_of(path), name, part_named(name.split(".")[1:]))
        for path, tree in sources().items()
        for name in imports(tree)
        if name.startswith("quantkit.") and name != "quantkit.__version__"
    ]


def test_every_part_has_a_row() -> None:
    assert {part_of(path) for path in sources()} - set(APART) <= set(ALLOWED)


def test_the_table_itself_points_one_way() -> None:
    graph = {part: set(allowed.split()) for part, allowed in ALLOWED.items()}
    assert set().union(*graph.values()) <= set(graph)
    list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert "formats" not in graph["quantize"]
    assert "quantize" not in graph["formats"]


def test_imports_within_quantkit_follow_the_table() -> None:
    found = inner_imports()
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path, part, name, target in found
        if target != part and target not in ALLOWED.get(part, "").split()
    ]
    assert not wrong
    used = {(part, target) for _, part, _, target in found}
    unused = [
        f"{part} -> {target}" for part, row in ALLOWED.items() for target in row.split() if (part, target) not in used
    ]
    assert not unused, "rows that allow what nobody imports"


def test_narrow_doors() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path, part, name, target in inner_imports()
        if name != NARROW.get((part, target), name)
    ]
    assert not wrong


def test_libraries_with_effects_stay_where_they_belong() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path, tree in sources().items()
        for name in imports(tree)
        if part_of(path) not in LIBRARIES.get(name.split(".")[0], part_of(path)).split()
    ]
    assert not wrong


@pytest.mark.parametrize("part", PURE)
def test_pure_parts_touch_no_files(part: str) -> None:
    for path, tree in sources().items():
        if part_of(path) == part:
            assert not FILES & {name.split(".")[0] for name in imports(tree)}
            called = {
                node.func.id
                for node in ast.walk(tree)
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            }
            assert not called & {"open", "exec", "eval", "print", "input"}


def test_nothing_loads_pickles_or_remote_code() -> None:
    for path, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in ("torch.load", "yaml.load", "eval", "exec"), f"{path.name}:{node.lineno}: {name}"
                for keyword in node.keywords:
                    if keyword.arg == "trust_remote_code":
                        assert ast.unparse(keyword.value) == "False", f"{path.name}:{node.lineno}"
