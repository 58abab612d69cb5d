# SPDX-License-Identifier: Apache-2.0
"""The recipes that ship, and what of each is on this machine."""

from typing import Any

from quantkit.checkpoint.source import resolve
from quantkit.errors import ModelError
from quantkit.recipe import shipped
from quantkit.resources import demo_dir


def model_of(recipe: str) -> str:
    """What a recipe's name stands for: a hub id, or the folder of the bundled model."""
    target = shipped()[recipe].model or recipe
    return str(demo_dir()) if target == "demo" else target


def catalogue() -> list[dict[str, Any]]:
    """One row a recipe: name, model, description, and the folder it is in ("path"), or None if it is not here."""
    rows = []
    for name, recipe in shipped().items():
        try:
            path: str | None = str(resolve(model_of(name), offline=True, recipe_models={}))
        except ModelError:
            path = None
        row = {"name": name, "model": recipe.model, "description": recipe.description, "path": path}
        rows.append(row)
    return rows
