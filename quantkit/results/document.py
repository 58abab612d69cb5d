# SPDX-License-Identifier: Apache-2.0
"""quantkit.json: what a finished run says of itself, checked once when it is read; after that its fields are trusted.

The classes name what the commands, the report and the card rely on; a document may hold more.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quantkit.errors import OutputError
from quantkit.jsonfile import read_object

RESULT = "quantkit.json"
Figure = float | None  # None: not measured, or not finite


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class Scheme(_Part):
    """How numbers are represented."""

    bits: int
    group_size: int
    symmetric: bool


class Layer(Scheme):
    """A quantized linear: its place, its stored bytes, and its relative output error."""

    name: str
    layer: int
    kind: str
    method: str
    loss: Figure
    bytes: int


class File(_Part):
    """A file of the checkpoint."""

    name: str
    bytes: int
    sha256: str


class Exported(_Part):
    """The .gguf beside the shards, which is what llama.cpp loads."""

    file: str
    bytes: int


class Tokens(_Part):
    """A calibration or evaluation set."""

    source: str
    sha256: str
    samples: int
    seqlen: int
    protocol: str = ""
    notes: list[str] = []


class BaseModelFacts(_Part):
    """The model that was quantized, where it is known by a name of the hub's."""

    id: str | None = None
    license: str | None = None


class Card(_Part):
    """Memory of one card."""

    cards: int = 1
    weights_bytes: int
    kv_bytes: int
    kv_bytes_per_token: int
    workspace_bytes: int


class Cache(_Part):
    """Layers whose KV caches grow alike."""

    layers: int
    bytes_per_token: int
    window: int | None


class Fit(_Part):
    """What `fit` said."""

    kv: str
    kv_layers: list[Cache]
    tensor_parallel: Card
    context: int
    total_bytes: int
    budget_bytes: int
    fits: bool
    longest_context: int
    engines: dict[str, str | None] = {}


class Limits(_Part):
    """What the verdict was judged by."""

    max_ppl_increase: Figure = None
    max_kl: Figure = None


class LayerError(_Part):
    """The error of the hidden states after a layer."""

    layer: int
    relative_error: Figure


class Verification(_Part):
    """What was measured against FP16, and the verdict."""

    perplexity: Figure
    perplexity_fp16: Figure
    kl_divergence: Figure
    kl_percentiles: dict[str, Figure]
    top1_agreement: Figure
    tokens: int
    dtype: str | None = None
    torch_dtype: str | None = None
    largest_activation: Figure = None
    layer_errors: list[LayerError]
    eval: Tokens | None
    limits: Limits
    fit: Fit | None
    verdict: Literal["pass", "fail"]
    reasons: list[str]


class Document(_Part):
    """The whole of it."""

    quantkit_version: str
    command: str
    model: str
    base_model: BaseModelFacts | None = None
    method: str
    format: str
    scheme: Scheme
    options: dict[str, Any] = {}
    calibration: Tokens | None = None
    layers: list[Layer]
    files: list[File] = Field(default=[])
    bits_per_weight: float
    total_bytes: int
    tensor_bytes: int | None = None
    seconds: Figure = None
    peak_rss_bytes: int | None = None
    peak_device_bytes: int | None = None
    device: str | None = None
    torch_dtype: str | None = None
    versions: dict[str, str] = {}
    fallbacks: list[str] = []
    engines: dict[str, str | None] = {}
    gguf: Exported | None = None
    verification: Verification | None


def read_result(out: Path) -> dict[str, Any]:
    """The result document of a finished run.

    Raises:
        OutputError: there is none, it cannot be read, or it is not as a run writes it.
    """
    path = out / RESULT
    if not path.is_file():
        state = (
            "unfinished; run its command again" if (out / "journal.jsonl").is_file() else "not a folder of quantkit's"
        )
        raise OutputError(f"{out}: no {RESULT} ({state})")
    return checked(read_object(path, "run the command that made it again", OutputError), path)


def checked(document: dict[str, Any], path: Path) -> dict[str, Any]:
    """The document itself, if it is as a run writes it.

    Raises:
        OutputError: a field is missing or of another kind, with its place.
    """
    try:
        Document.model_validate(document)
    except ValidationError as error:
        first, more = error.errors()[0], len(error.errors()) - 1
        place = ".".join(map(str, first["loc"]))
        found = "" if first["type"] == "missing" else f", got {repr(first['input'])[:60]}"
        others = f" ({more} more like it)" if more else ""
        raise OutputError(
            f"{path}: {place}: {first['msg']}{found}{others}; the file is damaged: run the command that made it again"
        ) from error
    return document
