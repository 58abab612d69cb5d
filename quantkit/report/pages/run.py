# SPDX-License-Identifier: Apache-2.0
"""report.html: what a run did and what was measured.

A pure function of the content of quantkit.json: the same content gives the same bytes. What it lacks is left out or
said to be missing. Everything taken from it is escaped by jinja2.
"""

from collections.abc import Sequence

from quantkit.formats.names import expert_of
from quantkit.records import Linear, Result, Tokens, Verification
from quantkit.report import formatting
from quantkit.report.pages import charts
from quantkit.report.pages.parts import Card, Chart, Table, memory
from quantkit.report.rendering import template
from quantkit.settings.advice import usage
from quantkit.text import one_line

SHARES = {"most": 1.0, "upper q.": 0.75, "median": 0.5, "lower q.": 0.25, "least": 0.0}  # of experts, in order
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# KL by bits of awq and of rounding to nearest: "How to read a KL divergence" in docs/verdict.md has the commands.
USUAL_KL = {4: (0.0155, 0.0315), 3: (0.0611, 0.1585), 2: (0.2823, 1.440)}


def render_report(result: Result, out: str | None = None) -> str:
    """The page; out: the folder of the checkpoint, as commands name it."""
    verification = result.verification
    return template("report.html.j2", escape=True).render(
        model=formatting.short_name(result.model),
        subtitle=f"{result.method.upper()} · {formatting.overall_scheme(result)} · stored as {result.format}",
        version=result.quantkit_version,
        verdict=verification.verdict if verification else None,
        reasons=verification.reasons if verification else [],
        passed_because=_passed_because(verification) if verification else "",
        cards=_cards(result),
        memory=memory(verification.fit) if verification and verification.fit else None,
        usage=usage(result, out) if out else [],
        yardstick=_yardstick(result),
        accuracy=_accuracy(verification) if verification else None,
        depth=_depth(result),
        bits=_bits(result),
        ran=_ran(result),
        command=result.command,
        fallbacks=result.fallbacks,
        files=_files(result),
        versions=sorted(result.versions.items()),
        layers=_layers(result),
    )


def _passed_because(verification: Verification) -> str:
    """One sentence of the figures that were judged."""
    limits, fit = verification.limits, verification.fit
    parts = []
    if verification.increase is not None:
        allowed = limits.max_ppl_increase
        tail = f" (limit {formatting.limit(allowed)})" if allowed is not None else ""
        parts.append(f"perplexity {formatting.percent(verification.increase, signed=True)} against FP16{tail}")
    if limits.max_kl is not None:
        parts.append(f"KL {formatting.figure(verification.kl_divergence)} nats (limit {limits.max_kl:g})")
    if fit is not None:
        parts.append(
            f"{formatting.size(fit.total_bytes)} of the {formatting.size(fit.budget_bytes)} budget "
            f"at {formatting.tokens(fit.context)} context"
        )
    return _sentence("; ".join(parts))


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _cards(result: Result) -> list[Card]:
    cards = []
    verification = result.verification
    if verification:
        rise = formatting.percent(verification.increase, signed=True)
        cards += [
            Card(
                "Perplexity",
                formatting.figure(verification.perplexity),
                f"FP16 {formatting.figure(verification.perplexity_fp16)} · {rise}",
            ),
            Card("KL divergence", formatting.figure(verification.kl_divergence, 3), "nats per token, mean"),
            Card("Top-1 agreement", formatting.percent(verification.top1_agreement), "same most likely token"),
        ]
    full, stored = formatting.bytes_in_16_bit(result), result.tensor_bytes
    smaller = f" · {full / stored:.2f}× smaller than 16 bit" if full and stored else ""
    bits = f"{formatting.figure(result.bits_per_weight, 3)} bits per weight{smaller}"
    cards.append(Card("Size", formatting.size(result.total_bytes), bits))
    device, resident = result.peak_device_bytes, result.peak_rss_bytes
    if device:
        cards.append(
            Card("Peak memory", formatting.size(device), f"on {result.device} · {formatting.size(resident)} RAM")
        )
    elif resident:
        cards.append(Card("Peak memory", formatting.size(resident), "RAM of the whole run"))
    if result.seconds is not None:
        took = "quantizing and verifying" if verification else ""
        cards.append(Card("Time", formatting.duration(result.seconds), took))
    return cards


def _accuracy(verification: Verification) -> tuple[str, Table, Chart | None]:
    """What it was measured on, the figures, and how the KL is spread."""
    rise = formatting.percent(verification.increase, signed=True)
    quantized, reference = (formatting.figure(x, 5) for x in (verification.perplexity, verification.perplexity_fp16))
    percentiles = verification.kl_percentiles
    table = Table(
        ["figure", "FP16", "quantized", "change"],
        [
            ["perplexity", reference, quantized, rise],
            ["KL mean, nats", "", formatting.figure(verification.kl_divergence), ""],
            *([f"KL {name}", "", formatting.figure(value), ""] for name, value in percentiles.items()),
            ["top-1 agreement", "", formatting.percent(verification.top1_agreement), ""],
        ],
    )
    spread = [(name, value) for name, value in percentiles.items() if name != "max"]
    bars = [*spread, ("mean", verification.kl_divergence), ("max", percentiles.get("max"))]
    known = [(name, v, formatting.figure(v, 3)) for name, v in bars if v]
    chart = None
    if len(known) > 1:
        chart = Chart(
            "KL divergence per token",
            charts.bar_chart("KL divergence per token", sorted(known, key=lambda bar: bar[1])),
            note="Nats, on a logarithmic scale. p99 = 99% of the tokens are below.",
        )
    return _measured_on(verification), table, chart


def _measured_on(verification: Verification) -> str:
    """The evaluation in a sentence: how many tokens of what, cut how, computed in what."""
    tokens, parts = verification.eval, [f"{verification.tokens:,} predicted tokens"]
    if tokens:
        parts[0] += f" of {tokens.source}"
        parts.append(f"{tokens.samples:,} windows of {tokens.seqlen:,}")
        parts += [tokens.protocol] if tokens.protocol else []
    parts += [f"computed in {verification.dtype}"] if verification.dtype else []
    return f"{'; '.join(parts)}."


def _yardstick(result: Result) -> str:
    """What KL is usual at these bits, in a sentence."""
    bits = round(result.bits_per_weight - 0.25)  # without scales and zero points
    usual = USUAL_KL.get(bits)
    if usual is None or result.verification is None or result.verification.kl_divergence is None:
        return ""
    awq, nearest = usual
    return (
        f"A yardstick at {bits} bits: {awq} nats with awq, {nearest} rounded to nearest, "
        "for a trained model of 26M parameters in groups of 128. Larger models lose less."
    )


def _protocol(tokens: Tokens | None) -> Table:
    """What a token set is: evaluation or calibration."""
    if tokens is None:
        return Table(["", ""], [], figures=False)
    rows = [
        ("source", tokens.source),
        ("windows", f"{tokens.samples:,} × {tokens.seqlen:,} tokens"),
        ("protocol", tokens.protocol),
        ("notes", "; ".join(tokens.notes)),
        ("sha256 of the token ids", tokens.sha256),
    ]
    return Table(["", ""], [[name, value] for name, value in rows if value], figures=False)


def _kinds(layers: Sequence[Linear]) -> list[str]:
    """The kinds of linears in the order of a decoder layer, unknown ones last."""
    present = dict.fromkeys(kind_of(layer) for layer in layers)
    return [*(k for k in KINDS if k in present), *(k for k in present if k not in KINDS)]


def kind_of(linear: Linear) -> str:
    """The kind of a linear; those of experts are kinds of their own."""
    return f"exp {linear.kind}" if expert_of(linear.name) else linear.kind


def _short(kind: str) -> str:
    return kind.removesuffix("_proj")


def _depth(result: Result) -> tuple[list[Chart], Table | None]:
    """The error of the stream by depth, the loss of each linear, and a table by kind."""
    shown: list[Chart] = []
    measured = result.verification.layer_errors if result.verification else []
    stream = [(e.layer, e.relative_error) for e in measured if e.relative_error is not None]
    if stream:
        points = [(layer, error * 100) for layer, error in stream]
        hover = [f"after layer {layer}: {formatting.percent(error, 3)}" for layer, error in stream]
        line = charts.Line(points, 0, hover)
        axes = (
            charts.depth_axis(max(layer for layer, _ in stream) + 1),
            charts.linear_axis(max(y for _, y in points), "%"),
        )
        shown.append(
            Chart(
                "Error carried by the stream",
                charts.line_chart("Error of the hidden states after each layer", [line], *axes),
                note="Relative error of the hidden states after each layer, against FP16, on the evaluation set.",
            )
        )
    layers = [layer for layer in _decoder(result) if layer.loss is not None]
    if not layers:
        return shown, None
    kinds = _kinds(layers)
    values: dict[tuple[str, int], float] = {}
    for layer in layers:  # of experts the worst
        place = _short(kind_of(layer)), layer.layer
        values[place] = max(values.get(place, 0.0), layer.loss or 0.0)
    depth = max(layer.layer for layer in layers) + 1
    shown.append(
        Chart(
            "Error of each linear",
            charts.heat_map("Relative output error by kind and layer", [_short(k) for k in kinds], depth, values),
            note="Relative output error of each linear on its own input; darker is larger, on a logarithmic scale."
            + (" Of experts (exp) the worst of a layer is shown." if any(expert_of(x.name) for x in layers) else ""),
        )
    )
    shown += _tokens_of_experts(layers, depth)
    rows = []
    for kind in kinds:
        own = [(layer.loss or 0.0, layer.layer) for layer in layers if kind_of(layer) == kind]
        worst, where = max(own, key=lambda pair: pair[0])
        mean = sum(loss for loss, _ in own) / len(own)
        rows.append([kind, formatting.figure(mean, 3), formatting.figure(worst, 3), str(where)])
    return shown, Table(["kind", "mean error", "largest", "in layer"], rows)


def _tokens_of_experts(layers: Sequence[Linear], depth: int) -> list[Chart]:
    """How many calibration tokens the experts of each layer saw, if there are any."""
    by_layer: dict[int, dict[tuple[str, int], int]] = {}
    for linear in layers:
        if linear.tokens is not None and (expert := expert_of(linear.name)) is not None:
            by_layer.setdefault(linear.layer, {})[expert] = linear.tokens
    if not by_layer:
        return []
    values: dict[tuple[str, int], float] = {}
    for layer, tokens in by_layer.items():
        ordered = sorted(tokens.values())
        for name, share in SHARES.items():
            values[name, layer] = float(ordered[round(share * (len(ordered) - 1))])
    drawn = charts.heat_map("Calibration tokens of an expert by layer", list(SHARES), depth, values)
    note = (
        "Tokens that the router sent to an expert: to that with the most in a layer, to one that a quarter, half and "
        "three quarters of them surpass, and to that with the least."
    )
    return [Chart("Tokens of experts", drawn, note=note)]


def _decoder(result: Result) -> list[Linear]:
    """The linears of the decoder layers; a quantized head is in the tables only."""
    return [layer for layer in result.layers if layer.layer >= 0]


def _bits(result: Result) -> tuple[str, Chart | None]:
    """One sentence if all layers share a scheme, else a map of them."""
    layers = result.layers
    counts = formatting.schemes(layers)
    if not counts:
        return "No linear is quantized.", None
    if len(counts) == 1:
        return f"All {len(layers):,} quantized linears are {next(iter(counts))}.", None
    sentence = ", ".join(f"{count:,} linears {name}" for name, count in counts.items())
    of_name = {layer.scheme_name: layer for layer in layers}
    names = sorted(counts, key=lambda name: (of_name[name].bits, -(of_name[name].group_size or 0)))
    inner = _decoder(result)
    rows, depth = [_short(k) for k in _kinds(inner)], max(x.layer for x in inner) + 1
    values = {(_short(kind_of(x)), x.layer): x.scheme_name for x in inner}
    svg = charts.category_map("Scheme by kind and layer", rows, depth, values, names)
    legend = list(zip(charts.ordered_shades(len(names)), names, strict=True))
    return f"{sentence[:1].upper()}{sentence[1:]}.", Chart("Scheme by kind and layer", svg, legend)


def _ran(result: Result) -> list[list[tuple[str, Table]]]:
    """What was run: tables with a heading, on the left and on the right."""
    verification, base = result.verification, result.base_model
    settings = [
        ("model", one_line(result.model)),
        ("method", result.method),
        ("format", result.format),
        ("scheme asked for", result.scheme.scheme_name),
        *((str(k).replace("_", " "), _option(v)) for k, v in result.options.items()),
        ("device", result.device),
        ("base model", base and base.id),
        ("licence of the base", base and base.license),
        ("stored tensors", formatting.exact(result.tensor_bytes)),
        ("all files of weights", formatting.exact(result.total_bytes)),
    ]
    if verification and verification.limits.max_ppl_increase is not None:
        kl = verification.limits.max_kl
        settings.append(
            ("limit on perplexity", f"+{formatting.limit(verification.limits.max_ppl_increase)} above FP16")
        )
        settings.append(("limit on KL divergence", "none" if kl is None else f"{kl:g} nats"))
    shown = [[name, str(v)] for name, v in settings if v is not None]
    tokens = [
        ("Calibration", _protocol(result.calibration)),
        ("Evaluation", _protocol(verification.eval if verification else None)),
    ]
    right = [(heading, table) for heading, table in tokens if table.rows]
    return [[("Settings", Table(["", ""], shown, figures=False))], *([right] if right else [])]


def _option(value: object) -> str | None:
    return None if value is None else {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _files(result: Result) -> Table:
    rows = [[file.name, formatting.size(file.bytes), file.sha256] for file in result.files]
    return Table(["file", "size", "sha256"], rows)


def _layers(result: Result) -> Table:
    """Every quantized linear, and the worst of a layer's experts for all; the optional columns only where needed."""
    together: dict[str, list[Linear]] = {}
    for linear in result.layers:
        expert = expert_of(linear.name)
        name = linear.name if expert is None else f"{expert[0]}.*.{linear.kind}"
        together.setdefault(name, []).append(linear)
    layers = [
        max(experts, key=lambda x: x.loss or 0.0).having(name=name, bytes=sum(x.bytes for x in experts))
        for name, experts in together.items()
    ]
    extra = [k for k in ("scale_gain", "damp_raised_to") if any(getattr(layer, k) is not None for layer in layers)]
    rows = [
        [
            one_line(layer.name),
            layer.scheme_name,
            layer.method or "",
            formatting.figure(layer.loss, 3),
            *("" if (value := getattr(layer, k)) is None else formatting.figure(value, 3) for k in extra),
            formatting.size(layer.bytes),
        ]
        for layer in layers
    ]
    return Table(["layer", "scheme", "method", "error", *(k.replace("_", " ") for k in extra), "stored"], rows)
