# SPDX-License-Identifier: Apache-2.0
"""The recipes that ship, and what of each is on this machine."""

from typing import Any

from rich.table import Table

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


def catalogue_table(rows: list[dict[str, Any]]) -> Table:
    """The rows of `catalogue` as a table."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("recipe", no_wrap=True)
    table.add_column("model", overflow="fold")  # names to copy, so none is cut
    table.add_column("here")
    table.add_column("what it is")
    for row in rows:
        table.add_row(row["name"], row["model"], "yes" if row["path"] else "no", row["description"])
    return table
