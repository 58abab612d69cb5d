# SPDX-License-Identifier: Apache-2.0
"""What quantizing costs against the model's size, the calibration samples and their length, as a picture.

    python benchmarks/cost.py measure docs/cost.json --device cuda:0
    python benchmarks/cost.py draw docs/cost.json docs/cost.png

The first quantizes slabs (see `slab.py`) of the recipes' geometries without verification, and keeps the seconds of the
second layer, reading and writing included. The second draws them, and what operations say of the rest; a whole model
is its layers times that.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slab import arguments, make_slab, measure

from quantkit.recipe import shipped

SIZES = ("deepseek-r1-1.5b", "deepseek-r1-7b", "deepseek-r1-14b", "deepseek-r1-32b", "deepseek-r1-70b")
USUAL = {"gptq": (128, 2048), "awq": (128, 512)}  # samples, seqlen
LARGE = "deepseek-r1-32b"
SAMPLES, SEQLENS = (16, 32, 64, 128, 256), (256, 512, 1024, 2048, 4096)
LAYERS, TYPICAL = 3, 1  # the first layer also compiles, the last is not run on


def wanted(recipe: str) -> list[tuple[str, int, int]]:
    """(method, samples, seqlen) of what is measured with a recipe's geometry."""
    found = [(method, *tokens) for method, tokens in USUAL.items()]
    if recipe == LARGE:
        for method, (samples, seqlen) in USUAL.items():
            found += [(method, count, seqlen) for count in SAMPLES]
            found += [(method, samples, length) for length in SEQLENS]
    return list(dict.fromkeys(found))


def measured(recipe: str, device: str) -> list[dict[str, Any]]:
    """One row for each setting."""
    sizes, rows = _sizes(recipe), []
    with tempfile.TemporaryDirectory() as scratch:
        slab, out = Path(scratch) / "slab", Path(scratch) / "out"
        make_slab(recipe, LAYERS, 1024, slab)
        for method, samples, seqlen in wanted(recipe):
            words = [recipe, "--method", method, "--samples", str(samples), "--seqlen", str(seqlen)]
            found = measure(arguments([*words, "--device", device]), slab, out)
            shutil.rmtree(out)
            row = {"recipe": recipe, "layers": sizes["num_hidden_layers"], "weights": weights(sizes)}
            row |= {"method": method, "samples": samples, "seqlen": seqlen}
            row["seconds_per_layer"] = round(found["seconds_per_layer"][TYPICAL], 3)
            rows.append(row | {"device": found["device"], "torch": found["versions"]["torch"]})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def weights(sizes: dict[str, Any]) -> int:
    """How many weights the linears of all layers have."""
    return sum(rows * width for rows, width in _sites(sizes)) * int(sizes["num_hidden_layers"])


def operations(sizes: dict[str, Any]) -> tuple[float, float]:
    """Of one layer on a GPU: what rounding takes, whatever the tokens, and what each token takes; see `slab.floors`."""
    fixed, per_token = 0.0, 0.0
    for rows, width in _sites(sizes):
        drift = min(2 * width**2, 4 * rows * width)
        fixed += rows * width**2
        per_token += 2 * 2 * rows * width + width**2 + drift
    return fixed, per_token


def _sites(sizes: dict[str, Any]) -> list[tuple[int, int]]:
    """(out_features, in_features) of q/k/v, o, gate/up and down."""
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    key_value = hidden * sizes["num_key_value_heads"] // sizes["num_attention_heads"]
    return [(hidden + 2 * key_value, hidden), (hidden, hidden), (2 * inner, hidden), (hidden, inner)]


def expected(rows: list[dict[str, Any]]) -> Callable[[str, int, int], float]:
    """Seconds a layer of GPTQ with any recipe: operations, at the two rates that the measured lines of the 32B have."""
    import numpy

    known = [row for row in rows if row["recipe"] == LARGE and row["method"] == "gptq" and row["samples"] <= 128]
    tokens = [row["samples"] * row["seqlen"] for row in known]  # with more, inputs are computed again and not kept
    a_token, fixed = numpy.polyfit(tokens, [row["seconds_per_layer"] for row in known], 1)
    large = operations(_sizes(LARGE))

    def seconds(recipe: str, samples: int, seqlen: int) -> float:
        here = operations(_sizes(recipe))
        return float(fixed * here[0] / large[0] + a_token * samples * seqlen * here[1] / large[1])

    return seconds


def _sizes(recipe: str) -> dict[str, Any]:
    sizes = shipped()[recipe].config
    assert sizes is not None
    return sizes


def draw(rows: list[dict[str, Any]], picture: Path) -> None:
    """Minutes for a whole model against its size, and seconds a layer of the 32B against samples and their length.

    Dots are measured, and AWQ's are joined; dashes are `expected`.
    """
    import matplotlib.pyplot as plt

    figure, (by_size, by_samples, by_length) = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    guess = expected(rows)
    samples, seqlen = USUAL["gptq"]
    sizes = sorted((weights(_sizes(recipe)) / 1e9, recipe) for recipe in SIZES)
    minutes = [guess(recipe, samples, seqlen) * _sizes(recipe)["num_hidden_layers"] / 60 for _, recipe in sizes]
    by_size.plot([size for size, _ in sizes], minutes, "--", color="C0")
    for (size, recipe), y in zip(sizes, minutes, strict=True):
        by_size.annotate(recipe.rpartition("-")[2], (size, y), textcoords="offset points", xytext=(-6, 8), ha="right")
    by_samples.plot(SAMPLES, [guess(LARGE, count, seqlen) for count in SAMPLES], "--", color="C0")
    by_length.plot(SEQLENS, [guess(LARGE, samples, length) for length in SEQLENS], "--", color="C0")
    for color, (method, (samples, seqlen)) in zip(("C0", "C1"), USUAL.items(), strict=True):
        mine = [row for row in rows if row["method"] == method]
        usual = [row for row in mine if (row["samples"], row["seqlen"]) == (samples, seqlen)]
        large = [row for row in mine if row["recipe"] == LARGE]
        joined = "" if method == "gptq" else ":"  # the dashes are those of GPTQ
        dots = {"marker": "o", "linestyle": joined, "color": color}
        y = [row["seconds_per_layer"] * row["layers"] / 60 for row in usual]
        by_size.plot([row["weights"] / 1e9 for row in usual], y, label=f"{method}, {samples} x {seqlen}", **dots)
        for axes, key, fixed, value in (
            (by_samples, "samples", "seqlen", seqlen),
            (by_length, "seqlen", "samples", samples),
        ):
            line = sorted((row for row in large if row[fixed] == value), key=lambda row: row[key])
            label = f"{method}, {value} tokens each" if fixed == "seqlen" else f"{method}, {value} samples"
            axes.plot([row[key] for row in line], [row["seconds_per_layer"] for row in line], label=label, **dots)
    by_size.set(xlabel="weights that are quantized, billions", ylabel="minutes for the whole model")
    by_samples.set(xlabel="calibration samples", ylabel="seconds a layer of the 32B")
    by_length.set(xlabel="tokens of a sample", ylabel="seconds a layer of the 32B")
    for axes in (by_size, by_samples, by_length):
        axes.margins(y=0.12)  # room for the name of the uppermost dot
        axes.set(xlim=(0, None), ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, loc="upper left")
    where = f"one {rows[0]['device']}, torch {rows[0]['torch']}, without verification"
    figure.suptitle(
        f"{where}; dots: measured, dashes: GPTQ from operations, at the rates of the 32B's dots", fontsize=11
    )
    figure.savefig(picture, dpi=110)


def main() -> None:
    """Measure, or draw what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    measuring = commands.add_parser("measure")
    measuring.add_argument("table", type=Path)
    measuring.add_argument("--device", default="auto")
    measuring.add_argument("--recipes", default=",".join(SIZES))
    drawing = commands.add_parser("draw")
    drawing.add_argument("table", type=Path)
    drawing.add_argument("picture", type=Path)
    said = parser.parse_args()
    if said.command == "draw":
        draw(json.loads(said.table.read_text()), said.picture)
        return
    rows = [row for recipe in said.recipes.split(",") for row in measured(recipe, said.device)]
    said.table.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
