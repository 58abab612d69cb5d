# SPDX-License-Identifier: Apache-2.0
"""A conversation as text, by the model's own chat template.

Templates of reasoning models drop the `<think>` part of an assistant's turn, because it is not sent back in a
conversation. For calibration it is the part that matters. So such a turn is appended to the generation prompt, which is
how the model writes it.

The template runs in a process of its own (`sandbox.py`). That process is ended when it takes too much time or memory.
"""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Any, Self

import psutil
from transformers import PreTrainedTokenizerBase

from quantkit.calibration import sandbox
from quantkit.calibration.shapes import Conversation, Document, plain_text
from quantkit.text import clean_line

SECONDS, ALL_SECONDS = 3.0, 60.0  # of processor time: for one conversation, which usually takes 0.001, and for all
MEMORY = 1 << 30  # bytes of the template's process
LOOK = 0.02  # seconds between two looks at the process

Apply = Callable[[Conversation, bool], str]  # (messages, whether to add the generation prompt) -> text


class TemplateFaultError(Exception):
    """The chat template gave no text; the message says why."""


class ChatTemplate:
    """The chat template of a tokenizer; a context that ends the template's process.

    Attributes:
        dated: whether the template has asked for the date, which is always `sandbox.DATE`
        faults: reason -> number of conversations that were joined as plain lines because of it
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.dated = False
        self.faults: Counter[str] = Counter()
        self._tokenizer = tokenizer
        self._process: TemplateProcess | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.end()

    def as_text(self, document: Document) -> tuple[str, bool]:
        """Text of a document, and whether the tokenizer is to add its special tokens (a template writes its own)."""
        if isinstance(document, str):
            return document, True
        reason = "the tokenizer has no chat template"
        if self._tokenizer.chat_template:
            try:
                return render(document, self._apply, str(self._tokenizer.eos_token or "")), False
            except TemplateFaultError as fault:
                reason = f"the chat template refused them ({clean_line(fault)})"
        self.faults[reason] += 1
        return plain_text(document), True

    def prompt(self, conversation: Conversation) -> tuple[str, bool]:
        """Text that ends where the model's answer begins, and whether the tokenizer is to add its special tokens."""
        if self._tokenizer.chat_template:
            try:
                return self._apply(conversation, True), False
            except TemplateFaultError as fault:
                self.faults[clean_line(fault)] += 1
        return f"{plain_text(conversation)}\nassistant:", True

    def notes(self) -> tuple[str, ...]:
        """One note for each reason why conversations were joined without the template."""
        return tuple(
            f"{n} of the conversations joined as plain 'role: content' lines: {reason}"
            for reason, n in sorted(self.faults.items())
        )

    def protocol(self) -> str:
        """What the protocol of a token set says of the template, if anything."""
        return f"; the chat template was told that it is {sandbox.DATE:%d %b %Y}" if self.dated else ""

    def _apply(self, conversation: Conversation, generation: bool) -> str:
        if self._process is None:
            self._process = TemplateProcess(*_template_of(self._tokenizer))
        reply = self._process.ask({"messages": conversation, "generation": generation})
        if "fault" in reply:
            raise TemplateFaultError(reply["fault"])
        self.dated |= reply["dated"]
        return str(reply["text"])


def _template_of(tokenizer: PreTrainedTokenizerBase) -> tuple[str, dict[str, Any]]:
    """The template of a tokenizer and the special tokens that it may name.

    Raises:
        TemplateFaultError: it has several and no default, or one that is no text.
    """
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise TemplateFaultError(str(error)) from None
    if not isinstance(template, str):
        raise TemplateFaultError(f"expected text, got {type(template).__name__}")
    return template, dict(tokenizer.special_tokens_map)


def render(conversation: Conversation, apply: Apply, eos: str) -> str:
    """Text of a conversation by a chat template, the last assistant turn kept with its reasoning.

    The template's own rendering is taken unless words of the last turn are missing from it.

    Raises:
        TemplateFaultError: the template gives no text.
    """
    text = apply(conversation, False)
    *history, last = conversation
    if last["role"] != "assistant" or not history or _squeeze(last["content"] or "") in _squeeze(text):
        return text
    prompt, reply = apply(history, True), str(last["content"])
    if prompt.rstrip().endswith("<think>"):
        if "</think>" not in reply:
            return text
        reply = reply.lstrip().removeprefix("<think>")
        reply = reply.lstrip("\n") if prompt.endswith("\n") else reply
    return prompt + reply + eos


def _squeeze(text: str) -> str:
    """Drop white space, which templates add and strip freely."""
    return "".join(text.split())


class TemplateProcess:
    """The process that renders with one template, watched from here.

    Its time and memory are read from the system, which works alike on Linux, macOS and Windows. When it was ended, it
    stays ended: every later question has the same fault.
    """

    def __init__(self, template: str, variables: dict[str, Any]) -> None:
        self._fault = ""
        self._answers: SimpleQueue[bytes] = SimpleQueue()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(Path(sandbox.__file__))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except OSError as error:
            raise TemplateFaultError(f"it cannot be run: {error}") from None
        self._reader = Thread(target=self._read, daemon=True)
        self._reader.start()
        self._send({"template": template, "variables": variables})

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request: `text` and `dated`, or `fault`."""
        if self._fault:
            return {"fault": self._fault}
        self._send(request)
        try:
            line = self._answers.get(timeout=LOOK)
        except Empty:
            line = self._watch()
        if line:
            reply: dict[str, Any] = json.loads(line)
            return reply
        self._fault = self._fault or "its process ended without an answer"
        self.end()
        return {"fault": self._fault}

    def _watch(self) -> bytes:
        """Wait for an answer while the process keeps to its limits; empty if there will be none."""
        before, _ = _usage(self._process.pid)
        while True:
            try:
                return self._answers.get(timeout=LOOK)
            except Empty:
                seconds, memory = _usage(self._process.pid)
            if seconds - before > SECONDS:
                self._fault = f"it runs for more than {SECONDS:.0f} seconds"
            elif seconds > ALL_SECONDS:
                self._fault = f"it has run for more than {ALL_SECONDS:.0f} seconds in all"
            elif memory > MEMORY:
                self._fault = f"it takes more than {MEMORY >> 20} MiB of memory"
            if self._fault:
                return b""

    def end(self) -> None:
        """End the process, and leave nothing open."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(OSError):  # what is not yet written has no reader any more
                pipe.close()

    def _send(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):  # the process has ended, as its answer says
            self._process.stdin.write(json.dumps(request, default=str).encode() + b"\n")
            self._process.stdin.flush()

    def _read(self) -> None:
        """Pass the answers on, and an empty one when the process has ended; runs in a thread."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(b"")


def _usage(pid: int) -> tuple[float, int]:
    """(seconds of processor time, bytes of memory) of a process and of those that it has started.

    On Windows the Python of a virtual environment starts another one, which does the work.
    """
    seconds, memory = 0.0, 0
    with suppress(psutil.Error):  # it has just ended, which its pipe says, too
        first = psutil.Process(pid)
        for process in (first, *first.children(recursive=True)):
            times = process.cpu_times()
            seconds += times.user + times.system
            memory += process.memory_info().rss
    return seconds, memory
