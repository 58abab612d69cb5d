# SPDX-License-Identifier: Apache-2.0
"""The fit command: from a name to the document of `fit.fit`, for a model, a recipe, or a folder that is quantized."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from quantkit.checkpoint.writer import write_text
from quantkit.errors import OutputError, QuantkitError
from quantkit.jsonfile import read_object
from quantkit.model.shapes import Shapes, shapes_of, text_values
from quantkit.plan import OUTSIDE, dividing, make_plan
from quantkit.quantized import quantization_of, read_config, shapes_in
from quantkit.recipe import BudgetSpec, explained, resolver, shipped
from quantkit.records import Fit
from quantkit.results.document import RESULT, read_result
from quantkit.serving.fit import fit, fit_checkpoint, fit_stored
from quantkit.settings.defaults import (
    AskedScheme,
    choose_format,
    choose_recipe,
    choose_scheme,
    choose_serving,
    find_source,
    positions,
    usual_method,
)

EXPECTED = "expected the folder of a model"


@dataclass(frozen=True)
class FitRequest:
    """What the user asked for; None means: not said."""

    model: str
    bits: int | None
    group_size: int | None
    symmetric: bool | None
    format: str | None
    recipe: Path | None
    budget: int | None
    context: int | None
    kv: str | None
    tensor_parallel: int
    offline: bool
    engine: str | None = None
    scheme: str | None = None


class Named(NamedTuple):
    """What `fit` said, of what, and how that is quantized."""

    name: str
    scheme: str
    fit: Fit
    would_fit: tuple[str, ...] = ()  # commands, where this does not

    def content(self) -> dict[str, Any]:
        """As JSON has it."""
        others = {"would_fit": list(self.would_fit)} if self.would_fit else {}
        return {"name": self.name, "scheme": self.scheme} | self.fit.content() | others


AS_STORED = "as stored"
FEWER_BITS = ((4, 128), (3, 128), (2, 64))  # bits and groups to try where a model is too large
MORE_CARDS = (2, 4, 8)


def fit_request(request: FitRequest) -> Named:
    """Memory, context and engines of a model, a plan for it, or a folder; no weights are read.

    Where it does not fit, what would.

    Raises:
        QuantkitError: a model, scheme, format or recipe that cannot be.
    """
    result = _fit_as_asked(request)
    return result if result.fit.fits else result._replace(would_fit=tuple(_would_fit(request, result)))


def _would_fit(request: FitRequest, result: Named) -> Iterator[str]:
    """Commands for what is nearest to a request that does not fit: one for each kind of change that is enough."""
    fewer = [
        {"bits": bits, "group_size": group, "scheme": None, "recipe": None, "format": None}
        for bits, group in FEWER_BITS
        if result.scheme != AS_STORED
    ]
    kinds: list[list[dict[str, Any]]] = [
        [{"context": result.fit.longest_context // 1024 * 1024}] if result.fit.longest_context >= 1024 else [],
        [{"kv": "fp8"}] if result.fit.kv != "fp8" else [],
        fewer,
        [{"tensor_parallel": cards} for cards in MORE_CARDS if cards > request.tensor_parallel],
    ]
    for changes in kinds:
        for change in changes:
            other = replace(request, **change)
            try:
                fit = _fit_as_asked(other).fit
            except QuantkitError:
                continue
            loads = request.engine is not None or None in fit.engines.values()
            if fit.fits and loads and not fit.tensor_parallel.problems:
                yield _command(other)
                break


def _command(request: FitRequest) -> str:
    """The command that asks for a request."""
    options = {
        "--w-bit": request.bits,
        "--group": request.group_size,
        "--scheme": request.scheme,
        "--format": request.format,
        "--recipe": request.recipe,
        "--budget": _size(request.budget) if request.budget else None,
        "--context": request.context,
        "--kv": request.kv,
        "--tensor-parallel": request.tensor_parallel if request.tensor_parallel > 1 else None,
        "--for": request.engine,
    }
    words = [str(word) for option, value in options.items() if value is not None for word in (option, value)]
    sym = [] if request.symmetric is None else ["--sym" if request.symmetric else "--asym"]
    return shlex.join(["quantkit", "fit", request.model, *words, *sym, *(["--offline"] if request.offline else [])])


def _size(count: int) -> str:
    return f"{count}B" if count % 2**30 else f"{count // 2**30}GiB"


def _fit_as_asked(request: FitRequest) -> Named:
    folder = Path(request.model)
    if _holds_gguf(folder):
        return Named(folder.resolve().name, AS_STORED, _fit_gguf(request, folder))
    known = shipped().get(request.model)
    if known is not None and known.config is not None:
        model = shapes_in(known.config)
    else:
        source = find_source(request.model, offline=request.offline)
        raw = read_config(source.directory) if (source.directory / "config.json").is_file() else {}
        if quantization_of(raw):
            name = request.model if source.hub else folder.resolve().name
            asked = _asked(request, positions(SimpleNamespace(**text_values(raw))))
            return Named(name, AS_STORED, fit_checkpoint(source.directory, headers=source.headers(), **asked))
        model = _shapes(source.directory)
    recipe = choose_recipe(request.recipe, request.model)
    method = usual_method(request.format)
    numbers = AskedScheme(request.bits, request.group_size, request.symmetric, request.scheme)
    scheme = choose_scheme(method, recipe, numbers, request.format)
    fmt = choose_format(request.format, method, scheme, recipe)
    resolve = resolver(recipe, scheme, model.family.sixteen_bit)
    if request.group_size is None:
        resolve, _ = dividing(model, resolve, fmt)
    with explained(recipe):
        plan = make_plan(model, resolve, fmt, head=resolve(model.head_name or "", OUTSIDE))
    result = fit(model, plan, **_asked(request, positions(model.config), recipe.budget))
    return Named(request.model, f"{scheme}, stored as {fmt.name}", result)


def _asked(request: FitRequest, limit: int | None, recipe: BudgetSpec | None = None) -> dict[str, Any]:
    serving = choose_serving(limit, recipe, budget=request.budget, context=request.context, kv=request.kv)
    return serving | {"tensor_parallel": request.tensor_parallel, "engine": request.engine}


def _holds_gguf(folder: Path) -> bool:
    """Whether a path is a .gguf file, or a folder that is about one."""
    if not any(folder.glob("*.gguf")):
        return folder.suffix == ".gguf" and folder.is_file()
    return (folder / RESULT).is_file() or not any(folder.glob("*.safetensors"))


def _fit_gguf(request: FitRequest, folder: Path) -> Fit:
    """What llama.cpp loads of a .gguf file or its folder: not the safetensors that a run leaves beside it."""
    from quantkit.gguf.file import open_gguf  # imports torch
    from quantkit.gguf.folder import config_of
    from quantkit.gguf.reading import find_gguf, open_gguf_model
    from quantkit.model.config import config_from_dict, load_config
    from quantkit.model.skeleton import build

    recorded = read_result(folder) if (folder / RESULT).is_file() else None
    path = find_gguf(folder, recorded)
    if path is None:
        raise OutputError(f"{folder}: {RESULT} does not say which .gguf file it made; name the file: {folder}/...")
    if recorded is not None:
        model = build(load_config(find_source(recorded.model, offline=request.offline).directory))
    else:
        model = build(config_from_dict(config_of(open_gguf(path))))
    return fit_stored(model, open_gguf_model(path, model).stored(), **_asked(request, positions(model.config)))


def fit_page(result: Named, path: Path) -> None:
    """Write the picture of memory against context as one HTML page."""
    from quantkit.report.pages.fit import render_fit  # templates, which the table needs not

    write_text(path, render_fit(result.fit, result.name, result.scheme))


def _shapes(directory: Path) -> Shapes:
    """From a model's config.json."""
    known = shapes_of(read_object(directory / "config.json", EXPECTED))
    if known is not None:
        return known
    from quantkit.model.config import load_config  # takes seconds, and is seldom needed
    from quantkit.model.skeleton import build

    return build(load_config(directory))
