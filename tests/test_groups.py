# SPDX-License-Identifier: Apache-2.0
"""Widths that the usual group does not divide: smaller groups, recorded, instead of an end."""

from pathlib import Path
from typing import Any

import pytest

from quantkit.commands.fit import FitRequest, fit_request
from quantkit.commands.quantize import quantize
from quantkit.errors import SchemeError
from quantkit.formats import FORMATS
from quantkit.model.config import config_from_dict
from quantkit.model.skeleton import build
from quantkit.plan import dividing
from quantkit.report.terminal.screen import Terminal
from quantkit.scheme import Scheme
from quantkit.settings.request import Request
from tests.conftest import TINY, make_qwen2

QUIET = Terminal(quiet=True)
WIDTHS: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
DEFAULT = Scheme(4, 128, True)


def groups_in(name: str) -> dict[int, int]:
    """Width -> group, as planned in a format."""
    model = build(config_from_dict(TINY | WIDTHS | {"model_type": "qwen2"}))
    resolve, notes = dividing(model, lambda name, layer: DEFAULT, FORMATS[name])
    assert notes
    chosen = {}
    for linear, width in (("self_attn.q_proj", 96), ("mlp.down_proj", 256)):
        scheme = resolve(f"model.layers.0.{linear}", 0)
        assert scheme is not None
        chosen[width] = scheme.group_size
    return chosen


def test_each_linear_takes_the_largest_group_that_divides() -> None:
    assert groups_in("compressed-tensors") == {96: 32, 256: 128}


def test_formats_of_one_scheme_take_one_group_for_all() -> None:
    assert groups_in("awq") == {96: 32, 256: 32}
    assert groups_in("gptq") == {96: 32, 256: 32}


def test_a_run_goes_on_and_records_it(tmp_path: Path) -> None:
    model = make_qwen2(tmp_path / "model", **WIDTHS)
    asked = Request("rtn", str(model), "rtn", format="compressed-tensors", verify=False, out=tmp_path / "out")
    result, _ = quantize(asked, QUIET)
    assert {layer.group_size for layer in result.layers if layer.kind == "q_proj"} == {32}
    assert {layer.group_size for layer in result.layers if layer.kind == "down_proj"} == {128}
    assert "12 linears of 96 columns: groups of 32 instead of 128" in result.fallbacks


def test_a_group_that_was_asked_for_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    model = make_qwen2(tmp_path / "model", **WIDTHS)
    asked = Request("rtn", str(model), "rtn", group_size=128, verify=False, out=tmp_path / "out")
    with pytest.raises(SchemeError, match=r"96 is not divisible by group_size 128; use 32, or --group auto"):
        quantize(asked, QUIET)


def test_fit_counts_the_same_groups(tmp_path: Path) -> None:
    model = make_qwen2(tmp_path / "model", **WIDTHS)
    unsaid: dict[str, Any] = dict.fromkeys(("bits", "group_size", "symmetric", "recipe", "budget", "context", "kv"))
    result = fit_request(FitRequest(str(model), format="compressed-tensors", tensor_parallel=1, offline=True, **unsaid))
    assert result.fit.fits
