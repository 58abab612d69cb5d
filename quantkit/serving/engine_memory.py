# SPDX-License-Identifier: Apache-2.0
"""What an engine takes of a card beside the tensors of a checkpoint and the KV cache, by its flags. A row an engine.

vLLM's row was measured: `benchmarks/engine_memory.py`, kept in docs/engine_memory.json, and whole models of 48 and 64
layers, all on one H200 held to 22 GiB (tests/test_engine_memory.py holds them against the row). vLLM runs one batch
of the largest size, and gives the KV cache what its budget leaves beside the peak of that:

    activations   tokens x (HIDDEN_COPIES x hidden + widest output + widest input of a layer) in 16 bit. The peak lies
                  in the MLP, where gate and up, their product and a few hidden states live side by side
    compilation   what the peak is more while the model is compiled: a copy of the embedding, and COMPILED_TENTHS / 10
                  hidden states a token. Measured at hidden sizes of 3584 and 5120; `--enforce-eager` has none of it
    logits        sequences x vocabulary in float32, SAMPLER_COPIES times while the sampler sorts, where that is more
    graphs        GRAPH_BYTES a layer and CUDA graph; vLLM captures them for 1, 2, 4 and every 8th batch size up to
                  twice the sequences
    engine        base_bytes: context and libraries
    loading       the bytes by which tensors grow when they are loaded, see `loading_bytes`
    margin        MARGIN_BYTES, as two starts of the same command are not alike to the byte
    block         the KV cache is handed out in blocks of BLOCK tokens, so one may be half empty
    communication COMMUNICATION_BYTES of NCCL buffers where there are several cards; not measured

The other rows are from the engines' documents and not measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quantkit.hardware.card import Card
from quantkit.model.shapes import Shapes
from quantkit.serving.cache import Cache, bytes_per_token, longest_context
from quantkit.serving.needs import HIDDEN_COPIES, MIB
from quantkit.serving.stored import Stored, widest_input, widest_output

COMPILED_TENTHS = 22
SAMPLER_COPIES = 8
GRAPH_BYTES = MIB // 5
BLOCK = 16
COMMUNICATION_BYTES = 256 * MIB
MARGIN_BYTES = 32 * MIB
LOADED_BYTES = 24 * MIB  # the most by which a measured model was larger than `loading_bytes` explains
SEGMENT = 2 * MIB  # torch takes memory for large tensors in multiples of this
LARGE = 10 * MIB
UNSPLIT = MIB  # a rest of a segment that is no larger is lost


@dataclass(frozen=True)
class Batch:
    """What an engine is told to run at once; measured: whether it was with this."""

    tokens: int
    sequences: int
    eager: bool = False
    measured: bool = True


@dataclass(frozen=True)
class EngineMemory:
    """An engine's row.

    batches: to choose from, the fastest first; base_bytes: context and libraries; itemsize: bytes of an activation;
    compiles: whether it compiles models and captures graphs; loads: whether what it makes of tensors is known;
    prompt_logits: whether logits are made of each token of a batch
    """

    version: str
    source: str
    batches: tuple[Batch, ...]
    base_bytes: int
    itemsize: int = 2
    compiles: bool = False
    loads: bool = False
    prompt_logits: bool = False


MEMORY: dict[str, EngineMemory] = {
    "vllm": EngineMemory(
        "0.24.0",
        "measured on one H200 held to 22 GiB, 2026-12-01 (docs/engine_memory.json)",
        (
            Batch(2048, 8),
            Batch(1024, 4, measured=False),
            Batch(2048, 8, eager=True),
            Batch(512, 8, eager=True, measured=False),
        ),
        base_bytes=256 * MIB,
        compiles=True,
        loads=True,
    ),
    "sglang": EngineMemory(
        "0.5.23",
        "from SGLang's documents on memory, not measured",
        (Batch(2048, 8, measured=False),),
        base_bytes=1024 * MIB,
    ),
    "transformers": EngineMemory(
        "5.23.0",
        "an allowance, not measured",
        (Batch(2048, 1, eager=True, measured=False),),
        base_bytes=512 * MIB,
    ),
    "gptqmodel": EngineMemory(
        "7.7.0",
        "an allowance, not measured",
        (Batch(2048, 1, eager=True, measured=False),),
        base_bytes=512 * MIB,
    ),
    "llama.cpp": EngineMemory(
        "its server",
        "from llama.cpp's documents, not measured",
        (Batch(512, 1, measured=False),),
        base_bytes=512 * MIB,
        itemsize=4,
        prompt_logits=True,
    ),
}


@dataclass(frozen=True)
class Load:
    """A checkpoint as an engine has it on one of `cards` cards.

    kinds: tensor name -> a key of `stored.KINDS`; caches: of a sequence, there; weights: bytes of the tensors, there
    """

    model: Shapes
    stored: Stored
    kinds: Mapping[str, str]
    caches: Sequence[Cache]
    weights: int
    cards: int
    card: Card | None = None


@dataclass(frozen=True)
class Choice:
    """A batch, the workspace that it takes, and the tokens of context it leaves room for (None: no limit)."""

    batch: Batch
    workspace: Mapping[str, int]
    room: int | None

    def reaches(self, context: int) -> bool:
        return self.room is None or self.room >= context


def choices(engine: str, load: Load, budget: int) -> list[Choice]:
    """Every batch of the engine's row with what it leaves of the budget."""
    row = MEMORY[engine]
    found = []
    for batch in row.batches:
        parts = workspace(row, load, batch)
        found.append(Choice(batch, parts, longest_context(load.caches, budget - load.weights - parts["total"])))
    return found


def choose(found: Sequence[Choice], context: int) -> Choice:
    """The first that reaches the context, or the one that takes least."""
    reaching = [choice for choice in found if choice.reaches(context)]
    return reaching[0] if reaching else min(found, key=lambda choice: choice.workspace["total"])


def workspace(row: EngineMemory, load: Load, batch: Batch) -> dict[str, int]:
    """Part -> bytes on one card, and their "total"; see above."""
    config, linears, cards = load.model.config, load.stored.linears, load.cards
    vocabulary, hidden = int(config.vocab_size), int(config.hidden_size)
    width = HIDDEN_COPIES * hidden + (widest_output(linears) + widest_input(linears)) // cards
    activations = batch.tokens * width * row.itemsize
    compiled = row.compiles and not batch.eager
    compiling = 0
    if compiled:
        embeddings = sum(size for name, size in load.stored.tensors.items() if load.kinds[name] == "embeddings")
        compiling = embeddings // cards + batch.tokens * hidden * row.itemsize * COMPILED_TENTHS // 10
    rows, copies = (batch.tokens, 1) if row.prompt_logits else (batch.sequences, SAMPLER_COPIES)
    forward = max(activations, compiling)
    parts = {
        "activations": activations,
        "compilation": forward - activations,
        "logits": max(0, rows * vocabulary * 4 * copies - forward),
        "graphs": len(load.model.layer_tensors) * captured(batch.sequences) * GRAPH_BYTES if compiled else 0,
        "engine": row.base_bytes,
        "loading": loading_bytes(load) if row.loads else 0,
        "margin": MARGIN_BYTES,
        "block": BLOCK * bytes_per_token(load.caches),
        "communication": COMMUNICATION_BYTES if cards > 1 else 0,
    }
    return parts | {"total": sum(parts.values())}


def captured(sequences: int) -> int:
    """How many batch sizes vLLM captures CUDA graphs for (`config/vllm.py` of 0.24)."""
    largest = min(2 * sequences, 512)
    small = [size for size in (1, 2, 4) if size <= largest]
    return len(small) + len(range(8, min(largest + 1, 256), 8)) + len(range(256, largest + 1, 16))


def loading_bytes(load: Load) -> int:
    """By how much the tensors grow in vLLM, on one card.

    zero points   Machete, the kernel of cards of compute capability 9.0, keeps them as float16 of zero point x scale.
                  Marlin, that of all others, leaves them packed, and drops those of symmetric files. Where no card is
                  seen, one like the RTX 4090 is meant, as by the usual budget and share of it (`flags.USUAL_SHARE`)
    rounding      torch gives a large tensor whole segments
    rotary table  cosines and sines of all positions that the model allows
    LOADED_BYTES  what this does not explain
    """
    config = load.model.config
    heads = int(getattr(config, "num_attention_heads", None) or 1)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    rotary = 2 * width * int(getattr(config, "max_position_embeddings", None) or 0)
    return (_zero_points(load) + _rounding(load)) // load.cards + rotary + LOADED_BYTES


def machete(card: Card | None) -> bool:
    """Whether vLLM's kernel for a card is Machete."""
    return card is not None and card.capability == (9, 0) and "MacheteLinearKernel" not in card.disabled


def _zero_points(load: Load) -> int:
    zeros = {name: size for name, size in load.stored.tensors.items() if load.kinds[name] == "zeros"}
    packed = {name.rpartition(".")[0]: size for name, size in zeros.items()}
    grown = 0
    for linear in load.stored.linears:
        scheme = linear.scheme
        if scheme is None or linear.name not in packed:
            continue
        used = load.stored.format == "awq" or not scheme.symmetric  # AWQ's configs do not say that all are alike
        if machete(load.card) and used:
            grown += 2 * scheme.groups(linear.in_features) * linear.out_features - packed[linear.name]
        if not machete(load.card) and not used:
            grown -= packed[linear.name]
    return grown


def _rounding(load: Load) -> int:
    """What is lost in segments, with linears together that the engine runs as one."""
    linears = {linear.name: linear for linear in load.stored.linears}
    sizes: dict[object, int] = {}
    for name, size in load.stored.tensors.items():
        owner, _, key = name.rpartition(".")
        linear = linears.get(owner)
        whole = name if linear is None else (linear.layer, linear.role.fused or linear.local, key)
        sizes[whole] = sizes.get(whole, 0) + size
    rests = (-size % SEGMENT for size in sizes.values() if size >= LARGE)
    return sum(rest for rest in rests if rest <= UNSPLIT)
