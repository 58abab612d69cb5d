# SPDX-License-Identifier: Apache-2.0
"""Renders conversations with one chat template, as a process of its own (see `chat.py`).

A template is a program that comes with a model. It can loop for ever or make a string of 10 GB, and nothing within
Python can stop it there. So it runs in this process, which `chat.py` watches and ends.

The environment is that of transformers 5 (`utils/chat_template_utils.py`), but for two things: the date is always the
same, and so are random choices. The same conversation gives the same text on every day.

Standard input has one JSON object a line: first the template and its variables, then conversations. Standard output
answers each conversation with one line.
"""

import faulthandler
import json
import random
import sys
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any, BinaryIO

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

DATE = datetime(2024, 7, 26, 12)  # the date that Llama 3.1's template has when it is given none
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of the same field
LIFETIME = 600  # seconds for one conversation, after which this process ends by itself if nobody watches it
LARGEST_GROWTH, LARGEST_EXTRA = 8, 1 << 20  # characters of a text: for each of the request, and beside that


class Generation(Extension):
    """The tag that marks what the assistant wrote; its content is rendered as if the tag were not there."""

    tags = {"generation"}  # noqa: RUF012  (as the base class declares it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The nodes between the tag and its end."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class PlainNamespace(Namespace):
    """A namespace without names that begin with an underscore, which lead into Python itself."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that a template may pass a field named self
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise TemplateError(f"a namespace holds no names that begin with an underscore, got {name}")


def _raise(message: object) -> None:
    raise TemplateError(str(message))


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def renderer(template: str, variables: dict[str, Any]) -> Callable[..., tuple[str, bool]]:
    """A function (messages, generation) -> (text, whether the template asked for the date)."""
    dates: list[str] = []

    def strftime_now(format: str) -> str:
        dates.append(DATE.strftime(format))
        return dates[-1]

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": strftime_now,
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        "namespace": PlainNamespace,
    }
    compiled: list[Any] = []  # with the first conversation, because compiling runs parts of the template

    def render(messages: list[dict[str, Any]], generation: bool) -> tuple[str, bool]:
        compiled[:] = compiled or [environment.from_string(template)]
        random.seed(0)
        dates.clear()
        text = compiled[0].render(
            **variables,
            messages=list(map(_plain, messages)),
            tools=None,
            documents=None,
            add_generation_prompt=generation,
        )
        return text, bool(dates)

    return render


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """A message without empty fields, and with its reasoning under every name that templates read."""
    present = {name: value for name, value in message.items() if value is not None}
    reasoning = next((present[name] for name in REASONING if name in present), None)
    return present if reasoning is None else {"thinking": reasoning, **present, "reasoning_content": reasoning}


def answer(lines: Iterable[bytes], out: BinaryIO) -> None:
    """Answer each conversation with a JSON object: `text` and `dated`, or `fault`."""
    requests = iter(lines)
    render = renderer(**json.loads(next(requests)))
    for line in requests:
        faulthandler.dump_traceback_later(LIFETIME, exit=True)
        try:
            text, dated = render(**json.loads(line))
            largest = LARGEST_GROWTH * len(line) + LARGEST_EXTRA
            if len(text) > largest:
                raise TemplateError(f"it makes {len(text)} characters of {len(line)}")
            reply: dict[str, Any] = {"text": text, "dated": dated}
        except Exception as error:  # a template can raise anything
            name = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
            reply = {"fault": f"{name}{error}"[:1000]}
        out.write(json.dumps(reply).encode() + b"\n")
        out.flush()


if __name__ == "__main__":
    answer(sys.stdin.buffer, sys.stdout.buffer)
