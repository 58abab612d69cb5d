# SPDX-License-Identifier: Apache-2.0
"""The token streams that travel through the layers of a run."""

from dataclasses import dataclass, replace

from quantkit.calibration.tokens import TokenSet
from quantkit.model.streaming import embedding_names, outside_loaded, read_outside
from quantkit.pipeline.activations import Stream
from quantkit.pipeline.forward import embed_tokens, open_streams
from quantkit.pipeline.job import Job
from quantkit.pipeline.shards import written_outside
from quantkit.pipeline.tuning import learn_sizes
from quantkit.plan import ShardPlan


@dataclass(frozen=True)
class Streams:
    """What travels through the layers, as far as a job has it, of this rank's samples.

    original, quantized: the evaluation samples on both models
    calibration: the calibration samples; reference: the first of them on the original model, where their drift from it
    is made up for
    gram_samples: of how many calibration samples, the first ones, Gram matrices are made
    """

    original: Stream | None
    quantized: Stream | None
    calibration: Stream | None
    reference: Stream | None
    gram_samples: int

    @property
    def all(self) -> list[Stream]:
        """Those that there are."""
        streams = (self.original, self.quantized, self.calibration, self.reference)
        return [stream for stream in streams if stream is not None]

    @property
    def places(self) -> dict[str, str]:
        """Where the hidden states of each token set live."""
        streams = {"calibration": self.calibration, "evaluation": self.original}
        return {name: stream.place for name, stream in streams.items() if stream}


def own_samples(job: Job, tokens: TokenSet | None) -> TokenSet | None:
    """The samples of this rank."""
    return tokens and replace(tokens, input_ids=tokens.input_ids[job.runtime.ranks.own(tokens.samples)])


def open_run(job: Job, reference: TokenSet | None, gram_samples: int) -> Streams:
    """Room for the streams of a job; `reference`: the calibration samples that the original model runs too."""
    sets = {
        "original": job.evaluation,
        "quantized": job.evaluation,
        "calibration": job.calibration,
        "reference": reference,
    }
    streams = open_streams(job.runtime, {name: tokens for name, tokens in sets.items() if tokens is not None})
    if job.inputs == "quantized":  # what only calibrates is summed up over many tokens
        for name in streams.keys() & {"calibration", "reference"}:
            streams[name] = replace(streams[name], exact=False)
    return Streams(**{name: streams.get(name) for name in sets}, gram_samples=gram_samples)


def embed_run(job: Job, streams: Streams, embeddings: ShardPlan) -> None:
    """Fill the streams: those on the original by its embedding, those on the quantized by the one that is stored."""
    runtime = job.runtime
    model = runtime.model

    def fill(tokens: TokenSet | None, stream: Stream | None) -> None:
        if tokens is not None and stream is not None:
            embed_tokens(runtime, tokens, stream)

    names = embedding_names(model)
    with outside_loaded(model, runtime.loaded(read_outside(model, names))):
        fill(job.evaluation, streams.original)
        fill(job.calibration, streams.reference)
        if job.inputs == "original":
            fill(job.calibration, streams.calibration)
        learn_sizes(job, streams.calibration, streams.gram_samples)
    with outside_loaded(model, runtime.loaded(written_outside(job, embeddings, names))):
        fill(job.evaluation, streams.quantized)
        if job.inputs == "quantized":
            fill(job.calibration, streams.calibration)
