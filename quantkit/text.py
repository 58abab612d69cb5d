# SPDX-License-Identifier: Apache-2.0
"""Text from files, users, hubs and libraries made fit to show: no control characters, no text that turns direction, no
forged lines, no secrets.
"""

import json
import os
import re
from typing import Any

UNSHOWN = "\N{REPLACEMENT CHARACTER}"
LONGEST_LINE = 200  # characters
FRAGMENT = 8  # characters of a known secret that give it away
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
SECRETS = (
    (re.compile(r"(?i)(authorization['\"]?\s*[:=]\s*)(?:['\"]?\w+\s+)?\S+"), r"\1***"),
    (re.compile(r"hf_[A-Za-z0-9]{16,}|eyJ[\w-]{8,}\.[\w-]+\.[\w-]+|(?i:bearer)\s+\S+"), "***"),
    (re.compile(r"(\w+://)[^\s/@]+@"), r"\1"),  # a name and password in an address
    (re.compile(r"(\w+://[^\s?#]*)[?#]\S*"), r"\1"),  # a signature in an address
    (re.compile(r"(?i)([\w-]*(?:signature|credential|secret|token|sig)=)[^\s&]+"), r"\1***"),
)


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


def clean_line(text: object, *secrets: str) -> str:
    """What a hub or a library says, as one line without secrets, cut to what a message can hold."""
    line = without_secrets(one_line(text), *secrets)
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE - 1]}…"


def without_secrets(text: str, *secrets: str) -> str:
    """The text with what looks like a token masked, and with addresses cut before what may be their signature.

    Args:
        secrets: tokens of which no part may appear, beside those of the environment
    """
    for pattern, instead in SECRETS:
        text = pattern.sub(instead, text)
    for secret in (*secrets, *(os.environ.get(name, "") for name in TOKEN_VARIABLES)):
        parts = {secret[start : start + FRAGMENT] for start in range(len(secret) - FRAGMENT + 1)}
        if any(part in text for part in parts):
            words = re.split(r"(\s+)", text)
            text = "".join("***" if any(part in word for part in parts) else word for word in words)
    return text


def json_text(document: Any, *, ascii_only: bool = False) -> str:
    """A document as indented JSON whose strings hold no unprintable character as such: those are written `\\u001b`."""
    text = json.dumps(document, indent=2, ensure_ascii=ascii_only)
    if text.replace("\n", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return "\\u007f" if character == "\x7f" else json.dumps(character)[1:-1]  # DEL is the one that json leaves
