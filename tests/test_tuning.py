# SPDX-License-Identifier: Apache-2.0
"""`--quality best` around the layer: what is prepared, and micro-batches that its samples do not fill."""

from collections import namedtuple
from pathlib import Path

import pytest
import torch

from quantkit.calibration.tokens import TokenSet
from quantkit.checkpoint.journal import open_journal
from quantkit.errors import OutputError
from quantkit.formats import FORMATS
from quantkit.methods.table import Options
from quantkit.model.streaming import open_model
from quantkit.pipeline import tuning
from quantkit.pipeline.fisher import spilled_bytes
from quantkit.pipeline.job import Job
from quantkit.pipeline.run import run
from quantkit.pipeline.runtime import Memory, Runtime, Silent
from quantkit.plan import make_plan
from quantkit.scheme import Scheme
from tests.tiny import random_ids, save_tiny

CPU = torch.device("cpu")


def tuned(model: Path, out: Path, samples: int, batch: int) -> Job:
    streamed = open_model(model)
    plan = make_plan(streamed, lambda name, layer: Scheme(4, 16, True), FORMATS["compressed-tensors"])
    tokens = TokenSet(random_ids(samples), "random", "random", "random")
    return Job(Runtime(streamed, CPU, out, Memory(batch=batch)), plan, "gptq", Options(tune=True), tokens)


def shards(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("*.safetensors")}


@pytest.mark.parametrize("samples", [4, 5])
def test_micro_batches_of_any_size_end_the_same_when_continued(tmp_path: Path, samples: int) -> None:
    """As on a GPU, where several samples go through a layer at once: 20 of them by 4, of which 5 make Gram matrices."""
    model, out = save_tiny(tmp_path / "model", "qwen2"), tmp_path / "out"
    run(tuned(model, out, samples, 4), Silent())
    expected = shards(out)
    (out / "model-00003-of-00005.safetensors").unlink()
    run(tuned(model, out, samples, 4), Silent())
    assert shards(out) == expected


def test_a_full_disk_is_told_before_the_text_is_rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = tuned(save_tiny(tmp_path / "model", "qwen2"), tmp_path / "out", 4, 1)
    usage = namedtuple("usage", "total used free")
    assert job.calibration is not None
    needed = spilled_bytes(job.runtime, job.calibration)
    assert needed == 4 * 4 * 24 * 48 * 4  # layers + 1, samples, tokens, numbers, bytes
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(needed, 1, needed - 1))
    with open_journal(job.runtime.folder, {}, fresh=False) as journal, pytest.raises(OutputError, match="needed"):
        tuning.prepare(job, journal, Silent())
