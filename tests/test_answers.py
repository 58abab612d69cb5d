# SPDX-License-Identifier: Apache-2.0
"""Answers go to stdout, so that they can be piped; progress and notes go to stderr."""

from pathlib import Path

import pytest

from tests.running import done, run_words


@pytest.mark.parametrize(
    ("words", "shown"), [(["fit", "deepseek-r1-32b", "--offline"], "embeddings"), (["models"], "deepseek-r1-32b")]
)
def test_an_answer_is_on_stdout_alone(words: list[str], shown: str) -> None:
    answer = done(*words)
    assert shown in answer.stdout
    assert not answer.stderr


def test_the_summary_of_a_run_is_on_stdout_and_its_progress_is_not(qwen2: Path, ids: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = done(*run_words("rtn", qwen2, out, ids))
    assert "perplexity" in made.stdout
    assert "layer 1" not in made.stdout
    again = done(*run_words("rtn", qwen2, out, ids), "--json")
    assert again.stdout.startswith("{")
    assert "perplexity" in again.stderr
    assert "q_proj" in done("inspect", str(out)).stdout
    assert "README.md" in done("push", str(out), "me/it", "--dry-run", "--force").stdout
