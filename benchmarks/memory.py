# SPDX-License-Identifier: Apache-2.0
"""Peak memory against depth and width: slabs of growing depth and of wider models, each in a process of its own.

    python benchmarks/memory.py --layers 2,8 --recipes deepseek-r1-32b -- --method rtn --device cpu

What follows `--` goes to `slab.py`. Prints one line a slab: counted and measured peaks.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SLAB = Path(__file__).with_name("slab.py")


def measured(recipe: str, layers: int, words: list[str]) -> dict[str, Any]:
    """The document of one slab, which is built by another process so that only quantizing it counts."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "slab"
        command = [sys.executable, str(SLAB), recipe, "--layers", str(layers), "--folder", str(folder), *words]
        subprocess.run([*command, "--build"], check=True)
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    document = json.loads(output[output.index("\n{") :])
    assert isinstance(document, dict)
    return document


def main() -> None:
    """Measure each slab; one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default="deepseek-r1-32b")
    parser.add_argument("--layers", default="2,8")
    parser.add_argument("slab", nargs="*", help="words for slab.py")
    said = parser.parse_args()
    for recipe in said.recipes.split(","):
        for layers in map(int, said.layers.split(",")):
            found = measured(recipe, layers, said.slab)
            print(
                f"{recipe} {layers} layers: RSS {found['peak_rss_gib']:.3f} GiB "
                f"(counted {found['memory']['ram_bytes'] / 2**30:.3f}), device {found['peak_device_gib']:.3f} GiB "
                f"(counted {found['memory']['device_bytes'] / 2**30:.3f}), {found['seconds']:.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
