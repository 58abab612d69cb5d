# SPDX-License-Identifier: Apache-2.0
"""A row of a data set -> a text or a conversation.

Data sets name their fields in a few usual ways, which the tables below list. A row is taken by the first that it fits:

    messages, conversations          a list of turns: role and content, or from and value
    text                             a string
    instruction/output and others    two turns; `input` or `context` is added to the first
    content                          a string

A field that is named by the user (`SOURCE#NAME`) is a string or a list of turns.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from quantkit.errors import InputError
from quantkit.text import clean_line

Conversation = list[dict[str, Any]]
Document = str | Conversation

TURNS = ("messages", "conversations", "conversation")
PAIRS = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("prompt", "chosen"),
    ("prompt", "output"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("query", "answer"),
    ("problem", "solution"),
    ("problem", "answer"),
    ("input", "output"),
)
MORE = ("input", "context")  # what the first turn of a pair goes on with
SYSTEM = ("system", "system_prompt")  # what comes before the first turn
FIELDS = tuple(dict.fromkeys([*TURNS, "text", *(name for pair in PAIRS for name in pair), *MORE, *SYSTEM, "content"]))
EXPECTED = (
    "text, messages (role and content), conversations (from and value), instruction and output, "
    "prompt and response, or question and answer"
)
ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"} | {
    "model": "assistant",
    "observation": "tool",
}
CALLS = ("tool_calls", "function_call", "reasoning_content")  # what a turn may hold instead of content


class NoShapeError(Exception):
    """A row that is nothing of what is known; the message says what it is."""


def document_of(record: object, where: str, field: str | None) -> Document | None:
    """The text or the turns of a row; None if its field is null or holds no words.

    Args:
        record: the row
        where: its file and line, for messages
        field: the name of the field to take; None: the first that fits

    Raises:
        InputError: the row is of no known shape, or lacks the field.
    """
    try:
        if not isinstance(record, dict):
            raise NoShapeError(type(record).__name__)
        if field is None:
            document = _by_shape(record)
        elif field in record:
            document = _value(record[field])
        else:
            raise NoShapeError(_names(record))
    except NoShapeError as got:
        expected = EXPECTED if field is None else f"a field {field!r}"
        hint = "name the field with --field NAME, or mend the row" if field is None else "name one that each row has"
        raise InputError(f"{where}: expected {expected}, got {got}; {hint}") from None
    return document if _has_words(document) else None


def _by_shape(record: Mapping[str, Any]) -> Document | None:
    for name in TURNS:
        if record.get(name):
            turns = _value(record[name])
            if isinstance(turns, str):
                raise NoShapeError(f"text in {name}")
            return _after_system(record, turns or [])
    if record.get("text") is not None:
        return _text(record["text"], "text")
    for names in PAIRS:
        if all(name in record for name in names):
            return _pair(record, *names)
    if record.get("content") is not None:
        return _text(record["content"], "content")
    if any(name in record for name in (*TURNS, "text", "content")):
        return None
    raise NoShapeError(_names(record))


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise NoShapeError(f"{type(value).__name__} in {name}")
    return value


def _value(value: object) -> Document | None:
    """A text, or a list of turns."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        value = [dict(zip(value, turn, strict=False)) for turn in zip(*value.values(), strict=False)]
    if isinstance(value, list):
        return [_turn(item) for item in value]
    raise NoShapeError(f"{type(value).__name__}, neither a text nor a list of turns")


def _pair(record: Mapping[str, Any], first: str, second: str) -> Conversation | None:
    """Two turns; either may be given as turns already, and the second may begin with all that came before it."""
    question, answer = (_side(record[name], role) for name, role in ((first, "user"), (second, "assistant")))
    if not _has_words(question) or not _has_words(answer):
        return None
    assert question is not None
    assert answer is not None
    if answer[0]["role"] != "assistant":
        return answer
    more = next((record[name] for name in MORE if name not in (first, second) and _is_words(record.get(name))), None)
    if more is not None and isinstance(record[first], str):
        question[0]["content"] += f"\n\n{more}"
    return _after_system(record, question + answer)


def _side(value: object, role: str) -> Conversation | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    turns = _value(value)
    assert not isinstance(turns, str)
    return turns


def _after_system(record: Mapping[str, Any], turns: Conversation) -> Conversation:
    system = next((record[name] for name in SYSTEM if _is_words(record.get(name))), None)
    if system is None or not turns or turns[0]["role"] == "system":
        return turns
    return [{"role": "system", "content": system}, *turns]


def _turn(value: object) -> dict[str, Any]:
    """One turn with a role and content; content is text, or None where the turn calls a tool."""
    if not isinstance(value, dict):
        raise NoShapeError(f"a turn that is {type(value).__name__}")
    role = next((value[name] for name in ("role", "from") if value.get(name) is not None), None)
    content = next((value[name] for name in ("content", "value") if value.get(name) is not None), None)
    if isinstance(content, list):
        content = "".join(map(_part, content))
    present = any(name in value for name in ("content", "value", *CALLS))
    if not present or not isinstance(role, str) or not isinstance(content, str | None):
        raise NoShapeError(f"a turn with {_names(value)}, without a role and text")
    others = {name: item for name, item in value.items() if name not in ("from", "value")}
    return others | {"role": ROLES.get(role, role), "content": content}


def _part(part: object) -> str:
    """The text of a part of some content; pictures and sounds have none."""
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise NoShapeError(f"a turn with a part that is {type(part).__name__}")
    text = part.get("text")
    return text if isinstance(text, str) else ""


def _has_words(document: Document | None) -> bool:
    """Whether a text or every turn holds something."""
    if document is None or isinstance(document, str):
        return _is_words(document)
    return (
        bool(document)
        and all(turn["content"] is not None or any(turn.get(name) for name in CALLS) for turn in document)
        and any(_is_words(turn["content"]) for turn in document)
    )


def _is_words(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _names(record: Mapping[Any, Any]) -> str:
    return f"the fields {clean_line(', '.join(map(str, record)))}" if record else "no fields"


def plain_text(turns: Sequence[Mapping[str, Any]]) -> str:
    """A conversation as `role: content` lines, for models without a chat template."""
    return "\n".join(f"{turn['role']}: {_said(turn)}" for turn in turns)


def _said(turn: Mapping[str, Any]) -> str:
    calls = next((turn[name] for name in CALLS if turn.get(name)), None)
    return turn["content"] or ("" if calls is None else json.dumps(calls, default=str, ensure_ascii=False))
