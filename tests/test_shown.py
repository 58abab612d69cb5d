# SPDX-License-Identifier: Apache-2.0
"""Text from files and users is shown as text: no markup, no control characters, no lines of its own."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Group
from rich.table import Table
from rich.text import Text

from quantkit.report.terminal.screen import Screen
from quantkit.text import json_text, one_line, printable
from tests.result_document import example, render_card, render_report
from tests.running import command, quantkit, run_process

HOSTILE = "\x1b]0;owned\x07 runs[old]/x [/b] \x9b31m \u202egpj \ud800 :warning:\nquantkit: forged"


def unprintable(text: str) -> set[str]:
    return {character for character in text if not character.isprintable() and character != "\n"}


def test_what_cannot_be_printed_is_replaced_one_for_one() -> None:
    assert printable("plain \u4e2d\u6587 ±") == "plain \u4e2d\u6587 ±"
    assert len(printable(HOSTILE)) == len(HOSTILE)
    assert printable(HOSTILE).isprintable()
    assert one_line(" a\n\tb\x1b ") == "a b\N{REPLACEMENT CHARACTER}"


def test_json_keeps_every_string_and_holds_no_control_character() -> None:
    document = {"a": HOSTILE.replace("\ud800", "\x7f"), "b": ["\U000e0001", "é"]}
    for ascii_only in (False, True):
        text = json_text(document, ascii_only=ascii_only)
        assert not unprintable(text)
        assert json.loads(text) == document
    assert "é" in json_text(document)


def in_text(shown: Screen) -> None:
    shown.print(Text(HOSTILE, style="red"), style="bold")


def in_string(shown: Screen) -> None:
    shown.print(HOSTILE, soft_wrap=True)


def in_table(shown: Screen) -> None:
    table = Table(HOSTILE, title=HOSTILE, box=None)
    table.add_row(HOSTILE)
    table.add_row(Text(HOSTILE, style="dim"))
    shown.print(Group(table, HOSTILE))


@pytest.mark.parametrize("show", [in_text, in_string, in_table])
def test_the_terminal_shows_text_as_it_is(show: Callable[[Screen], None]) -> None:
    file = io.StringIO()
    show(Screen(file=file, width=200))
    text = file.getvalue()
    assert not unprintable(text)
    assert "runs[old]/x [/b]" in text
    assert ":warning:" in text
    assert not any(line.startswith("quantkit:") for line in text.splitlines())


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the strings of a document are."""
    if isinstance(value, str):
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def spoiled(document: Any, path: tuple[Any, ...]) -> Any:
    if not path:
        return f"{document}{HOSTILE.replace(chr(0xD800), '')}"
    items = document.items() if isinstance(document, dict) else enumerate(document)
    changed = {key: spoiled(inner, path[1:]) if key == path[0] else inner for key, inner in items}
    return changed if isinstance(document, dict) else list(changed.values())


def test_pages_hold_no_control_characters() -> None:
    result = example(1)
    for path in places(result):
        if path[-1] not in ("kind", "format", "verdict"):  # words of ours, which choose the parts of the page
            for page in (render_report(spoiled(result, path)), render_card(spoiled(result, path))):
                assert not unprintable(page), path


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("command", "quantkit awq m --out runs[/b]"),
        ("model", "\x1b]0;owned\x07"),
        ("format", "[red]\x1b[2J"),
    ],
)
def test_inspect_shows_a_foreign_document(tmp_path: Path, key: str, value: str) -> None:
    (tmp_path / "quantkit.json").write_text(json.dumps(example(1) | {key: value}))
    done = quantkit("inspect", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert not unprintable(done.stdout + done.stderr)
    assert "".join(printable(value).split()) in "".join((done.stdout + done.stderr).split())
    printed = quantkit("inspect", str(tmp_path), "--json")
    assert not unprintable(printed.stdout)
    assert json.loads(printed.stdout)[key] == value


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["fit", "demo", "--\x1b[31mred"], 2),
        (["\x1b[31m"], 2),
        (["fit", "demo", "--tensor-parallel", "\x1b[31m"], 2),
        (["fit", "\x1b[31m\u202e[/b]"], 1),
        (["fit", "demo", "--budget", "\x1b[31m[/b]"], 1),
    ],
)
def test_words_of_the_user_are_quoted_without_their_control_characters(words: list[str], code: int) -> None:
    refused = quantkit(*words)
    assert refused.returncode == code
    assert refused.stderr
    assert not unprintable(refused.stderr)


def test_a_terminal_of_ascii_shows_everything(tmp_path: Path) -> None:
    (tmp_path / "quantkit.json").write_text(json.dumps(example(1) | {"model": "caf\u00e9 ±"}))
    shown = run_process(command("inspect", str(tmp_path)), PYTHONIOENCODING="ascii")
    assert shown.returncode == 0, shown.stderr
    printed = run_process(command("inspect", str(tmp_path), "--json"), PYTHONIOENCODING="ascii")
    assert printed.returncode == 0, printed.stderr
    assert json.loads(printed.stdout)["model"] == "caf\u00e9 ±"
