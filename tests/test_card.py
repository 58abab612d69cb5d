# SPDX-License-Identifier: Apache-2.0
"""The model card: metadata that the Hub reads, tables that say what was measured, commands that keep to the budget."""

import copy
import math
import re
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from quantkit.report.card import named
from tests.result_document import example, render_card

NASTY = "a: \"b\" 'c'\n---\n# h <script>x</script> | `d` [e](f) ```\n```"


def metadata(card: str) -> dict[str, Any]:
    match = re.match(r"---\n(.*?\n)---\n", card, re.DOTALL)
    assert match is not None
    found = yaml.safe_load(match[1])
    assert isinstance(found, dict)
    return found


def test_the_hub_reads_the_metadata_and_the_measurements() -> None:
    card = ModelCard(render_card(example(4)))
    assert isinstance(card.data, ModelCardData)
    assert card.data.base_model == "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B"
    assert card.data.get("base_model_relation") == "quantized"
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.license == "mit"
    assert card.data.tags == ["awq", "4-bit", "quantkit"]
    results = card.data.eval_results
    assert results is not None
    assert {r.metric_type: r.metric_value for r in results} == {
        "perplexity": 8.5523,
        "kl_divergence": 0.02133,
        "top1_agreement": 0.9432,
    }
    assert {(r.task_type, r.dataset_name) for r in results} == {("text-generation", "eval")}


@pytest.mark.parametrize(
    ("source", "dataset"),
    [
        ("eval", {"type": "eval", "name": "eval"}),
        ("/home/me/secret plans/wiki.txt", {"type": "wiki.txt", "name": "wiki.txt"}),
        ("hf:Salesforce/wikitext/w2:test", {"type": "Salesforce/wikitext", "name": "Salesforce/wikitext/w2:test"}),
    ],
)
def test_the_dataset_of_the_measurements(source: str, dataset: dict[str, str]) -> None:
    result = example(2)
    result["verification"]["eval"]["source"] = source
    assert metadata(render_card(result))["model-index"][0]["results"][0]["dataset"] == dataset


def test_formats_and_bits_become_tags() -> None:
    assert metadata(render_card(example(2, format="gptq_v2", method="gptq")))["tags"] == ["gptq", "4-bit", "quantkit"]
    mixed = metadata(render_card(example(2, bits={"down_proj": 5, "v_proj": 8})))
    assert mixed["tags"] == ["compressed-tensors", "awq", "4-bit", "5-bit", "8-bit", "quantkit"]


@pytest.mark.parametrize(
    "name", [None, "outputs", "/home/me/model", "../model", "a/b/c", "-a/b", "a/b--c", "a/b\n", NASTY]
)
def test_only_a_hub_id_is_a_base_model(name: str | None) -> None:
    found = metadata(render_card(example(2, base_model={"id": name, "license": None})))
    assert "base_model" not in found
    assert "base_model_relation" not in found
    assert "license" not in found
    assert metadata(render_card(example(2, base_model={}))) == found


def test_the_table_says_what_was_measured() -> None:
    card = render_card(example(64))
    assert "| Perplexity | 8.439 | 8.552 | +1.34% |" in card
    assert "| KL divergence, p99 |  | 0.2410 |  |" in card
    assert "| Weights | 61.03 GiB | 18.00 GiB | -70.5% |" in card
    assert "**Verdict: pass.** Limits: perplexity at most 5% above FP16." in card
    assert "262,016 tokens" in card
    assert card.count("9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08") == 2
    assert "\n```bash\nquantkit awq deepseek-r1-32b --w-bit 4 --group 128 --budget 22GiB --context 8k\n```\n" in card


def test_without_verification_it_says_not_measured() -> None:
    card = render_card(example(4, verification=None, calibration=None))
    assert "Not measured" in card
    assert "model-index" not in metadata(card)
    assert "Verdict" not in card
    assert "Perplexity" not in card
    assert "Calibration: none" in card
    assert "vllm serve PATH_OR_REPO_ID\n" in card


def test_figures_that_are_no_numbers_stay_out_of_the_metadata() -> None:
    result = example(2)
    result["verification"] |= {"perplexity": math.nan, "verdict": "fail", "reasons": ["perplexity is nan"]}
    card = render_card(result)
    (entry,) = metadata(card)["model-index"]
    assert [m["type"] for m in entry["results"][0]["metrics"]] == ["kl_divergence", "top1_agreement"]
    assert "| Perplexity | 8.439 | not measured | not measured |" in card
    assert "**Verdict: fail.**" in card
    assert "- perplexity is nan" in card


def test_the_commands_keep_to_the_budget() -> None:
    result = example(64)
    longest = result["verification"]["fit"]["longest_context"]
    card = render_card(result, repo_id="me/model")
    assert f"vllm serve me/model --max-model-len {longest}\n" in card
    assert f"--model-path me/model --context-length {longest} --max-total-tokens {longest}\n" in card
    assert 'from_pretrained("me/model")' in card
    result["verification"]["fit"]["kv"] = "fp8"
    assert f"--max-model-len {longest} --kv-cache-dtype fp8\n" in render_card(result)
    result["verification"]["fit"]["longest_context"] = 0
    card = render_card(result)
    assert "--max-model-len" not in card
    assert "no context fits" in card


def test_the_code_for_transformers_is_python() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", render_card(example(2), repo_id='we"ird\\'), re.DOTALL)
    compile(code, "card", "exec")


def test_a_forced_push_says_so_with_the_reasons() -> None:
    assert "--force" not in render_card(example(2))
    card = render_card(example(2), forced=["model.safetensors: the hash *differs*"])
    assert "pushed with `--force`" in card
    assert "> - model.safetensors: the hash \\*differs\\*" in card


def test_the_same_document_gives_the_same_card_and_stays_as_it_was() -> None:
    result = example(4, fallbacks=["x"])
    before = copy.deepcopy(result)
    assert render_card(result) == render_card(result)
    assert result == before


def nasty(text: str) -> dict[str, Any]:
    result = example(2, model=text, command=text, fallbacks=[text], base_model={"id": text, "license": text})
    result |= {"quantkit_version": text, "versions": {text: text}}
    result["verification"] |= {"verdict": "fail", "reasons": [text]}
    for tokens in (result["calibration"], result["verification"]["eval"]):
        tokens |= {"source": text, "sha256": text, "protocol": text}
    return result


def shape(card: str) -> list[tuple[str, str]]:
    """The structure of the page without its text: what a name from outside must not change."""
    body = re.sub(r"\A---\n.*?\n---\n", "", card, flags=re.DOTALL)
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    inline = [child for token in tokens for child in token.children or [] if child.type not in ("text", "softbreak")]
    return [(token.type, token.tag) for token in [*tokens, *inline] if token.type != "text_special"]


def test_nasty_names_change_neither_metadata_nor_structure() -> None:
    card, plain = render_card(nasty(NASTY), forced=[NASTY]), render_card(nasty("plain"), forced=["plain"])
    assert shape(card) == shape(plain)
    assert metadata(card).keys() == metadata(plain).keys()
    assert metadata(card)["license"] == " ".join(NASTY.split())
    ModelCard(card)


@given(st.text(min_size=1, max_size=40).filter(lambda text: text.strip().isprintable() and text.strip() != ""))
@settings(max_examples=60, deadline=None)
def test_no_name_breaks_out_of_its_place(text: str) -> None:
    card = render_card(nasty(text), forced=[text])
    found = metadata(card)
    assert found["license"] == " ".join(text.split())
    assert found["library_name"] == "transformers"
    headings = re.findall(r"^## .*$", card, re.MULTILINE)
    assert headings == ["## Measured", "## Run it", "## How it was made"]


# --- which engines load it ------------------------------------------------------------------------------------------


def test_the_card_tells_which_engine_does_not_load_it_and_gives_no_command_for_it() -> None:
    result = example(2, format="gptq", method="gptq")
    result["verification"]["fit"]["engines"]["vllm"] = "vLLM 0.32 has no kernel for W4 g128 asym in gptq"
    card = render_card(result)
    assert "**vLLM**: does not load this checkpoint. vLLM 0.32 has no kernel for W4 g128 asym in gptq." in card
    assert "vllm serve" not in card
    assert "sglang.launch_server" in card
    assert "**transformers**: needs `pip install gptqmodel optimum accelerate`" in card


def test_an_engine_that_was_not_asked_about_is_not_promised() -> None:
    card = render_card(example(2, verification=None))
    assert card.count("not checked, `quantkit fit` tells whether it loads") == 3
    known = render_card(example(2, verification=None, engines={"vllm": None, "sglang": "no", "transformers": None}))
    assert "not checked" not in known
    assert "sglang.launch_server" not in known


def test_tensor_parallel_is_in_the_commands() -> None:
    result = example(2)
    result["verification"]["fit"]["tensor_parallel"]["cards"] = 2
    assert render_card(result).count("--tensor-parallel-size 2") == 2


# --- commands that can be typed as they are -------------------------------------------------------------------------


def test_commands_have_the_flags_that_were_counted() -> None:
    result = example(2)
    flags = ["--max-model-len", "6699", "--max-num-seqs", "8", "--gpu-memory-utilization", "0.93", "--enforce-eager"]
    result["verification"]["fit"]["engine"] = {
        "name": "vllm",
        "version": "0.24.0",
        "measured": True,
        "source": "here",
        "flags": flags,
        "costs": [],
        "context": 6699,
        "batches": [],
    }
    card = render_card(result, "outputs/my model")
    assert f"vllm serve 'outputs/my model' {' '.join(flags)}\n" in card
    assert "PATH_OR_REPO_ID" not in card
    assert "sglang.launch_server --model-path 'outputs/my model' --context-length" in card


def test_the_snippet_prints_the_answer_alone_and_dequantizes_what_needs_it() -> None:
    card = render_card(example(2, format="compressed-tensors"))
    snippet = card.partition("```python\n")[2].partition("```")[0]
    compile(snippet, "snippet", "exec")
    assert "CompressedTensorsConfig(dequantize=True)" in snippet
    assert 'inputs["input_ids"].shape[1] :]' in snippet
    assert "dequantize" not in render_card(example(2))
    mixed = example(2, format="compressed-tensors", bits={"down_proj": 8})
    assert "dequantize" not in render_card(mixed)


@pytest.mark.parametrize("folder", ["out", "outputs/my model", "/home/o'hara/x y", 'a"b', "PATH_OR_REPO_ID"])
@pytest.mark.parametrize("fmt", ["awq", "gguf"])
def test_a_card_that_goes_up_names_the_repository_alone(folder: str, fmt: str) -> None:
    result = example(2, format=fmt)
    if fmt == "gguf":
        result["files"] = [{"name": "x.gguf", "bytes": 1, "sha256": "0"}]
    assert named(render_card(result, folder), "me/model") == render_card(result, "me/model")
