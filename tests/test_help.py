# SPDX-License-Identifier: Apache-2.0
"""The words of the command line: help by groups, names that are nearly right, sizes as people write them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quantkit.checkpoint.meant import meant
from quantkit.cli import app
from quantkit.errors import InputError
from quantkit.units import parse_bytes, parse_tokens
from tests.running import quantkit

RECIPES = ("deepseek-r1-32b", "deepseek-r1-70b", "demo")


def shown(*words: str) -> str:
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0
    return done.output


def test_help_shows_only_the_options_that_a_method_has() -> None:
    gptq, awq, rtn = (shown(method, "-h") for method in ("gptq", "awq", "rtn"))
    assert "\n  --damp " in gptq
    assert "--rounding" not in gptq
    assert "--rounding" in awq
    for option in ("--damp", "--calib", "--samples", "--quality", "--act-order", "--rounding"):
        assert f"\n  {option} " not in rtn
    assert "--w-bit" in rtn


@pytest.mark.parametrize("command", ["awq", "gptq", "rtn", "fit", "verify", "sweep", "allocate", "convert"])
def test_options_stand_in_groups_with_examples(command: str) -> None:
    text = shown(command, "--help")
    assert "\nWhere it is served:\n" in text or command == "convert"
    assert "\nThis machine:\n" in text
    assert f"\n    quantkit {command} " in text
    assert shown(command, "-h") == text


def test_model_and_source_are_explained_once() -> None:
    text = shown("--help")
    assert "SOURCE  of text: mix" in text
    assert "MODEL   a recipe" in text


def test_words_are_completed() -> None:
    asked = {"_QUANTKIT_COMPLETE": "complete_bash", "COMP_WORDS": "quantkit gptq demo --format g", "COMP_CWORD": "4"}
    done = subprocess.run(
        [sys.executable, "-m", "quantkit"], env=os.environ | asked, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["gptq", "gptq_v2", "gguf"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("deepseek-r1-32B", "deepseek-r1-32b"),
        ("demmo", "demo"),
        ("https://huggingface.co/Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("https://huggingface.co/Qwen/Qwen3-0.6B/tree/main", "Qwen/Qwen3-0.6B"),
        ("hf.co/Qwen/Qwen3-0.6B?library=true", "Qwen/Qwen3-0.6B"),
    ],
)
def test_a_name_that_is_nearly_right_is_named(name: str, expected: str) -> None:
    assert meant(name, RECIPES) == f"; did you mean {expected}?"


def test_a_name_like_no_other_gets_the_list() -> None:
    assert meant("llama", RECIPES) == ""
    refused = quantkit("fit", "llama", "--offline")
    assert "demo" in refused.stderr
    assert "did you mean deepseek-r1-32b?" in quantkit("fit", "deepseek-r1-32B", "--offline").stderr


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("22GiB", 22 * 2**30),
        ("24GB", 24 * 10**9),
        ("24G", 24 * 2**30),
        ("24gib", 24 * 2**30),
        ("1.5M", 3 * 2**19),
        ("7B", 7),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, expected: int) -> None:
    assert parse_bytes(text, "--budget") == expected


@pytest.mark.parametrize("text", ["24", "24 cards", "-1GB", "24iB", "GiB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected a size"):
        parse_bytes(text, "--budget")


def test_a_million_tokens() -> None:
    assert parse_tokens("1M", "--context") == 2**20


def test_a_recipe_s_fault_is_told_without_the_library_s_words(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("rules:\n  - match: model.embed_tokens\n    bits: 4\n")
    refused = quantkit("fit", "demo", "--recipe", str(recipe))
    assert "embeddings stay in 16 bit" in refused.stderr
    assert "Value error" not in refused.stderr


def test_what_would_fit_is_told_with_its_command() -> None:
    done = quantkit("fit", "deepseek-r1-70b", "--budget", "45GiB", "--context", "64k")
    first, *others = done.stdout.splitlines()
    assert first.startswith("DOES NOT FIT: 45.00 GiB with 65,536 tokens of context, ")
    commands = [line.partition("would fit: ")[2] for line in others if "would fit: " in line]
    assert commands
    for command in commands:
        again = quantkit(*command.split()[1:])
        assert again.stdout.startswith("FITS in "), command


def test_fit_names_budget_and_margin_first() -> None:
    first = quantkit("fit", "demo", "--budget", "1GiB", "--context", "1k").stdout.splitlines()[0]
    assert first.startswith("FITS in 1.00 GiB with 1,024 tokens of context, ")
