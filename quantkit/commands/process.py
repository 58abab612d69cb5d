# SPDX-License-Identifier: Apache-2.0
"""An engine's server as a process: started, waited for, watched, and ended with all that it has started itself."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit.errors import EngineError, InputError
from quantkit.text import clean_line

PAUSE = 0.2  # seconds between two looks at a server
GRACE = 20.0  # seconds that a server gets to end by itself
START = 3600.0  # seconds that it may take to load a model
KV_TOKENS = re.compile(r"KV cache size: ([\d,]+) tokens")
PROBLEM_LINE = re.compile(r"error|exception|cannot|failed|out of memory|no available|not found", re.IGNORECASE)
RAISED = re.compile(r"\b[A-Z]\w*(?:Error|Exception): .*")
TAIL = 256 * 1024  # bytes of a log that are looked through


@dataclass(frozen=True)
class Program:
    """What is started: its words, its port, the file of its output, and the path that answers when it is ready."""

    name: str
    words: Sequence[str]
    host: str
    port: int
    log: Path
    health: str = "/health"
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{'127.0.0.1' if host in ('0.0.0.0', '[::]') else host}:{self.port}"


@dataclass
class Running:
    """A program that was started."""

    program: Program
    process: subprocess.Popen[bytes]


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    return host in ("localhost", "::1") or host.startswith("127.")


def require_port(host: str, port: int) -> None:
    """Refuse a port that is taken.

    Raises:
        InputError: with a port that is free.
    """
    if not _is_free(host, port):
        free = next((other for other in range(port + 1, min(port + 100, 65536)) if _is_free(host, other)), None)
        raise InputError(f"--port {port}: taken on {host}; use --port {free or 'N'}")


def _is_free(host: str, port: int) -> bool:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, OverflowError) as error:
        raise InputError(f"--host {host}: {clean_line(error)}; expected an address of this machine") from error
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError:
            return False
    return True


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(program: Program) -> Running:
    """Start it in a session of its own, so that all of it can be ended.

    Raises:
        EngineError: there is no such program.
    """
    try:
        with program.log.open("ab") as log:
            process = subprocess.Popen(
                list(program.words),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | program.environment,
            )
    except OSError as error:
        raise EngineError(f"{program.words[0]}: {error.strerror}; expected a program that starts the engine") from error
    return Running(program, process)


def wait_until_ready(running: Running) -> None:
    """Return when the server answers.

    Raises:
        EngineError: it has ended, or takes longer than START seconds.
    """
    program, began = running.program, time.monotonic()
    while not answers(program):
        require_alive(running, "before it answered")
        if time.monotonic() - began > START:
            raise EngineError(f"{program.name}: no answer on {program.url} for {START:.0f} s; log: {program.log}")
        time.sleep(PAUSE)
    require_alive(running, "before it answered")  # another server may have answered


def answers(program: Program) -> bool:
    """Whether the server says that it is ready."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(program.url + program.health, timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError, ValueError):
        return False


def ask(url: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The pieces of an answer that an OpenAI server streams.

    Raises:
        EngineError: what the server says instead.
    """
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request) as answer:
            for line in answer:
                text = line.decode("utf-8", errors="replace").strip()
                if text.startswith("data: {"):
                    choices = json.loads(text.removeprefix("data: ")).get("choices") or [{}]
                    yield choices[0].get("delta") or {}
    except urllib.error.HTTPError as error:
        raise EngineError(f"{url}: {clean_line(error.read().decode('utf-8', errors='replace'))}") from error
    except (OSError, ValueError) as error:
        raise EngineError(f"{url}: {clean_line(error)}; does the engine still run?") from error


def require_alive(running: Running, when: str) -> None:
    """Refuse to go on with a server that has ended.

    Raises:
        EngineError: with what it said last of a problem, and its log.
    """
    code = running.process.poll()
    if code is not None:
        program = running.program
        how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
        said = last_problem(program.log)
        raise EngineError(f"{program.name} {how} {when}{f': {said}' if said else ''}; log: {program.log}")


def last_problem(log: Path) -> str:
    """The last error that a log names, or its last line that tells of a problem, or its last line.

    vLLM's own processes end with an error that only points at the one before it.
    """
    lines = [line for line in _tail(log).splitlines() if line.strip() and "root cause above" not in line]
    errors = [found[0] for line in lines if (found := RAISED.search(line))]
    problems = [line for line in lines if PROBLEM_LINE.search(line)]
    return clean_line((errors or problems or lines or [""])[-1])


def kv_tokens(log: Path) -> int | None:
    """The tokens of KV cache that vLLM reports, or None."""
    found = KV_TOKENS.findall(_tail(log))
    return int(found[-1].replace(",", "")) if found else None


def _tail(log: Path) -> str:
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL))
        return file.read().decode("utf-8", errors="replace")
    return ""


def stop(servers: Sequence[Running]) -> None:
    """End the servers and everything that they have started; a second interruption ends them at once."""
    try:
        for running in servers:
            if running.process.poll() is None:
                running.process.terminate()
        end = time.monotonic() + GRACE
        for running in servers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.process.wait(max(0.0, end - time.monotonic()))
    except KeyboardInterrupt:
        pass
    finally:
        for running in servers:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(running.process.pid, signal.SIGKILL)
            running.process.wait()
