# SPDX-License-Identifier: Apache-2.0
"""quantkit.json as types: built by whoever knows a part, written as it is, and checked once when it is read.

A field that was not set is not written. A document may hold more than is named here.
"""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field

from quantkit.scheme import Scheme, name_of


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Figure = Annotated[float | None, BeforeValidator(_finite)]  # None: not measured, or not finite, which JSON cannot hold


class Part(BaseModel):
    """A part of the document."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    def content(self) -> dict[str, Any]:
        """The part as JSON has it."""
        return self.model_dump(exclude_unset=True, by_alias=True)

    def having(self, **fields: Any) -> Self:
        """The same with some fields changed."""
        return type(self).model_validate({name: getattr(self, name) for name in self.model_fields_set} | fields)


# ---------------------------------------------------------------- what was made


class Numbers(Part):
    """How numbers are represented. 16 bits: as they are."""

    bits: int
    group_size: int | None
    symmetric: bool | None
    grid: str = "integer"

    @staticmethod
    def fields_of(scheme: Scheme | None) -> dict[str, Any]:
        """The fields of a scheme; None: 16 bit."""
        if scheme is None:
            return {"bits": 16, "group_size": None, "symmetric": None}
        fields = {"bits": scheme.bits, "group_size": scheme.group_size, "symmetric": scheme.symmetric}
        return fields if scheme.grid == "integer" else fields | {"grid": scheme.grid}

    @property
    def scheme(self) -> Scheme | None:
        """The scheme that the fields are of."""
        if self.bits >= 16 or self.group_size is None or self.symmetric is None:
            return None
        return Scheme(self.bits, self.group_size, self.symmetric, self.grid)

    @property
    def scheme_name(self) -> str:
        """As `scheme.name_of`."""
        return name_of(self.scheme)


class Place(Part):
    """Which linear: its full name, the number of its decoder layer (-1: the head), and the last part of its name."""

    name: str
    layer: int
    kind: str


class Linear(Numbers, Place):
    """A quantized linear: its stored bytes, and its relative output error; `LinearPlan.record` makes it.

    tokens: those that an expert has calibrated on; fallback: what an expert that saw too few has leaned on (see
    `methods.starved`)

    What follows those is of some methods, or of a conversion: what it was before, whether its integers are the same,
    and if not how far its weights are from what they were.
    """

    method: str | None = None
    out_features: int
    in_features: int
    bytes: int
    loss: Figure = None
    tokens: int | None = None
    fallback: str | None = None
    damp_raised_to: Figure = None
    scale: str | None = None
    scale_gain: Figure = None
    tuning: dict[str, Any] | None = None
    type: str | None = None
    before: str | None = None
    equal: bool | None = None
    weight_error: Figure = None

    @property
    def weights(self) -> int:
        """How many it has."""
        return self.out_features * self.in_features


class RecipeRow(Numbers):
    """Linears of one kind that are treated alike, and the layers that they are in."""

    kind: str
    layers: str
    method: str | None
    linears: int
    bytes: int


class File(Part):
    """A file of the checkpoint."""

    name: str
    bytes: int
    sha256: str


class GgufFile(Part):
    """The .gguf beside the shards, which is what llama.cpp loads; equal: linears whose integers went in as they are."""

    file: str
    bytes: int
    types: list[str] = []
    equal: int | None = None
    embeddings: str | None = None


class Tokens(Part):
    """A calibration or evaluation set."""

    source: str
    sha256: str
    samples: int
    seqlen: int
    protocol: str = ""
    notes: list[str] = []


class BaseModelFacts(Part):
    """The model that was quantized, where it is known by a name of the hub's."""

    id: str | None = None
    license: str | None = None


class WeightError(Part):
    """Of linears that were rounded again: |W' - W| / |W|."""

    mean: Figure
    worst: Figure


class Converted(Part):
    """Where a converted folder comes from, and what became of its integers.

    equal: number of linears with the same integers; rounded: of those that were rounded again
    """

    origin: str = Field(validation_alias=AliasChoices("origin", "from"), serialization_alias="from")
    from_format: str | None
    made_by: str
    source: dict[str, str] = {}
    source_result_sha256: str | None = None
    lossless: bool
    equal: int
    rounded: int
    weight_error: WeightError | None


# ---------------------------------------------------------------- what was measured


class Shard(Part):
    """A kind of linear: [out_features, in_features] whole and on one card (None: it cannot be cut, and why not)."""

    linear: str
    scheme: str
    shape: list[int]
    on_card: list[int] | None
    why_not: str | None
    layers: int


class Card(Part):
    """Memory of one card; problems: why a linear cannot be cut over the cards."""

    cards: int = 1
    weights_bytes: int
    kv_bytes: int
    kv_bytes_per_token: int
    workspace_bytes: int
    shards: list[Shard] = []
    problems: list[str] = []


class Cache(Part):
    """Layers whose KV caches grow alike."""

    layers: int
    bytes_per_token: int
    window: int | None


class EngineFlag(Part):
    """Words of a server's command line, and what they cost."""

    words: list[str]
    note: str


class EngineBatch(Part):
    """A batch that an engine can be told to run, what it takes beside weights and cache, and the context it leaves."""

    batched_tokens: int
    sequences: int
    eager: bool
    measured: bool
    workspace_bytes: int
    context: int


class EngineUse(Part):
    """The engine that memory was counted for, and the flags of its server.

    measured: whether what it takes was measured with these flags, and not read; source: where the figures are from;
    context: the tokens of one sequence that the flags allow; batches: what was chosen from; card: the GPU that was seen
    """

    name: str
    version: str
    measured: bool
    source: str
    flags: list[str]
    costs: list[EngineFlag]
    context: int
    batches: list[EngineBatch]
    card: str | None = None


class Fit(Part):
    """What `fit` said: memory of one card, in bytes.

    weights: by kind and "total"; file_bytes: of a .gguf without its header; workspace: by part and "total", see
    `serving.engine_memory`; kv_bytes: of one sequence at the context; longest_context: with the flags of `engine`;
    longest_context_in_memory: without the model's own limit, None: none; tensor_parallel: on one card

    What quantizing needs, where it is still to be done: disk_bytes, ram_bytes, device_bytes, hidden_states_bytes.
    """

    format: str | None = None
    weights: dict[str, int] = {}
    weights_16bit: int = 0
    file_bytes: int | None = None
    kv: str
    kv_bytes_per_token: int = 0
    kv_bytes: int = 0
    kv_layers: list[Cache]
    workspace: dict[str, int] = {}
    model: dict[str, int] = {}
    tensor_parallel: Card
    context: int
    total_bytes: int
    budget_bytes: int
    fits: bool
    margin_bytes: int = 0
    longest_context: int
    longest_context_in_memory: int | None = None
    max_position_embeddings: int | None = None
    engine: EngineUse | None = None
    engines: dict[str, str | None] = {}
    disk_bytes: int | None = None
    ram_bytes: int | None = None
    device_bytes: int | None = None
    hidden_states_bytes: int | None = None
    quantizing: dict[str, int] = {}


class Limits(Part):
    """What the verdict is judged by; None: not said.

    max_ppl_increase: how far perplexity may rise above FP16's, relative: 0.05 is 5%
    max_kl: the largest mean KL divergence in nats
    """

    max_ppl_increase: Figure = None
    max_kl: Figure = None


class LayerError(Part):
    """The error of the hidden states after a layer."""

    layer: int
    relative_error: Figure


class StrangeLinear(Part):
    """A linear whose weights are not the original's: their relative error, and what rounding to its bits explains."""

    name: str
    error: Figure
    expected: Figure


class Measured(Part):
    """What was measured against FP16.

    tokens: those that were predicted; dtype: of the computation; torch_dtype: what config.json has it served in;
    largest_activation: the largest absolute number within the model; vocabulary: how many tokens it predicts among;
    differences: in what its config, metadata or tokenizer say something else than the original's, a line each
    """

    perplexity: Figure
    perplexity_fp16: Figure
    kl_divergence: Figure
    kl_standard_error: Figure = None
    kl_percentiles: dict[str, Figure]
    top1_agreement: Figure
    tokens: int
    dtype: str | None = None
    torch_dtype: str | None = None
    largest_activation: Figure = None
    vocabulary: int | None = None
    strange_linears: list[StrangeLinear] = []
    differences: list[str] = []
    layer_errors: list[LayerError]

    @property
    def increase(self) -> float | None:
        """How far perplexity rose above FP16's, relative; None if either is missing."""
        return self.perplexity / self.perplexity_fp16 - 1 if self.perplexity and self.perplexity_fp16 else None


class Verification(Measured):
    """What was measured, on what, and the verdict."""

    eval: Tokens | None
    limits: Limits
    fit: Fit | None
    verdict: Literal["pass", "fail"]
    reasons: list[str]


# ---------------------------------------------------------------- the whole


class Foreign(Part):
    """A checkpoint of another tool, as `inspect` and `verify` describe it.

    made_by: what wrote it; act_order: whether columns that share a scale are not side by side; layers: the quantized
    linears; kept: full names of those in 16 bit; schemes: how many linears have each
    """

    out: str
    model: str
    format: str
    bits_per_weight: float
    total_bytes: int
    quantkit_version: str | None = None
    command: str | None = None
    made_by: str = "unknown"
    act_order: bool = False
    layers: list[Linear] = []
    kept: list[str] = []
    schemes: dict[str, int] = {}
    tensor_bytes: int | None = None
    seconds: Figure = None
    peak_rss_bytes: int | None = None
    device: str | None = None
    versions: dict[str, str] = {}
    verification: Verification | None = None


class Result(Part):
    """The whole of it; torch_dtype: what config.json has the weights served in."""

    quantkit_version: str
    command: str
    model: str
    base_model: BaseModelFacts | None = None
    method: str
    format: str
    scheme: Numbers
    options: dict[str, Any] = {}
    recipe: list[RecipeRow] = []
    calibration: Tokens | None = None
    layers: list[Linear]
    bits_per_weight: float
    total_bytes: int
    tensor_bytes: int | None = None
    seconds: Figure = None
    peak_rss_bytes: int | None = None
    peak_device_bytes: int | None = None
    processes: int = 1
    device: str | None = None
    torch_dtype: str | None = None
    memory: dict[str, Any] = {}
    versions: dict[str, str] = {}
    fallbacks: list[str] = []
    engines: dict[str, str | None] = {}
    gguf: GgufFile | None = None
    converted: Converted | None = None
    files: list[File] = []
    verification: Verification | None
