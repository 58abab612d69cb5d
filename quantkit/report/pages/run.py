# SPDX-License-Identifier: Apache-2.0
"""report.html: what a run did and what was measured.

A pure function of the result document (quantkit.json): the same document gives the same bytes. What the document lacks
is left out or said to be missing. Everything taken from it is escaped by jinja2.
"""

import math
from collections.abc import Sequence

from quantkit.report import formatting
from quantkit.report.pages import charts
from quantkit.report.pages.parts import Card, Chart, Result, Table, memory
from quantkit.report.rendering import template
from quantkit.text import one_line

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def render_report(result: Result) -> str:
    """The page. `result` is the document described in docs: quantkit.json, verification included or None."""
    verification = result.get("verification")
    fit = (verification or {}).get("fit")
    return template("report.html.j2", escape=True).render(
        model=formatting.short_name(result["model"]),
        subtitle=f"{result['method'].upper()} · {formatting.overall_scheme(result)} · stored as {result['format']}",
        version=result["quantkit_version"],
        verdict=(verification or {}).get("verdict"),
        reasons=(verification or {}).get("reasons") or [],
        passed_because=_passed_because(verification),
        cards=_cards(result),
        memory=memory(fit) if fit else None,
        accuracy=_accuracy(verification) if verification else None,
        depth=_depth(result),
        bits=_bits(result),
        ran=_ran(result),
        command=result["command"],
        fallbacks=result.get("fallbacks") or [],
        files=_files(result),
        versions=sorted((result.get("versions") or {}).items()),
        layers=_layers(result),
    )


def _passed_because(verification: Result | None) -> str:
    """One sentence of the figures that were judged."""
    if not verification:
        return ""
    limits, fit = verification.get("limits") or {}, verification.get("fit") or {}
    said = []
    rise = formatting.increase(verification)
    if rise is not None:
        allowed = limits.get("max_ppl_increase")
        tail = f" (limit {formatting.limit(allowed)})" if allowed is not None else ""
        said.append(f"perplexity {formatting.percent(rise, signed=True)} against FP16{tail}")
    if limits.get("max_kl") is not None:
        said.append(f"KL {formatting.figure(verification['kl_divergence'])} nats (limit {limits['max_kl']:g})")
    if fit.get("budget_bytes") is not None:
        said.append(
            f"{formatting.size(fit['total_bytes'])} of the {formatting.size(fit['budget_bytes'])} budget "
            f"at {formatting.tokens(fit['context'])} context"
        )
    return _sentence("; ".join(said))


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _cards(result: Result) -> list[Card]:
    found = []
    verification = result.get("verification")
    if verification:
        rise = formatting.percent(formatting.increase(verification), signed=True)
        found += [
            Card(
                "Perplexity",
                formatting.figure(verification.get("perplexity")),
                f"FP16 {formatting.figure(verification.get('perplexity_fp16'))} · {rise}",
            ),
            Card("KL divergence", formatting.figure(verification.get("kl_divergence"), 3), "nats per token, mean"),
            Card("Top-1 agreement", formatting.percent(verification.get("top1_agreement")), "same most likely token"),
        ]
    full = formatting.bytes_in_16_bit(result)
    smaller = f" · {full / result['tensor_bytes']:.2f}× smaller than 16 bit" if full else ""
    bits = f"{formatting.figure(result['bits_per_weight'], 3)} bits per weight{smaller}"
    found.append(Card("Size", formatting.size(result["total_bytes"]), bits))
    device, resident = result.get("peak_device_bytes"), result.get("peak_rss_bytes")
    if device:
        found.append(
            Card("Peak memory", formatting.size(device), f"on {result['device']} · {formatting.size(resident)} RAM")
        )
    elif resident:
        found.append(Card("Peak memory", formatting.size(resident), "RAM of the whole run"))
    if result.get("seconds") is not None:
        found.append(
            Card("Time", formatting.duration(result["seconds"]), "quantizing and verifying" if verification else "")
        )
    return found


def _accuracy(verification: Result) -> tuple[str, Table, Chart | None]:
    """What it was measured on, the figures, and how the KL is spread."""
    rise = formatting.percent(formatting.increase(verification), signed=True)
    quantized, reference = (formatting.figure(verification.get(k), 5) for k in ("perplexity", "perplexity_fp16"))
    percentiles = verification.get("kl_percentiles") or {}
    table = Table(
        ["figure", "FP16", "quantized", "change"],
        [
            ["perplexity", reference, quantized, rise],
            ["KL mean, nats", "", formatting.figure(verification.get("kl_divergence")), ""],
            *([f"KL {name}", "", formatting.figure(value), ""] for name, value in percentiles.items()),
            ["top-1 agreement", "", formatting.percent(verification.get("top1_agreement")), ""],
        ],
    )
    spread = [(name, value) for name, value in percentiles.items() if name != "max"]
    bars = [*spread, ("mean", verification.get("kl_divergence")), ("max", percentiles.get("max"))]
    known = [
        (name, float(v), formatting.figure(v, 3)) for name, v in bars if v is not None and math.isfinite(v) and v > 0
    ]
    chart = None
    if len(known) > 1:
        chart = Chart(
            "KL divergence per token",
            charts.bar_chart("KL divergence per token", sorted(known, key=lambda bar: bar[1])),
            note="Nats, on a logarithmic scale. p99 = 99% of the tokens are below.",
        )
    return _measured_on(verification), table, chart


def _measured_on(verification: Result) -> str:
    """The evaluation in a sentence: how many tokens of what, cut how, computed in what."""
    tokens, said = verification.get("eval"), [f"{verification['tokens']:,} predicted tokens"]
    if tokens:
        said[0] += f" of {tokens['source']}"
        said.append(f"{tokens['samples']:,} windows of {tokens['seqlen']:,}")
        said += [tokens["protocol"]] if tokens.get("protocol") else []
    said += [f"computed in {verification['dtype']}"] if verification.get("dtype") else []
    return f"{'; '.join(said)}."


def _protocol(tokens: Result | None) -> Table:
    """What a token set is: evaluation or calibration."""
    if not tokens:
        return Table(["", ""], [], figures=False)
    notes = tokens.get("notes") or []
    said = [
        ("source", tokens.get("source")),
        ("windows", f"{tokens['samples']:,} × {tokens['seqlen']:,} tokens" if "samples" in tokens else None),
        ("protocol", tokens.get("protocol")),
        ("notes", "; ".join([notes] if isinstance(notes, str) else notes)),
        ("sha256 of the token ids", tokens.get("sha256")),
    ]
    return Table(["", ""], [[name, str(value)] for name, value in said if value], figures=False)


def _kinds(layers: Sequence[Result]) -> list[str]:
    """The kinds of linears in the order of a decoder layer, unknown ones last."""
    present = dict.fromkeys(layer["kind"] for layer in layers)
    return [*(k for k in KINDS if k in present), *(k for k in present if k not in KINDS)]


def _short(kind: str) -> str:
    return kind.removesuffix("_proj")


def _depth(result: Result) -> tuple[list[Chart], Table | None]:
    """The error of the stream by depth, the loss of each linear, and a table by kind."""
    shown: list[Chart] = []
    stream = [e for e in (result.get("verification") or {}).get("layer_errors") or [] if _finite(e["relative_error"])]
    if stream:
        points = [(e["layer"], e["relative_error"] * 100) for e in stream]
        hover = [f"after layer {e['layer']}: {formatting.percent(e['relative_error'], 3)}" for e in stream]
        line = charts.Line(points, 0, hover)
        axes = (
            charts.depth_axis(max(e["layer"] for e in stream) + 1),
            charts.linear_axis(max(y for _, y in points), "%"),
        )
        shown.append(
            Chart(
                "Error carried by the stream",
                charts.line_chart("Error of the hidden states after each layer", [line], *axes),
                note="Relative error of the hidden states after each layer, against FP16, on the evaluation set.",
            )
        )
    layers = [layer for layer in _decoder(result) if layer.get("loss") is not None]
    if not layers:
        return shown, None
    kinds = _kinds(layers)
    values = {(_short(layer["kind"]), layer["layer"]): float(layer["loss"]) for layer in layers}
    depth = max(layer["layer"] for layer in layers) + 1
    shown.append(
        Chart(
            "Error of each linear layer",
            charts.heat_map("Relative output error by kind and layer", [_short(k) for k in kinds], depth, values),
            note="Relative output error of each linear on its own input; darker is larger, on a logarithmic scale.",
        )
    )
    rows = []
    for kind in kinds:
        own = [layer for layer in layers if layer["kind"] == kind]
        worst = max(own, key=lambda layer: layer["loss"] if _finite(layer["loss"]) else math.inf)
        mean = sum(layer["loss"] for layer in own) / len(own)
        rows.append([kind, formatting.figure(mean, 3), formatting.figure(worst["loss"], 3), str(worst["layer"])])
    return shown, Table(["kind", "mean error", "largest", "in layer"], rows)


def _decoder(result: Result) -> list[Result]:
    """The linears of the decoder layers; a quantized head is in the tables only."""
    return [layer for layer in result.get("layers") or [] if layer["layer"] >= 0]


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _bits(result: Result) -> tuple[str, Chart | None]:
    """One sentence if all layers share a scheme, else a map of them."""
    layers = result.get("layers") or []
    found = formatting.schemes(layers)
    if not found:
        return "No layer is quantized.", None
    if len(found) == 1:
        return f"All {len(layers):,} quantized linear layers are {next(iter(found))}.", None
    said = ", ".join(f"{count:,} layers {name}" for name, count in found.items())
    names = list(found)
    inner = _decoder(result)
    rows, depth = [_short(k) for k in _kinds(inner)], max(x["layer"] for x in inner) + 1
    values = {
        (_short(x["kind"]), x["layer"]): formatting.scheme(x["bits"], x["group_size"], x["symmetric"]) for x in inner
    }
    svg = charts.category_map("Scheme by kind and layer", rows, depth, values, names)
    return f"{said[:1].upper()}{said[1:]}.", Chart("Scheme by kind and layer", svg, list(enumerate(names)))


def _ran(result: Result) -> list[list[tuple[str, Table]]]:
    """What was run: tables with a heading, on the left and on the right."""
    limits = (result.get("verification") or {}).get("limits") or {}
    settings = [
        ("model", one_line(result["model"])),
        ("method", result["method"]),
        ("format", result["format"]),
        ("scheme asked for", formatting.scheme(*(result["scheme"][k] for k in ("bits", "group_size", "symmetric")))),
        *((str(k).replace("_", " "), _option(v)) for k, v in (result.get("options") or {}).items()),
        ("device", result.get("device")),
        ("base model", (result.get("base_model") or {}).get("id")),
        ("licence of the base", (result.get("base_model") or {}).get("license")),
        ("stored tensors", formatting.exact(result.get("tensor_bytes"))),
        ("all files of weights", formatting.exact(result["total_bytes"])),
    ]
    if limits.get("max_ppl_increase") is not None:
        settings.append(("limit on perplexity", f"+{formatting.limit(limits['max_ppl_increase'])} above FP16"))
        kl = limits.get("max_kl")
        settings.append(("limit on KL divergence", "none" if kl is None else f"{kl:g} nats"))
    shown = [[name, str(v)] for name, v in settings if v is not None]
    tokens = [
        ("Calibration", _protocol(result.get("calibration"))),
        ("Evaluation", _protocol((result.get("verification") or {}).get("eval"))),
    ]
    right = [(heading, table) for heading, table in tokens if table.rows]
    return [[("Settings", Table(["", ""], shown, figures=False))], *([right] if right else [])]


def _option(value: object) -> str | None:
    return None if value is None else {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _files(result: Result) -> Table:
    rows = [[f["name"], formatting.size(f["bytes"]), f["sha256"]] for f in result.get("files") or []]
    return Table(["file", "size", "sha256"], rows)


def _layers(result: Result) -> Table:
    """Every quantized linear; the optional columns only where some layer has them."""
    layers = result.get("layers") or []
    extra = [k for k in ("scale_gain", "damp_raised_to") if any(layer.get(k) is not None for layer in layers)]
    rows = [
        [
            one_line(layer["name"]),
            formatting.scheme(layer["bits"], layer["group_size"], layer["symmetric"]),
            layer.get("method") or "",
            formatting.figure(layer.get("loss"), 3),
            *("" if layer.get(k) is None else formatting.figure(layer[k], 3) for k in extra),
            formatting.size(layer.get("bytes")),
        ]
        for layer in layers
    ]
    return Table(["layer", "scheme", "method", "error", *(k.replace("_", " ") for k in extra), "stored"], rows)
