# SPDX-License-Identifier: Apache-2.0
"""Imports point one way. The tables below are the architecture; a new module needs a row in the first."""

import ast
from collections.abc import Iterator, Sequence
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "quantkit"

# The package in eight layers, each resting on those above it in this list. A part is a file, or a folder, of quantkit.
LAYERS: dict[str, str] = {
    "words": "errors text units files patterns dtypes jsonfile resources hardware network",
    "numbers": "scheme kernels grids stats methods formats",
    "files": "checkpoint records calibration recipe verdict",
    "models": "model plan quantized",
    "engines": "serving settings",
    "streams": "pipeline gguf convert allocation",
    "results": "report hub results",
    "commands": "commands cli __main__ __init__",
}

# What each part may import of the others, exactly. `quantkit.__version__` is free to all.
ALLOWED: dict[str, str] = {
    # words
    "dtypes": "errors",
    "errors": "",
    "files": "",
    "hardware": "errors",
    "jsonfile": "errors files",
    "network": "text",
    "patterns": "errors",
    "resources": "errors",
    "text": "",
    "units": "errors",
    # numbers
    "formats": "dtypes errors patterns grids scheme",
    "grids": "errors kernels scheme",
    "kernels": "scheme",
    "methods": "errors hardware grids kernels scheme stats",
    "scheme": "errors",
    "stats": "errors hardware",
    # files
    "calibration": "errors network resources text records",
    "checkpoint": "dtypes errors jsonfile network text units",
    "recipe": "errors files patterns resources units formats scheme records",
    "records": "scheme",
    "verdict": "dtypes errors units records",
    # models
    "model": "dtypes errors hardware jsonfile text formats checkpoint",
    "plan": "dtypes errors formats scheme checkpoint recipe records model",
    "quantized": "dtypes errors jsonfile formats grids scheme checkpoint records model plan",
    # engines
    "serving": "dtypes errors hardware jsonfile units formats scheme checkpoint records model plan quantized",
    "settings": (
        "errors hardware resources units formats methods scheme calibration checkpoint recipe records verdict model"
    ),
    # streams
    "allocation": (
        "errors files hardware units formats grids methods scheme stats calibration checkpoint recipe records"
        " model plan serving settings pipeline.activations pipeline.compare pipeline.forward pipeline.head"
        " pipeline.job pipeline.layer pipeline.runtime pipeline.site_inputs pipeline.walk"
    ),
    "convert": "dtypes errors hardware formats grids methods scheme checkpoint model plan quantized gguf",
    "gguf": "dtypes errors jsonfile formats grids methods scheme checkpoint records model plan quantized serving",
    "pipeline.activations": "errors hardware",
    "pipeline.compare": (
        "dtypes hardware grids methods scheme calibration model plan pipeline.activations pipeline.metrics"
        " pipeline.runtime"
    ),
    "pipeline.fisher": (
        "errors hardware calibration model pipeline.activations pipeline.forward pipeline.runtime pipeline.walk"
    ),
    "pipeline.forward": "dtypes errors calibration model pipeline.activations pipeline.runtime",
    "pipeline.head": (
        "hardware formats methods scheme stats model pipeline.activations pipeline.forward pipeline.runtime"
    ),
    "pipeline.job": "dtypes hardware methods calibration checkpoint plan pipeline.runtime",
    "pipeline.layer": (
        "dtypes errors hardware formats grids methods scheme stats model plan pipeline.activations"
        " pipeline.forward pipeline.job pipeline.mixtures pipeline.site_inputs"
    ),
    "pipeline.measure": "calibration model plan pipeline.compare pipeline.forward pipeline.runtime pipeline.walk",
    "pipeline.memory": "errors hardware units formats model serving pipeline.job pipeline.runtime",
    "pipeline.metrics": "errors",
    "pipeline.mixtures": "hardware formats methods stats model pipeline.activations pipeline.site_inputs",
    "pipeline.prefetch": "",
    "pipeline.resample": "calibration model pipeline.activations pipeline.forward pipeline.runtime pipeline.walk",
    "pipeline.resume": "errors checkpoint pipeline.job pipeline.tuning",
    "pipeline.run": (
        "dtypes errors hardware methods stats checkpoint model plan quantized pipeline.activations"
        " pipeline.compare pipeline.forward pipeline.head pipeline.job pipeline.layer pipeline.prefetch"
        " pipeline.resume pipeline.runtime pipeline.shards pipeline.site_inputs pipeline.streams"
        " pipeline.tuning pipeline.walk"
    ),
    "pipeline.runtime": "dtypes hardware model",
    "pipeline.shards": "dtypes errors checkpoint model plan quantized pipeline.forward pipeline.job pipeline.layer",
    "pipeline.site_inputs": "hardware formats stats model pipeline.activations pipeline.forward",
    "pipeline.streams": (
        "calibration model plan pipeline.activations pipeline.forward pipeline.job pipeline.shards pipeline.tuning"
    ),
    "pipeline.sweep": (
        "dtypes methods stats checkpoint model quantized pipeline.activations pipeline.compare"
        " pipeline.forward pipeline.job pipeline.layer pipeline.runtime pipeline.site_inputs pipeline.walk"
    ),
    "pipeline.tuning": (
        "hardware grids methods scheme calibration checkpoint model pipeline.activations pipeline.fisher"
        " pipeline.forward pipeline.job pipeline.layer pipeline.resample pipeline.runtime"
    ),
    "pipeline.walk": "hardware model pipeline.forward pipeline.prefetch pipeline.runtime",
    # results
    "hub": "errors jsonfile network text units checkpoint",
    "report.card": "text formats methods records report.formatting report.rendering",
    "report.formatting": "text units records",
    "report.pages": "text formats records settings report.formatting report.rendering",
    "report.rendering": "text",
    "report.terminal": "text units records plan serving settings hub",
    "results": "dtypes errors jsonfile formats checkpoint records model report.card report.pages",
    # commands
    "__init__": "",
    "__main__": "cli",
    "cli": (
        "errors hardware text units formats methods scheme calibration verdict serving settings hub"
        " report.card report.terminal results commands.allocate commands.chat commands.conversion"
        " commands.convert commands.convert_gguf commands.doctor commands.fit commands.inspect"
        " commands.quantize commands.serve commands.sweep commands.verify"
    ),
    "commands.allocate": (
        "errors units methods calibration checkpoint recipe records model quantized settings allocation"
        " pipeline.job pipeline.layer pipeline.memory pipeline.runtime report.terminal results"
        " commands.quantize"
    ),
    "commands.chat": (
        "errors jsonfile units calibration checkpoint model quantized settings gguf results commands.process"
        " commands.serve"
    ),
    "commands.conversion": "errors checkpoint records plan report.terminal results commands.verify",
    "commands.convert": (
        "dtypes errors hardware formats checkpoint records verdict model plan quantized serving settings"
        " convert gguf report.terminal results commands.conversion commands.convert_from_gguf"
    ),
    "commands.convert_from_gguf": (
        "dtypes errors hardware jsonfile checkpoint records model plan settings convert gguf report.terminal"
        " results commands.conversion"
    ),
    "commands.convert_gguf": (
        "errors hardware formats methods checkpoint records quantized settings gguf report.terminal results"
        " commands.conversion commands.quantize"
    ),
    "commands.doctor": "errors hardware text records quantized serving results commands.serve",
    "commands.fit": (
        "errors jsonfile checkpoint recipe records model plan quantized serving settings gguf report.pages results"
    ),
    "commands.inspect": "errors formats records plan quantized gguf results",
    "commands.process": "errors text",
    "commands.quantize": (
        "errors hardware units formats methods scheme stats calibration checkpoint recipe records model plan"
        " serving settings gguf pipeline.job pipeline.memory pipeline.run pipeline.runtime report.terminal"
        " results commands.quantize_result"
    ),
    "commands.quantize_result": (
        "errors hardware units formats scheme calibration checkpoint recipe records verdict plan settings"
        " gguf pipeline.job pipeline.memory pipeline.run results"
    ),
    "commands.serve": (
        "errors hardware text units checkpoint records model quantized serving settings results commands.fit"
        " commands.process"
    ),
    "commands.sweep": (
        "errors hardware units methods calibration checkpoint recipe model plan serving settings pipeline.job"
        " pipeline.memory pipeline.runtime pipeline.sweep report.pages report.terminal results"
    ),
    "commands.verify": (
        "errors hardware scheme calibration checkpoint records verdict model quantized serving settings gguf"
        " pipeline.measure pipeline.memory pipeline.runtime report.terminal results"
    ),
}

# Where a part may import only one module of another.
NARROW = {("recipe", "formats"): "quantkit.formats.names"}

# Libraries with effects, and the only parts that may import them.
LIBRARIES: dict[str, str] = {
    "huggingface_hub": "network calibration checkpoint hub",
    "datasets": "calibration",
    "requests": "",
    "httpx": "",
    "urllib": "commands.process",
    "socket": "commands.process",
    "subprocess": "calibration commands.process",
    "pickle": "",
    "transformers": "gguf calibration model cli",
    "accelerate": "model",
    "typer": "cli",
    "rich": (
        "report.terminal settings commands.quantize commands.verify commands.convert commands.allocate"
        " commands.convert_gguf commands.sweep commands.inspect cli"
    ),
}

# Pure parts: tensors in, tensors out.
PURE = ("errors", "scheme", "kernels", "grids", "stats", "units", "methods", "formats")
FILES = {"pathlib", "os", "io", "shutil", "tempfile", "safetensors", "mmap", "glob", "fcntl"}


FEW_VALUES = ("pipeline", "allocation")  # folders whose functions take six values at most: a context, and few others

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
    assert "formats" not in graph["methods"]
    assert "methods" not in graph["formats"]


def test_the_table_agrees_with_the_layers() -> None:
    level = {folder: i for i, row in enumerate(LAYERS.values()) for folder in row.split()}
    for part, allowed in ALLOWED.items():
        for other in allowed.split():
            assert level[other.split(".")[0]] <= level[part.split(".")[0]], f"{part} imports {other} of a later layer"


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


def test_functions_of_the_pipeline_take_six_values_at_most() -> None:
    many = []
    for path, tree in sources().items():
        for node in ast.walk(tree):
            if path.relative_to(PACKAGE).parts[0] in FEW_VALUES and isinstance(node, ast.FunctionDef | ast.Lambda):
                names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                if len([name for name in names if name not in ("self", "cls")]) > 6:
                    many.append(f"{path.relative_to(PACKAGE)}:{node.lineno}: {', '.join(names)}")
    assert not many


def test_nothing_loads_pickles_or_remote_code() -> None:
    for path, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in ("torch.load", "yaml.load", "eval", "exec"), f"{path.name}:{node.lineno}: {name}"
                for keyword in node.keywords:
                    if keyword.arg == "trust_remote_code":
                        assert ast.unparse(keyword.value) == "False", f"{path.name}:{node.lineno}"
