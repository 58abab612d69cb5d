# SPDX-License-Identifier: Apache-2.0
"""What verification costs: the same run without and with it, one after the other in one process.

    python benchmarks/overhead.py MODEL [CALIB.safetensors EVAL.safetensors] [--method awq]

The share depends on how many tokens are evaluated for one that calibrates; without files they are those of a plain
run. Prints JSON: the seconds of both and what is added, by the clock and of the CPU; on a machine that does other work
too, only the latter say something. What is started once is paid by the run without it.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from quantkit.commands.quantize import quantize
from quantkit.hardware.machine import versions
from quantkit.report.terminal.screen import Terminal
from quantkit.settings.request import Request


def seconds(said: argparse.Namespace, out: Path, *, verify: bool) -> dict[str, float]:
    """The time of a run, as it says itself, and of the CPU."""
    request = Request(
        method=said.method,
        model=str(said.model),
        command="overhead",
        calib=said.calib,
        evaluation=said.eval,
        out=out,
        offline=True,
        verify=verify,
    )
    began = time.process_time()
    clock = quantize(request, Terminal())[0].seconds or 0.0
    return {"clock": clock, "cpu": time.process_time() - began}


def main() -> None:
    """Run twice, print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("calib", nargs="?")
    parser.add_argument("eval", nargs="?")
    parser.add_argument("--method", choices=("awq", "gptq", "rtn"), default="awq")
    said = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        without = seconds(said, Path(folder) / "without", verify=False)
        with_it = seconds(said, Path(folder) / "with", verify=True)
    added = {name: with_it[name] / without[name] - 1 for name in without}
    figures = {"method": said.method, "without": without, "with": with_it, "added": added}
    print(json.dumps(figures | {"versions": versions()}, indent=1))


if __name__ == "__main__":
    main()
