# SPDX-License-Identifier: Apache-2.0
"""Text from files and users made fit to show: no control characters, no text that turns direction, no forged lines."""

import json
from typing import Any

UNSHOWN = "\N{REPLACEMENT CHARACTER}"


def printable(text: str) -> str:
    """The text with every character that cannot be printed replaced by one that can; its length stays.

    Line breaks and other white space become spaces, so that the text stays one line.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " if c.isspace() else UNSHOWN for c in text)


def printable_lines(text: str) -> str:
    """As `printable`, but lines stay lines; of the same class as the text, such as markup that is escaped already."""
    shown = "\n".join(map(printable, text.split("\n")))
    return text if shown == text else type(text)(shown)


def one_line(text: object) -> str:
    """The words of a text, printable, with one space between them."""
    return printable(" ".join(str(text).split()))


def json_text(document: Any, *, ascii_only: bool = False) -> str:
    """A document as indented JSON whose strings hold no unprintable character as such: those are written `\\u001b`."""
    text = json.dumps(document, indent=2, ensure_ascii=ascii_only)
    if text.replace("\n", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return "\\u007f" if character == "\x7f" else json.dumps(character)[1:-1]  # DEL is the one that json leaves
