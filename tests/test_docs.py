# SPDX-License-Identifier: Apache-2.0
"""What the pages promise: the commands and options that they name exist, and LOG.md keeps its order and its index."""

import re
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from quantkit.cli import app

ROOT = Path(__file__).parents[1]
LOG = (ROOT / "LOG.md").read_text(encoding="utf-8")
VERDICTS = ("kept", "negative", "measured", "mended", "open")


def commands() -> dict[str, Any]:
    group: Any = get_command(app)
    named: dict[str, Any] = group.commands
    return named


def test_the_readme_is_read_in_one_sitting() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_readme_lists_every_page() -> None:
    pages = {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}
    assert pages <= set(re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text(encoding="utf-8")))


@pytest.mark.parametrize("page", ["README.md", "docs/commands.md"])
def test_the_table_of_commands_names_all_of_them(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `quantkit (\w+)", text, re.MULTILINE)) == set(commands())


@pytest.mark.parametrize("page", ["README.md", "docs/commands.md", "docs/recipes.md", "docs/verdict.md"])
def test_every_option_that_a_page_names_exists(page: str) -> None:
    options = [option for command in commands().values() for option in command.params]
    exist = {name for option in options for name in (*option.opts, *option.secondary_opts)}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", (ROOT / page).read_text(encoding="utf-8")))
    assert named - exist <= {"--help"}


def anchor(heading: str) -> str:
    """The anchor of a heading, as GitHub and the site make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def log_titles() -> list[str]:
    return [line[3:] for line in LOG.splitlines() if re.match(r"## \d{4}", line)]


def test_every_title_of_the_log_has_a_date_and_a_verdict_and_the_newest_is_first() -> None:
    dates = []
    for title in log_titles():
        parts = re.fullmatch(r"(\d{4}-\d\d-\d\d): .+ \((\w+)\)", title)
        assert parts, f"{title}: expected 'YYYY-MM-DD: what (verdict)'"
        assert parts[2] in VERDICTS, title
        dates.append(parts[1])
    assert dates == sorted(dates, reverse=True)


def test_the_index_of_the_log_names_every_entry() -> None:
    anchors = [anchor(title) for title in log_titles()]
    assert len(set(anchors)) == len(anchors)
    index = LOG[: LOG.index(f"## {log_titles()[0]}")]
    assert set(re.findall(r"\]\(#([^)]+)\)", index)) == set(anchors)
