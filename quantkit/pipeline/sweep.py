# SPDX-License-Identifier: Apache-2.0
"""Many settings measured in one pass over the model.

Every layer is read once; the original runs through it once for the calibration tokens, whose Gram matrices serve all
settings, and once for the evaluation tokens; and each setting's own evaluation stream runs through its own rounding of
the layer.

GPTQ's factor of a Gram matrix does not depend on bits or groups and is made once; AWQ's does, by its scales.

After each layer the streams are kept in the folder, and the journal says so: an interrupted sweep goes on there.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.checkpoint.journal import Journal, Unit
from quantkit.checkpoint.reader import open_file
from quantkit.checkpoint.scan import require_finite_weights
from quantkit.checkpoint.writer import require_disk, write_json, write_shard
from quantkit.dtypes import to_stored
from quantkit.methods import gptq
from quantkit.methods.table import METHODS
from quantkit.model.sites import sites_of
from quantkit.model.streaming import embedding_names, move_buffers, outside_loaded, read_outside
from quantkit.pipeline.activations import Stream
from quantkit.pipeline.compare import compare_logits
from quantkit.pipeline.forward import embed_tokens, ending_names, open_states
from quantkit.pipeline.job import Job
from quantkit.pipeline.layer import quantize_observed, require_sites
from quantkit.pipeline.runtime import Progress, Runtime
from quantkit.pipeline.site_inputs import observe
from quantkit.pipeline.walk import walk
from quantkit.quantized import parameters
from quantkit.stats import SiteStats


@dataclass(frozen=True)
class Setting:
    """One setting of a sweep: its name, how it would be run, and its document without the figures."""

    name: str
    job: Job
    document: dict[str, Any]


@torch.no_grad()
def measure_settings(
    runtime: Runtime, settings: Sequence[Setting], journal: Journal, progress: Progress
) -> tuple[list[dict[str, Any]], float]:
    """One row of figures for each setting, and the seconds that all of them share.

    The settings have the same tokens and options.
    """
    finished = journal.finished.get("figures")
    if finished is not None:
        _forget_states(runtime.folder)
        return list(finished.record["figures"]), float(finished.record["shared_seconds"])
    model, calibration, evaluation = runtime.model, settings[0].job.calibration, settings[0].job.evaluation
    assert evaluation is not None
    if not journal.finished:
        require_finite_weights(model.checkpoint, parameters(model))
    move_buffers(model.model, runtime.device)
    numbers = [str(number) for number in range(len(settings))]
    tokens = dict.fromkeys(["original", *numbers], evaluation)
    if calibration is not None:
        tokens["calibration"] = calibration
    total = sum(each.input_ids.numel() for each in tokens.values())
    require_disk(runtime.folder, 2 * total * model.state_width * runtime.dtype.itemsize)
    streams = {name: open_states(runtime, each, name) for name, each in tokens.items()}
    progress.start(len(model.layers), total, {"all streams": str(runtime.memory.place)})
    outside = read_outside(model, embedding_names(model))
    as_files = {name: to_stored(name, tensor) for name, tensor in outside.items()}
    for original, tensors in ((True, outside), (False, as_files)):  # also learns what layers are called with
        with outside_loaded(model, runtime.loaded(tensors)):
            for name, stream in streams.items():
                if original == (name in ("original", "calibration")):
                    embed_tokens(runtime, tokens[name], stream)
    first, seconds, shared = _resume(journal, streams, len(settings))
    began = time.monotonic()
    sites = sites_of(model)
    for setting in settings:
        require_sites(setting.job, sites)
    with walk(runtime, progress, range(first, len(model.layers)), sites) as layers:
        for layer in layers:
            progress.stage("run the original")
            stats = observe(layer, streams["calibration"]) if calibration is not None else ()
            layer.advance(streams["original"])
            factors = _factors(settings, stats)
            shared += time.monotonic() - began
            worst = 0.0
            for number, setting in enumerate(settings):
                began = time.monotonic()
                progress.stage(setting.name)
                given = _given(setting.job, stats, factors, len(layer.sites))
                written, records = quantize_observed(setting.job, layer, *given)
                layer.load(written)
                layer.advance(streams[str(number)])
                seconds[number] += time.monotonic() - began
                worst = max([worst, *(record["loss"] for record in records)])
            began = time.monotonic()
            del stats, factors, given, written
            layer.forget_original()
            _keep(journal, layer.index, streams, {"seconds": list(seconds), "shared_seconds": shared})
            progress.finished(layer.index, worst, False)
    progress.ending("compare the logits")
    ending = read_outside(model, ending_names(model))
    stored = ((name, to_stored(name, tensor)) for name, tensor in ending.items())
    quantized = [streams[number] for number in numbers]
    figures = compare_logits(runtime, evaluation, streams["original"], quantized, runtime.loaded(ending), stored)
    shared += time.monotonic() - began
    rows = [figure | {"seconds": taken} for figure, taken in zip(figures, seconds, strict=True)]
    sha256 = write_json(runtime.folder / "figures.json", rows)
    journal.append(Unit("figures", "figures.json", sha256, {"figures": rows, "shared_seconds": shared}))
    _forget_states(runtime.folder)
    return rows, shared


Factors = Sequence[gptq.Factor | None]


def _factors(settings: Sequence[Setting], stats: Sequence[SiteStats]) -> Factors:
    """GPTQ's factor of each site's Gram matrix, if a setting has a use for it."""
    options = settings[0].job.options
    if not any(METHODS[setting.job.method].shares_factor for setting in settings):
        return [None] * len(stats)
    return [gptq.factorize(each.gram, damp=options.damp, act_order=options.act_order) for each in stats]


def _given(
    job: Job, stats: Sequence[SiteStats], factors: Factors, sites: int
) -> tuple[Sequence[SiteStats | None], Factors]:
    """What a setting may have of the shared statistics: AWQ rescales its Gram matrices in place."""
    if not METHODS[job.method].calibrates:
        return [None] * sites, [None] * sites
    if METHODS[job.method].shares_factor:
        return stats, factors
    return [replace(each, gram=each.gram.clone()) for each in stats], [None] * sites


def _keep(journal: Journal, index: int, streams: Mapping[str, Stream], record: dict[str, Any]) -> None:
    """Keep the streams behind a layer, and then forget those behind layers before."""
    name = f"states-{index}.safetensors"
    sha256 = write_shard(journal.folder / name, {key: stream.states.cpu() for key, stream in streams.items()})
    journal.append(Unit(f"layer.{index}", name, sha256, record))
    _forget_states(journal.folder, but=name)


def _forget_states(folder: Path, but: str = "") -> None:
    """Remove kept streams, those too that an interrupted sweep had no time to remove."""
    for path in folder.glob("states-*.safetensors"):
        if path.name != but:
            path.unlink()


def _resume(journal: Journal, streams: Mapping[str, Stream], settings: int) -> tuple[int, list[float], float]:
    """Fill the streams from the last layer that is kept.

    Returns:
        The layer to go on with, the seconds of each setting, and those that all share.
    """
    layers = [unit for unit in journal.finished.values() if unit.unit.startswith("layer.")]
    if not layers:
        return 0, [0.0] * settings, 0.0
    last = layers[-1]
    if not journal.verify_unit(last):
        journal.drop_from("layer.0")
        return 0, [0.0] * settings, 0.0
    file = open_file(journal.folder / last.file)
    for name, stream in streams.items():
        states: Tensor = file.read(name)
        stream.states.copy_(states)
    return len(layers), list(last.record["seconds"]), float(last.record["shared_seconds"])
