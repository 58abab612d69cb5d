# SPDX-License-Identifier: Apache-2.0
"""Several processes, started by torchrun as users do: the same bytes as one leaves, and one voice when it ends."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

from quantkit.hardware.matmul import strips
from quantkit.hardware.ranks import Ranks
from tests.conftest import make_qwen2
from tests.outputs import contents
from tests.running import ENVIRONMENT, command, done, run_process, run_words

WIDE = 1152  # in_features of down_proj: its Gram matrix is summed up in three strips


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen2(tmp_path_factory.mktemp("wide"), intermediate_size=WIDE)


@pytest.fixture(scope="module")
def odd_ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven samples, which two or three processes cannot share evenly."""
    path = tmp_path_factory.mktemp("ids") / "ids.safetensors"
    save_file({"input_ids": torch.randint(0, 96, (7, 32), generator=torch.Generator().manual_seed(1))}, path)
    return path


def several(processes: int, words: list[str]) -> list[str]:
    """The command, started by torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [words[0], *launcher, *words[1:]]


def told(stderr: str) -> list[str]:
    """The lines that are quantkit's own; torchrun adds many when a process fails."""
    return [line for line in stderr.splitlines() if line.startswith("quantkit: ")]


@pytest.mark.parametrize(("method", "processes"), [("awq", 2), ("gptq", 3)])
def test_several_processes_leave_the_bytes_of_one(
    tmp_path: Path, wide: Path, odd_ids: Path, method: str, processes: int
) -> None:
    assert len(strips(torch.empty(WIDE, WIDE))) >= 3
    followed = ["--drift-samples", "5"] if method == "gptq" else []  # two, two and one of the processes' own
    done(*run_words(method, wide, tmp_path / "one", odd_ids, *followed))
    words = run_words(method, wide, tmp_path / "many", odd_ids, *followed, "--states", "file", "--json")
    shared = run_process(several(processes, command(*words)))
    assert shared.returncode == 0, shared.stderr
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    one, many = (json.loads((tmp_path / name / "quantkit.json").read_text()) for name in ("one", "many"))
    assert many["verification"] == one["verification"]
    assert many["layers"] == one["layers"]
    assert many["processes"] == processes
    assert json.loads(shared.stdout) == many  # once
    assert shared.stderr.count("layer 1 of 2") == 1


def test_a_lost_process_ends_the_run_and_any_number_continues_it(tmp_path: Path, odd_ids: Path) -> None:
    model = make_qwen2(tmp_path / "model", layers=8)
    whole, out = tmp_path / "whole", tmp_path / "out"
    made = run_process(several(2, command(*run_words("gptq", model, whole, odd_ids))))
    assert made.returncode == 0, made.stderr
    process = subprocess.Popen(
        several(2, command(*run_words("gptq", model, out, odd_ids))), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 600
    while not list(out.glob("model-00002*")) and time.monotonic() < deadline and process.poll() is None:
        pass
    second = next(p for p in psutil.Process(process.pid).children() if p.environ().get("RANK") == "1")
    second.kill()
    _, stderr = process.communicate(timeout=600)
    assert process.returncode != 0
    assert len(told(stderr)) == 1
    assert "a process of this run was lost" in told(stderr)[0]
    finished = len((out / "journal.jsonl").read_text().splitlines())
    assert 1 < finished < 11
    resumed = done(*run_words("gptq", model, out, odd_ids))
    assert "from disk" in resumed.stderr
    assert contents(out) == contents(whole)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["awq", "MODEL", "--quality", "best"], "--quality best: in one process only"),
        (["awq", "MODEL", "--group", "48"], "group_size 48"),
        (
            ["awq", "MODEL", "--group", "32", "--drift-samples", "1"],
            "--drift-samples: 1 windows for 2 processes; use 2 or more",
        ),
        (["fit", "MODEL"], "fit: runs in one process"),
        (["awq", "MODEL", "--nonsense"], "No such option: --nonsense"),
    ],
)
def test_problems_are_told_once(tmp_path: Path, wide: Path, odd_ids: Path, words: list[str], problem: str) -> None:
    ids = ["--calib", str(odd_ids), "--eval", str(odd_ids), "--out", str(tmp_path / "out")] if words[0] == "awq" else []
    refused = run_process(several(2, command(*(str(wide) if word == "MODEL" else word for word in words), *ids)))
    assert refused.returncode != 0
    assert refused.stderr.count(problem) == 1
    assert "Traceback" not in refused.stderr.split("elastic")[0]
    assert not (tmp_path / "out").exists()


LATE = """
import os, sys
if os.environ["RANK"] == "0":
    import transformers.models.qwen2.modeling_qwen2  # takes seconds
from quantkit.cli import main
main()
"""


@pytest.mark.parametrize(
    ("words", "problem"), [(["fit", "MODEL"], "fit: runs in one process"), (["awq", "--nonsense"], "No such option")]
)
def test_a_process_with_nothing_to_tell_waits_for_the_one_that_has(
    tmp_path: Path, words: list[str], problem: str
) -> None:
    (tmp_path / "late.py").write_text(LATE)
    refused = run_process(several(2, [sys.executable, str(tmp_path / "late.py"), *words]))
    assert refused.returncode != 0
    assert refused.stderr.count(problem) == 1


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_cover_everything_once(size: int) -> None:
    ranks = [Ranks(rank, size) for rank in range(size)]
    for count in (7, 8, 100):
        everything = torch.arange(count)
        assert torch.cat([everything[rank.rows(count)] for rank in ranks]).equal(everything)
        samples = [everything[rank.own(count)] for rank in ranks]
        assert torch.cat(samples).sort().values.equal(everything)
        assert max(map(len, samples)) == ranks[0].most(count)
    work = [sum(8 - strip for strip in range(8) if ranks[0].owner(strip) == rank) for rank in range(size)]
    assert sum(work) == 36
    assert max(work) <= 36 / size + 8
