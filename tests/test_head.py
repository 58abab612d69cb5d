# SPDX-License-Identifier: Apache-2.0
"""A quantized lm_head: its bytes, what clients compute with it, when it is refused, and going on after a stop."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from quantkit.commands.quantize import quantize
from quantkit.commands.verify import VerifyRequest, verify_files
from quantkit.errors import EngineError, InputError, OutputError, SchemeError
from quantkit.formats import FORMATS
from quantkit.hardware.matmul import mirror_
from quantkit.methods.site import QUANTIZE, SiteInput
from quantkit.methods.table import Options
from quantkit.pipeline import head as heads
from quantkit.pipeline import run as pipeline
from quantkit.pipeline.head import quantize_head
from quantkit.recipe import read_recipe
from quantkit.report.terminal.screen import Terminal
from quantkit.scheme import Scheme
from quantkit.settings.request import Request
from quantkit.stats import add_inputs, empty_stats
from tests.conftest import make_qwen2

QUIET = Terminal(quiet=True)
DEFAULT = "default: {bits: 4, group_size: 32, symmetric: true}\n"
HEAD = DEFAULT + "rules: [{kind: lm_head, bits: 8}]\n"


def asked(model: Path, ids: Path, folder: Path, recipe: str = HEAD, **changes: Any) -> Request:
    path = folder / "recipe.yaml"
    path.write_text(recipe)
    request = Request(
        method="gptq",
        model=str(model),
        command="quantkit gptq",
        recipe=path,
        format="compressed-tensors",
        calib=str(ids),
        evaluation=str(ids),
        out=folder / "out",
        offline=True,
        max_ppl_increase=9.0,
    )
    return replace(request, **changes)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen2(tmp_path_factory.mktemp("untied"), dtype=torch.float32)


@pytest.mark.parametrize("method", ["gptq", "awq", "rtn"])
def test_clients_see_what_the_run_measured(untied: Path, ids: Path, tmp_path: Path, method: str) -> None:
    made, out = quantize(asked(untied, ids, tmp_path, method=method), QUIET)
    result = made.content()
    assert result["total_bytes"] == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    record = result["layers"][-1]
    assert (record["name"], record["layer"], record["bits"]) == ("lm_head", -1, 8)
    assert 0 < record["loss"] < 1e-3
    found = result["verification"]
    again = verify_files(VerifyRequest(out=out, command="quantkit verify", offline=True), QUIET).content()[
        "verification"
    ]
    assert again["kl_divergence"] == pytest.approx(found["kl_divergence"], rel=1e-6)
    tokens = load_file(ids)["input_ids"]
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    original = AutoModelForCausalLM.from_pretrained(untied, dtype=torch.float32)
    with torch.no_grad():
        p, q = (model(tokens).logits[:, :-1].double().log_softmax(-1) for model in (original, theirs))
    assert float((p.exp() * (p - q)).sum(-1).mean()) == pytest.approx(found["kl_divergence"], rel=1e-4)
    assert {engine for engine, why in result["engines"].items() if why is None} == {"vllm", "transformers"}


def test_vllm_finds_the_head_by_its_name(untied: Path, ids: Path, tmp_path: Path) -> None:
    """To vLLM it is no Linear: a target of its own must match it, also where one scheme serves all."""
    same = DEFAULT + "rules: [{kind: lm_head, bits: 4}]\n"
    made, out = quantize(asked(untied, ids, tmp_path, same, method="rtn"), QUIET)
    _ = made.content()
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["targets"] == ["Linear", "re:^lm_head$"]
    assert config["ignore"] == []


def test_gptq_says_so_and_only_its_readers_load_it(untied: Path, ids: Path, tmp_path: Path) -> None:
    made, out = quantize(asked(untied, ids, tmp_path, method="rtn", format="gptq"), QUIET)
    result = made.content()
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["lm_head"] is True
    assert config["dynamic"]["+:^lm_head$"]["bits"] == 8
    assert result["engines"]["gptqmodel"] is None
    assert result["engines"]["vllm"] is None
    same = DEFAULT + "rules: [{kind: lm_head}]\n"
    with pytest.raises(EngineError, match="not known to read a quantized lm_head in gptq"):
        quantize(asked(untied, ids, tmp_path, same, method="rtn", format="gptq", engine="transformers"), QUIET)


def test_patterns_do_not_reach_it(untied: Path, ids: Path, tmp_path: Path) -> None:
    everything = DEFAULT + 'rules: [{match: "*", bits: 8}, {match: "re:.*", group_size: 64}]\n'
    result = quantize(asked(untied, ids, tmp_path, everything, method="rtn"), QUIET)[0].content()
    assert {record["layer"] for record in result["layers"]} == {0, 1}
    assert next(row for row in result["recipe"] if row["kind"] == "lm_head")["bits"] == 16


def test_what_cannot_be_is_refused_before_work(untied: Path, ids: Path, tmp_path: Path) -> None:
    tied = make_qwen2(tmp_path / "tied", tie_word_embeddings=True)
    with pytest.raises(SchemeError, match="embedding's own matrix"):
        quantize(asked(tied, ids, tmp_path), QUIET)
    with pytest.raises(SchemeError, match="awq expect it in 16 bit"):
        quantize(
            asked(untied, ids, tmp_path, DEFAULT + "rules: [{kind: lm_head}]\n", method="awq", format="awq"), QUIET
        )
    with pytest.raises(SchemeError, match="lm_head: in_features 64 is not divisible by group_size 48"):
        quantize(asked(untied, ids, tmp_path, DEFAULT + "rules: [{kind: lm_head, group_size: 48}]\n"), QUIET)
    assert not (tmp_path / "out").exists()
    path = tmp_path / "embeddings.yaml"
    path.write_text(DEFAULT + "rules:\n  - {kind: down_proj, bits: 8}\n  - {kind: embed_tokens, bits: 8}\n")
    with pytest.raises(InputError, match=r"line 4: rules.1.kind: .*embeddings stay in 16 bit"):
        read_recipe(path)


def test_an_interrupted_head_is_made_again_to_the_same_bytes(
    untied: Path, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    whole = quantize(asked(untied, ids, tmp_path / "whole"), QUIET)[0].content()
    request = asked(untied, ids, tmp_path / "broken")

    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "quantize_head", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(request, QUIET)
    monkeypatch.undo()
    again = quantize(request, QUIET)[0].content()
    assert {f["name"]: f["sha256"] for f in again["files"]} == {f["name"]: f["sha256"] for f in whole["files"]}
    third = quantize(request, QUIET)[0].content()  # nothing is left to do
    assert third["verification"]["kl_divergence"] == whole["verification"]["kl_divergence"]
    with pytest.raises(OutputError, match=r"another recipe \(lm_head differs\)"):
        quantize(asked(untied, ids, tmp_path / "broken", HEAD.replace("bits: 8", "bits: 4")), QUIET)


@pytest.mark.parametrize("options", [Options(), Options(rounding="nearest")])
def test_rows_are_rounded_as_if_together(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, inputs = (torch.randn(rows, 32, generator=generator) for rows in (40, 200))
    stats = empty_stats(32, torch.device("cpu"))
    add_inputs(stats, inputs)
    mirror_(stats.gram)
    scheme = Scheme(4, 16, True)
    monkeypatch.setattr(heads, "HEAD_ROWS", 16)
    found, record = quantize_head(weight, scheme, options, stats, FORMATS["compressed-tensors"])
    expected = QUANTIZE["gptq"](SiteInput({"w": weight}, {"w": scheme}, stats, None), options)
    assert torch.equal(found.codes, expected.quantized["w"].codes)
    assert torch.equal(found.scales, expected.quantized["w"].scales)
    assert record["loss"] == pytest.approx(expected.records["w"]["loss"], rel=1e-5)
