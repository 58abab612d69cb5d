# SPDX-License-Identifier: Apache-2.0
"""What verification costs at most: one reading of each FP16 layer."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.checkpoint.reader import Checkpoint
from quantkit.commands.quantize import quantize
from quantkit.report.terminal.screen import Terminal
from quantkit.settings.request import Request


def reads(monkeypatch: pytest.MonkeyPatch, model: Path, **request: Any) -> Counter[str]:
    """How often each tensor of the model is read in a run."""
    counted: Counter[str] = Counter()
    read = Checkpoint.read

    def spy(self: Checkpoint, name: str, *args: Any, **named: Any) -> torch.Tensor:
        if self.directory == model:
            counted[name] += 1
        return read(self, name, *args, **named)

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "read", spy)
        quantize(Request(model=str(model), command="quantkit", offline=True, **request), Terminal(quiet=True))
    return counted


@pytest.mark.parametrize("method", ["rtn", "awq", "gptq"])
def test_each_layer_of_the_original_is_read_once_for_quantizing_and_verifying_both(
    tmp_path: Path, qwen2: Path, ids: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    said: dict[str, Any] = {"method": method, "group_size": 32, "calib": str(ids), "evaluation": str(ids)}
    counted = reads(monkeypatch, qwen2, out=tmp_path / "out", **said)
    layers = {name: count for name, count in counted.items() if ".layers." in name}
    assert len(layers) == 2 * (7 + 3 + 2)  # weights, biases of q, k and v, norms
    assert {count for name, count in layers.items() if name.endswith("_proj.weight")} == {1}
    assert max(layers.values()) <= 2  # norms and biases are looked at before the first layer
