# SPDX-License-Identifier: Apache-2.0
"""`serve`: the command that it prints, what it refuses, and the processes that it starts and ends.

The engine is a small program that takes vLLM's words: what is tested here is the handling of processes and ports.
"""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import quantkit as package
from quantkit.commands.process import is_loopback
from quantkit.serving.balancer import nginx_config
from tests.running import ENVIRONMENT, command, done, quantkit

DEMO = str(Path(package.__file__).parent / "demo")
ENGINE = """#!{python}
import json, os, sys, time, subprocess
from http.server import BaseHTTPRequestHandler, HTTPServer
words = sys.argv[1:]
port = int(words[words.index("--port") + 1])
mode = "{mode}"
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open("{folder}/pids", "a").write(f"{{os.getpid()}} {{child.pid}} ")
print("GPU KV cache size: {tokens} tokens", flush=True)
if mode == "dies":
    sys.exit("RuntimeError: CUDA out of memory\\x1b[31m")
class Answers(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({{"words": words, "key": os.environ.get("VLLM_API_KEY")}}).encode())
    def log_message(self, *args):
        pass
HTTPServer(("127.0.0.1", port), Answers).serve_forever()
"""


def engine(folder: Path, mode: str = "serves", tokens: str = "6,912") -> Path:
    path = folder / "python"
    path.write_text(ENGINE.format(python=sys.executable, mode=mode, tokens=tokens, folder=folder))
    path.chmod(0o755)
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.fixture
def started(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int, str]]:
    """A running `serve`, its port, and what it has printed once it answers."""
    port = free_port()
    words = command("serve", DEMO, "--engine-python", str(engine(tmp_path)), "--port", str(port))
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT | {"TMPDIR": str(tmp_path)}
    ) as process:
        assert process.stdout is not None
        shown = process.stdout.readline() + process.stdout.readline()
        try:
            yield process, port, shown
        finally:
            process.kill()


def test_a_dry_run_prints_the_engines_command_alone() -> None:
    answer = done("serve", DEMO, "--dry-run", "--engine", "vllm", "--port", "8123", "--", "--seed", "7")
    words = shlex.split(answer.stdout)
    assert words[:3] == ["vllm", "serve", DEMO]
    assert words[words.index("--max-model-len") + 1] == "2048"
    for flag in ("--max-num-seqs", "--max-num-batched-tokens", "--gpu-memory-utilization", "--served-model-name"):
        assert flag in words
    assert words[-6:] == ["--seed", "7", "--host", "127.0.0.1", "--port", "8123"]
    assert answer.stdout.count("\n") == 1


def test_what_does_not_fit_is_refused_before_the_start(tmp_path: Path) -> None:
    program = engine(tmp_path)
    words = ("serve", DEMO, "--engine-python", str(program), "--budget", "327MiB")
    longest = shlex.split(done(*words, "--dry-run").stdout)
    tokens = int(longest[longest.index("--max-model-len") + 1])
    assert 0 < tokens < 2048
    refused = quantkit(*words, "--context", "2048")
    assert refused.returncode == 1
    assert f"use --context {tokens}" in refused.stderr
    none = quantkit("serve", DEMO, "--engine-python", str(program), "--budget", "100MiB")
    assert none.returncode == 1
    assert "no context fits" in none.stderr
    assert not (tmp_path / "pids").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--host", "0.0.0.0"), "--api-key"),
        (("--replicas", "2"), "--nginx"),
        (("--engine-python", "/nowhere/python"), "/nowhere/python: no such file"),
        (("--engine", "vllm"), "vllm is not installed here; pip install 'quantkit[serve]'"),
        (("--context", "4096"), "the model allows 2048"),
    ],
)
def test_refusals_are_one_line(words: tuple[str, ...], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    answer = quantkit("serve", DEMO, *words)
    assert answer.returncode == 1
    assert told in answer.stderr
    assert answer.stderr.count("\n") == 1
    assert answer.stdout == ""


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    answer = quantkit("serve", str(tmp_path))
    assert answer.returncode == 1
    assert "no config.json" in answer.stderr


def test_a_port_that_is_taken_is_told_with_a_free_one(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        answer = quantkit("serve", DEMO, "--engine-python", str(engine(tmp_path)), "--port", str(port))
    assert answer.returncode == 1
    assert f"--port {port}: taken on 127.0.0.1; use --port " in answer.stderr
    assert not (tmp_path / "pids").exists()


def test_it_answers_and_leaves_nothing_behind(started: tuple[subprocess.Popen[str], int, str], tmp_path: Path) -> None:
    process, port, shown = started
    assert shown.startswith(f"http://127.0.0.1:{port}/v1\ncurl http://127.0.0.1:{port}/v1/chat/completions")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
        words = json.load(answer)["words"]
    assert words[:4] == ["-m", "vllm.entrypoints.openai.api_server", "--model", DEMO]
    pids = [int(word) for word in (tmp_path / "pids").read_text().split()]
    assert all(map(alive, pids))
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "KV cache: 6,912 tokens; fit promised 2,048" in told
    assert not any(map(alive, pids))
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))


def test_an_engine_that_ends_while_it_serves_is_told(
    started: tuple[subprocess.Popen[str], int, str], tmp_path: Path
) -> None:
    process, _, _ = started
    leader, child = (int(word) for word in (tmp_path / "pids").read_text().split())
    os.kill(leader, signal.SIGKILL)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "vllm was ended by signal 9 while it served" in told
    assert not alive(child)


def test_an_engine_that_dies_at_the_start_is_told_with_its_log(tmp_path: Path) -> None:
    program = engine(tmp_path, "dies", tokens="100")
    log = tmp_path / "engine.log"
    words = ("serve", DEMO, "--engine-python", str(program), "--port", str(free_port()), "--log", str(log))
    answer = quantkit(*words)
    assert answer.returncode == 1
    line = answer.stderr.splitlines()[-1]
    assert "vllm ended with code 1 before it answered: RuntimeError: CUDA out of memory" in line
    assert str(log) in line
    assert "\x1b" not in answer.stderr
    assert "out of memory" in log.read_text()
    _, child = (int(word) for word in (tmp_path / "pids").read_text().split())
    end = time.monotonic() + 10
    while alive(child) and time.monotonic() < end:
        os.sched_yield()
    assert not alive(child)


def test_fewer_tokens_than_promised_are_told(tmp_path: Path) -> None:
    words = command("serve", DEMO, "--engine-python", str(engine(tmp_path, tokens="1,024")), "--port", str(free_port()))
    with subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        try:
            _, told = process.communicate(timeout=60)
        finally:
            process.kill()
    assert "KV cache: 1,024 tokens, fewer than the 2,048 that fit promised" in told


def test_the_balancer_hands_on_to_every_server_and_streams() -> None:
    config = nginx_config(Path("/tmp/x"), "127.0.0.1", 8000, [8001, 8002])
    for line in ("least_conn;", "server 127.0.0.1:8001", "server 127.0.0.1:8002", "proxy_buffering off;"):
        assert line in config
    assert "listen 127.0.0.1:8000;" in config
    assert config.count("{") == config.count("}")


@pytest.mark.parametrize(
    ("host", "own"), [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("10.0.0.1", False)]
)
def test_only_loopback_needs_no_key(host: str, own: bool) -> None:
    assert is_loopback(host) == own


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
def test_replicas_behind_nginx_lose_nothing_when_one_ends(tmp_path: Path) -> None:
    port = free_port()
    words = command("serve", DEMO, "--engine-python", str(engine(tmp_path)), "--port", str(port))
    with subprocess.Popen(
        [*words, "--replicas", "2", "--nginx"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT | {"TMPDIR": str(tmp_path)},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"http://127.0.0.1:{port}/v1\n"
        first = int((tmp_path / "pids").read_text().split()[0])
        os.kill(first, signal.SIGKILL)
        for _ in range(20):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
                assert answer.status == 200
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert not any(alive(int(word)) for word in (tmp_path / "pids").read_text().split())
