# SPDX-License-Identifier: Apache-2.0
"""`quantkit chat`: a model answers, from the files that it has.

By default the weights are read as `verify` reads them, dequantized into a transformers model: that runs every format
that quantkit knows, on a CPU too. Or an engine's server is started as `serve` does it, and asked.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import psutil
import torch

from quantkit.calibration.chat import ChatTemplate
from quantkit.checkpoint.reader import Checkpoint
from quantkit.commands.process import ask, free_port, start, stop, wait_until_ready
from quantkit.commands.serve import ServeRequest, gguf_of, plan_serving, program_of, require_installed
from quantkit.errors import EngineError, InputError, ModelError
from quantkit.gguf.reading import open_gguf_model
from quantkit.jsonfile import read_object
from quantkit.model.generate import Read, fill, generate, parameter_count, picker
from quantkit.model.skeleton import Architecture
from quantkit.model.streaming import open_model
from quantkit.model.tokenizer import tokenizer_of
from quantkit.quantized import architecture_in, open_quantized, quantization_of, read_config
from quantkit.results.document import RESULT, read_result
from quantkit.settings.defaults import find_model, positions
from quantkit.units import format_bytes

Say = Callable[[str], None]  # shows a line on stderr
Conversation = list[dict[str, str]]
BEGIN, END = "<think>", "</think>"
SPARE = 0.9  # of the free memory


@dataclass(frozen=True)
class ChatRequest:
    """What the user asked for."""

    model: str
    device: torch.device
    engine: str | None = None
    python: Path | None = None
    max_new_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0
    offline: bool = False


@dataclass
class Answer:
    """What was said so far, and how fast; first: seconds to the first token."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    count: int = 0
    seconds: float = 0.0
    first: float | None = None
    complete: bool = True

    @property
    def thinking(self) -> str:
        """What stands before the end of the thoughts."""
        return self.text.partition(END)[0].removeprefix(BEGIN).strip() if END in self.text else ""

    @property
    def reply(self) -> str:
        """What stands behind the thoughts."""
        return (self.text.partition(END)[2] if END in self.text else self.text).strip()

    def content(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "answer": self.reply,
            "thinking": self.thinking,
            "tokens": self.count,
            "token_ids": self.tokens,
            "complete": self.complete,
            "seconds": round(self.seconds, 3),
            "seconds_to_first_token": None if self.first is None else round(self.first, 3),
            "tokens_per_second": round(self.count / self.seconds, 2) if self.seconds else None,
        }

    def stats(self) -> str:
        """The same in a line."""
        first = "" if self.first is None else f"first token after {self.first:.2f} s, "
        speed = f"{self.count / self.seconds:.1f} tokens/s" if self.seconds else "no time"
        memory = format_bytes(psutil.Process().memory_info().rss)
        return f"{self.count} tokens, {first}{speed}, {memory} of RAM"


class Speaker(Protocol):
    """Something that answers; a context that frees what it holds."""

    described: str

    def __enter__(self) -> Self: ...
    def __exit__(self, *error: object) -> None: ...
    def answer(self, conversation: Conversation, answer: Answer) -> Iterator[str]:
        """The pieces of an answer as they come; `answer` is filled meanwhile."""
        ...


def speaker(request: ChatRequest, say: Say) -> Speaker:
    """Load the model, or start the engine.

    Raises:
        EngineError: an engine that is not installed, or that ends.
        ModelError: no such model. InputError: it does not fit in the memory that is free.
    """
    path = Path(request.model)
    if request.engine in ("vllm", "sglang", "llama.cpp") or (path.suffix == ".gguf" and request.engine is None):
        return Served(request, say)
    return Loaded(request, say)


# ---------------------------------------------------------------- our own reading


class Loaded:
    """A transformers model with weights as quantkit reads them."""

    def __init__(self, request: ChatRequest, say: Say) -> None:
        self.request = request
        directory, model, read, how = _opened(request)
        dtype = _dtype(model, request.device)
        _require_memory(request, model, dtype)
        where = f"{request.device}, {str(dtype).removeprefix('torch.')}"
        self.described = f"transformers on {where}: {how}"
        say(f"engine: {self.described}")
        self.tokenizer = tokenizer_of(directory)()
        self.template = ChatTemplate(self.tokenizer)
        self.limit = positions(model.config)
        self.ends = _ends(directory, self.tokenizer.eos_token_id)
        self.model = fill(model, read, request.device, dtype, lambda index: None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.template.__exit__(None, None, None)

    def answer(self, conversation: Conversation, answer: Answer) -> Iterator[str]:
        """See `Speaker`."""
        request, began = self.request, time.monotonic()
        text, special = self.template.prompt(conversation)
        prompt = self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        room = request.max_new_tokens if self.limit is None else min(request.max_new_tokens, self.limit - len(prompt))
        if room < 1:
            raise InputError(f"the conversation has {len(prompt)} tokens, the model {self.limit}; /reset begins anew")
        if text.rstrip().endswith(BEGIN):
            answer.text = BEGIN + "\n"
            yield answer.text
        shown = ""
        pick = picker(request.temperature, request.seed)
        answer.complete = False
        for token in generate(self.model, prompt, self.ends, pick):
            answer.first = answer.first or time.monotonic() - began
            answer.tokens.append(token)
            answer.count, answer.seconds = len(answer.tokens), time.monotonic() - began
            decoded = str(self.tokenizer.decode(answer.tokens, skip_special_tokens=True))
            if not decoded.endswith("\N{REPLACEMENT CHARACTER}") and decoded.startswith(shown):
                piece, shown = decoded[len(shown) :], decoded
                answer.text += piece
                yield piece
            if answer.count >= room:
                return
        answer.complete = True


def _opened(request: ChatRequest) -> tuple[Path, Architecture, Read, str]:
    """The folder of the tokenizer, the model without weights, what reads them, and how they are stored."""
    path = Path(request.model)
    gguf = gguf_of(path)
    if gguf is not None:
        folder = path if path.is_dir() else path.parent
        if not (folder / RESULT).is_file():
            raise EngineError(f"{gguf}: no {RESULT} beside it; use --engine llama.cpp")
        original = open_model(find_model(read_result(folder).model, offline=request.offline))
        return original.directory, original, open_gguf_model(gguf, original).read, f"{gguf.name}, dequantized"
    directory = find_model(request.model, offline=request.offline)
    if not quantization_of(read_config(directory)):
        model = open_model(directory)
        return directory, model, model.checkpoint.read_many, "16 bit, as stored"
    built: list[Architecture] = []

    def model_of(raw: Any, checkpoint: Checkpoint) -> Architecture:
        built.append(architecture_in(raw, checkpoint))
        return built[0]

    opened = open_quantized(directory, model_of)
    return directory, built[0], opened.read, f"{opened.format_name}, dequantized"


def _dtype(model: Architecture, device: torch.device) -> torch.dtype:
    """float32 on a CPU that has the memory for it, else 16 bit."""
    if device.type == "cpu" and 4 * parameter_count(model) < SPARE * psutil.virtual_memory().available:
        return torch.float32
    return torch.bfloat16


def _require_memory(request: ChatRequest, model: Architecture, dtype: torch.dtype) -> None:
    needed = parameter_count(model) * dtype.itemsize
    on_gpu = request.device.type == "cuda"
    free = torch.cuda.mem_get_info(request.device)[0] if on_gpu else psutil.virtual_memory().available
    if needed > SPARE * free:
        raise InputError(
            f"{request.model}: takes {format_bytes(needed)} dequantized, and {format_bytes(free)} are free on "
            f"{request.device}; use --engine vllm, which keeps it quantized"
        )


def _ends(directory: Path, own: int | list[int] | None) -> set[int]:
    """The tokens that end an answer: of generation_config.json and of the tokenizer."""
    path = directory / "generation_config.json"
    said = read_object(path, "expected an object").get("eos_token_id") if path.is_file() else None
    ends = [*(said if isinstance(said, list) else [said]), *(own if isinstance(own, list) else [own])]
    return {end for end in ends if isinstance(end, int)}


# ---------------------------------------------------------------- an engine's server


class Served:
    """A server of an engine, started for this conversation."""

    def __init__(self, request: ChatRequest, say: Say) -> None:
        path = Path(request.model)
        folder = path if path.exists() else find_model(request.model, offline=request.offline)
        wanted = ServeRequest(folder, engine=request.engine, python=request.python, port=free_port())
        serving = plan_serving(wanted)
        require_installed(serving)
        self.request, self.name, self.described = request, serving.name, serving.engine
        program = program_of(wanted, serving)
        say(f"engine: {serving.engine}; log: {program.log}")
        self.url = program.url
        with ExitStack() as stack:
            running = start(program)
            stack.callback(stop, [running])
            wait_until_ready(running)
            self.stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def answer(self, conversation: Conversation, answer: Answer) -> Iterator[str]:
        """See `Speaker`."""
        request, began = self.request, time.monotonic()
        body = {
            "model": self.name,
            "messages": conversation,
            "stream": True,
            "max_tokens": request.max_new_tokens,
            "temperature": request.temperature,
            "seed": request.seed,
        }
        thinking = False
        for delta in ask(f"{self.url}/v1/chat/completions", body):
            thought = delta.get("reasoning_content") or delta.get("reasoning") or ""
            piece = str(delta.get("content") or "")
            if thought and not thinking:
                thought, thinking = f"{BEGIN}\n{thought}", True
            if piece and thinking:
                piece, thinking = f"{END}\n{piece}", False
            if not thought + piece:
                continue
            answer.first = answer.first or time.monotonic() - began
            answer.text += thought + piece
            answer.count, answer.seconds = answer.count + 1, time.monotonic() - began
            yield thought + piece


# ---------------------------------------------------------------- the conversation


def opening(system: str | None) -> Conversation:
    """How a conversation begins."""
    return [{"role": "system", "content": system}] if system else []


def turn(speaks: Speaker, conversation: Conversation, question: str, show: Callable[[str], None]) -> Answer:
    """Ask a question, show the answer as it comes, and keep both in the conversation, without the thoughts."""
    answer = Answer()
    asked: Conversation = [*conversation, {"role": "user", "content": question}]
    for piece in speaks.answer(asked, answer):
        show(piece)
    conversation[:] = [*asked, {"role": "assistant", "content": answer.reply}]
    return answer


def parting(first: Sequence[int], second: Sequence[int]) -> int | None:
    """The number of the first token in which two answers differ; None: in none."""
    if list(first) == list(second):
        return None
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def compared(request: ChatRequest, asked: Conversation, say: Say) -> Answer:
    """One model's answer to a conversation that ends with a question; it is gone from memory afterwards."""
    with speaker(request, say) as speaks:
        return turn(speaks, asked[:-1], asked[-1]["content"], lambda piece: None)


def original_of(model: str) -> str:
    """The model that a folder was made of.

    Raises:
        ModelError: nothing says which.
    """
    folder = Path(model)
    if not (folder / RESULT).is_file():
        raise ModelError(
            f"{model}: no {RESULT}, so nothing says which model it was made from; --compare MODEL names one"
        )
    return read_result(folder).model
