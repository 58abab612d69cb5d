# SPDX-License-Identifier: Apache-2.0
"""The fit command: from a name to the document of `fit.fit`, for a model, a recipe, or a folder that is quantized."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.checkpoint.writer import write_text
from quantkit.choices import choose_format, choose_recipe, choose_scheme, find_model
from quantkit.errors import ModelError
from quantkit.fit import config_from_dict, fit, fit_checkpoint
from quantkit.model.config import load_config
from quantkit.model.streaming import Architecture, build
from quantkit.plan import make_plan
from quantkit.recipe import resolver, shipped
from quantkit.report import render_fit

DEFAULT_CONTEXT = 8192


@dataclass(frozen=True)
class FitRequest:
    """What the user asked for; None means: not said."""

    model: str
    bits: int | None
    group_size: int | None
    symmetric: bool | None
    format: str | None
    recipe: Path | None
    budget: int
    context: int | None
    kv: str
    tensor_parallel: int
    offline: bool
    engine: str | None = None


def fit_request(request: FitRequest) -> dict[str, Any]:
    """The document of `fit.fit`, with "name" and "scheme" added; no weights are read.

    Raises:
        QuantkitError: a model, scheme, format or recipe that cannot be.
    """
    if _is_quantized(Path(request.model)):
        out = Path(request.model)
        limit = _positions(json.loads((out / "config.json").read_text(encoding="utf-8")).get("max_position_embeddings"))
        context = request.context or min(DEFAULT_CONTEXT, limit)
        result = fit_checkpoint(
            out,
            budget=request.budget,
            context=context,
            kv=request.kv,
            tensor_parallel=request.tensor_parallel,
            engine=request.engine,
        )
        return {"name": out.resolve().name, "scheme": "as stored"} | result
    architecture = _architecture(request)
    recipe = choose_recipe(request.recipe, request.model)
    method = "gptq" if (request.format or "").startswith("gptq") else "awq"
    scheme = choose_scheme(method, recipe, request.bits, request.group_size, request.symmetric, request.format)
    fmt = choose_format(request.format, method, scheme, recipe)
    plan = make_plan(architecture, resolver(recipe, scheme), fmt)
    limit = _positions(getattr(architecture.config, "max_position_embeddings", None))
    result = fit(
        architecture,
        plan,
        budget=request.budget,
        context=request.context or min(DEFAULT_CONTEXT, limit),
        kv=request.kv,
        tensor_parallel=request.tensor_parallel,
        engine=request.engine,
    )
    return {"name": request.model, "scheme": f"{scheme}, stored as {fmt.name}"} | result


def fit_page(result: dict[str, Any], path: Path) -> None:
    """Write the picture of memory against context as one HTML page."""
    write_text(path, render_fit(result, result["name"], result["scheme"]))


def _positions(limit: Any) -> int:
    return limit if isinstance(limit, int) and limit > 0 else DEFAULT_CONTEXT


def _is_quantized(folder: Path) -> bool:
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(raw, dict) and bool(raw.get("quantization_config"))


def _architecture(request: FitRequest) -> Architecture:
    """From the model's config.json; from the recipe's own sizes when the model is not here."""
    sizes = shipped()[request.model].config if request.model in shipped() else None
    try:
        return build(load_config(find_model(request.model, offline=request.offline or sizes is not None)))
    except ModelError:
        if sizes is None:
            raise
        return build(config_from_dict(sizes))
