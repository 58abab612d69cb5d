# SPDX-License-Identifier: Apache-2.0
"""README.md of a checkpoint: the model card, with the metadata that the Hub reads.

A pure function of the result document (quantkit.json). The metadata is that of
https://huggingface.co/docs/hub/model-cards, the measurements a `model-index`. Names from outside reach the page only
through yaml.safe_dump, the `md` filter, or a code block whose fence they cannot close.
"""

import json
import re
import shlex
from collections.abc import Sequence
from typing import Any

import yaml

from quantkit.formats import FORMATS
from quantkit.methods.table import METHODS
from quantkit.records import Fit, Limits, Result, Tokens
from quantkit.report import formatting
from quantkit.report.rendering import template
from quantkit.text import one_line

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
PATH = "PATH_OR_REPO_ID"
WORD = r"""(?:'[^'\n]*'|"[^"\n]*"|[^\s'"])+"""  # of a shell's command line


def render_card(result: Result, where: str | None = None, forced: Sequence[str] = ()) -> str:
    """The card.

    where: the folder or repository in the commands that run it; without it they hold a placeholder
    forced: the reasons why a push needed `--force`
    """
    verification = result.verification
    text = template("card.md.j2", escape=False, md=markdown).render(
        front_matter=_front_matter(result),
        title=_title(result),
        summary=_summary(result),
        forced=forced,
        verification=verification,
        limits=_limits(verification.limits) if verification else "",
        table=_table(result),
        evaluation=_token_set(verification.eval) if verification else "",
        fit=_fit(verification.fit) if verification and verification.fit else "",
        engines=_engines(result, where or PATH),
        command=_in_code(result.command),
        facts=_facts(result),
        fallbacks=result.fallbacks,
    )
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def named(card: str, repo_id: str) -> str:
    """A card whose commands name the repository where they have named a folder."""
    card = card.replace(PATH, repo_id)
    card = re.sub(r'(?<=from_pretrained\()"(?:[^"\\]|\\.)*"', lambda _: json.dumps(repo_id), card)
    card = re.sub(rf"(?<=vllm serve ){WORD}", lambda _: shlex.quote(repo_id), card)
    card = re.sub(rf"(?<=--model-path ){WORD}", lambda _: shlex.quote(repo_id), card)
    return re.sub(rf"(?<=llama-server --model ){WORD}", lambda word: _gguf_in(repo_id, word[0]), card)


def _gguf_in(repo_id: str, word: str) -> str:
    name = shlex.split(word)[0].rpartition("/")[2]
    return shlex.quote(f"{repo_id}/{name}" if name.endswith(".gguf") else repo_id)


def markdown(text: object) -> str:
    """Text as it is in Markdown: on one line, its special characters escaped."""
    return re.sub(r"([\\`*_\[\]<>|#~&!{}])", r"\\\1", one_line(text))


def hub_id(result: Result) -> str | None:
    """The base model's name on the Hub; None for a folder or what could not be one."""
    name = result.base_model.id if result.base_model else None
    if name is None or len(name) > 96 or "--" in name or ".." in name:
        return None
    return name if HUB_ID.fullmatch(name) else None


def _title(result: Result) -> str:
    name = formatting.short_name(hub_id(result) or result.model)
    return f"{name} {result.method.upper()} {formatting.overall_scheme(result)}"


def _summary(result: Result) -> str:
    base = hub_id(result)
    source = f"[{markdown(base)}](https://huggingface.co/{base})" if base else markdown(result.model)
    return (
        f"{source}, quantized with {markdown(result.method.upper())} to {formatting.overall_scheme(result)} "
        f"and stored as {markdown(result.format)}: {formatting.size(result.total_bytes)}, "
        f"{formatting.figure(result.bits_per_weight, 3)} bits per quantized weight. "
        f"Made by quantkit {markdown(result.quantkit_version)}."
    )


# --- metadata -------------------------------------------------------------------------------------------------------


def _front_matter(result: Result) -> str:
    base, license_name = hub_id(result), result.base_model.license if result.base_model else None
    bits = sorted({layer.bits for layer in result.layers} or {result.scheme.bits})
    stored = FORMATS.get(result.format)
    calibrated = result.method in METHODS and METHODS[result.method].calibrates
    data: dict[str, Any] = {
        **({"base_model": base, "base_model_relation": "quantized"} if base else {}),
        "library_name": stored.tag if stored and stored.in_one_file else "transformers",
        "pipeline_tag": "text-generation",
        **({"license": one_line(license_name)} if license_name else {}),
        "tags": list(dict.fromkeys([stored.tag if stored else result.format, *([result.method] if calibrated else [])]))
        + [f"{b}-bit" for b in bits]
        + ["quantkit"],
        **_model_index(result),
    }
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=1000)}---\n"


def _model_index(result: Result) -> dict[str, Any]:
    """The measurements in the form of https://github.com/huggingface/hub-docs/blob/main/modelcard.md."""
    verification = result.verification
    if verification is None:
        return {}
    names = {
        "perplexity": "Perplexity",
        "kl_divergence": "KL divergence from FP16 (nats)",
        "top1_agreement": "Top-1 agreement with FP16",
    }
    metrics = [
        {"type": kind, "value": value, "name": name}
        for kind, name in names.items()
        if (value := getattr(verification, kind)) is not None
    ]
    if not metrics:
        return {}
    source = one_line(verification.eval.source if verification.eval else "evaluation set")
    task = {"type": "text-generation", "name": "Text generation"}
    measured = {"task": task, "dataset": _dataset(source), "metrics": metrics}
    return {"model-index": [{"name": one_line(_title(result)), "results": [measured]}]}


def _dataset(source: str) -> dict[str, str]:
    """A dataset of the hub by its id; a file by its name, without the folders that it lies in here."""
    on_hub = re.match(r"hf:([\w.-]+/[\w.-]+)", source, re.ASCII)
    if on_hub:
        return {"type": on_hub[1], "name": source.removeprefix("hf:")}
    name = formatting.short_name(source)
    return {"type": re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-") or "evaluation-set", "name": name}


# --- what was measured ----------------------------------------------------------------------------------------------


def _limits(limits: Limits) -> str:
    parts = []
    if limits.max_ppl_increase is not None:
        parts.append(f"perplexity at most {formatting.limit(limits.max_ppl_increase)} above FP16")
    if limits.max_kl is not None:
        parts.append(f"KL divergence at most {limits.max_kl:g} nats")
    return f"Limits: {', '.join(parts)}." if parts else ""


def _table(result: Result) -> list[tuple[str, str, str, str]]:
    rows = []
    verification = result.verification
    if verification:
        rise = formatting.percent(verification.increase, signed=True)
        figures = [formatting.figure(figure) for figure in (verification.perplexity_fp16, verification.perplexity)]
        rows.append(("Perplexity", *figures, rise))
        rows.append(("KL divergence, mean", "", formatting.figure(verification.kl_divergence), ""))
        rows += [
            (f"KL divergence, {markdown(name)}", "", formatting.figure(value), "")
            for name, value in verification.kl_percentiles.items()
        ]
        rows.append(("Top-1 agreement", "", formatting.percent(verification.top1_agreement), ""))
    full, stored = formatting.bytes_in_16_bit(result), result.tensor_bytes
    if full and stored:
        rows.append(
            ("Weights", formatting.size(full), formatting.size(stored), formatting.percent(stored / full - 1, 1))
        )
    else:
        rows.append(("Weights", "", formatting.size(result.total_bytes), ""))
    return [(str(a), str(b), str(c), str(d)) for a, b, c, d in rows]


def _token_set(tokens: Tokens | None) -> str:
    """A token set in words, with its hash."""
    if tokens is None:
        return "not named"
    parts = [markdown(tokens.source), f"{tokens.samples:,} windows of {tokens.seqlen:,} tokens"]
    if tokens.protocol:
        parts.append(markdown(tokens.protocol))
    return ", ".join([*parts, f"sha256 of the token ids `{_in_span(tokens.sha256)}`"])


def _facts(result: Result) -> list[tuple[str, str]]:
    schemes = formatting.schemes(result.layers)
    facts = [
        ("Calibration", _token_set(result.calibration) if result.calibration else "none"),
        ("Experts", _experts(result)),
        ("Schemes", ", ".join(f"{n:,} linears {name}" for name, n in schemes.items())),
        ("Time", formatting.duration(result.seconds) if result.seconds is not None else ""),
        ("Versions", markdown(", ".join(f"{name} {version}" for name, version in sorted(result.versions.items())))),
    ]
    return [(name, value) for name, value in facts if value]


def _experts(result: Result) -> str:
    """How many calibration tokens each expert saw, in a few words; "" where there are none."""
    tokens = sorted(x.tokens for x in result.layers if x.tokens is not None)
    if not tokens:
        return ""
    least, median, most = tokens[0], tokens[len(tokens) // 2], tokens[-1]
    few = sum(x.fallback is not None for x in result.layers)
    sentence = f"calibrated on the tokens sent to each: {least:,} at least, {median:,} in the middle, {most:,} at most"
    return sentence + (f"; {few:,} of {len(tokens):,} linears saw too few by themselves" if few else "")


# --- how to run it --------------------------------------------------------------------------------------------------


ENGINES = {"vllm": "vLLM", "sglang": "SGLang", "transformers": "transformers"}


def _fit(fit: Fit) -> str:
    longest, own = fit.longest_context, fit.tensor_parallel
    reach = f"the longest context that fits is {longest:,} tokens" if longest else "no context fits beside the weights"
    weights, workspace = formatting.size(own.weights_bytes), formatting.size(own.workspace_bytes)
    return (
        f"Weights {weights}, workspace {workspace}, and a KV cache ({markdown(fit.kv)}) of "
        f"{formatting.exact(own.kv_bytes_per_token)} per token: in {formatting.size(fit.budget_bytes)}, {reach}. "
        "The flags below keep to that context, and to the budget as a card's share: `--gpu-memory-utilization` or "
        "`--mem-fraction-static`. On a card of another size give another share."
    )


def _engines(result: Result, path: str) -> list[dict[str, Any]]:
    """Name, note, whether it loads the checkpoint, and the code that runs it; what was not asked counts as loading."""
    fit = result.verification.fit if result.verification else None
    refusals = result.engines or (fit.engines if fit else {})
    # What engines take by themselves is said only where it is unusual.
    dtype = ["--dtype", "bfloat16"] if result.torch_dtype == "bfloat16" else []
    sglang = ["python", "-m", "sglang.launch_server", "--model-path", path, *dtype]
    context, tokens = "--context-length {0} --max-total-tokens {0}", "--max-model-len {0}"
    dequantize = _dequantizes(result)
    code = {
        "vllm": ("bash", _command("vllm", ["vllm", "serve", path, *dtype], fit, tokens, "fp8")),
        "sglang": ("bash", _command("sglang", sglang, fit, context, "fp8_e5m2")),
        "transformers": ("python", _transformers(path, result.torch_dtype or "float16", dequantize=dequantize)),
    }
    if dequantize:
        refusals = refusals | {"transformers": None}
    stored = FORMATS.get(result.format)
    if stored and stored.in_one_file:
        return [_llamacpp(result, path, fit)]
    shown = []
    for engine, name in ENGINES.items():
        why = refusals.get(engine)
        packages = stored.packages if stored and engine == "transformers" else ()
        note = f"needs `pip install {' '.join(packages)}`" if packages else ""
        if why:
            note = f"does not load this checkpoint. {markdown(why)}."
        elif engine not in refusals:
            note = "; ".join(["not checked, `quantkit fit` tells whether it loads", *([note] if note else [])])
        shown.append(
            {"name": name, "loads": not why, "note": note, "language": code[engine][0], "code": code[engine][1]}
        )
    return shown


def _llamacpp(result: Result, path: str, fit: Fit | None) -> dict[str, Any]:
    """llama.cpp, and what is built on it, with the file in the folder."""
    names = [file.name for file in result.files if file.name.endswith(".gguf")]
    file = f"{path}/{names[0]}" if names else path
    words = ["llama-server", "--model", file, "--n-gpu-layers", "999"]
    code = _command("", words, fit, "--ctx-size {0}", "q8_0")
    note = "also ollama, LM Studio, llama-cpp-python: whatever reads GGUF"
    return {"name": "llama.cpp", "loads": True, "note": note, "language": "bash", "code": code.split(" --kv-cache")[0]}


def _command(engine: str, words: Sequence[str], fit: Fit | None, context_flags: str, fp8: str) -> str:
    """A shell command with the flags that were counted for the engine.

    For another engine than the counted one: those that keep to the longest context and the kind of KV cache.
    """
    if fit is None:
        return shlex.join(words)
    if fit.engine is not None and fit.engine.name == engine:
        return shlex.join([*words, *fit.engine.flags])
    cards = fit.tensor_parallel.cards
    flags = [
        *([context_flags.format(fit.longest_context)] if fit.longest_context else []),
        *([f"--kv-cache-dtype {fp8}"] if fit.kv == "fp8" else []),
        *([f"--tensor-parallel-size {cards}"] if cards > 1 else []),
    ]
    return " ".join([shlex.join(words), *flags])


def _dequantizes(result: Result) -> bool:
    """Whether transformers loads a checkpoint only if it is told to dequantize it: for its zero points.

    Files with several schemes it does not load that way.
    """
    schemes = {layer.scheme for layer in result.layers} - {None}
    alike = next(iter(schemes)) if len(schemes) == 1 else None
    stored = FORMATS.get(result.format)
    return bool(stored and stored.zeros_dequantized and alike is not None and not alike.symmetric)


def _transformers(path: str, dtype: str, *, dequantize: bool = False) -> str:
    quoted = json.dumps(path)
    names = ["AutoModelForCausalLM", "AutoTokenizer", *(["CompressedTensorsConfig"] if dequantize else [])]
    options = [f'dtype="{dtype}"', 'device_map="auto"']
    options += ["quantization_config=CompressedTensorsConfig(dequantize=True)"] if dequantize else []
    return "\n".join(
        [
            f"from transformers import {', '.join(names)}",
            "",
            f"tokenizer = AutoTokenizer.from_pretrained({quoted})",
            f"model = AutoModelForCausalLM.from_pretrained({quoted}, {', '.join(options)})",
            'chat = [{"role": "user", "content": "Why is the sky blue?"}]',
            'options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}',
            "inputs = tokenizer.apply_chat_template(chat, **options).to(model.device)",
            'answer = model.generate(**inputs, max_new_tokens=256)[0][inputs["input_ids"].shape[1] :]',
            "print(tokenizer.decode(answer, skip_special_tokens=True))",
        ]
    )


# --- text that cannot leave its block -------------------------------------------------------------------------------


def _in_code(text: Sequence[str] | str) -> str:
    """One line inside a fenced block: a line of its own cannot begin with the closing fence."""
    line = one_line(text)
    return f" {line}" if line.startswith("```") else line


def _in_span(text: object) -> str:
    return one_line(text).replace("`", "'")
