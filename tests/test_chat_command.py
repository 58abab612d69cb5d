# SPDX-License-Identifier: Apache-2.0
"""`chat`: the greedy tokens are those of transformers, of every format the same way, and nothing else is shown."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import quantkit as package
from quantkit.cli.chat import Writer
from quantkit.commands.chat import Answer, parting
from tests.running import ENVIRONMENT, command, done, quantkit
from tests.test_serve import free_port

DEMO = Path(package.__file__).parent / "demo"
QUESTION = "What is 2 plus 3?"
SHORT = ("--max-new-tokens", "12", "--device", "cpu", "--offline")
SERVER = """#!{python}
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
port = int(sys.argv[sys.argv.index("--port") + 1])
class Answers(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()
        words = asked["messages"][-1]["content"].split()
        deltas = [{{"reasoning_content": "hm"}}, *({{"content": word + " "}} for word in words)]
        for delta in deltas:
            self.wfile.write(b"data: " + json.dumps({{"choices": [{{"delta": delta}}]}}).encode() + b"\\n\\n")
        self.wfile.write(b"data: [DONE]\\n\\n")
    def log_message(self, *args):
        pass
HTTPServer(("127.0.0.1", port), Answers).serve_forever()
"""


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in 4 bits, asymmetric, as compressed-tensors, which transformers cannot load as it is."""
    out = tmp_path_factory.mktemp("chat") / "out"
    words = ("--format", "compressed-tensors", "--asym", "--no-verify", "--offline", "--device", "cpu")
    done("rtn", "demo", *words, "--out", str(out))
    return out


def ask(model: str | Path, *words: str) -> dict[str, Any]:
    document = json.loads(done("chat", str(model), "--prompt", QUESTION, *SHORT, "--json", *words).stdout)
    assert isinstance(document, dict)
    return document


def greedy(model: Path) -> list[int]:
    """The first twelve tokens that transformers' own generation gives."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    chat = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = loaded.generate(**inputs, max_new_tokens=12, do_sample=False)
    return [int(token) for token in written[0][inputs["input_ids"].shape[1] :]]


def test_the_answer_is_that_of_transformers() -> None:
    answer = ask("demo")
    assert answer["token_ids"] == greedy(DEMO)
    assert answer["tokens"] == 12
    assert answer["complete"] is False
    assert str(answer["engine"]).startswith("transformers on cpu, float32")


def test_a_quantized_folder_answers_as_its_16_bit_weights_do(quantized: Path, tmp_path: Path) -> None:
    done("convert", str(quantized), "--to", "fp16", "--out", str(tmp_path / "fp16"))
    shutil.copy(DEMO / "generation_config.json", tmp_path / "fp16")
    answer = ask(quantized)
    assert answer["token_ids"] == greedy(tmp_path / "fp16")
    assert "compressed-tensors, dequantized" in str(answer["engine"])


def test_one_answer_goes_to_stdout_and_the_rest_to_stderr() -> None:
    answer = done("chat", "demo", "--prompt", QUESTION, *SHORT)
    assert answer.stdout.startswith("<think>\n")
    assert answer.stdout == done("chat", "demo", "--prompt", QUESTION, *SHORT).stdout
    assert answer.stderr.startswith("engine: transformers on cpu")
    assert "12 tokens, first token after" in answer.stderr


def test_the_seed_decides_where_tokens_are_drawn() -> None:
    first, again, other = (ask("demo", "--temperature", "1", "--seed", seed)["token_ids"] for seed in ("1", "1", "2"))
    assert first == again
    assert first != other


def test_a_conversation_takes_commands() -> None:
    lines = f"{QUESTION}\n/stats\n/reset\n/what\n{QUESTION}\n/exit\nnever\n"
    words = command("chat", "demo", *SHORT)
    answer = subprocess.run(words, input=lines, capture_output=True, text=True, env=ENVIRONMENT, check=True)
    first, second = answer.stdout.split("<think>")[1:]
    assert first == second  # after /reset the same question has the same answer
    assert "never" not in answer.stderr + answer.stdout
    assert answer.stderr.count("tokens/s") == 1
    assert "the conversation begins anew" in answer.stderr


def test_two_models_are_compared(quantized: Path) -> None:
    same = json.loads(done("chat", "demo", "--prompt", QUESTION, *SHORT, "--compare", str(DEMO), "--json").stdout)
    assert same["first_difference"] is None
    shown = done("chat", str(quantized), "--prompt", QUESTION, *SHORT, "--compare", "original").stdout
    assert shown.splitlines()[0] == f"--- {quantized}"
    assert "--- demo" in shown
    assert parting([1, 2, 3], [1, 5, 3]) == 1
    assert parting([1, 2], [1, 2, 3]) == 2


def test_an_engines_server_is_asked(tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text(SERVER.format(python=sys.executable))
    program.chmod(0o755)
    answer = ask(DEMO, "--engine", "vllm", "--engine-python", str(program))
    assert answer["answer"] == QUESTION
    assert answer["thinking"] == "hm"
    assert answer["engine"] == "vllm"
    assert free_port()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("no-such-folder-or-recipe", "--prompt", "x"), "no-such-folder-or-recipe"),
        (("demo", "--json"), "needs --prompt"),
        (("demo", "--prompt", "word " * 3000), "/reset begins anew"),
        (("nothing.gguf", "--engine", "llama.cpp", "--prompt", "x"), "nothing.gguf"),
    ],
)
def test_problems_are_one_line(words: tuple[str, ...], told: str) -> None:
    answer = quantkit("chat", *words, *SHORT)
    assert answer.returncode == 1
    assert told in answer.stderr.splitlines()[-1]
    assert "Traceback" not in answer.stderr


def test_no_control_sequence_of_an_answer_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    writer = Writer()
    writer.show("a\x1b[31mb\r\u202ec\td\ne\x07")
    writer.end()
    shown = capsys.readouterr().out
    assert shown.replace("\n", "").isprintable()
    assert shown.splitlines()[1].startswith("e")


def test_thoughts_are_dimmed_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    writer = Writer()
    writer.dims = True
    for piece in ("<think>\n", "so ", "it</think>", "is 5"):
        writer.show(piece)
    writer.end()
    assert capsys.readouterr().out == "\x1b[2m<think>\nso it</think>\x1b[0mis 5\n"


def test_thoughts_and_the_reply_are_apart() -> None:
    answer = Answer(text="<think>\na b\n</think>\n\n5")
    assert (answer.thinking, answer.reply) == ("a b", "5")
    assert Answer(text="5").reply == "5"
