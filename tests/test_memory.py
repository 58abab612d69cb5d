# SPDX-License-Identifier: Apache-2.0
"""What a run may take of memory: chosen before it begins, never more than allowed, refused where it cannot be."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from quantkit.errors import InputError
from quantkit.formats import FORMATS
from quantkit.model.config import config_from_dict
from quantkit.model.skeleton import Architecture, build
from quantkit.pipeline.memory import Allowance, Layout, Streams, lay_out
from quantkit.plan import OUTSIDE, LinearPlan, Plan, make_plan
from quantkit.recipe import Recipe, resolver, shipped
from quantkit.scheme import Scheme
from quantkit.serving.fit import fit
from quantkit.serving.needs import Work, needs

GIB = 2**30
CPU, GPU = torch.device("cpu"), torch.device("cuda")
CALIBRATION = Streams([(128, 2048)])

# Runs `quantkit --version`, and says at the end what torch has found or would find.
VERSION = """
import atexit, json, os, sys
from quantkit.cli import main

def tell():
    print(json.dumps(["torch" in sys.modules, {n: v for n, v in os.environ.items() if n.endswith("ALLOC_CONF")}]))

atexit.register(tell)
main()
"""


@pytest.fixture(scope="module")
def model() -> Architecture:
    """The 32B, from its recipe's sizes."""
    config = shipped()["deepseek-r1-32b"].config
    assert config is not None
    return build(config_from_dict(config))


@pytest.fixture(scope="module")
def plan(model: Architecture) -> Plan:
    return make_plan(model, resolver(Recipe(), Scheme(4, 128, False)), FORMATS["awq"])


def work(plan: Plan, longest: int = 2048, **changes: Any) -> Work:
    """Of a run at its defaults, on a GPU."""
    usual = Work(plan.linears, True, 2, longest, compared=False, calibrated=True, follows_original=True)
    return replace(usual, **changes)


def on_gpu(
    model: Architecture, plan: Plan, vram: float, ram: float, streams: Streams = CALIBRATION, **changes: Any
) -> Layout:
    return lay_out(model, work(plan, **changes), streams, GPU, Allowance(int(vram * GIB), int(ram * GIB)))


def test_the_32b_fits_a_24_gb_card_and_24_gib_of_ram(model: Architecture, plan: Plan) -> None:
    found = on_gpu(model, plan, 22, 24)
    assert found.device_bytes <= 22 * GIB
    assert found.ram_bytes <= 24 * GIB
    assert found.states_bytes == 128 * 2048 * 5120 * 2


def test_hidden_states_move_out_as_memory_shrinks(model: Architecture, plan: Plan) -> None:
    three, limits = Streams([(128, 2048)] * 3), ((80, 64), (18, 64), (18, 10))
    places = [on_gpu(model, plan, vram, ram, three, compared=True).place for vram, ram in limits]
    assert places == ["device", "ram", "file"]


def test_less_is_kept_of_what_linears_read_before_hidden_states_move_out(model: Architecture, plan: Plan) -> None:
    streams = replace(CALIBRATION, input_tokens=128 * 2048)
    found = [on_gpu(model, plan, vram, 64, streams, follows_original=False) for vram in (80, 30, 18)]
    assert [(x.place, x.kept_width) for x in found] == [("device", 27648), ("device", 5120), ("device", 0)]
    kept = (27648 + 5120) * 128 * 2048 * 2  # of down_proj and o_proj
    assert found[0].device_bytes - on_gpu(model, plan, 80, 64, follows_original=False).device_bytes == kept
    for layout, vram in zip(found, (80, 30, 18), strict=True):
        assert layout.device_bytes <= vram * GIB


def test_micro_batches_shrink_before_anything_is_refused(model: Architecture, plan: Plan) -> None:
    most = on_gpu(model, plan, 80, 64)
    batches = {on_gpu(model, plan, vram / 4, 64).batch for vram in range(64, 120) if _fits(model, plan, vram / 4)}
    assert most.batch == 4
    assert max(batches) == most.batch


def _fits(model: Architecture, plan: Plan, vram: float) -> bool:
    try:
        return on_gpu(model, plan, vram, 64).device_bytes <= vram * GIB
    except InputError:
        return False


@pytest.mark.parametrize(("vram", "ram", "told"), [(8, 64, "--vram 8.00 GiB"), (22, 2, "--ram 2.00 GiB")])
def test_a_limit_that_cannot_be_kept_is_refused_with_what_it_takes(
    model: Architecture, plan: Plan, vram: float, ram: float, told: str
) -> None:
    with pytest.raises(InputError, match=f"{told}: .* GiB needed"):
        on_gpu(model, plan, vram, ram)


def test_no_limit_refuses_nothing(model: Architecture, plan: Plan) -> None:
    endless = replace(CALIBRATION, shapes=[(10**9, 2048)])
    assert lay_out(model, work(plan, on_gpu=False, itemsize=4), endless, CPU).place == "file"


def test_a_cpu_keeps_16_gib_and_refuses_vram(model: Architecture, plan: Plan) -> None:
    usual = work(plan, 512, on_gpu=False, itemsize=4, compared=True)
    found = lay_out(model, usual, Streams([(4, 512)] * 4), CPU, Allowance(ram=16 * GIB))
    assert found.ram_bytes <= 16 * GIB
    assert (found.batch, found.device_bytes) == (1, 0)
    with pytest.raises(InputError, match="--vram"):
        lay_out(model, usual, CALIBRATION, CPU, Allowance(vram=GIB))


@pytest.mark.parametrize("on_gpu", [True, False])
def test_a_large_vocabulary_counts_in_ram(model: Architecture, plan: Plan, on_gpu: bool) -> None:
    """With a vocabulary so large that little else matters: 2 bytes of each, and 4 where sites are looked for, which no
    other moment exceeds; on a CPU the embedding also runs in 4.
    """
    embedding = 10**8 * 5120
    shapes = {name: (10**8, 5120) if len(shape) == 2 else shape for name, shape in model.outside_tensors.items()}
    wide = replace(model, outside_tensors=shapes)
    small, large = (needs(x, work(plan, on_gpu=on_gpu, itemsize=2 if on_gpu else 4)).ram for x in (model, wide))
    expected = (6 if on_gpu else 10) * embedding
    assert expected < large < expected + small


def test_fit_tells_what_a_run_will_count(model: Architecture, plan: Plan) -> None:
    told = fit(model, plan, budget=22 * GIB, context=8192)
    cpu = lay_out(model, work(plan, on_gpu=False, itemsize=4, compared=True), Streams([]), CPU, Allowance(place="file"))
    assert told.ram_bytes == cpu.ram_bytes
    on_gpu(model, plan, (told.device_bytes or 0) / GIB, 64, Streams([(1, 2048)]), compared=True)
    with pytest.raises(InputError, match="--vram"):
        on_gpu(model, plan, (told.device_bytes or 0) / GIB - 0.01, 64, Streams([(1, 2048)]), compared=True)


def test_what_was_chosen_is_told(model: Architecture, plan: Plan) -> None:
    text = str(on_gpu(model, plan, 22, 24))
    assert "2.50 GiB of hidden states" in text
    assert "(22.00 GiB allowed)" in text


def test_a_quantized_head_and_an_allocation_of_the_32b_fit_a_24_gb_card(model: Architecture, plan: Plan) -> None:
    """Two streams of calibration, and those of the probing windows for 2 models and 4 parts in each of 64 layers."""
    head = LinearPlan("lm_head", OUTSIDE, "lm_head", 152064, 5120, Scheme(8, 128, True))
    streams = Streams([(128, 512)] * 2 + [(16, 512)] * (4 + 4 * 64 + 1))

    def found(head: LinearPlan | None, ram: float) -> Layout:
        return on_gpu(model, plan, 22, ram, streams, longest=512, compared=True, head=head)

    assert found(head, 30).place == "file"
    assert found(head, 30).ram_bytes > found(None, 30).ram_bytes  # the floats of a whole head, for a moment
    with pytest.raises(InputError, match="--ram"):
        found(head, 15)
    found(None, 15)


SPINNING = """
import atexit
from quantkit.cli import main

@atexit.register
def load():
    import torch

main()
"""


@pytest.mark.parametrize(
    ("said", "spins"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")],
)
def test_threads_that_wait_spin_briefly_and_the_user_has_the_word(said: dict[str, str], spins: str) -> None:
    clean = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    words = [sys.executable, "-c", SPINNING, "--version"]
    environment = clean | said | {"OMP_DISPLAY_ENV": "VERBOSE"}  # the library prints what it has read
    run = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    found = re.search(r"GOMP_SPINCOUNT = '([0-9]+)'", run.stderr)
    if found is None:
        pytest.skip("this torch has another OpenMP runtime than libgomp")
    assert found[1] == spins


@pytest.mark.parametrize("said", [{}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, {"PYTORCH_ALLOC_CONF": ""}])
def test_the_gpus_allocator_is_told_before_torch_is_there_and_the_user_has_the_word(said: dict[str, str]) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.endswith("ALLOC_CONF")}
    words = [sys.executable, "-c", VERSION, "--version"]
    run = subprocess.run(words, env=clean | said, capture_output=True, text=True, check=True)
    torch_is_there, found = json.loads(run.stdout.splitlines()[-1])
    assert not torch_is_there
    assert found == (said or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})
