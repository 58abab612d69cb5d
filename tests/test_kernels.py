# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels against the PyTorch functions that they stand for, in Triton's interpreter where there is no GPU.

Sums are taken in another order, so values may differ in the last bits (relative 1e-5), and a value that close to a tie
may be rounded to the other side, which moves the columns after it: at most 1% of the codes may differ by one.
"""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quantkit import kernels
from quantkit.grids import integer
from quantkit.grids.base import to_float16
from quantkit.grids.registry import dequantize
from quantkit.methods import awq, columns
from quantkit.scheme import QuantizedTensor, Scheme
from tests.integer_parameters import encode, lattice

triton = pytest.importorskip("triton")
compiler = pytest.importorskip("triton.compiler")
GPUTarget = pytest.importorskip("triton.backends.compiler").GPUTarget
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_kernels = pytest.mark.skipif(
    not INTERPRETED and DEVICE == "cpu", reason="runs on a GPU, and through test_in_the_interpreter"
)


@pytest.mark.skipif(INTERPRETED, reason="is the one that runs the others")
def test_in_the_interpreter() -> None:
    """TRITON_INTERPRET must be set before Triton is imported: these tests run once more in another process."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "pytest", "-n0", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [75, 80, 90])
@pytest.mark.parametrize(
    ("name", "constants"),
    [
        ("_round_block", {"WIDTH": 32, "HEIGHT": 32, "PRECISION": "tf32x3"}),
        ("_improve_group", {"WIDTH": 32, "HEIGHT": 32, "PRECISION": "ieee"}),
        ("_search", {"SYMMETRIC": True, "WIDTH": 128, "HEIGHT": 16}),
        ("_search", {"SYMMETRIC": False, "WIDTH": 128, "HEIGHT": 16}),
        ("_scaled_differences", {"SYMMETRIC": False, "WIDTH": 128, "HEIGHT": 16}),
    ],
    ids=str,
)
def test_a_kernel_compiles_for_a_gpu_that_is_not_here(
    name: str, constants: dict[str, int | str], capability: int
) -> None:
    """The interpreter takes what the compiler refuses."""
    kernel = getattr(kernels, name)
    numbers = dict.fromkeys(("rows", "columns", "stride", "out", "groups"), "i32")
    numbers |= dict.fromkeys(("max_code", "middle", "min_zero"), "fp32")
    numbers["group"] = "*i64"
    signature = {x: "constexpr" if x in constants else numbers.get(x, "*fp32") for x in kernel.arg_names}
    source = compiler.ASTSource(kernel, signature, {(kernel.arg_names.index(x),): v for x, v in constants.items()})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": True})
    assert compiled.asm["ptx"]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def block_inputs(
    rows: int, width: int, groups: int, bits: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """target, base, scales, zeros, group, feedback of a random block; groups in mixed order, scales of both signs."""
    generator = torch.Generator().manual_seed(seed)
    base = random(width, rows, seed=seed)
    scales = (0.05 + 0.2 * random(groups, rows, seed=seed + 1).abs()) * random(groups, rows, seed=seed + 2).sign()
    zeros = torch.randint(0, 1 << bits, (groups, rows), generator=generator).float().to(DEVICE)
    group = torch.randint(0, groups, (width,), generator=generator).to(DEVICE)
    return base + 0.1 * random(width, rows, seed=3), base, scales, zeros, group, 0.3 * random(width, width, seed=4)


@needs_kernels
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("rows", "width", "groups"), [(1, 1, 1), (5, 7, 2), (16, 128, 1), (33, 128, 3), (17, 100, 4)])
def test_a_block_is_rounded_as_by_torch(rows: int, width: int, groups: int, bits: int) -> None:
    inputs, copies = (block_inputs(rows, width, groups, bits) for _ in range(2))
    max_code = (1 << bits) - 1
    steps, errors, expected_steps, expected_errors = (torch.empty(width, rows, device=DEVICE) for _ in range(4))
    target, base, scales, zeros, group, feedback = copies
    expected = expected_steps, expected_errors
    columns.round_block_by_torch(target, base, lattice(scales, zeros, max_code), group, feedback, expected)
    target, base, scales, zeros, group, feedback = inputs
    kernels.round_block(target, base, (scales, zeros, max_code), group, feedback, (steps, errors))
    assert all(torch.equal(a, b) for a, b in zip(inputs[1:], copies[1:], strict=True))  # the target is overwritten
    same = steps == expected_steps
    assert float((~same).double().mean()) <= 0.01
    torch.testing.assert_close(errors[same], expected_errors[same], rtol=1e-5, atol=1e-5)
    zero = inputs[3][inputs[4]]
    assert bool(((steps + zero >= 0) & (steps + zero <= max_code)).all())
    assert torch.equal(steps, steps.round())


@needs_kernels
def test_ties_go_to_even_and_far_values_to_the_ends() -> None:
    target = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 1e30, -1e30, 7.49999]], device=DEVICE)
    scales, zeros = torch.ones(1, 8, device=DEVICE), torch.full((1, 8), 8.0, device=DEVICE)
    group, feedback = torch.zeros(1, dtype=torch.int64, device=DEVICE), torch.zeros(1, 1, device=DEVICE)
    steps, errors = torch.empty_like(target), torch.empty_like(target)
    kernels.round_block(target, target.clone(), (scales, zeros, 15), group, feedback, (steps, errors))
    assert steps.tolist() == [[0, 2, 2, 0, -2, 7, -8, 7]]


@needs_kernels
@pytest.mark.parametrize("min_zero", [0, 1])
@pytest.mark.parametrize("scheme", [Scheme(b, g, s) for b in (2, 4) for g in (8, 24) for s in (True, False)], ids=str)
def test_the_grid_search_is_as_good_as_by_torch(scheme: Scheme, min_zero: int) -> None:
    """A candidate that is better by less than rounding may be missed: errors agree to 1e-4, most grids are equal."""
    weight, energy = random(9, 48, seed=5) * random(9, 1, seed=6).exp(), random(48, seed=7).exp()
    weight[0, :8] = 0
    importance = energy.view(1, -1, scheme.group_size)
    grouped = weight.unflatten(1, (-1, scheme.group_size)).contiguous()
    found = kernels.search(grouped, importance, scheme, min_zero)
    expected = integer.search_by_torch(grouped, importance, scheme, min_zero)

    def error(scale: Tensor, zero: Tensor) -> Tensor:
        scales, zeros = to_float16(scale), zero.to(torch.uint8)
        rounded = dequantize(QuantizedTensor(encode(weight, scales, zeros, scheme), scales, zeros, scheme))
        errors: Tensor = ((rounded - weight).square() * energy).unflatten(1, (-1, scheme.group_size)).sum(2)
        return errors

    torch.testing.assert_close(error(*found), error(*expected), rtol=1e-4, atol=1e-6)
    assert float((found[1] != expected[1]).double().mean()) <= 0.05


@needs_kernels
@pytest.mark.parametrize("min_zero", [0, 1])
@pytest.mark.parametrize(
    "scheme", [Scheme(b, g, s) for b in (2, 4) for g in (8, 24, -1) for s in (True, False)], ids=str
)
def test_scaled_weights_are_rounded_as_by_torch(scheme: Scheme, min_zero: int) -> None:
    weight = random(21, 48, seed=5) * random(21, 1, seed=6).exp()
    weight[0, :8] = 0
    scales = random(3, 48, seed=7).exp()
    found = kernels.scaled_differences(weight, scales, scheme, min_zero, torch.float32)
    expected = awq.scaled_differences_by_torch(weight, scales, scheme, min_zero)
    far = (found - expected).abs() > 1e-5 * (weight.abs() + expected.abs())
    assert float(far.double().mean()) <= 0.01  # a tie, or a zero point at one
    rough = kernels.scaled_differences(weight.bfloat16(), scales, scheme, min_zero)
    assert rough.dtype == torch.bfloat16
    again = awq.scaled_differences_by_torch(weight.bfloat16(), scales, scheme, min_zero)
    torch.testing.assert_close(rough.float().square().sum(2), again.square().sum(2), rtol=0.02, atol=1e-6)


@needs_kernels
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("columns_", "rows"), [(1, 1), (7, 33), (100, 40), (128, 40)])
def test_a_group_is_improved_as_by_torch(columns_: int, rows: int, bits: int) -> None:
    generator, max_code = torch.Generator().manual_seed(9), (1 << bits) - 1
    zero = torch.randint(0, 1 << bits, (rows,), generator=generator).float().to(DEVICE)
    x = torch.randint(0, 1 << bits, (columns_, rows), generator=generator).float().to(DEVICE) - zero
    inputs = random(4 * columns_, columns_, seed=1)
    hessian = inputs.T @ inputs
    energy = hessian.diagonal().contiguous()
    feedback = hessian / energy.unsqueeze(1)
    scale = (0.05 + 0.2 * random(rows, seed=4).abs()) * random(rows, seed=5).sign()
    pull, bend = hessian @ (0.1 * random(columns_, rows, seed=2)), hessian @ x
    pull[:, 1:2] = 1e9  # a scale beyond float16
    before = x * scale

    def by_kernel(codes: Tensor, size: Tensor, errors: Tensor) -> None:
        grid = size, zero, max_code
        kernels.improve_group(codes, pull.clone(), bend.clone(), (energy, feedback), grid, errors)

    def by_torch(codes: Tensor, size: Tensor, errors: Tensor) -> None:
        grid = lattice(size.unsqueeze(0), zero.unsqueeze(0), max_code)
        columns.improve_group_by_torch(codes, pull.clone(), bend.clone(), (energy, feedback), grid, errors)

    def improved(by: Callable[[Tensor, Tensor, Tensor], None]) -> tuple[Tensor, Tensor, Tensor]:
        codes, size, errors = x.clone(), scale.clone(), torch.empty_like(x)
        by(codes, size, errors)
        return codes, size, errors

    codes, size, errors = improved(by_kernel)
    expected = improved(by_torch)
    torch.testing.assert_close(errors, before - codes * size, rtol=1e-4, atol=1e-5 * float(before.abs().max()))
    torch.testing.assert_close(size, expected[1], rtol=2e-3, atol=0)  # to the next float16
    assert float((codes != expected[0]).double().mean()) <= 0.02
    assert bool(((codes + zero >= 0) & (codes + zero <= max_code)).all())
