# SPDX-License-Identifier: Apache-2.0
"""quantkit's commands in tests: here, which saves the imports; or in a process that can be killed, or measured."""

import os
import subprocess
import sys
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from transformers.utils import logging
from typer.testing import CliRunner

from quantkit.cli import app, main

ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
MODELLING = "transformers.models.qwen2.modeling_qwen2"
PRELOADED = [
    "quantkit.commands.quantize",
    "quantkit.commands.convert",
    MODELLING,
    "tests.running",
]


@dataclass(frozen=True)
class Answer:
    """What a command said, and how it ended."""

    returncode: int
    stdout: str
    stderr: str


def run_words(method: str, model: Path, out: Path, ids: Path, *more: str) -> list[str]:
    """The words of a run on a tiny model, whose perplexity is no measure of anything."""
    fixed = ["--calib", str(ids), "--eval", str(ids), "--group", "32", "--out", str(out), "--max-ppl-increase", "900%"]
    return [method, str(model), "--device", "cpu", *fixed, *more]


def quantkit(*words: str) -> Answer:
    """The command, in this process."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["quantkit", *words])
        patch.setenv("TRANSFORMERS_VERBOSITY", "error")  # as some commands set it; gone afterwards
        result = CliRunner().invoke(app, words, catch_exceptions=False)
    logging.set_verbosity(verbosity)  # a command quiets transformers, for good
    if bars:
        logging.enable_progress_bar()
    return Answer(result.exit_code, result.stdout, result.stderr)


def done(*words: str) -> Answer:
    """The same; it must succeed."""
    answer = quantkit(*words)
    assert answer.returncode == 0, answer.stderr + answer.stdout
    return answer


def command(*words: str) -> list[str]:
    """The command as a process of its own."""
    return [sys.executable, "-m", "quantkit", *words]


def run_process(words: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, to its end."""
    return subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT | environment, check=False)


def started(*words: str) -> BaseProcess:
    """The command in a process of its own, forked from one that has the imports: to be killed."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_main, args=(words,))
    process.start()
    return process


def _main(words: tuple[str, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    sys.argv = ["quantkit", *words]
    main()
