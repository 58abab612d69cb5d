# SPDX-License-Identifier: Apache-2.0
"""`quantkit serve`: an engine's own server with the flags of `fit`. We write no server ourselves.

What does not fit is refused before the start. The server is waited for, its KV cache is compared with what `fit`
promised, and it ends with us.
"""

import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

from quantkit.checkpoint.writer import write_text
from quantkit.commands.process import (
    PAUSE,
    Program,
    Running,
    is_loopback,
    kv_tokens,
    last_problem,
    require_alive,
    require_port,
    start,
    stop,
    wait_until_ready,
)
from quantkit.errors import EngineError, InputError, ModelError, OutputError
from quantkit.hardware.card import visible_card
from quantkit.model.shapes import text_values
from quantkit.quantized import read_config
from quantkit.records import Fit, Result
from quantkit.results.document import RESULT, read_result
from quantkit.serving.balancer import nginx_config
from quantkit.serving.fit import fit_checkpoint
from quantkit.serving.flags import START
from quantkit.settings.defaults import choose_serving, positions
from quantkit.text import one_line
from quantkit.units import format_bytes

MODULES = {
    "vllm": ("vllm.entrypoints.openai.api_server", "--model"),
    "sglang": ("sglang.launch_server", "--model-path"),
}
PACKAGES = {"vllm": "vllm", "sglang": "sglang", "llama.cpp": "llama_cpp"}
KEYS = {"vllm": "VLLM_API_KEY", "llama.cpp": "LLAMA_API_KEY"}
INSTALL = {
    "vllm": "pip install 'quantkit[serve]', or --engine-python PATH of an environment that has it",
    "sglang": "pip install sglang, or --engine-python PATH of an environment that has it",
    "llama.cpp": "install llama.cpp, whose llama-server is looked for in PATH",
}
Say = Callable[[str], None]  # shows a line on stderr
RESTARTS = 5  # times that a replica is started again


@dataclass(frozen=True)
class ServeRequest:
    """What the user asked for; None means: not said. extra: words for the engine, as they are."""

    folder: Path
    engine: str | None = None
    python: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    budget: int | None = None
    context: int | None = None
    kv: str | None = None
    tensor_parallel: int = 1
    replicas: int = 1
    nginx: bool = False
    log: Path | None = None
    extra: tuple[str, ...] = ()


@dataclass(frozen=True)
class Serving:
    """What is to be started: the engine, its words without host and port, and what `fit` said, where it could."""

    engine: str
    words: tuple[str, ...]
    fit: Fit | None
    name: str


def plan_serving(request: ServeRequest) -> Serving:
    """The engine's command for a folder or a .gguf.

    Raises:
        InputError: a context that does not fit, or options that do not go together.
        EngineError: the engine does not load the folder. ModelError: there is no such folder.
    """
    _check(request)
    path = gguf_of(request.folder)
    if path is not None:
        return _plan_gguf(request, path)
    if not (request.folder / "config.json").is_file():
        raise ModelError(f"{request.folder}: no config.json; expected a folder with a checkpoint, or a .gguf file")
    fit = folder_fit(request)
    engine = request.engine or (fit.engine.name if fit.engine else "vllm")
    if engine not in MODULES:
        raise EngineError(f"{request.folder}: {_why_not(fit)}")
    name = one_line(request.folder.resolve().name)
    words = [*engine_start(engine, request.python), str(request.folder), "--served-model-name", name]
    words += _flags(request, fit)
    if engine == "vllm" and (parser := reasoning_parser(request.folder)):
        words += ["--reasoning-parser", parser]
    return Serving(engine, (*words, *request.extra), fit, name)


def _check(request: ServeRequest) -> None:
    if not is_loopback(request.host) and not request.api_key:
        raise InputError(
            f"--host {request.host}: others can reach it; give --api-key KEY too, or leave --host at 127.0.0.1"
        )
    if request.replicas > 1 and not request.nginx:
        raise InputError(f"--replicas {request.replicas}: add --nginx, which hands requests on to them")
    if request.python is not None and not request.python.is_file():
        raise InputError(f"--engine-python {request.python}: no such file; expected the python of an environment")


def gguf_of(folder: Path) -> Path | None:
    """The .gguf that is meant: the file itself, or what a run of ours has made in its folder."""
    if folder.suffix == ".gguf" and folder.is_file():
        return folder
    files = sorted(folder.glob("*.gguf")) if folder.is_dir() else []
    if not files or ((folder / "config.json").is_file() and not (folder / RESULT).is_file()):
        return None
    if len(files) > 1:
        raise OutputError(f"{folder}: {len(files)} .gguf files; give one of them: {files[0]}")
    return files[0]


def _plan_gguf(request: ServeRequest, path: Path) -> Serving:
    if request.engine not in (None, "llama.cpp"):
        raise EngineError(f"{path}: {request.engine} does not serve .gguf files; use --engine llama.cpp")
    recorded = _recorded(request.folder)
    fit = recorded.verification.fit if recorded and recorded.verification else None
    asked = request.budget is not None or request.context is not None
    if fit is not None and asked:
        from quantkit.commands.fit import FitRequest, fit_request

        asked_fit = FitRequest(
            model=str(request.folder),
            bits=None,
            group_size=None,
            symmetric=None,
            format=None,
            recipe=None,
            budget=request.budget,
            context=request.context,
            kv=request.kv,
            tensor_parallel=1,
            offline=True,
        )
        fit = fit_request(asked_fit).fit
    name = one_line(path.stem)
    start_words = list(engine_start("llama.cpp", request.python))
    if len(start_words) > 2:  # llama-cpp-python's server, whose options have other names
        context = request.context or (fit.engine.context if fit and fit.engine else 0)
        words = [*start_words, str(path), "--model_alias", name, "--n_gpu_layers", "-1", "--n_ctx", str(context)]
    else:
        flags = _flags(request, fit) if fit else ["--ctx-size", str(request.context or 0), "--n-gpu-layers", "999"]
        words = [*start_words, str(path), "--alias", name, *flags]
    return Serving("llama.cpp", (*words, *request.extra), fit, name)


def folder_fit(request: ServeRequest) -> Fit:
    """Memory of a folder, within what was asked, or what its run was judged by."""
    recorded = _recorded(request.folder)
    before = recorded.verification.fit if recorded and recorded.verification else None
    serving = choose_serving(
        positions(SimpleNamespace(**text_values(read_config(request.folder)))),
        budget=request.budget or (before.budget_bytes if before else None),
        context=request.context or (before.context if before else None),
        kv=request.kv or (before.kv if before else None),
    )
    engine = request.engine if request.engine in MODULES else None
    return fit_checkpoint(request.folder, **serving, tensor_parallel=request.tensor_parallel, engine=engine)


def _recorded(folder: Path) -> Result | None:
    return read_result(folder) if (folder / RESULT).is_file() else None


def _flags(request: ServeRequest, fit: Fit) -> list[str]:
    """The flags of `fit`.

    Raises:
        InputError: the context that was asked for, or any, does not fit.
    """
    engine = fit.engine
    budget = format_bytes(fit.budget_bytes)
    if engine is None or not engine.flags:
        raise InputError(
            f"{request.folder}: no context fits in {budget}; weights and workspace take "
            f"{format_bytes(fit.total_bytes - fit.tensor_parallel.kv_bytes)}; give a larger --budget"
        )
    if request.context is not None and not fit.fits:
        raise InputError(
            f"--context {request.context}: {engine.context} tokens fit in {budget}; use --context {engine.context}, "
            "--kv fp8, or a larger --budget"
        )
    return engine.flags


def _why_not(fit: Fit) -> str:
    reasons = [reason for engine in MODULES if (reason := fit.engines.get(engine))]
    return reasons[0] if reasons else "no engine with a server loads it"


def engine_start(engine: str, python: Path | None) -> tuple[str, ...]:
    """The words that start an engine's server, up to the model's name; the usual ones where it is not here."""
    module = MODULES.get(engine)
    if engine == "llama.cpp":
        if python is not None or (shutil.which(START[engine][0]) is None and find_spec("llama_cpp") is not None):
            return (str(python or sys.executable), "-m", "llama_cpp.server", "--model")
        return START[engine]
    assert module is not None
    if python is not None:
        return (str(python), "-m", *module)
    if shutil.which(START[engine][0]) is None and find_spec(PACKAGES[engine]) is not None:
        return (sys.executable, "-m", *module)
    return START[engine]


def reasoning_parser(folder: Path) -> str | None:
    """vLLM's parser for models whose chat template knows of thoughts."""
    templates = [folder / "chat_template.jinja", folder / "tokenizer_config.json"]
    text = "".join(path.read_text(encoding="utf-8", errors="replace") for path in templates if path.is_file())
    if "</think>" not in text:
        return None
    return "qwen3" if str(read_config(folder).get("model_type", "")).startswith("qwen3") else "deepseek_r1"


# ---------------------------------------------------------------- running


def serve(request: ServeRequest, say: Say) -> None:
    """Start, wait, say where it answers, and stay until it ends or we are interrupted.

    Raises:
        EngineError: the engine is not installed, or ends.
    """
    serving = plan_serving(request)
    require_installed(serving)
    card = visible_card()
    if serving.fit and card and serving.fit.budget_bytes > card.memory_bytes:
        size = format_bytes(card.memory_bytes)
        raise InputError(f"--budget {format_bytes(serving.fit.budget_bytes)}: {card.name} has {size}; give less")
    require_port(request.host, request.port)
    folder = Path(tempfile.mkdtemp(prefix="quantkit-serve-"))
    programs = [program_of(request, serving, index, folder) for index in range(request.replicas)]
    for program in programs:
        if program.port != request.port:
            require_port(program.host, program.port)
    servers: list[Running] = []
    try:
        for program in programs:
            say(f"starting {program.name}; log: {program.log}")
            servers.append(start(program))
        for running in servers:
            wait_until_ready(running)
            _compare(say, serving, running.program.log)
        front = servers[0].program
        if request.nginx:
            servers.append(start(_nginx(request, programs, folder)))
            wait_until_ready(servers[-1])
            front = servers[-1].program
        print(_how_to_ask(serving, front.url, request.api_key), flush=True)
        _watch(say, servers)
    finally:
        stop(servers)


def require_installed(serving: Serving) -> None:
    """Refuse an engine that is not here.

    Raises:
        EngineError: with how to get it.
    """
    if shutil.which(serving.words[0]) is None:
        raise EngineError(f"{serving.engine} is not installed here; {INSTALL[serving.engine]}")


def program_of(request: ServeRequest, serving: Serving, index: int = 0, folder: Path | None = None) -> Program:
    """What is started: one of several servers, whose log lies in a folder."""
    folder = folder or Path(tempfile.mkdtemp(prefix="quantkit-serve-"))
    alone = not request.nginx
    host, port = (request.host, request.port) if alone else ("127.0.0.1", request.port + 1 + index)
    log = request.log if request.log and request.replicas == 1 else folder / f"{serving.engine}-{index}.log"
    environment = {KEYS[serving.engine]: request.api_key} if request.api_key and serving.engine in KEYS else {}
    if request.replicas > 1 and "CUDA_VISIBLE_DEVICES" not in os.environ:
        environment["CUDA_VISIBLE_DEVICES"] = str(index)
    name = serving.engine if request.replicas == 1 else f"{serving.engine} {index + 1} of {request.replicas}"
    words = (*serving.words, "--host", host, "--port", str(port))
    return Program(name, words, host, port, log, environment=environment)


def _nginx(request: ServeRequest, programs: Sequence[Program], folder: Path) -> Program:
    program = shutil.which("nginx")
    if program is None:
        raise EngineError("nginx is not installed here; install it, or leave out --replicas and --nginx")
    config = folder / "nginx.conf"
    write_text(config, nginx_config(folder, request.host, request.port, [each.port for each in programs]))
    words = (program, "-p", str(folder), "-c", str(config))
    return Program("nginx", words, request.host, request.port, folder / "nginx.log")


def _compare(say: Say, serving: Serving, log: Path) -> None:
    """Say how many tokens of KV cache there are, beside what `fit` promised."""
    tokens, use = kv_tokens(log), serving.fit.engine if serving.fit else None
    if tokens is None or use is None:
        return
    if tokens < use.context:
        say(f"KV cache: {tokens:,} tokens, fewer than the {use.context:,} that fit promised")
    else:
        say(f"KV cache: {tokens:,} tokens; fit promised {use.context:,}")


def _watch(say: Say, servers: list[Running]) -> None:
    """Stay while the servers run; of several engines one that ends is started again.

    Raises:
        EngineError: one has ended for good.
    """
    restarts = 0
    several = len(servers) > 2
    while True:
        for index, running in enumerate(servers):
            if running.process.poll() is None:
                continue
            if not several or running.program.name == "nginx" or restarts >= RESTARTS:
                require_alive(running, "while it served")
            restarts += 1
            say(f"{running.program.name} has ended: {last_problem(running.program.log)}; started again")
            stop([running])
            servers[index] = start(running.program)
        time.sleep(PAUSE)


def _how_to_ask(serving: Serving, url: str, key: str | None) -> str:
    question = {"model": serving.name, "messages": [{"role": "user", "content": "Why is the sky blue?"}]}
    header = " -H 'Authorization: Bearer KEY'" if key else ""
    body = shlex.quote(json.dumps(question))
    return f"{url}/v1\ncurl {url}/v1/chat/completions -H 'Content-Type: application/json'{header} -d {body}"


def dry_run(request: ServeRequest) -> str:
    """The engine's command alone."""
    serving = plan_serving(request)
    return shlex.join([*serving.words, "--host", request.host, "--port", str(request.port)])
