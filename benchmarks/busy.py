# SPDX-License-Identifier: Apache-2.0
"""Two runs at once beside one alone: how the waiting of OpenMP's threads costs time on a busy machine.

    python benchmarks/busy.py --rounds 5

Each round times every setting in turn: one run alone, then two at once until both have ended. The minima over the
rounds count, since other work on the machine only adds to them. The settings:

    ours        nothing in the environment: what the program chooses
    libraries'  what the OpenMP libraries choose by themselves, as before the program chose
    passive     OMP_WAIT_POLICY=PASSIVE: no spinning at all

Exit code 1: two runs of ours took more than 2.2 times one, or one took more than 5% longer than with the libraries'.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
SETTINGS: dict[str, dict[str, str]] = {
    "ours": {},
    "libraries'": {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"},  # their documented defaults
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
}
MOST_TOGETHER = 2.2  # times one alone
MOST_ALONE = 1.05  # times the libraries' own setting; below this, rounds of the same setting differ as much


def seconds(words: list[str], count: int, environment: dict[str, str], folder: Path) -> float:
    """The time that so many runs at once take until the last has ended."""
    inherited = {name: value for name, value in os.environ.items() if name not in WAITING}
    begun = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "quantkit", *words, "--fresh", "--out", str(folder / str(number))],
            env=inherited | environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for number in range(count)
    ]
    codes = [process.wait() for process in processes]
    if any(codes):
        sys.exit(f"a run ended with {codes}")
    return time.monotonic() - begun


def main() -> None:
    """Time the settings round after round, and print the minima and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--samples", default="16")
    parser.add_argument("--seqlen", default="256")
    parser.add_argument("--also", action="append", default=[], metavar="NAME=VALUE", help="one more setting to time")
    arguments = parser.parse_args()
    settings = dict(SETTINGS)
    for text in arguments.also:
        name, _, value = text.partition("=")
        settings[text] = {name: value}
    sizes = ["--samples", arguments.samples, "--seqlen", arguments.seqlen]
    words = ["gptq", arguments.model, *sizes, "--no-verify", "--offline", "--device", "cpu"]
    times: dict[str, dict[int, list[float]]] = {name: {1: [], 2: []} for name in settings}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(arguments.rounds):
            for name, environment in settings.items():
                for count, taken in times[name].items():
                    taken.append(seconds(words, count, environment, Path(folder)))
                print(f"{name:20} alone {times[name][1][-1]:6.2f} s   two {times[name][2][-1]:6.2f} s", flush=True)
    print("\nminima")
    best = {name: {count: min(taken) for count, taken in by_count.items()} for name, by_count in times.items()}
    for name, found in best.items():
        against = found[1] / best["libraries'"][1]
        print(
            f"{name:20} alone {found[1]:6.2f} s ({against:.2f} of the libraries')   "
            f"two {found[2]:6.2f} s ({found[2] / found[1]:.2f} of alone)"
        )
    ours = best["ours"]
    sys.exit(int(ours[2] > MOST_TOGETHER * ours[1] or ours[1] > MOST_ALONE * best["libraries'"][1]))


if __name__ == "__main__":
    main()
