# SPDX-License-Identifier: Apache-2.0
"""What a run holds at its peak beside hidden states, counted in bytes from shapes alone, without torch.

`memory` chooses by it before a run, `fit` tells it before there is a model. One of these moments is the peak:

    begin   the input embedding, or what comes after the layers, as stored and as written; the former as it runs
    layer   the layer as it runs, as it was, and what has been quantized of it; for the site that needs most, what sums
            up its inputs or what rounds its weights (see `_calibrating`, `_rounding`). In RAM also the layer as stored,
            the next one being read, its shard, and the one being written
    head    where it is quantized: it whole and its codes, and what is at work on some of its rows
    end     what makes logits twice (the model's and the written one, where they differ), and the logits of both for a
            micro-batch; without a comparison what comes after the layers, as stored and as written
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from quantkit.formats.names import expert_of
from quantkit.hardware.batching import HEAD_ROWS, LOGITS_AT_ONCE, TOKENS_A_STEP, samples_per_sum, weights_at_once
from quantkit.model.shapes import Shape, Shapes
from quantkit.plan import LinearPlan

MIB = 2**20
PROCESS_BYTES = 704 * MIB  # of RAM: Python, torch and transformers, what oneDNN keeps, tokenizer and tokens
CUDA_PROCESS_BYTES = 3 * 2**30  # of RAM with CUDA's libraries loaded
CUDA_BYTES = 768 * MIB  # of a GPU: its context, and the workspaces of libraries
PINNED_ROUNDING = 2  # torch pins memory in powers of two
WIDE_BYTES = 2**30  # of a GPU: what the large blocks of its column loops and split products hold
SITE_COPIES = 2  # of a site's weights: scaled, together
EVIDENCE = 7  # Gram matrices of an expert that leans on its layer: its own and the layer's in two parts, blends
ROUNDING_COPIES = 6  # of those that are rounded together: corrected, steps, residual, a product, two at work
DEQUANTIZING = 13  # bytes a weight of the head: its code; it, its zero point and its scale as floats
TUNED_BYTES = 5 * 4 + 2 + 1  # a weight: its position, gradient, two moments, average; its offset; its code
TUNED_LOGITS = 6  # float32 copies of the logits from which gradients start, see `fisher`
TUNED_ACTIVATIONS = 3  # what is kept for going back, against what running needs
HIDDEN_COPIES = 4  # residual, its norm, attention's output, the next residual


@dataclass(frozen=True)
class Work:
    """What decides a run's memory beside the model's shapes.

    linears: of the layers; head: if it is quantized; itemsize: bytes of a number while running; batch, longest: samples
    of a micro-batch and their tokens; calibrated: whether Gram matrices are made; follows_original: whether the inputs'
    drift is (see `stats`), for which the original's layer stays; tuned: whether layers are tuned by gradients;
    compared: whether the two models are at the end
    """

    linears: Sequence[LinearPlan]
    on_gpu: bool
    itemsize: int
    longest: int
    compared: bool
    batch: int = 1
    calibrated: bool = False
    follows_original: bool = False
    tuned: bool = False
    head: LinearPlan | None = None

    @property
    def tokens(self) -> int:
        return self.batch * self.longest


@dataclass(frozen=True)
class Needs:
    """Bytes of device memory (0 on a CPU) and of RAM."""

    device: int
    ram: int


def needs(model: Shapes, work: Work) -> Needs:
    """The most that is held beside hidden states."""
    working, files = _working(model, work), _files(model, work)
    if work.on_gpu:
        device = CUDA_BYTES + WIDE_BYTES + max(working.values())
        return Needs(device, CUDA_PROCESS_BYTES + max(files.values()))
    return Needs(0, PROCESS_BYTES + max(working[moment] + files[moment] for moment in working))


def sites(linears: Sequence[LinearPlan]) -> list[list[LinearPlan]]:
    """The linears by what they read, in order."""
    found: dict[tuple[int, str], list[LinearPlan]] = {}
    for linear in linears:
        found.setdefault((linear.layer, linear.role.site or linear.local), []).append(linear)
    return list(found.values())


def _different(linears: Sequence[LinearPlan]) -> list[list[LinearPlan]]:
    """One of all sites that need the same: a mixture of experts has thousands."""
    found = {
        (expert_of(site[0].local) is None, *((x.out_features, x.in_features) for x in site)): site
        for site in sites(linears)
    }
    return list(found.values())


def _working(model: Shapes, work: Work) -> dict[str, int]:
    """Moment -> bytes where the work is."""
    largest = _largest_layer(model)
    at_work = max(
        (max(_calibrating(site, model, work), _rounding(site, work)) for site in _different(work.linears)), default=0
    )
    if work.tuned:
        step = TUNED_ACTIVATIONS * _activations(model, work, TOKENS_A_STEP)
        at_work = max(at_work, largest * (TUNED_BYTES + 2 * work.itemsize) + step)
    ending = _count(model.outside() if model.tied else model.after_layers())
    logits = 2 * work.tokens * int(model.config.vocab_size) * work.itemsize
    moments = {
        "begin": _count(model.before_layers()) * work.itemsize,
        "layer": largest * (2 * work.itemsize + 1) + at_work,
        "end": 2 * ending * work.itemsize + logits if work.compared else 0,
    }
    if work.tuned:
        drawn = min(LOGITS_AT_ONCE, max(TOKENS_A_STEP, work.longest) * int(model.config.vocab_size))
        start = _count(model.outside()) * work.itemsize + TUNED_LOGITS * 4 * drawn
        moments["end"] = max(moments["end"], start)
    if work.head is not None:
        some = replace(work.head, out_features=min(HEAD_ROWS, work.head.out_features))
        moments["head"] = 3 * _weights([work.head]) + max(_calibrating([some], model, work), _rounding([some], work))
    return moments


def _files(model: Shapes, work: Work) -> dict[str, int]:
    """Moment -> bytes of what is read and written, in 16 bit but for codes."""
    before, after, outside = (_count(x()) for x in (model.before_layers, model.after_layers, model.outside))
    largest = _largest_layer(model)
    widths = {linear.scheme.bits if linear.scheme else 16 for linear in work.linears} or {16}
    # Shards: one made, one being written. What torch has pinned it keeps, and uses again for no other size.
    kept = PINNED_ROUNDING * 2 * largest * sum(widths) // 8 if work.on_gpu else 0
    shards = kept or 2 * largest * max(widths) // 8
    moments = {
        "begin": max(6 * before, 4 * after),  # in float32 beside it where the sites are found by watching
        "layer": 4 * largest + shards,
        "end": kept + 4 * (outside if work.compared else after),
    }
    if work.head is not None:
        whole = _weights([work.head])
        moments["head"] = kept + 2 * (outside + whole)
        moments["end"] += DEQUANTIZING * whole if work.compared else 0
    return moments


def _calibrating(site: Sequence[LinearPlan], model: Shapes, work: Work) -> int:
    """The Gram matrix, the drift (of one linear with few rows as those rows, see `stats`), and inputs on their way."""
    if not work.calibrated:
        return _activations(model, work, work.tokens)
    width = site[0].in_features
    summed = 2 * samples_per_sum(work.longest) * work.longest * width * work.itemsize
    return 4 * width**2 + _drift(site, work) + _activations(model, work, work.tokens) + summed


def _rounding(site: Sequence[LinearPlan], work: Work) -> int:
    """The Gram matrix (on a GPU also in 16 bit) and its factor, the drift, the site's weights, and copies of those that
    are rounded together.
    """
    weights = _weights(site)
    if not work.calibrated:
        return 4 * 4 * weights
    copies = SITE_COPIES * weights + ROUNDING_COPIES * min(weights, weights_at_once(work.on_gpu))
    grams = (2 * 4 + 2 * work.on_gpu) * site[0].in_features ** 2
    if expert_of(site[0].local):
        grams += EVIDENCE * 4 * site[0].in_features ** 2
    return grams + _drift(site, work) + 4 * copies


def _drift(site: Sequence[LinearPlan], work: Work) -> int:
    width, rows = site[0].in_features, site[0].out_features
    few = len(site) == 1 and 2 * rows < width
    return 4 * width * (rows if few else width) if work.follows_original else 0


def _activations(model: Shapes, work: Work, tokens: int) -> int:
    widest_in = max(linear.in_features for linear in work.linears)
    widest_out = 2 * max(linear.out_features for linear in work.linears)  # gate and up
    hidden = HIDDEN_COPIES * int(model.config.hidden_size)
    return work.itemsize * tokens * (hidden + widest_in + widest_out)


def _weights(linears: Sequence[LinearPlan]) -> int:
    return sum(linear.in_features * linear.out_features for linear in linears)


def _largest_layer(model: Shapes) -> int:
    return max(_count(model.layer_shapes(index)) for index in range(len(model.layer_tensors)))


def _count(shapes: Mapping[str, Shape]) -> int:
    return sum(map(math.prod, shapes.values()))
