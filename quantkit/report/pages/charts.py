# SPDX-License-Identifier: Apache-2.0
"""Charts as inline SVG: pure functions from numbers to markup, without scripts.

A chart is 440 units wide, so that its text stays readable when a phone shrinks it to 340 pixels. Colours come from the
page's CSS variables (light and dark), in the order of Okabe and Ito, which colour-blind readers can tell apart
(https://jfly.uni-koeln.de/color/); heat maps go from light to dark in one hue. Labels are escaped by Markup.format.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

WIDTH, HEIGHT = 440, 270
LEFT, RIGHT, TOP, BOTTOM = 52, 20, 26, 42
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8a8f98")  # as the page's
LETTER = 7.2  # units that a letter takes, also on a phone
LEAST_SPAN = 10  # times: what differs by less is not shown as light and dark
FARTHEST_BUDGET = 4  # times what is needed; a budget above that is named, as drawing it would flatten the rest
RAMP = ((0xE8, 0xF1, 0xFA), (0x9E, 0xCA, 0xE1), (0x42, 0x92, 0xC6), (0x08, 0x51, 0x9C), (0x05, 0x1F, 0x4A))


@dataclass(frozen=True)
class Axis:
    """Values `low`..`high`, linear or logarithmic, with its ticks and what they say."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    label: str = ""
    log: bool = False

    def share(self, value: float) -> float:
        """Where a value lies between low (0) and high (1)."""
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return (at - low) / (high - low)


@dataclass(frozen=True)
class Line:
    """A line through points (x, y), each with what it says on hovering."""

    points: Sequence[tuple[float, float]]
    colour: int = 0
    hover: Sequence[str] = field(default=())


def linear_axis(high: float, label: str = "") -> Axis:
    """0 to at least `high`, with about five ticks at 1, 2, 2.5 or 5 times a power of ten."""
    high = high if high > 0 and math.isfinite(high) else 1.0
    power = 10 ** math.floor(math.log10(high / 5))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power * 5 >= high * (1 - 1e-9))
    ticks = tuple((i * step, f"{round(i * step, 12):g}") for i in range(math.ceil(high / step - 1e-9) + 1))
    return Axis(0, ticks[-1][0], ticks, label)


def log_axis(low: float, high: float, label: str = "") -> Axis:
    """The powers of ten around low..high (both above 0)."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    every = max(1, math.ceil((last - first) / 5))
    ticks = tuple((10.0**e, f"1e{e}" if not -3 <= e <= 3 else f"{10.0**e:g}") for e in range(first, last + 1, every))
    return Axis(10.0**first, 10.0**last, ticks, label, log=True)


def context_axis(high: int, label: str) -> Axis:
    """0 to `high` tokens, with at most six ticks at multiples of a power of two."""
    step = 1024 if high >= 1024 else 1
    while high / step > 6:
        step *= 2
    write = "{}k".format if step >= 1024 else "{}".format
    unit = 1024 if step >= 1024 else 1
    return Axis(0, high, tuple((t, write(t // unit) if t else "0") for t in range(0, high + 1, step)), label)


def depth_axis(layers: int) -> Axis:
    """Layers 0..layers-1, each one unit wide around its number."""
    step = next(s for s in (1, 2, 4, 8, 16, 32, 64) if layers / s <= 9 or s == 64)
    return Axis(-0.5, layers - 0.5, tuple((i, str(i)) for i in range(0, layers, step)), "layer")


# --- pieces ---------------------------------------------------------------------------------------------------------


def svg(title: str, body: str, height: float = HEIGHT) -> Markup:
    return Markup('<svg class="chart" viewBox="0 0 {} {:g}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, height, title, body
    )


def text(x: float, y: float, content: str, kind: str = "", anchor: str = "start") -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" class="{}" text-anchor="{}">{}</text>').format(
        x, y, kind, anchor, content
    )


def rule(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return Markup('<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" class="{}"/>').format(x1, y1, x2, y2, kind)


def box(x: float, y: float, width: float, height: float, fill: str, hover: str) -> Markup:
    shape = Markup('<rect x="{:.2f}" y="{:.2f}" width="{:.2f}" height="{:.2f}" style="fill:{}">').format(
        x, y, width, height, fill
    )
    return shape + Markup("<title>{}</title></rect>").format(hover)


def joined(parts: Sequence[Markup]) -> Markup:
    return Markup("").join(parts)


def _x(axis: Axis, value: float) -> float:
    return LEFT + axis.share(value) * (WIDTH - LEFT - RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - axis.share(value) * (HEIGHT - TOP - BOTTOM)


def frame(x: Axis, y: Axis) -> Markup:
    """Grid lines, tick labels, and what the axes say."""
    base = HEIGHT - BOTTOM
    return joined(
        [
            *(rule(LEFT, _y(y, v), WIDTH - RIGHT, _y(y, v), "grid") for v, _ in y.ticks),
            *(text(LEFT - 6, _y(y, v) + 4, label, "tick", "end") for v, label in y.ticks),
            *(text(_x(x, v), base + 16, label, "tick", "middle") for v, label in x.ticks),
            text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x.label, "axis", "middle"),
            text(2, 13, y.label, "axis"),
        ]
    )


# --- charts ---------------------------------------------------------------------------------------------------------


def line_chart(title: str, lines: Sequence[Line], x: Axis, y: Axis) -> Markup:
    """Lines with a dot at each point that says its value on hovering."""
    parts = [frame(x, y)]
    for line in lines:
        at = [(_x(x, px), _y(y, py)) for px, py in line.points]
        parts.append(
            Markup('<polyline points="{}" class="line" style="stroke:var(--c{})"/>').format(
                " ".join(f"{px:.1f},{py:.1f}" for px, py in at), line.colour
            )
        )
        radius = 3 if len(at) <= 32 else 1.8
        parts += [
            Markup('<circle cx="{:.1f}" cy="{:.1f}" r="{}" style="fill:var(--c{})"><title>{}</title></circle>').format(
                px, py, radius, line.colour, hover
            )
            for (px, py), hover in zip(at, line.hover, strict=True)
        ]
    return svg(title, joined(parts))


@dataclass(frozen=True)
class Mark:
    """A point of a scatter chart: where, its colour, a short label beside it ("": none), and its words on hovering."""

    x: float
    y: float
    colour: int
    label: str
    hover: str


def scatter_chart(
    title: str, marks: Sequence[Mark], x: Axis, y: Axis, *, front: Sequence[tuple[float, float]], limit: float | None
) -> Markup:
    """Points, the line through those that no other beats, and a dashed line at the most that x may be."""
    parts = [frame(x, y)]
    if limit is not None and x.low <= limit <= x.high:
        parts.append(rule(_x(x, limit), TOP, _x(x, limit), HEIGHT - BOTTOM, "limit"))
    path = " ".join(f"{_x(x, px):.1f},{_y(y, py):.1f}" for px, py in front)
    parts.append(Markup('<polyline points="{}" class="line" style="stroke:var(--soft);stroke-width:1"/>').format(path))
    for mark in marks:
        at = (_x(x, mark.x), _y(y, mark.y))
        parts.append(
            Markup('<circle cx="{:.1f}" cy="{:.1f}" r="4" style="fill:var(--c{})"><title>{}</title></circle>').format(
                *at, mark.colour, mark.hover
            )
        )
    dots = [(_x(x, mark.x), _y(y, mark.y)) for mark in marks]
    taken: list[tuple[float, float]] = []
    for mark in sorted((mark for mark in marks if mark.label), key=lambda mark: mark.x):
        at = (_x(x, mark.x), _y(y, mark.y))
        place = next((p for p in _places(at, mark.label) if _is_free(p, mark.label, dots, taken)), None)
        if place is not None:  # else it says its name on hovering, and stands in the table
            taken.append(place)
            parts.append(text(*place, mark.label, "tick", "middle"))
    return svg(title, joined(parts))


def _places(at: tuple[float, float], label: str) -> list[tuple[float, float]]:
    """Where a label may stand: below its point, left, above, right; the middle of its baseline."""
    x, y = at
    half = LETTER * len(label) / 2
    return [(x - half - 4, y + 14), (x, y + 17), (x - half - 8, y + 4), (x, y - 9), (x + half + 8, y + 4), (x, y + 29)]


def _is_free(
    place: tuple[float, float], label: str, dots: Sequence[tuple[float, float]], taken: Sequence[tuple[float, float]]
) -> bool:
    """Whether a label is inside the frame, on no point, and on no other label."""
    (x, y), half = place, LETTER * len(label) / 2
    inside = x - half > LEFT and x + half < WIDTH - RIGHT + 12 and y - 9 > TOP and y < HEIGHT - BOTTOM - 2
    covers = any(abs(px - x) < half + 4 and y - 13 < py < y + 4 for px, py in dots)
    return inside and not covers and not any(abs(px - x) < 2 * half + 6 and abs(py - y) < 13 for px, py in taken)


def near_axis(low: float, high: float, label: str, write: Callable[[float], str] = "{:g}".format) -> Axis:
    """From a round number below `low` to one above `high`, without going down to zero."""
    span = max(high - low, 1e-9 * max(abs(high), 1.0), 1e-12)
    power = 10 ** math.floor(math.log10(span / 4))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power * 5 >= span * (1 - 1e-9))
    first, last = math.floor(low / step), math.ceil(high / step)
    last = max(last, first + 1)
    return Axis(
        first * step,
        last * step,
        tuple((i * step, f"{round(i * step, 12):g}") for i in range(first, last + 1)),
        label,
    )


def memory_chart(
    parts: Sequence[tuple[str, Callable[[int], float]]],
    *,
    budget: float | None,
    longest: int | None,
    asked: int | None,
    allowed: int | None = None,
    bends: Sequence[int] = (),
) -> Markup:
    """Memory against context, stacked from below.

    parts: (name, context in tokens -> bytes, straight between the `bends`), from the bottom up
    budget: bytes, drawn across unless it would flatten the parts
    longest, asked: contexts in tokens, marked where given
    allowed: the most tokens that the model takes; the picture ends there
    """
    marked = max(longest or 0, asked or 0)
    reach = math.ceil(1.25 * max(marked, 4096) / 1024) * 1024
    if allowed is not None:
        reach = max(min(reach, allowed), marked)
    needed = sum(part(reach) for _, part in parts)
    in_sight = budget is not None and budget <= FARTHEST_BUDGET * needed
    unit, unit_name = _unit(max(needed, budget or 0) if in_sight else needed)

    def total(context: int) -> float:
        return sum(part(context) for _, part in parts) / unit

    top = max(total(reach), (budget or 0) * 1.05 / unit if in_sight else total(reach) * 1.15) or 1.0
    ticks = tuple(tick for tick in linear_axis(top).ticks if tick[0] <= top)
    x, y = context_axis(reach, "context, tokens"), Axis(0, top, ticks, unit_name)
    contexts = [0, *sorted(bend for bend in set(bends) if 0 < bend < reach), reach]
    drawn = [frame(x, y)]
    below = [0.0] * len(contexts)
    for colour, (name, part) in enumerate(parts):
        above = [low + part(context) / unit for low, context in zip(below, contexts, strict=True)]
        corners = [*zip(contexts, below, strict=True), *reversed(list(zip(contexts, above, strict=True)))]
        drawn.append(
            Markup('<polygon points="{}" style="fill:var(--c{});fill-opacity:.8"><title>{}</title></polygon>').format(
                " ".join(f"{_x(x, context):.1f},{_y(y, value):.1f}" for context, value in corners), colour, name
            )
        )
        below = above
    if budget is not None:
        size, name = _unit(budget)
        label = f"budget {budget / size:.4g} {name}"
        at = _y(y, budget / unit) if in_sight else TOP
        drawn += [rule(LEFT, at, WIDTH - RIGHT, at, "limit")] if in_sight else []
        drawn.append(text(LEFT + 4, at - 5, label if in_sight else f"{label}: far above ↑", "mark"))
    if asked and asked != longest:
        drawn.append(
            _dot(x, y, asked, total(asked), "ring", f"asked for: {asked:,} tokens, {total(asked):.2f} {unit_name}")
        )
    if longest:
        at, right = _x(x, longest), x.share(longest) > 0.5
        drawn += [
            rule(at, _y(y, 0), at, _y(y, total(longest)), "drop"),
            _dot(
                x, y, longest, total(longest), "dot", f"longest: {longest:,} tokens, {total(longest):.2f} {unit_name}"
            ),
            text(
                at - 6 if right else at + 6, _y(y, 0) - 8, f"longest {longest:,}", "inside", "end" if right else "start"
            ),
        ]
    return svg("Memory against context", joined(drawn))


def _unit(size: float) -> tuple[float, str]:
    return next(((unit, name) for unit, name in ((2.0**30, "GiB"), (2.0**20, "MiB")) if size >= unit), (1.0, "bytes"))


def _dot(x: Axis, y: Axis, at: float, value: float, kind: str, hover: str) -> Markup:
    return Markup('<circle cx="{:.1f}" cy="{:.1f}" r="4.5" class="{}"><title>{}</title></circle>').format(
        _x(x, at), _y(y, value), kind, hover
    )


def bar_chart(title: str, bars: Sequence[tuple[str, float, str]]) -> Markup:
    """Horizontal bars on a logarithmic scale: (name, value above 0, what it says)."""
    values = [value for _, value, _ in bars]
    axis = log_axis(min(values) / 2, max(values))
    row, left, right = 30, 52, 76
    height = row * len(bars) + 8
    parts = []
    for i, (name, value, label) in enumerate(bars):
        length = max(2.0, axis.share(value) * (WIDTH - left - right))
        parts += [
            text(left - 8, i * row + 21, name, "tick", "end"),
            box(left, i * row + 8, length, 18, "var(--c0)", f"{name}: {label}"),
            text(left + length + 6, i * row + 21, label, "value"),
        ]
    return svg(title, joined(parts), height)


def shade(share: float) -> str:
    """0 (light) to 1 (dark) on the ramp, as a CSS colour."""
    at = min(max(share, 0.0), 1.0) * (len(RAMP) - 1)
    low = min(int(at), len(RAMP) - 2)
    mixed = (round(a + (b - a) * (at - low)) for a, b in zip(RAMP[low], RAMP[low + 1], strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def ordered_shades(count: int) -> list[str]:
    """Colours for things that have an order, from light to dark."""
    return [shade(0.15 + 0.85 * i / max(count - 1, 1)) for i in range(count)]


def colour(index: int) -> str:
    """A colour of the page for things without an order."""
    return f"var(--c{index % len(COLOURS)})"


def grid_map(
    title: str,
    rows: Sequence[str],
    columns: int,
    cells: Mapping[tuple[str, int], tuple[str, str]],
    legend: Callable[[float], Markup] | None = None,
) -> Markup:
    """Cells by row name and layer: (CSS colour, what it says). The legend is drawn at the y it is given."""
    row = 24
    x, left = depth_axis(columns), 52
    width = (WIDTH - left - RIGHT) / columns
    gap = 0.5 if columns > 24 else 1.5
    bottom = row * len(rows)
    parts = [text(left - 6, i * row + 16, name, "tick", "end") for i, name in enumerate(rows)]
    for i, name in enumerate(rows):
        parts += [
            box(left + layer * width, i * row + 1, width - gap, row - 2, *cells[name, layer])
            for layer in range(columns)
            if (name, layer) in cells
        ]
    parts += [text(left + (v + 0.5) * width, bottom + 15, label, "tick", "middle") for v, label in x.ticks]
    parts.append(text((left + WIDTH - RIGHT) / 2, bottom + 32, x.label, "axis", "middle"))
    if legend is not None:
        parts.append(legend(bottom + 44))
    return svg(title, joined(parts), bottom + (40 if legend is None else 76))


def ramp_legend(low: str, high: str) -> Callable[[float], Markup]:
    """The ramp from light to dark between two labels."""

    def draw(y: float) -> Markup:
        left, steps = 150, 24
        cells = [box(left + i * 6, y + 4, 6.2, 10, shade(i / (steps - 1)), "") for i in range(steps)]
        return joined(
            [text(left - 8, y + 13, low, "tick", "end"), *cells, text(left + 6 * steps + 8, y + 13, high, "tick")]
        )

    return draw


def heat_map(title: str, rows: Sequence[str], columns: int, values: Mapping[tuple[str, int], float]) -> Markup:
    """Values (0 or more) by row name and layer, shaded by their logarithm; each says its value on hovering."""
    known = [value for value in values.values() if math.isfinite(value) and value > 0]
    low, high = (math.log(min(known)), math.log(max(known))) if known else (0.0, 0.0)
    missing = max(math.log(LEAST_SPAN) - (high - low), 0.0)
    low, high = low - missing / 2, high + missing / 2

    def colour(value: float) -> str:
        if not math.isfinite(value):
            return "var(--bad)"
        return shade((math.log(value) - low) / (high - low) if value > 0 and high > low else 0.0)

    cells = {
        (row, layer): (colour(value), f"layer {layer}, {row}: {value:.4g}") for (row, layer), value in values.items()
    }
    legend = ramp_legend(f"{math.exp(low):.2g}", f"{math.exp(high):.2g}") if known else None
    return grid_map(title, rows, columns, cells, legend)


def category_map(
    title: str, rows: Sequence[str], columns: int, values: Mapping[tuple[str, int], str], categories: Sequence[str]
) -> Markup:
    """Categories by row name and layer, shaded from the first to the last; the page shows the legend."""
    shades = dict(zip(categories, ordered_shades(len(categories)), strict=True))
    cells = {(row, layer): (shades[value], f"layer {layer}, {row}: {value}") for (row, layer), value in values.items()}
    return grid_map(title, rows, columns, cells)
