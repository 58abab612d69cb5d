# SPDX-License-Identifier: Apache-2.0
"""Imports point one way. The tables below are the architecture; a new module needs a row in the first."""

import ast
from collections.abc import Iterator
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
    "activations": "errors portions machine",
    "background": "",
    "verify": "errors",
    "recipe": "errors scheme units resources formats",
    "model": "errors products jsonfile checkpoint",
    "plan": "errors dtypes scheme formats checkpoint recipe model",
    "loaders": "errors scheme formats plan",
    "stored": "errors jsonfile scheme formats checkpoint model plan",
    "needs": "portions formats model plan",
    "fit": "errors dtypes jsonfile units formats checkpoint model plan loaders stored needs",
    "memory": "errors portions units model needs job",
    "library": "errors resources checkpoint recipe",
    "gguf": (
        "errors portions dtypes scheme stats machine quantize formats checkpoint calibration activations model"
        " plan stored fit evaluation"
    ),
    # the loop
    "evaluation": "errors products ranks portions dtypes stats calibration activations verify model",
    "resample": "machine calibration activations model evaluation",
    "fisher": "errors products portions machine calibration activations model evaluation",
    "passage": "activations model evaluation",
    "job": "ranks machine quantize checkpoint calibration model plan evaluation",
    "layer": "errors products portions dtypes scheme stats quantize activations model plan evaluation passage job",
    "head": "ranks portions scheme stats quantize activations model evaluation",
    "tuning": "portions scheme quantize checkpoint calibration activations model evaluation resample fisher job layer",
    "pipeline": (
        "errors dtypes machine quantize checkpoint calibration activations background model plan stored evaluation"
        " passage job layer head tuning"
    ),
    "remeasure": "errors machine formats checkpoint calibration activations model plan stored evaluation",
    # what is shown and written for people
    "progress": "units",
    "summary": "units hub",
    "wording": "units",
    "charts": "",
    "rendering": "",
    "report": "wording charts rendering",
    "card": "wording rendering",
    "document": "errors jsonfile",
    "inspection": "errors scheme units formats checkpoint plan stored fit gguf document",
    "hub": "errors jsonfile units checkpoint",
    "folder": "errors formats checkpoint report card document",
    "tokenizer": "errors",
    # what a command does, and the commands
    "choices": "errors scheme formats checkpoint recipe library",
    "fitting": "errors jsonfile checkpoint recipe model plan stored fit gguf report document choices",
    "runs": (
        "errors ranks scheme units machine quantize formats calibration verify recipe model plan fit memory gguf"
        " job pipeline progress summary document folder tokenizer choices"
    ),
    "allocation": (
        "errors scheme stats units machine quantize formats checkpoint calibration activations recipe model plan"
        " loaders stored fit memory evaluation passage job layer head progress choices runs"
    ),
    "sweep": (
        "errors dtypes stats units machine quantize checkpoint calibration activations recipe model plan fit"
        " memory evaluation job layer progress report choices runs"
    ),
    "reverify": (
        "errors machine checkpoint calibration verify model needs fit memory gguf evaluation remeasure progress"
        " document folder tokenizer choices"
    ),
    "repack": "errors dtypes scheme machine quantize formats checkpoint model plan stored",
    "convert": (
        "errors machine formats checkpoint verify plan loaders stored fit document folder choices reverify repack"
    ),
    "export_gguf": (
        "errors machine formats checkpoint calibration model plan stored gguf progress document folder tokenizer"
        " choices reverify"
    ),
    "cli": (
        "errors ranks units machine quantize verify fit library summary card document inspection hub fitting runs"
        " allocation sweep reverify convert export_gguf"
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
    "rich": "export_gguf progress cli runs allocation sweep reverify convert fit inspection library summary",
}

# Pure parts: tensors in, tensors out.
PURE = ("errors", "products", "scheme", "stats", "units", "quantize", "formats")
FILES = {"pathlib", "os", "io", "shutil", "tempfile", "safetensors", "mmap", "glob", "fcntl"}


def part_of(path: Path) -> str:
    """The part of quantkit a file belongs to: its name, or the folder it is in."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


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
            whole = node.module == "quantkit"  # `from quantkit import recipe` names the module after the import
            yield from (f"quantkit.{alias.name}" if whole else node.module for alias in node.names)


def inner_imports() -> list[tuple[Path, str, str, str]]:
    """(file, its part, the module of quantkit that it imports, that module's part)"""
    return [
        (path, part_of(path), name, name.split(".")[1])
        for path, tree in sources().items()
        for name in imports(tree)
        if name.startswith("quantkit.") and name != "quantkit.__version__"
    ]


def test_every_part_has_a_row() -> None:
    assert {part_of(path) for path in sources()} <= set(ALLOWED)


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
