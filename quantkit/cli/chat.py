# SPDX-License-Identifier: Apache-2.0
"""The command chat."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.cli.console import heed_termination, print_json, quiet_libraries, told
from quantkit.cli.options import ChatEngine, Device, Json, Offline
from quantkit.report.terminal.screen import Terminal
from quantkit.text import printable_lines

if TYPE_CHECKING:
    from quantkit.commands.chat import ChatRequest, Conversation, Say, Speaker

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
HELP = "/reset begins anew, /stats says how fast, /exit ends"


def chat(
    model: Annotated[str, typer.Argument(metavar="OUT|MODEL|FILE.gguf", help="What is to answer.")],
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="One question: the answer goes to stdout, and that is all.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="What the model is told first.")] = None,
    compare: Annotated[
        str | None,
        typer.Option("--compare", metavar="OUT2|original", help="With --prompt: another that answers, too."),
    ] = None,
    engine: ChatEngine = None,
    engine_python: Annotated[
        Path | None, typer.Option("--engine-python", help="The python of the environment that has the engine.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="The longest answer.")] = 512,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, max=5.0, help="0: the likeliest.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Of tokens that are drawn.")] = 0,
    device: Device = "auto",
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Talk to a model. Answers one question with --prompt, or begins a conversation; greedy unless --temperature."""
    with told():
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        from quantkit.commands import chat as command
        from quantkit.errors import InputError
        from quantkit.hardware.machine import choose_device

        quiet_libraries()
        heed_termination()
        if prompt is None and (json or compare):
            raise InputError(f"{'--json' if json else '--compare'}: needs --prompt TEXT")
        request = command.ChatRequest(
            model=model,
            device=choose_device(device),
            engine=engine,
            python=engine_python,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            offline=offline,
        )
        say = Terminal().say
        if prompt is not None and compare:
            asked = [*command.opening(system), {"role": "user", "content": prompt}]
            _compare(request, compare, asked, say, json)
            return
        with command.speaker(request, say) as speaks:
            conversation = command.opening(system)
            if prompt is None:
                say(HELP)
                _converse(speaks, conversation, system, say)
                return
            writer = Writer(quiet=json)
            answer = command.turn(speaks, conversation, prompt, writer.show)
            writer.end()
            if json:
                print_json({"model": model, "engine": speaks.described, "prompt": prompt} | answer.content())
            else:
                say(answer.stats())


class Writer:
    """Shows an answer on stdout as it comes: no control sequence of it, its thoughts dimmed on a terminal."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.dims = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self.dim = False

    def show(self, piece: str) -> None:
        """A piece of the answer."""
        if self.quiet:
            return
        text = printable_lines(piece.replace("\t", "    "))
        if self.dims and "<think>" in text and not self.dim:
            before, _, text = text.partition("<think>")
            text, self.dim = f"{before}{DIM}<think>{text}", True
        if self.dim and "</think>" in text:
            before, _, after = text.partition("</think>")
            text, self.dim = f"{before}</think>{PLAIN}{after}", False
        sys.stdout.write(text)
        sys.stdout.flush()

    def end(self) -> None:
        """The end of the answer."""
        if not self.quiet:
            sys.stdout.write(f"{PLAIN}\n" if self.dim else "\n")
            sys.stdout.flush()


def _converse(speaks: "Speaker", conversation: "Conversation", system: str | None, say: "Say") -> None:
    """Questions from stdin, until it ends."""
    from quantkit.commands.chat import Answer, opening, turn
    from quantkit.errors import QuantkitError

    last = Answer()
    while True:
        if sys.stdin.isatty():
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = sys.stdin.readline()
        question = line.strip()
        if not line or question == "/exit":
            return
        if question == "/reset":
            conversation[:] = opening(system)
            say("the conversation begins anew")
        elif question == "/stats":
            say(last.stats())
        elif question.startswith("/"):
            say(HELP)
        elif question:
            writer = Writer()
            try:
                last = turn(speaks, conversation, question, writer.show)
            except QuantkitError as error:
                say(str(error))
            writer.end()


def _compare(request: "ChatRequest", other: str, asked: "Conversation", say: "Say", json: bool) -> None:
    """Two models answer one after the other; where their answers part is told."""
    from quantkit.commands.chat import compared, original_of, parting

    models = (request.model, original_of(request.model) if other == "original" else other)
    answers = [compared(replace(request, model=model), asked, say) for model in models]
    at = parting(answers[0].tokens, answers[1].tokens)
    if json:
        rows = [{"model": model} | answer.content() for model, answer in zip(models, answers, strict=True)]
        print_json({"prompt": asked[-1]["content"], "answers": rows, "first_difference": at})
        return
    for model, answer in zip(models, answers, strict=True):
        sys.stdout.write(printable_lines(f"--- {model}\n{answer.text}\n"))
    sys.stdout.write("the answers are the same\n" if at is None else f"the answers part at token {at + 1}\n")
