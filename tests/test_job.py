# SPDX-License-Identifier: Apache-2.0
"""What a run's parts follow from what it was asked for."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch

from quantkit.calibration.tokens import TokenSet
from quantkit.methods.table import Options
from quantkit.pipeline.job import Job
from quantkit.pipeline.runtime import Runtime


@pytest.mark.parametrize(
    ("device", "samples", "seqlen", "options", "inputs", "expected"),
    [
        ("cuda", 128, 512, Options(), "quantized", 128),
        ("cpu", 128, 512, Options(), "quantized", 64),
        ("cpu", 127, 2048, Options(), "quantized", 64),
        ("cpu", 100, 512, Options(), "quantized", 64),  # 32768 tokens at least
        ("cpu", 32, 512, Options(), "quantized", 32),
        ("cpu", 128, 512, Options(drift_samples=128), "quantized", 128),
        ("cpu", 128, 512, Options(drift_samples=3), "quantized", 3),
        ("cuda", 128, 512, Options(drift_samples=3), "quantized", 3),
        ("cpu", 128, 512, Options(tune=True, drift_samples=3), "quantized", 128),
        ("cpu", 128, 512, Options(tune=True, correct=0), "quantized", 128),
        ("cpu", 128, 512, Options(correct=0), "quantized", 0),
        ("cpu", 128, 512, Options(rounding="nearest"), "quantized", 0),
        ("cpu", 128, 512, Options(), "original", 0),
    ],
)
def test_how_many_samples_the_original_runs_beside(
    device: str, samples: int, seqlen: int, options: Options, inputs: str, expected: int
) -> None:
    tokens = TokenSet(torch.arange(samples).unsqueeze(1).expand(samples, seqlen), "ids", "ids", "ids")
    none = cast(Any, None)
    runtime = Runtime(none, torch.device(device), Path())
    job = Job(runtime, none, "gptq", options, tokens, inputs=inputs)
    found = [] if job.reference is None else job.reference.input_ids[:, 0].tolist()
    assert found == list(range(expected))
