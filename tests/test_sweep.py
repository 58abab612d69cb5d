# SPDX-License-Identifier: Apache-2.0
"""Many settings in one pass: their figures are those of separate runs, and an interrupted sweep ends the same."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quantkit.commands.quantize import quantize
from quantkit.commands.sweep import SweepRequest, sweep
from quantkit.errors import InputError, OutputError
from quantkit.pipeline.forward import Layer
from quantkit.report.terminal.screen import Terminal
from quantkit.settings.advice import best_of
from quantkit.settings.request import Request
from tests.conftest import make_qwen2

QUIET = Terminal(quiet=True)
FIGURES = ("perplexity", "perplexity_fp16", "kl_divergence", "top1_agreement", "tokens")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen2(tmp_path_factory.mktemp("swept"), layers=3)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "ids.safetensors"
    save_file({"input_ids": torch.randint(0, 96, (6, 32), generator=torch.Generator().manual_seed(1))}, path)
    return path


def asked(model: Path, tokens: Path, out: Path, **changes: Any) -> SweepRequest:
    run = Request(
        method="awq",
        model=str(model),
        command="quantkit sweep",
        calib=str(tokens),
        samples=9,  # left out: the file has six windows
        seqlen=32,
        evaluation=str(tokens),
        out=out,
        offline=True,
        max_ppl_increase=9.0,
    )
    request = SweepRequest(run, ("awq", "gptq", "rtn"), (3, 4), (32, 48, 64))
    return replace(request, **changes)


@pytest.fixture(scope="module")
def result(model: Path, tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return sweep(asked(model, tokens, tmp_path_factory.mktemp("whole") / "sweep"), QUIET)


def measured(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in result["settings"] if row["why_not"] is None]


def test_every_setting_is_there_or_has_a_reason(result: dict[str, Any]) -> None:
    named = {(row["method"], row["bits"], row["group_size"]): row["why_not"] for row in result["settings"]}
    assert set(named) == {(m, b, g) for m in ("awq", "gptq", "rtn") for b in (3, 4) for g in (32, 48, 64)}
    for (_, _, group), reason in named.items():
        assert (reason is not None) == (group == 48)
        if reason:
            assert "48" in reason
    assert "--samples 9 was left out here" in result["fallbacks"][0]


@pytest.mark.parametrize("method", ["awq", "gptq", "rtn"])
@pytest.mark.parametrize("bits", [3, 4])
def test_figures_are_those_of_a_separate_run(
    result: dict[str, Any], model: Path, tokens: Path, tmp_path: Path, method: str, bits: int
) -> None:
    row = next(row for row in measured(result) if (row["method"], row["bits"], row["group_size"]) == (method, bits, 32))
    run = replace(
        asked(model, tokens, tmp_path / "out").run, method=method, bits=bits, group_size=32, inputs="original"
    )
    made, out = quantize(run, QUIET)
    separate = made.content()
    for name in FIGURES:
        assert row[name] == pytest.approx(separate["verification"][name], rel=1e-6), name
    assert row["total_bytes"] == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert row["bits_per_weight"] == separate["bits_per_weight"]
    assert row["longest_context"] == separate["verification"]["fit"]["longest_context"]
    assert row["format"] == separate["format"]


def test_a_usual_run_is_calibrated_otherwise(result: dict[str, Any], model: Path, tokens: Path, tmp_path: Path) -> None:
    row = next(row for row in measured(result) if (row["method"], row["bits"], row["group_size"]) == ("gptq", 3, 32))
    run = replace(asked(model, tokens, tmp_path / "out").run, method="gptq", bits=3, group_size=32)
    usual = quantize(run, QUIET)[0].content()
    assert usual["verification"]["kl_divergence"] != pytest.approx(row["kl_divergence"], rel=1e-6)
    assert "--inputs original" in result["note"]


def test_an_interrupted_sweep_ends_the_same(
    result: dict[str, Any], model: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = asked(model, tokens, tmp_path / "sweep")
    calls, advance = 0, Layer.advance

    def interrupted(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 20:  # 14 streams a layer: in the second layer
            raise KeyboardInterrupt
        advance(*args, **kwargs)

    monkeypatch.setattr(Layer, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep(request, QUIET)
    monkeypatch.undo()
    assert [path.name for path in request.run.out.glob("states-*")] == ["states-0.safetensors"]  # type: ignore[union-attr]
    (tmp_path / "sweep" / "states-9.safetensors").touch()  # as one killed before it could remove it leaves it
    again = sweep(request, QUIET)
    for row, expected in zip(measured(again), measured(result), strict=True):
        assert {name: row[name] for name in FIGURES} == {name: expected[name] for name in FIGURES}
    assert not list((tmp_path / "sweep").glob("states-*"))
    third = sweep(request, QUIET)  # nothing is left to do
    assert measured(third) == measured(again)
    with pytest.raises(OutputError, match="other settings"):
        sweep(replace(request, bits=(3,)), QUIET)


def test_files(result: dict[str, Any]) -> None:
    out = Path(result["out"])
    document = json.loads((out / "sweep.json").read_text())
    assert document["settings"] == json.loads(json.dumps(result["settings"]))
    rows = list(csv.DictReader((out / "sweep.csv").read_text().splitlines()))
    assert [row["name"] for row in rows] == [row["name"] for row in result["settings"]]
    assert float(rows[0]["kl_divergence"]) == result["settings"][0]["kl_divergence"]
    page = (out / "sweep.html").read_text()
    for row in result["settings"]:
        assert row["name"] in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_the_best_within_the_budget_is_named_with_its_command(result: dict[str, Any]) -> None:
    best = result["best"]
    lowest = min((row for row in measured(result) if row["fits"]), key=lambda row: row["kl_divergence"])
    assert best["name"] == lowest["name"]
    words = ["--w-bit", str(lowest["bits"]), "--group", str(lowest["group_size"])]
    assert best["command"].split()[:2] == ["quantkit", lowest["method"]]
    assert best["command"].split()[-4:] == words
    assert best["command"] in (Path(result["out"]) / "sweep.html").read_text()


def test_the_command_of_the_best_keeps_what_the_sweep_was_asked_for() -> None:
    row = {"name": "x", "method": "gptq", "bits": 3, "group_size": 64, "fits": True, "kl_divergence": 0.1}
    row |= {"total_bytes": 2**30}
    command = "quantkit sweep org/m --method awq,gptq --w-bit=3,4 --samples 8 --out swept --fresh --sym"
    best = best_of([row, row | {"kl_divergence": 0.01, "fits": False}], command)
    assert best is not None
    assert best["command"] == "quantkit gptq org/m --samples 8 --sym --w-bit 3 --group 64"
    assert best_of([row | {"fits": False}], command) is None


def test_the_front_is_what_nothing_beats(result: dict[str, Any]) -> None:
    rows = measured(result)
    front = sorted((row["total_bytes"], row["kl_divergence"]) for row in rows if row["pareto"])
    assert [kl for _, kl in front] == sorted((kl for _, kl in front), reverse=True)
    for row in rows:
        beaten = any(size <= row["total_bytes"] and kl <= row["kl_divergence"] for size, kl in front)
        assert beaten


def test_nothing_that_can_be(model: Path, tokens: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="48"):
        sweep(asked(model, tokens, tmp_path / "sweep", groups=(48,)), QUIET)
    assert not (tmp_path / "sweep").exists()
