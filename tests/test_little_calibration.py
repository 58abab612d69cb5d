# SPDX-License-Identifier: Apache-2.0
"""With little calibration no method loses to rounding to nearest, and the result says that it is little."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.running import done, quantkit, run_words
from tests.verified import run


def measured(folder: Path, method: str, *more: str) -> dict[str, Any]:
    words = [method, "demo", "--sym", "--eval-samples", "4", "--out", str(folder / method), "--json", *more]
    found: dict[str, Any] = json.loads(quantkit(*words).stdout)
    return found


@pytest.fixture(scope="module")
def nearest(tmp_path_factory: pytest.TempPathFactory) -> float:
    return float(measured(tmp_path_factory.mktemp("nearest"), "rtn")["verification"]["kl_divergence"])


@pytest.mark.parametrize(("method", "samples", "seqlen"), [("awq", 1, 2), ("gptq", 4, 128)])
def test_no_method_loses_to_rounding(method: str, samples: int, seqlen: int, nearest: float, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 4096, (samples, seqlen), generator=generator)  # not even text
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    found = measured(tmp_path, method, "--calib", str(tmp_path / "ids.safetensors"))
    assert found["verification"]["kl_divergence"] < nearest
    assert any(f"{samples * seqlen:,} tokens are fewer than the 768 inputs" in note for note in found["fallbacks"])


def test_enough_of_it_is_not_noted(qwen2: Path, ids: Path, tmp_path: Path) -> None:
    notes = run(qwen2, tmp_path / "out", ids, method="gptq", calib=str(ids))["fallbacks"]
    assert not any("fewer than" in note for note in notes)  # 192 tokens, at most 128 inputs


def test_tuning_on_little_text_is_noted(qwen2: Path, ids: Path, tmp_path: Path) -> None:
    told = done(*run_words("gptq", qwen2, tmp_path / "out", ids, "--quality", "best"))
    assert "--quality best: 192 tokens are little to tune on, and may make it worse" in " ".join(told.stderr.split())
