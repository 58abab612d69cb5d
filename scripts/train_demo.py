# SPDX-License-Identifier: Apache-2.0
"""Train the demo model that ships in `quantkit/demo`: a small Qwen2 with its own tokenizer, from scratch.

    python scripts/train_demo.py --train train.jsonl.xz --heldout heldout.jsonl.xz --out quantkit/demo

and with `--config FILE` a model of another architecture from the same data: FILE holds the keys of config.json that are
not the demo's (`benchmarks/qwen3-18m.json` is one).

The data are JSON lines (plain or .xz) with the fields `kind`, `source`, `license`, and either `text` or `messages`
(chat turns with `role` and `content`). On a CUDA GPU the defaults take a few minutes. On a CPU give a budget, for
example `--minutes 45 --batch 16`: the schedule then shrinks to the number of steps that fit. The seed decides the
weights at the start and the order of the data; given the data, seed and steps that the card (README.md) names, a run
repeats as closely as torch's kernels do (bit for bit on a CPU).

Left out on purpose: attention masks between the documents of a window, dropout, and anything else that a model of
four million weights does not need to show how 4, 3 and 2 bits differ.
"""

import argparse
import hashlib
import itertools
import json
import lzma
import math
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

SEQUENCE = 512  # tokens a training window and an evaluation window hold
VOCABULARY = 4096
END, USER, ASSISTANT = "<|endoftext|>", "<|User|>", "<|Assistant|>"
THINK = ("<think>", "</think>")
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role']=='user' %}<|User|>{{ m['content'] }}"
    "{% else %}<|Assistant|>{{ m['content'] }}<|endoftext|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
# How Qwen2 cuts text before BPE: words with their leading sign, digits one by one, runs of signs, white space.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Every width is a multiple of 256 or 128, so that groups of 32 to 256 columns fit. The keys are those of the Qwen2
# checkpoints on the hub, which every version of transformers reads.
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 768,
    "max_position_embeddings": 2048,
    "max_window_layers": 4,
    "model_type": "qwen2",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": VOCABULARY,
}
TOKENIZER_CONFIG: dict[str, Any] = {
    "add_bos_token": False,
    "bos_token": END,
    "clean_up_tokenization_spaces": False,
    "eos_token": END,
    "model_max_length": 2048,
    "pad_token": END,
    "tokenizer_class": "PreTrainedTokenizerFast",
}
GENERATION_CONFIG: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}

Record = dict[str, Any]
Perplexities = dict[str, float]  # kind -> perplexity, "all" -> over every kind


class Schedule(NamedTuple):
    """What decides the result besides data, seed and device."""

    steps: int
    batch: int
    learning_rate: float
    weight_decay: float
    seed: int

    def rate(self, step: int) -> float:
        """Linear warm-up over the first fiftieth, then a cosine to zero."""
        warmup = max(1, self.steps // 50)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.steps - warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


# --- data -----------------------------------------------------------------------------------------------------------


def read_records(path: Path) -> list[Record]:
    with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def render(record: Record) -> str:
    """A document as the model reads it, with the token that ends it."""
    if "text" in record:
        return str(record["text"]) + END
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)  # as transformers renders chat templates
    return environment.from_string(CHAT_TEMPLATE).render(messages=record["messages"])


def train_tokenizer(documents: list[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE of so many tokens; the special tokens come first, the tags of thinking last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern=Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = [END, USER, ASSISTANT]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(THINK),
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    marks = re.compile("|".join(map(re.escape, [*specials, *THINK])))  # the trainer would learn merges inside them
    tokenizer.train_from_iterator((marks.sub("", document) for document in documents), trainer)
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in THINK])
    return tokenizer


def tokenize(tokenizer: Tokenizer, documents: list[str]) -> Tensor:
    """All documents one after the other: int64 [tokens]."""
    ids: list[Tensor] = []
    for start in range(0, len(documents), 256):  # encodings carry offsets: not all of them at once
        encodings = tokenizer.encode_batch(documents[start : start + 256], add_special_tokens=False)
        ids += [torch.tensor(encoding.ids) for encoding in encodings]
    return torch.cat(ids)


def windows(tokens: Tensor, batch: int, seed: int) -> Iterator[Tensor]:
    """Endless batches [batch, SEQUENCE + 1]; each epoch cuts the stream at another offset and shuffles the windows."""
    if len(tokens) < (batch + 2) * SEQUENCE:
        raise SystemExit(f"{len(tokens)} tokens are less than a batch of {batch} x {SEQUENCE}; use a smaller --batch")
    span = torch.arange(SEQUENCE + 1, device=tokens.device)
    for epoch in itertools.count():
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        offset = int(torch.randint(SEQUENCE, (), generator=generator))
        starts = torch.arange(offset, len(tokens) - SEQUENCE, SEQUENCE)
        starts = starts[torch.randperm(len(starts), generator=generator)].to(tokens.device)
        for first in range(0, len(starts) - batch + 1, batch):  # whole batches: one compiled graph serves them all
            yield tokens[starts[first : first + batch].unsqueeze(1) + span]


# --- model ----------------------------------------------------------------------------------------------------------


def new_model(config: dict[str, Any], seed: int, device: torch.device) -> Any:
    """Random weights; those that write into the residual stream are smaller, as in GPT-2."""
    torch.manual_seed(seed)
    keys = {key: value for key, value in config.items() if key != "torch_dtype"}
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**keys))
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data /= math.sqrt(2 * config["num_hidden_layers"])
    return model.to(device, torch.float32)


def mean_loss(model: Any, rows: Tensor) -> Tensor:
    """Mean negative log-likelihood, in nats, of columns 1.. of rows [batch, length] given those before."""
    # A dict of masks is taken as it is: with None for a mask, attention is causal by flag and runs the fused kernel.
    logits = model(input_ids=rows[:, :-1], attention_mask={"full_attention": None}, use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


@torch.no_grad()
def perplexities(model: Any, heldout: dict[str, Tensor]) -> Perplexities:
    """exp(mean loss) over windows of SEQUENCE tokens that do not overlap: of each kind, and of "all" kinds together."""
    losses: dict[str, Tensor] = {}
    for kind, tokens in heldout.items():
        rows = tokens[: len(tokens) // SEQUENCE * SEQUENCE].view(-1, SEQUENCE).to(model.device)
        chunks = [mean_loss(model, chunk).double() * len(chunk) for chunk in torch.split(rows, 32)]
        losses[kind] = torch.stack(chunks).sum() / max(1, len(rows))
    sizes = {kind: len(tokens) // SEQUENCE for kind, tokens in heldout.items()}
    total = sum(float(losses[kind]) * sizes[kind] for kind in losses) / max(1, sum(sizes.values()))
    return {"all": math.exp(total)} | {kind: math.exp(float(loss)) for kind, loss in losses.items()}


def fake_quantize(weight: Tensor, bits: int, group: int = 128) -> Tensor:
    """Round-to-nearest of weight [out, in] on an asymmetric grid per group of input columns, as floats again."""
    grouped = weight.view(len(weight), -1, group)  # [out, groups, group]
    low, high = grouped.amin(2, keepdim=True).clamp(max=0), grouped.amax(2, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-8)
    zero = torch.round(-low / scale)
    codes = (torch.round(grouped / scale) + zero).clamp(0, 2**bits - 1)
    rounded: Tensor = ((codes - zero) * scale).view_as(weight)
    return rounded


def rounded_perplexities(model: Any, heldout: dict[str, Tensor]) -> dict[int, float]:
    """bits -> perplexity over all kinds when every linear of the decoder is rounded in groups of 128."""
    linears = [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    original = [m.weight.data for m in linears]
    result = {}
    for bits in (4, 3, 2):
        for linear, weight in zip(linears, original, strict=True):
            linear.weight.data = fake_quantize(weight, bits)
        result[bits] = perplexities(model, heldout)["all"]
    for linear, weight in zip(linears, original, strict=True):
        linear.weight.data = weight
    return result


# --- training -------------------------------------------------------------------------------------------------------


def make_step(model: Any, optimizer: torch.optim.Optimizer, compiled: bool) -> Callable[[Tensor, float], Tensor]:
    """One update as a function of (rows, learning rate) that returns the loss before it."""
    autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda")
    loss_of: Callable[[Any, Tensor], Tensor] = torch.compile(mean_loss, dynamic=False) if compiled else mean_loss

    def step(rows: Tensor, rate: float) -> Tensor:
        for group in optimizer.param_groups:
            group["lr"] = rate
        with autocast:
            loss = loss_of(model, rows)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def new_optimizer(model: Any, weight_decay: float) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True)


def seconds_per_step(config: dict[str, Any], tokens: Tensor, schedule: Schedule, compiled: bool) -> float:
    """Measured on a model that is thrown away, so that the budget decides the number of steps and nothing else."""
    model = new_model(config, schedule.seed, tokens.device)
    step = make_step(model, new_optimizer(model, schedule.weight_decay), compiled)
    batches = windows(tokens, schedule.batch, schedule.seed)
    warmup, timed = (20, 100) if tokens.is_cuda else (1, 3)
    start = 0.0
    for index in range(warmup + timed):
        if index == warmup:
            start = time.perf_counter()
        step(next(batches), 0.0).item()  # .item() waits for the device
    return (time.perf_counter() - start) / timed


def train(
    config: dict[str, Any], tokens: Tensor, heldout: dict[str, Tensor], schedule: Schedule, compiled: bool
) -> Any:
    """Train on tokens (on the device to use); progress and held-out perplexity go to stdout."""
    model = new_model(config, schedule.seed, tokens.device)
    step = make_step(model, new_optimizer(model, schedule.weight_decay), compiled)
    batches = windows(tokens, schedule.batch, schedule.seed)
    every, start = max(1, schedule.steps // 50), time.perf_counter()
    total = torch.zeros((), device=tokens.device)  # summed on the device: reading it each step would stall the GPU
    for index in range(schedule.steps):
        total += step(next(batches), schedule.rate(index))
        if (index + 1) % every == 0:
            loss = float(total) / every
            total.zero_()
            if not math.isfinite(loss):
                raise SystemExit(f"step {index + 1}: the loss is {loss}; use a smaller --learning-rate")
            line = f"step {index + 1}/{schedule.steps} loss {loss:.4f} {time.perf_counter() - start:.0f} s"
            if tokens.is_cuda and (index + 1) % (10 * every) == 0:
                line += f" held-out {perplexities(model, heldout)['all']:.3f}"
            print(line, flush=True)
    return model


# --- what ships -----------------------------------------------------------------------------------------------------

SOURCES = {  # source -> where it is, and the notice its licence asks for
    "python/peps": (
        "https://github.com/python/peps",
        "By the PEPs' authors; public domain or CC0-1.0 where the PEP says so.",
    ),
    "rust-lang/book": ("https://github.com/rust-lang/book", "By the Rust project; used under Apache-2.0."),
    "rust-lang/rfcs": (
        "https://github.com/rust-lang/rfcs",
        "By the RFCs' authors; MIT OR Apache-2.0 where the RFC says so.",
    ),
    "swiftlang/swift-evolution": (
        "https://github.com/swiftlang/swift-evolution",
        "By Apple Inc. and the Swift project authors; Apache-2.0.",
    ),
    "ethereum/EIPs": ("https://github.com/ethereum/EIPs", "Copyright waived by the authors via CC0-1.0."),
    "python/cpython": (
        "https://github.com/python/cpython",
        "Copyright (c) Python Software Foundation; All Rights Reserved. PSF License Agreement version 2.",
    ),
    "Snailclimb/JavaGuide": ("https://github.com/Snailclimb/JavaGuide", "By its authors; Apache-2.0."),
    "openai/grade-school-math": (
        "https://github.com/openai/grade-school-math",
        "Copyright (c) 2021 OpenAI; MIT License. Rewritten as chat messages, the steps between <think> and </think>.",
    ),
}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def data_table(records: list[Record]) -> str:
    """One row of Markdown a source: kind, source, licence, documents, bytes of text."""
    documents: Counter[tuple[str, str, str]] = Counter()
    sizes: Counter[tuple[str, str, str]] = Counter()
    for record in records:
        key = (str(record["kind"]), str(record["source"]), str(record["license"]))
        documents[key] += 1
        sizes[key] += len(render(record).encode())
    rows = ["| kind | source | licence | documents | text |", "| --- | --- | --- | ---: | ---: |"]
    for kind, source, license_ in sorted(documents):
        link = f"[{source}]({SOURCES[source][0]})" if source in SOURCES else source
        key = (kind, source, license_)
        rows.append(f"| {kind} | {link} | {license_} | {documents[key]} | {sizes[key] / 1e6:.1f} MB |")
    return "\n".join(rows)


def notice(records: list[Record]) -> str:
    lines = [
        "The demo model of quantkit",
        "",
        "The weights and the tokenizer are licensed under Apache-2.0 (LICENSE).",
        "",
    ]
    lines += ["They were learned from text of these sources, none of which is contained here:", ""]
    for source in sorted({str(record["source"]) for record in records}):
        link, words = SOURCES.get(source, ("", "See the source for its licence."))
        lines += [f"- {source} {link}".rstrip(), f"  {words}"]
    return "\n".join(lines) + "\n"


CARD = """---
license: apache-2.0
language: [en, zh]
library_name: transformers
pipeline_tag: text-generation
---
# quantkit demo

A Qwen2 model of {parameters:,} parameters, trained from scratch by `scripts/train_demo.py`. It is here so that
quantization can be tried, tested and measured in seconds and without a network. It writes text that looks right and
means little, and it repeats names and phrases of its data; use it for nothing else.

- Weights and tokenizer: Apache-2.0 (`LICENSE`); notices for the data: `NOTICE`.
- Shape: hidden {hidden_size}, {num_hidden_layers} layers, {num_attention_heads} heads, {num_key_value_heads} KV heads,
  intermediate {intermediate_size}, vocabulary {vocab_size}, tied embeddings, {max_position_embeddings} positions, BF16.
- Chat: `<|User|>question<|Assistant|>`, and the answer begins with a `<think>` trace.
- Trained on windows of {sequence} tokens, so longer texts lose accuracy.

## Held-out perplexity

Documents that training never saw, in windows of {sequence} tokens that do not overlap; the BF16 weights, computed in
float32.

{perplexity_table}

All kinds, with every linear of the decoder rounded to nearest (asymmetric, groups of 128), nothing calibrated:

{rounding_table}

## Data

{data_table}

## How it was made

{steps} steps of {batch} x {sequence} tokens ({seen:.0f} million tokens, {epochs:.1f} epochs), AdamW,
learning rate {rate} with warm-up and a cosine to zero, weight decay {decay},
{precision}; torch {torch}, transformers {transformers}.

    python scripts/train_demo.py --train {train} --heldout {heldout} \\
        --steps {steps} --batch {batch} --learning-rate {rate} --weight-decay {decay} --seed {seed} --out quantkit/demo

| file | sha256 |
| --- | --- |
| {train} | {train_sha} |
| {heldout} | {heldout_sha} |
"""


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def write_folder(out: Path, model: Any, tokenizer: Tokenizer, config: dict[str, Any]) -> None:
    """Weights, config and tokenizer, as AutoModelForCausalLM and AutoTokenizer of transformers 4.51 and 5 read them."""
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # written for its owner alone
    write_json(out / "config.json", config)  # over the one just saved, which has the keys of one version alone
    write_json(out / "generation_config.json", GENERATION_CONFIG)
    write_json(out / "tokenizer_config.json", TOKENIZER_CONFIG)
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    shutil.copyfile(Path(__file__).resolve().parents[1] / "LICENSE", out / "LICENSE")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--train", type=Path, required=True, help="JSON lines, plain or .xz")
    parser.add_argument("--heldout", type=Path, required=True, help="JSON lines, plain or .xz, not in --train")
    parser.add_argument("--out", type=Path, default=Path("quantkit/demo"))
    parser.add_argument("--config", type=Path, help="JSON: keys of config.json, not the demo's; no card is written")
    parser.add_argument("--epochs", type=float, default=40.0, help="passes over the data when --steps is not given")
    parser.add_argument("--steps", type=int, help="exactly this many steps")
    parser.add_argument("--minutes", type=float, help="no more steps than fit in this time, start and end included")
    parser.add_argument("--batch", type=int, default=64, help=f"windows of {SEQUENCE} tokens in a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true", help="do not compile the step (CPU runs never do)")
    parser.add_argument("--limit", type=int, help="only this many documents of each file, to try the script out")
    return parser.parse_args()


def table(head: str, values: dict[str, float]) -> str:
    return "\n".join([f"| {head} | perplexity |", "| --- | ---: |", *(f"| {k} | {v:.2f} |" for k, v in values.items())])


def main() -> None:
    begin = time.perf_counter()
    options = arguments()
    device = torch.device(options.device)
    compiled = device.type == "cuda" and not options.no_compile
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself only with this
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward pass adds in no fixed order; flash attention's can

    config = CONFIG | (json.loads(options.config.read_text(encoding="utf-8")) if options.config else {})
    records = read_records(options.train)[: options.limit]
    unseen = read_records(options.heldout)[: options.limit]
    documents = [render(record) for record in records]
    tokenizer = train_tokenizer(documents, config["vocab_size"])
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(options.seed)).tolist()
    tokens = tokenize(tokenizer, [documents[i] for i in order]).to(device)
    kinds = sorted({str(record["kind"]) for record in unseen})
    heldout = {kind: tokenize(tokenizer, [render(r) for r in unseen if r["kind"] == kind]) for kind in kinds}
    heldout = {kind: ids for kind, ids in heldout.items() if len(ids) >= SEQUENCE}
    print(
        f"{len(tokens):,} tokens to train on, {sum(map(len, heldout.values())):,} held out, "
        f"{time.perf_counter() - begin:.0f} s",
        flush=True,
    )

    steps = options.steps or max(1, round(options.epochs * len(tokens) / SEQUENCE / options.batch))
    schedule = Schedule(steps, options.batch, options.learning_rate, options.weight_decay, options.seed)
    if options.minutes:
        each = seconds_per_step(config, tokens, schedule, compiled)
        left = options.minutes * 60 - (time.perf_counter() - begin)
        schedule = schedule._replace(steps=max(1, min(steps, int(0.9 * left / each))))
        print(f"{each * 1000:.1f} ms a step: {schedule.steps} steps of {steps}", flush=True)

    model = train(config, tokens, heldout, schedule, compiled)
    model = model.to(torch.bfloat16)
    write_folder(options.out, model, tokenizer, config)

    model = model.float()  # the shipped weights, computed in float32
    parameters = sum(p.numel() for p in model.parameters())
    measured = perplexities(model, heldout)
    rounded = {"none": measured["all"]} | {str(b): p for b, p in rounded_perplexities(model, heldout).items()}
    print(f"{parameters:,} parameters in {options.out}, {time.perf_counter() - begin:.0f} s")
    print("held-out perplexity:", {kind: round(value, 3) for kind, value in measured.items()})
    print("rounded to nearest, groups of 128:", {bits: round(value, 3) for bits, value in rounded.items()})
    if options.config:
        return
    card = CARD.format(
        **{k: CONFIG[k] for k in CONFIG if k in CARD},
        parameters=parameters,
        sequence=SEQUENCE,
        perplexity_table=table("kind", measured),
        rounding_table=table("bits", rounded),
        data_table=data_table(records),
        steps=schedule.steps,
        batch=schedule.batch,
        seen=schedule.steps * schedule.batch * SEQUENCE / 1e6,
        epochs=schedule.steps * schedule.batch * SEQUENCE / len(tokens),
        rate=schedule.learning_rate,
        decay=schedule.weight_decay,
        seed=schedule.seed,
        precision="BF16 autocast on one CUDA GPU" if device.type == "cuda" else "float32 on a CPU",
        torch=torch.__version__.partition("+")[0],
        transformers=transformers.__version__,
        train=options.train.name,
        train_sha=sha256(options.train),
        heldout=options.heldout.name,
        heldout_sha=sha256(options.heldout),
    )
    (options.out / "README.md").write_text(card, encoding="utf-8")
    (options.out / "NOTICE").write_text(notice(records), encoding="utf-8")


if __name__ == "__main__":
    main()
