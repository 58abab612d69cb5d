# SPDX-License-Identifier: Apache-2.0
"""What a run may take of a GPU's memory and of RAM, and how it keeps to that.

Bytes are counted before any work, from shapes alone. Hidden states lie on the GPU if they fit beside everything else,
else in RAM, else in a mapped file in the output folder; a GPU takes as large a micro-batch as fits, a CPU one sample.
Neither changes what is computed on a CPU, bit for bit. What cannot be kept is refused, with what it would take.

At its peak a run holds one of these, beside the process itself:

    begin   the input embedding as stored and as it runs
    layer   the layer as it runs and what has been quantized of it; for the site that needs most, so many copies of its
            Gram matrix and of the weights that are rounded together, see FACTORISING and REFINING; the activations
            of a micro-batch. In RAM also the layer as stored, the next one being read, and the shard being written
    head    where it is quantized: it whole and its codes, and what is at work on some of its rows
    end     everything outside the layers twice (the model's and the written one, where they differ), and the logits of
            both for a micro-batch
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from quantkit.activations import LOGITS_AT_ONCE, TOKENS_A_STEP, TOKENS_AT_ONCE_GPU, samples_per_sum
from quantkit.errors import InputError
from quantkit.formats.names import fused_name
from quantkit.head import ROWS
from quantkit.job import Job
from quantkit.model.streaming import Architecture
from quantkit.plan import LinearPlan
from quantkit.units import format_bytes

MIB = 2**20
PROCESS_BYTES = 704 * MIB  # of RAM: Python, torch and transformers, what oneDNN keeps, tokenizer and tokens
CUDA_PROCESS_BYTES = 3 * 2**30  # of RAM with CUDA's libraries loaded
CUDA_BYTES = 768 * MIB  # of a GPU: its context, and the workspaces of libraries
# Copies of the Gram matrix and of the weights: it, and two at a time of: damped, its factor, that reversed; beside the
# weights scaled and together. Then it and the factor; weights scaled, together, steps, residual, a product, two at
# work.
FACTORISING = (3, 2)
REFINING = (2, 7)
TUNED_BYTES = 5 * 4 + 2 + 1  # a weight: its position, gradient, two moments, average; its offset; its code
TUNED_LOGITS = 6  # float32 copies of the logits from which gradients start, see `fisher`
TUNED_ACTIVATIONS = 3  # what is kept for going back, against what running needs
WIDE_BYTES = 2**30  # of a GPU: what the large blocks of its column loops and split products hold
DEQUANTIZING = 13  # bytes a weight of the head: its code; it, its zero point and its scale as floats
HIDDEN_COPIES = 4  # residual, its norm, attention's output, the next residual
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

    def record(self) -> dict[str, Any]:
        """For the result document."""
        return dict(vars(self))

    def __str__(self) -> str:
        where = {"device": "on the GPU", "ram": "in RAM", "file": "in a mapped file"}[self.place]
        parts = [f"{format_bytes(self.states_bytes)} of hidden states {where}, {self.batch} samples at a time"]
        if self.device_bytes:
            parts.append(f"at most {format_bytes(self.device_bytes)} of GPU memory{_of(self.device_limit)}")
        return "; ".join([*parts, f"at most {format_bytes(self.ram_bytes)} of RAM{_of(self.ram_limit)}"])


def _of(limit: int | None) -> str:
    return "" if limit is None else f" ({format_bytes(limit)} allowed)"


@dataclass(frozen=True)
class Streams:
    """The token streams of a run: (samples, seqlen) of each, and whether the two models are compared at the end.

    kept: the tokens of a stream whose inputs of linears may be kept
    """

    shapes: Sequence[tuple[int, int]]
    compared: bool
    kept: int = 0

    @property
    def tokens(self) -> int:
        return sum(samples * seqlen for samples, seqlen in self.shapes)

    @property
    def longest(self) -> int:
        return max((seqlen for _, seqlen in self.shapes), default=1)


def lay_out(
    architecture: Architecture,
    linears: Sequence[LinearPlan],
    streams: Streams,
    device: torch.device,
    itemsize: int,
    *,
    calibrated: bool = True,
    follows_original: bool = False,
    tuned: bool = False,
    vram: int | None = None,
    ram: int | None = None,
    place: str | None = None,
    processes: int = 1,
    head: LinearPlan | None = None,
) -> Layout:
    """Choose a layout within the limits; where none is given, within what is free, and then nothing is refused.

    itemsize: bytes of a number while running; calibrated: whether Gram matrices are made; follows_original: whether the
    inputs' drift is (see `stats`), for which the original's layer stays; tuned: whether layers are tuned by gradients;
    vram, ram: limits in bytes of this process; place: of hidden states, if that has been chosen; processes: that share
    the machine's free RAM; head: if it is quantized

    Raises:
        InputError: a limit that the smallest layout does not keep, with what it needs.
    """
    on_gpu = device.type == "cuda"
    if vram is not None and not on_gpu:
        raise InputError(f"--vram: layers run on the {device.type}; use --ram, or --device cuda")
    states = streams.tokens * architecture.config.hidden_size * itemsize
    device_room = vram or (int(SPARE * torch.cuda.mem_get_info(device)[0]) if on_gpu else 0)
    ram_room = ram or int(SPARE * psutil.virtual_memory().available / processes)
    batches = _batches(streams) if on_gpu else [1]
    places = [place] if place else (["device"] if on_gpu else []) + ["ram", "file"]
    fastest = "device" if on_gpu else "ram"
    found = []
    for where in places:
        for batch in batches:
            needs = _needs(
                architecture, linears, head, streams, on_gpu, itemsize, batch, calibrated, follows_original, tuned
            )
            for width, numbers in _keepable(linears, follows_original) if where == fastest else [(0, 0)]:
                held = states + numbers * streams.kept * itemsize
                device_bytes = needs["device"] + (held if where == "device" else 0)
                ram_bytes = needs["ram"] + (held if where == "ram" else 0)
                found.append(Layout(where, batch, states, device_bytes, ram_bytes, vram, ram, width))
    fitting = [x for x in found if x.device_bytes <= device_room and x.ram_bytes <= ram_room]
    smallest = found[-1]
    if not fitting:
        _refuse(smallest, on_gpu)
    return (fitting or [smallest])[0]


def _keepable(linears: Sequence[LinearPlan], follows_original: bool) -> list[tuple[int, int]]:
    """What may be kept for each token, the most first: its width, and the numbers that everything up to it comes to."""
    sites = _sites([linear for linear in linears if linear.layer == 0])
    widths = [site[0].in_features for site in sites if len(site) == 1]
    both = widths + (widths[:-1] if follows_original else [])  # the original has left the layer at its last site
    return [(limit, sum(w for w in both if w <= limit)) for limit in sorted({0, *widths}, reverse=True)]


def lay_out_job(
    job: Job,
    evaluated: Sequence[tuple[int, int]],
    *,
    vram: int | None = None,
    ram: int | None = None,
    place: str | None = None,
    keeps: bool = True,
) -> Layout:
    """The layout of a job: see `lay_out`.

    evaluated: (samples, seqlen) of each stream that measures; keeps: whether layers are calibrated site by site
    """
    shapes, kept = list(evaluated), 0
    if job.calibration:
        samples, seqlen = job.ranks.most(job.calibration.samples), job.calibration.seqlen
        shapes += [(samples * (1 + job.tuning_copies), seqlen)] * (2 if job.follows_original else 1)
        kept = samples * seqlen if keeps and job.inputs == "quantized" and not job.options.tune else 0
    return lay_out(
        job.model,
        job.plan.linears,
        Streams(shapes, compared=bool(evaluated), kept=kept),
        job.device,
        job.dtype.itemsize,
        calibrated=job.calibration is not None,
        follows_original=job.follows_original,
        tuned=job.options.tune,
        vram=vram,
        ram=ram,
        place=place,
        processes=job.ranks.local_size,
        head=next((linear for linear in job.plan.quantized if linear.unit == "head"), None),
    )


def laid_out(job: Job, layout: Layout) -> Job:
    """The job as this layout has it run."""
    return replace(job, place=layout.place, batch=layout.batch, kept_width=layout.kept_width)


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


def _needs(
    architecture: Architecture,
    linears: Sequence[LinearPlan],
    head: LinearPlan | None,
    streams: Streams,
    on_gpu: bool,
    itemsize: int,
    batch: int,
    calibrated: bool,
    follows_original: bool,
    tuned: bool,
) -> dict[str, int]:
    """The most of device memory and of RAM that is held beside hidden states."""
    layers = [_count(architecture.layer_shapes(index)) for index in range(len(architecture.layers))]
    largest = max(layers)
    stored = 2 * largest  # checkpoints of 16 bit
    before, outside = _count(architecture.before_layers()), _count(architecture.outside())
    vocabulary = int(architecture.config.vocab_size)
    tokens = batch * streams.longest
    logits = 2 * tokens * vocabulary * (itemsize + 4) if streams.compared else 0
    at_work = _solving(linears, calibrated, follows_original)
    at_work += _activations(linears, architecture, tokens, itemsize, streams)
    if tuned:
        step = TUNED_ACTIVATIONS * _activations(linears, architecture, TOKENS_A_STEP, itemsize, streams)
        at_work = max(at_work, largest * (TUNED_BYTES + 2 * itemsize) + step)
    working = {
        "begin": before * itemsize,
        "layer": largest * (itemsize * (2 if follows_original else 1) + 1) + at_work,
        "end": (2 if streams.compared else 0) * outside * itemsize + logits,
    }
    if tuned:
        drawn = TUNED_LOGITS * 4 * min(LOGITS_AT_ONCE, max(TOKENS_A_STEP, streams.longest) * vocabulary)
        working["end"] = max(working["end"], outside * itemsize + drawn)
    files = {"begin": 2 * before, "layer": 2 * stored + largest, "end": (4 if streams.compared else 2) * outside}
    if head is not None:
        whole = head.out_features * head.in_features
        some = replace(head, out_features=min(ROWS, head.out_features))
        working["head"] = 3 * whole + _solving([some], calibrated, follows_original)
        files["head"] = 2 * (outside + whole)
        files["end"] += DEQUANTIZING * whole if streams.compared else 0
    if on_gpu:
        return {
            "device": CUDA_BYTES + WIDE_BYTES + max(working.values()),
            "ram": CUDA_PROCESS_BYTES + max(files.values()),
        }
    return {"device": 0, "ram": PROCESS_BYTES + max(working[moment] + files[moment] for moment in working)}


def _solving(linears: Sequence[LinearPlan], calibrated: bool, follows_original: bool) -> int:
    """The Gram matrices and weights of the site that needs most."""
    needs = [0]
    for site in _sites(linears):
        width = site[0].in_features
        weight = 4 * width * sum(linear.out_features for linear in site)
        gram = 4 * width**2
        needs += (
            [(g + follows_original) * gram + w * weight for g, w in (FACTORISING, REFINING)]
            if calibrated
            else [4 * weight]
        )
    return max(needs)


def _sites(linears: Sequence[LinearPlan]) -> list[list[LinearPlan]]:
    """The linears by what they read, in order."""
    sites: dict[tuple[int, str], list[LinearPlan]] = {}
    for linear in linears:
        sites.setdefault((linear.layer, _reads(linear)), []).append(linear)
    return list(sites.values())


def _reads(linear: LinearPlan) -> str:
    """Linears with the same word read the same inputs, as far as their names tell."""
    return fused_name(linear.local) or linear.local


def _activations(
    linears: Sequence[LinearPlan], architecture: Architecture, tokens: int, itemsize: int, streams: Streams
) -> int:
    widest_in = max(linear.in_features for linear in linears)
    widest_out = 2 * max(linear.out_features for linear in linears)  # gate and up
    summed = samples_per_sum(streams.longest) * streams.longest * widest_in  # inputs waiting for their sum
    hidden = HIDDEN_COPIES * int(architecture.config.hidden_size)
    return itemsize * (tokens * (hidden + widest_in + widest_out) + 2 * summed)


def _count(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(int(torch.Size(shape).numel()) for shape in shapes.values())
