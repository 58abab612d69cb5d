# SPDX-License-Identifier: Apache-2.0
"""Where hidden states live changes no value, and leaves nothing behind."""

from pathlib import Path

import pytest
import torch

from quantkit.hardware.batching import TOKENS_AT_ONCE_GPU
from quantkit.pipeline import activations
from quantkit.pipeline.activations import Stream, choose_place, micro_batch, open_stream, regrouped

CPU = torch.device("cpu")
SHAPE = (5, 7, 6)


def filled(stream: Stream) -> torch.Tensor:
    """Write, and update in place, as a layer does."""
    generator = torch.Generator().manual_seed(0)
    for batch in stream.batches():
        stream.states[batch] = torch.randn(stream.states[batch].shape, generator=generator).to(stream.states.dtype)
    for batch in stream.batches():
        stream.states[batch] = stream.states[batch] * 2 + 1
    return stream.states.clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_place_holds_the_same_values(dtype: torch.dtype, tmp_path: Path) -> None:
    streams = [open_stream(SHAPE, dtype, CPU, tmp_path / "spill", place) for place in ("device", "ram", "file")]
    assert [stream.place for stream in streams] == ["device", "ram", "file"]
    for stream in streams:
        assert stream.states.shape == SHAPE
        assert stream.states.dtype == dtype
    first, *others = map(filled, streams)
    assert all(torch.equal(first, other) for other in others)


def test_the_file_is_gone_at_once_and_the_values_stay(tmp_path: Path) -> None:
    one = open_stream(SHAPE, torch.float32, CPU, tmp_path / "spill", "file")
    assert not list(tmp_path.iterdir())
    two = open_stream(SHAPE, torch.float32, CPU, tmp_path / "spill", "file")
    one.states.fill_(1)
    two.states.fill_(2)
    assert bool((one.states == 1).all())
    assert bool((two.states == 2).all())
    assert not list(tmp_path.iterdir())


def test_what_an_interrupted_run_left_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "spill").write_bytes(b"\x7f" * 10_000)
    stream = open_stream(SHAPE, torch.float32, CPU, tmp_path / "spill", "file")
    stream.states.zero_()
    assert bool((stream.states == 0).all())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("samples", "batch"), [(1, 3), (5, 1), (5, 2), (6, 3), (6, 7)])
def test_batches_cover_every_sample_once_in_order(samples: int, batch: int) -> None:
    stream = Stream(torch.zeros(samples, 2, 2), "ram", batch)
    covered = [sample for part in stream.batches() for sample in range(samples)[part]]
    assert covered == list(range(samples))
    assert all(part.stop - part.start <= batch for part in stream.batches())


def test_micro_batches_are_single_samples_on_a_cpu_and_as_many_tokens_on_a_gpu() -> None:
    gpu = torch.device("cuda")
    assert micro_batch(512, CPU) == 1
    assert micro_batch(512, gpu) * 512 == micro_batch(2048, gpu) * 2048 == TOKENS_AT_ONCE_GPU
    assert micro_batch(10 * TOKENS_AT_ONCE_GPU, gpu) == 1


@pytest.mark.parametrize("cuts", [[10], [1] * 10, [3, 3, 3, 1], [4, 6], [9, 1]])
@pytest.mark.parametrize("samples", [1, 3, 4, 10, 11])
def test_samples_are_summed_in_the_same_groups_however_they_come(cuts: list[int], samples: int) -> None:
    rows = torch.arange(20).view(10, 2)
    found = list(regrouped(rows.split(cuts), samples))
    assert [len(group) for group in found] == [len(group) for group in rows.split(samples)]
    assert torch.equal(torch.cat(found), rows)


def test_what_does_not_fit_in_memory_goes_to_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert choose_place(1000, CPU) == "ram"
    assert choose_place(2**60, CPU) == "file"
    monkeypatch.setattr(activations, "SPARE", 0.0)
    assert open_stream(SHAPE, torch.float32, CPU, tmp_path / "spill").place == "file"
