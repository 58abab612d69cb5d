# SPDX-License-Identifier: Apache-2.0
"""What a run may take of a GPU's memory and of RAM, and how it keeps to that.

Bytes are counted before any work, from shapes alone. Hidden states lie on the GPU if they fit beside everything else,
else in RAM, else in a mapped file in the output folder; a GPU takes as large a micro-batch as fits, a CPU one sample.
Neither changes what is computed on a CPU, bit for bit. What cannot be kept is refused, with what it would take.
What is held at the peak is counted by `needs`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from quantkit.errors import InputError
from quantkit.formats.names import expert_of
from quantkit.hardware.batching import TOKENS_AT_ONCE_GPU
from quantkit.model.shapes import Shapes
from quantkit.pipeline.job import Job
from quantkit.pipeline.runtime import Memory
from quantkit.serving.needs import CUDA_BYTES, Work, needs, sites
from quantkit.units import format_bytes

SPARE = 0.9  # of what is free, where no limit is given


@dataclass(frozen=True)
class Layout:
    """Where things go, and the most that will be held.

    place: of hidden states, "device", "ram" or "file"; batch: samples in a micro-batch; states_bytes: of hidden states;
    kept_width: the widest inputs of linears that are kept beside them while a layer is calibrated (0: none);
    device_bytes, ram_bytes: at the peak, as counted; device_limit, ram_limit: what was asked for, or None
    """

    place: str
    batch: int
    states_bytes: int
    device_bytes: int
    ram_bytes: int
    device_limit: int | None
    ram_limit: int | None
    kept_width: int = 0

    @property
    def memory(self) -> Memory:
        """What a run is given of it."""
        return Memory(self.place, self.batch, self.kept_width)

    def record(self) -> dict[str, Any]:
        """For the result document."""
        return dict(vars(self))

    def __str__(self) -> str:
        where = {"device": "on the GPU", "ram": "in RAM", "file": "in a mapped file"}[self.place]
        at_once = "one sample" if self.batch == 1 else f"{self.batch} samples"
        parts = [f"{format_bytes(self.states_bytes)} of hidden states {where}, {at_once} at a time"]
        if self.device_bytes:
            parts.append(f"at most {format_bytes(self.device_bytes)} of GPU memory{_of(self.device_limit)}")
        return "; ".join([*parts, f"at most {format_bytes(self.ram_bytes)} of RAM{_of(self.ram_limit)}"])


def _of(limit: int | None) -> str:
    return "" if limit is None else f" ({format_bytes(limit)} allowed)"


@dataclass(frozen=True)
class Allowance:
    """What one process may use, as the user says it: bytes of a GPU and of RAM, and where hidden states live.

    None: what is free of memory; the fastest place that has room.
    """

    vram: int | None = None
    ram: int | None = None
    place: str | None = None


FREE = Allowance()


@dataclass(frozen=True)
class Streams:
    """The token streams of a run.

    shapes: (samples, seqlen) of each; input_tokens: of the one whose inputs of linears may be kept
    """

    shapes: Sequence[tuple[int, int]]
    input_tokens: int = 0

    @property
    def tokens(self) -> int:
        return sum(samples * seqlen for samples, seqlen in self.shapes)

    @property
    def longest(self) -> int:
        return max((seqlen for _, seqlen in self.shapes), default=1)


def lay_out(
    model: Shapes,
    work: Work,
    streams: Streams,
    device: torch.device,
    allowance: Allowance = FREE,
    processes: int = 1,
) -> Layout:
    """Choose a layout within the limits; where none is given, within what is free, and then nothing is refused.

    processes: that share the machine's free RAM

    Raises:
        InputError: a limit that the smallest layout does not keep, with what it needs.
    """
    vram, ram, place = allowance.vram, allowance.ram, allowance.place
    if vram is not None and not work.on_gpu:
        raise InputError(f"--vram: layers run on the {device.type}; use --ram, or --device cuda")
    states = streams.tokens * model.state_width * work.itemsize
    device_room = vram or (int(SPARE * torch.cuda.mem_get_info(device)[0]) if work.on_gpu else 0)
    ram_room = ram or int(SPARE * psutil.virtual_memory().available / processes)
    places = [place] if place else (["device"] if work.on_gpu else []) + ["ram", "file"]
    fastest = "device" if work.on_gpu else "ram"
    layouts = []
    for where in places:
        for batch in _batches(streams) if work.on_gpu else [1]:
            most = needs(model, replace(work, batch=batch))
            for width, numbers in _keepable(work) if where == fastest else [(0, 0)]:
                bytes_there = states + numbers * streams.input_tokens * work.itemsize
                device_bytes = most.device + (bytes_there if where == "device" else 0)
                ram_bytes = most.ram + (bytes_there if where == "ram" else 0)
                layouts.append(Layout(where, batch, states, device_bytes, ram_bytes, vram, ram, width))
    fitting = [x for x in layouts if x.device_bytes <= device_room and x.ram_bytes <= ram_room]
    smallest = layouts[-1]
    if not fitting:
        _refuse(smallest, work.on_gpu)
    return (fitting or [smallest])[0]


def _keepable(work: Work) -> list[tuple[int, int]]:
    """What may be kept for each token, the most first: its width, and the numbers that everything up to it comes to."""
    layers: dict[int, list[int]] = {}
    for site in (site for site in sites(work.linears) if not expert_of(site[0].local)):
        layers.setdefault(site[0].layer, []).extend([site[0].in_features] if len(site) == 1 else [])
    # The original has left the layer at its last site.
    kept = [widths + (widths[:-1] if work.follows_original else []) for widths in layers.values()]
    limits = sorted({0, *(width for widths in kept for width in widths)}, reverse=True)
    return [(limit, max(sum(w for w in widths if w <= limit) for widths in kept)) for limit in limits]


def lay_out_job(
    job: Job, evaluated: Sequence[tuple[int, int]], allowance: Allowance = FREE, *, keeps: bool = True
) -> Layout:
    """The layout of a job: see `lay_out`.

    evaluated: (samples, seqlen) of each stream that measures; keeps: whether layers are calibrated site by site
    """
    runtime = job.runtime
    ranks = runtime.ranks
    shapes, input_tokens = list(evaluated), 0
    if job.calibration:
        seqlen = job.calibration.seqlen
        streamed = [ranks.most(tokens.samples) for tokens in (job.calibration, job.reference) if tokens]
        shapes += [(samples * (1 + job.tuning_copies), seqlen) for samples in streamed]
        if any(expert_of(linear.local) for linear in job.plan.quantized):  # what enters a layer's experts is kept, too
            shapes += [(samples, seqlen) for samples in streamed]
        if keeps and job.inputs == "quantized" and not job.options.tune:
            input_tokens = streamed[0] * seqlen
    streams = Streams(shapes, input_tokens)
    work = Work(
        linears=job.plan.linears,
        head=next((linear for linear in job.plan.quantized if linear.unit == "head"), None),
        on_gpu=runtime.device.type == "cuda",
        itemsize=runtime.dtype.itemsize,
        longest=streams.longest,
        calibrated=job.calibration is not None,
        follows_original=job.reference is not None,
        tuned=job.options.tune,
        compared=bool(evaluated),
    )
    return lay_out(runtime.model, work, streams, runtime.device, allowance, ranks.local_size)


def laid_out(job: Job, layout: Layout) -> Job:
    """The job as this layout has it run."""
    return replace(job, runtime=replace(job.runtime, memory=layout.memory))


def keep(layout: Layout, device: torch.device) -> None:
    """Have the allocator of the GPU keep to the limit: it gives cached memory back, or fails, rather than go beyond."""
    if layout.device_limit is not None:
        total = torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, (layout.device_limit - CUDA_BYTES) / total), device)


def _batches(streams: Streams) -> list[int]:
    """The micro-batches to try, the largest first."""
    batch = max(1, TOKENS_AT_ONCE_GPU // streams.longest)
    return [max(1, batch >> halvings) for halvings in range(batch.bit_length())]


def _refuse(smallest: Layout, on_gpu: bool) -> None:
    for option, limit, needed in (
        ("--vram", smallest.device_limit, smallest.device_bytes),
        ("--ram", smallest.ram_limit, smallest.ram_bytes),
    ):
        if limit is not None and needed > limit:
            why = "one layer, its Gram matrices and what is at work on them"
            raise InputError(
                f"{option} {format_bytes(limit)}: {format_bytes(needed)} needed for {why}, with hidden states in "
                f"{'RAM' if smallest.place == 'ram' else 'a file'}; allow more, or quantize a smaller model here"
            )
