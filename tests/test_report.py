# SPDX-License-Identifier: Apache-2.0
"""The report: complete, well formed, self-contained, escaped; and charts that say what the numbers say."""

import copy
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.commands.fit import FitRequest, fit_request
from quantkit.records import Fit, Result
from quantkit.report import formatting
from quantkit.report.pages import charts
from quantkit.report.pages.fit import render_fit
from tests.result_document import GIB, example, render_report

NASTY = "<script>alert('x')</script>\" onload=x & {{ 7 * 7 }}\n</title>"
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Tags must close in order; text and attributes are collected."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


MIXED = {"down_proj": 5, "v_proj": 8, "q_proj": 8, "k_proj": 8}


@pytest.mark.parametrize(
    "result",
    [
        example(6),
        example(64),
        example(3, bits=MIXED),
        example(6, verification=None, calibration=None, peak_device_bytes=0),
        example(1, layers=[], versions={}, files=[], fallbacks=["one", "two"]),
    ],
    ids=["6 layers", "64 layers", "mixed", "not verified", "bare"],
)
def test_the_page_is_whole_self_contained_and_the_same_each_time(result: dict[str, Any]) -> None:
    before = copy.deepcopy(result)
    page = render_report(result)
    parsed = Page(page)
    assert render_report(result) == page
    assert result == before
    assert not {tag for tag, _ in parsed.tags} & {"script", "link", "img", "iframe", "object", "embed"}
    assert not re.search(r"https?://|url\(|@import|\bsrc=", page)
    assert all(value.startswith("#") for _, attrs in parsed.tags for k, value in attrs.items() if k == "href" and value)
    assert not re.search(r"\b(nan|None|undefined)\b", page)
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(svg)


def test_the_verdict_comes_first_then_the_parts_in_order() -> None:
    text = Page(render_report(example(4, fallbacks=["damping raised"]))).text
    order = [
        "✓ Pass",
        "Perplexity +1.34% against FP16 (limit 5%)",
        "8.552",
        "FP16 8.439 · +1.34%",
        "0.0213",
        "94.32%",
        "9.30 GiB",
        "1 h 23 min",
        "Memory against context",
        "Accuracy",
        "Error by layer",
        "Bits by layer",
        "All 28 quantized linears are W4 g128 asym.",
        "What was run",
        "--w-bit 4",
        "9f86d081884c7d65",
        "damping raised",
        "model-00001-of-00003.safetensors",
        "torch 2.13.0",
    ]
    places = [text.find(part, text.find("✓ Pass")) for part in order]
    assert -1 not in places, order[places.index(-1)]
    assert places == sorted(places)


def test_the_accuracy_says_what_it_was_measured_on() -> None:
    text = Page(render_report(example(4))).text
    assert (
        "262,016 predicted tokens of eval; 128 windows of 2,048; documents concatenated, cut into windows that don't "
        "overlap; computed in bfloat16."
    ) in text


def test_a_folder_is_titled_by_its_last_part_and_named_in_full() -> None:
    page = render_report(example(2, model="/data/models/some-7b/"))
    assert "<h1>some-7b</h1>" in page
    assert "model /data/models/some-7b/" in Page(page).text


def test_a_fail_says_every_reason() -> None:
    result = example(4)
    result["verification"] |= {"verdict": "fail", "reasons": ["perplexity is too high", "it does not fit"]}
    text = Page(render_report(result)).text
    assert "✗ Fail perplexity is too high it does not fit" in text
    assert "Pass" not in text


def test_without_verification_nothing_is_claimed() -> None:
    text = Page(render_report(example(4, verification=None))).text
    assert "Not verified" in text
    for claim in ("Pass", "Fail", "Perplexity", "Accuracy", "Memory against context"):
        assert claim not in text


def test_figures_that_are_no_numbers_are_named() -> None:
    result = example(2)
    result["verification"] |= {"perplexity": math.nan, "kl_divergence": math.nan, "verdict": "fail", "reasons": ["x"]}
    result["verification"]["kl_percentiles"]["max"] = math.inf
    result["verification"]["layer_errors"][1]["relative_error"] = math.nan
    result["layers"][3]["loss"] = math.nan
    text = Page(render_report(result)).text
    assert "Perplexity not measured" in text
    assert "KL max not measured" in text


def test_everything_from_outside_is_escaped() -> None:
    result = example(
        2, model=NASTY, command=NASTY, fallbacks=[NASTY], device=NASTY, format=NASTY, versions={NASTY: "1"}
    )
    result["calibration"]["source"] = result["verification"]["eval"]["protocol"] = NASTY
    result["verification"] |= {"verdict": "fail", "reasons": [NASTY]}
    result["base_model"]["id"] = result["files"][0]["name"] = NASTY
    for layer in result["layers"]:
        layer |= {"name": NASTY, "method": NASTY}
    result["layers"][0]["kind"] = NASTY
    parsed = Page(render_report(result))
    assert "script" not in {tag for tag, _ in parsed.tags}
    assert not any("onload" in attrs for _, attrs in parsed.tags)
    assert parsed.text.count("<script>alert('x')</script>") >= 10
    assert "49" not in re.findall(r"& (\S+)", parsed.text)


def test_the_compression_counts_every_tensor() -> None:
    result = example(64)  # 3.11 GB of embeddings and head stay, 31.2e9 weights were 2 bytes
    expected = result["tensor_bytes"] + sum(
        2 * x["out_features"] * x["in_features"] - x["bytes"] for x in result["layers"]
    )
    assert formatting.bytes_in_16_bit(Result.model_validate(result)) == expected
    assert f"{expected / result['tensor_bytes']:.2f}× smaller than 16 bit" in Page(render_report(result)).text
    del result["tensor_bytes"]
    assert "smaller than" not in Page(render_report(result)).text


def test_a_mixed_checkpoint_shows_the_scheme_of_every_layer() -> None:
    page = render_report(example(3, bits=MIXED))
    assert "9 linears W4 g128 asym, 9 linears W8 g128 asym, 3 linears W5 g128 asym." in Page(page).text
    assert "<title>layer 2, down: W5 g128 asym</title>" in page


def test_a_budget_that_nothing_fits_is_said() -> None:
    result = example(64)
    result["verification"]["fit"] |= {"longest_context": 0, "fits": False, "budget_bytes": 10 * GIB}
    text = Page(render_report(result)).text
    assert "No context fits" in text
    assert "over the budget by" in text


def test_the_report_needs_no_torch() -> None:
    code = "import sys, quantkit.report.pages.run, quantkit.report.card; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- the picture of `fit` -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "✓ Fits The longest context that fits is 12,850 tokens."),
        ({"budget": 12 * GIB}, "✗ Does not fit No context fits"),
        ({"group_size": 256, "tensor_parallel": 8}, "✗ Cannot be cut over 8 cards self_attn.o_proj: 640 in_features"),
    ],
)
def test_the_page_of_fit(options: dict[str, Any], says: str) -> None:
    asked = {"group_size": 128, "budget": 22 * GIB, "tensor_parallel": 1} | options
    said: dict[str, Any] = dict.fromkeys(("symmetric", "format", "recipe"))
    said |= {"bits": 4, "context": 12_288, "kv": "fp16"}
    result = fit_request(FitRequest(model="deepseek-r1-32b", offline=True, **asked, **said))
    page = render_fit(result.fit, "<b>", result.scheme)
    parsed = Page(page)
    assert says in parsed.text
    for part in (
        "<b>",
        f"total {formatting.size(result.fit.weights['total'])} {result.fit.weights['total']:,}",
        "To quantize",
    ):
        assert part in parsed.text
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(svg)


# --- charts ---------------------------------------------------------------------------------------------------------


@given(st.floats(1e-9, 1e15))
@settings(deadline=None)
def test_linear_ticks_cover_the_data_and_stay_few(high: float) -> None:
    axis = charts.linear_axis(high)
    assert axis.high >= high * (1 - 1e-6)
    assert 2 <= len(axis.ticks) <= 7
    assert 0.5 <= axis.share(high) <= 1 + 1e-6


@given(st.floats(1e-12, 1e6), st.floats(1, 1e9))
@settings(deadline=None)
def test_log_ticks_cover_the_data_and_stay_few(low: float, ratio: float) -> None:
    axis = charts.log_axis(low, low * ratio)
    assert axis.low <= low * (1 + 1e-9)
    assert axis.high >= low * ratio * (1 - 1e-9)
    assert 1 <= len(axis.ticks) <= 7


@given(st.integers(1, 10_000_000))
@settings(deadline=None)
def test_context_ticks_stay_few(high: int) -> None:
    axis = charts.context_axis(high, "")
    assert 1 <= len(axis.ticks) <= 7
    assert all(value <= high for value, _ in axis.ticks)


def points(svg: str, tag: str) -> list[list[tuple[float, float]]]:
    found = re.findall(rf'<{tag} points="([^"]+)"', svg)
    return [[(float(x), float(y)) for x, y in (p.split(",") for p in line.split())] for line in found]


def test_memory_reaches_the_budget_at_the_longest_context() -> None:
    budget, per_token = 22 * GIB, 2**18
    longest = (budget - 19 * GIB) // per_token
    svg = charts.memory_chart(
        [("weights", lambda _: 18 * GIB), ("workspace", lambda _: GIB), ("KV cache", lambda n: n * per_token)],
        budget=budget,
        longest=longest,
        asked=8192,
    )
    ElementTree.fromstring(svg)
    limit = re.search(r'<line x1="\S+" y1="(\S+)" x2="\S+" y2="\S+" class="limit"', svg)
    dot = re.search(r'<circle cx="(\S+)" cy="(\S+)" r="4.5" class="dot"', svg)
    assert limit is not None
    assert dot is not None
    assert float(dot[2]) == pytest.approx(float(limit[1]), abs=0.1)
    weights, workspace, cache = points(svg, "polygon")
    assert weights[2:] == [workspace[1], workspace[0]]  # each part stands on the one below
    assert workspace[2:] == [cache[1], cache[0]]
    (x0, y0), (x1, y1) = cache[3], cache[2]  # the upper edge passes through the dot
    at = y0 + (y1 - y0) * (float(dot[1]) - x0) / (x1 - x0)
    assert at == pytest.approx(float(dot[2]), abs=0.2)


def test_a_budget_far_above_is_named_and_does_not_flatten_the_parts() -> None:
    for budget, flat in ((3 * GIB, False), (22 * GIB, True)):
        svg = charts.memory_chart([("weights", lambda _: GIB)], budget=budget, longest=4096, asked=None)
        (weights,) = points(svg, "polygon")
        top, base = min(y for _, y in weights), max(y for _, y in weights)
        assert base - top > (charts.HEIGHT - charts.TOP - charts.BOTTOM) / 4
        assert ('class="limit"' not in svg) is flat
        assert ("budget 22 GiB: far above" in svg) is flat


def test_the_picture_ends_where_the_model_does() -> None:
    svg = charts.memory_chart([("KV cache", lambda n: n)], budget=None, longest=4096, asked=2048, allowed=4096)
    dot = re.search(r'<circle cx="(\S+)" cy="\S+" r="4.5" class="dot"', svg)
    assert dot is not None
    assert float(dot[1]) == pytest.approx(charts.WIDTH - charts.RIGHT, abs=0.1)


def test_layers_with_a_window_stop_growing() -> None:
    layers = [
        {"layers": 3, "bytes_per_token": 10, "window": 100},
        {"layers": 1, "bytes_per_token": 10, "window": None},
    ]
    fit = Fit.model_validate(example()["verification"]["fit"] | {"kv_layers": layers})
    assert formatting.cache_bytes(fit, 50) == 2000
    assert formatting.cache_bytes(fit, 400) == 3000 + 4000
    svg = charts.memory_chart(
        [("KV cache", lambda n: formatting.cache_bytes(fit, n))], budget=None, longest=400, asked=None, bends=[100]
    )
    (cache,) = points(svg, "polygon")
    assert len(cache) == 6
    (x0, y0), (x1, y1), (x2, y2) = sorted(cache[3:])
    assert (y0 - y1) / (x1 - x0) > 3 * (y1 - y2) / (x2 - x1) > 0


def test_what_the_model_allows_may_all_fit() -> None:
    result = example(6)
    result["verification"]["fit"]["longest_context"] = 131_072
    assert "All 131,072 tokens that the model allows fit." in Page(render_report(result)).text


def test_lines_rise_with_the_values_and_stay_inside() -> None:
    values = [0.0, 1.0, 4.0, 2.0]
    line = charts.Line([(i, v) for i, v in enumerate(values)], hover=[f"v={v}" for v in values])
    svg = charts.line_chart("t", [line], charts.depth_axis(4), charts.linear_axis(4))
    (drawn,) = points(svg, "polyline")
    heights = [charts.HEIGHT - charts.BOTTOM - y for _, y in drawn]
    scale = heights[2] / 4
    assert heights == pytest.approx([v * scale for v in values], abs=0.1)
    assert all(charts.LEFT <= x <= charts.WIDTH - charts.RIGHT for x, _ in drawn)
    assert svg.count("<title>v=") == 4


def test_heat_maps_are_darker_where_values_are_larger() -> None:
    svg = charts.heat_map("t", ["q"], 3, {("q", 0): 0.01, ("q", 1): 0.1, ("q", 2): 1.0})
    fills = re.findall(r"fill:(#\w{6})\"><title>layer", svg)
    lightness = [sum(int(fill[i : i + 2], 16) for i in (1, 3, 5)) for fill in fills]
    assert lightness == sorted(lightness, reverse=True)
    assert fills[0] == charts.shade(0)
    assert fills[1] == charts.shade(0.5)
    assert fills[2] == charts.shade(1)


# --- wording --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "says"),
    [(8.55234, "8.552"), (0.0, "0"), (0.000012345, "1.234e-05"), (None, "not measured"), (math.nan, "not a number")],
)
def test_figures(value: float | None, says: str) -> None:
    assert formatting.figure(value) == says


@pytest.mark.parametrize(
    ("seconds", "says"),
    [(7.24, "7.2 s"), (59.99, "1 min 00 s"), (119.9, "2 min 00 s"), (3599.9, "1 h 00 min"), (5025, "1 h 23 min")],
)
def test_durations(seconds: float, says: str) -> None:
    assert formatting.duration(seconds) == says


def test_labels_of_a_scatter_chart_overlap_neither_each_other_nor_points() -> None:
    marks = [charts.Mark(1 + i / 200, 0.02 - i / 2000, i % 3, f"W4 g{i}", "") for i in range(24)]
    axes = charts.near_axis(1, 1.12, "GiB"), charts.log_axis(0.001, 0.1, "KL")
    svg = charts.scatter_chart("x", marks, *axes, front=[], limit=None)
    labels = [(float(x), float(y)) for x, y in re.findall(r'<text x="([\d.]+)" y="([\d.]+)"[^>]*>W4', svg)]
    dots = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)]
    assert len(labels) > 2
    width = 6 * charts.LETTER
    for number, (x, y) in enumerate(labels):
        assert not any(abs(x - other) < width and abs(y - at) < 12 for other, at in labels[:number])
        assert not any(abs(x - other) < width / 2 and y - 12 < at < y + 2 for other, at in dots)


def test_small_differences_are_not_shown_as_light_and_dark() -> None:
    close = charts.heat_map("x", ["q"], 2, {("q", 0): 0.010, ("q", 1): 0.011})
    first, second = (int(shade[:2], 16) for shade in re.findall(r'<rect[^>]*fill:#([0-9a-f]{6})"><title>layer', close))
    assert abs(first - second) < 24
    far = charts.heat_map("x", ["q"], 2, {("q", 0): 0.001, ("q", 1): 0.1})
    first, second = (int(shade[:2], 16) for shade in re.findall(r'<rect[^>]*fill:#([0-9a-f]{6})"><title>layer', far))
    assert abs(first - second) > 150


def test_bits_are_shaded_in_their_order() -> None:
    shades = charts.ordered_shades(4)
    reds = [int(shade[1:3], 16) for shade in shades]
    assert reds == sorted(reds, reverse=True)
