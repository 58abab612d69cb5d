# SPDX-License-Identifier: Apache-2.0
"""Large matrix products: float32 results, at the speed of 16-bit products where a GPU offers it.

A GPU multiplies bfloat16 an order of magnitude faster than float32, and sums the products in float32. A float32 number
is the sum of two bfloat16 numbers up to 2^-17 of itself, a = a1 + a2, so

    a b ~ a1 b1 + a1 b2 + a2 b1

is one bfloat16 product over three times the terms, and right to about 2^-16: what tf32 (2^-11) is not, at tf32's price
(Henry, Tang, Heinecke, arXiv 1904.06376). A product of numbers that are 16-bit to begin with is exact term by term.

A CPU multiplies in float32. torch does so through MKL, which takes AVX2 where the processor is not Intel's; oneDNN,
which torch also holds, takes what the processor has: with AVX512 that is twice as fast (`LOG.md`). Linears go there; so
do sums of products, with torch 2.9 and later, on processors with bfloat16 but not AMX.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

TERMS_AT_ONCE = 2048  # of the sum in a split product: bounds the memory of the copies
HALVES = 8  # strips of columns in which the upper half of a symmetric product is made: 56% of all the work
NARROWEST_STRIP = 512
NARROWEST_STRIP_CPU = 128
PRODUCT_AT_ONCE = 1 << 24  # of a product in bfloat16 that a CPU makes by itself before it is added


def accumulate_(total: Tensor, left: Tensor, right: Tensor, *, exact: bool = True) -> Tensor:
    """total += left.T @ right, in place.

    total: float32 [m, n]; left: [k, m], right: [k, n], both float32 or of one 16-bit type (right may be `rounded`).
    exact: False lets float32 be rounded to bfloat16 (2^-9), where that is enough, and faster; on a CPU the product too.
    """
    if not fast_16bit(left):
        if exact or not (total.device.type == "cpu" and fast_bfloat16()):
            with _addmm_by_onednn():
                return total.addmm_(left.T.float(), right.float())
        rows = max(1, PRODUCT_AT_ONCE // total.shape[1])
        for part, columns in zip(total.split(rows), left.T.split(rows), strict=True):
            part.add_(_pointwise(columns.bfloat16().contiguous(), right.bfloat16().T, None))
        return total
    for a, b in zip(_pieces(left), _pieces(right), strict=True):
        _accumulate_16bit(total, *_terms(a, b, exact))
    return total


def rounded(x: Tensor) -> Tensor:
    """x as `accumulate_` takes it on a CPU where it need not be exact: for what is multiplied more than once."""
    return x.bfloat16() if x.device.type == "cpu" and fast_bfloat16() else x


def strips(gram: Tensor) -> list[slice]:
    """The rows of a symmetric matrix [in, in] that are made at once, of which only what is right of the diagonal is."""
    narrowest = NARROWEST_STRIP_CPU if gram.device.type == "cpu" else NARROWEST_STRIP
    width = max(narrowest, -(-len(gram) // HALVES))
    return [slice(start, min(start + width, len(gram))) for start in range(0, len(gram), width)]


def accumulate_gram_(gram: Tensor, x: Tensor, rows: Sequence[slice] | None = None) -> Tensor:
    """gram += x.T @ x for x [tokens, in], in place: only the upper triangle, see `mirror_`, and what lies beside it.

    rows: the `strips` to do, if not all
    """
    rows = strips(gram) if rows is None else rows
    if not fast_16bit(x):
        x = x.float()
        with _addmm_by_onednn():
            for strip in rows:
                gram[strip, strip.start :].addmm_(x[:, strip].T, x[:, strip.start :])
        return gram
    for part in _pieces(x):
        left, right = _terms(part, part, exact=True)
        for strip in rows:
            _accumulate_16bit(gram[strip, strip.start :], left[:, strip], right[:, strip.start :])
    return gram


def mirror_(gram: Tensor) -> Tensor:
    """Copy the upper triangle of a square matrix to the lower one, in place."""
    for start in range(0, len(gram), NARROWEST_STRIP):
        stop = min(start + NARROWEST_STRIP, len(gram))
        corner = gram[start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).T)
        gram[stop:, start:stop] = gram[start:stop, stop:].T
    return gram


def product(left: Tensor, right: Tensor, *, exact: bool = True) -> Tensor:
    """left [m, k] @ right [k, n] in float32; see `accumulate_`."""
    if not fast_16bit(left):
        left, right = left.float(), right.float()
        return left @ right if _left_to_blas(left.device.type) else linear(left, right.T)
    total = torch.zeros(left.shape[0], right.shape[1], device=left.device)
    return accumulate_(total, left.T, right, exact=exact)


def batched_product(left: Tensor, right: Tensor) -> Tensor:
    """left [b, m, k] @ right [b, k, n] in float32, of float32 or, where `fast_16bit`, of one 16-bit type."""
    if left.dtype == torch.float32:
        return torch.bmm(left, right)
    result: Tensor = torch.ops.aten.bmm.dtype(left, right, torch.float32)
    return result


def fast_linears(like: Tensor, *, exact: bool = True) -> AbstractContextManager[object]:
    """Within it, float32 linears of a CPU are multiplied by oneDNN, whatever module calls them.

    exact: False lets them be rounded to bfloat16 (2^-9), before and after, where the CPU multiplies those faster
    """
    return nullcontext() if like.device.type != "cpu" else _ByOneDNN(exact)


class _ByOneDNN(TorchFunctionMode):
    def __init__(self, exact: bool) -> None:
        super().__init__()
        self._exact = exact

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.nn.functional.linear and not kwargs:
            return linear(*args, exact=self._exact)
        return func(*args, **(kwargs or {}))


@contextmanager
def _addmm_by_onednn() -> Iterator[None]:
    """Within it, float32 `addmm_` on a CPU is oneDNN's, where that is faster and the result the same.

    torch only asks oneDNN where products in bfloat16 are allowed; oneDNN does what it is allowed with AMX alone.
    """
    if not _onednn_adds():
        yield
        return
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # torch makes it when it is imported
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


@cache
def _onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@cache
def _onednn_adds() -> bool:
    amx: Callable[[], bool] = getattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    return fast_bfloat16() and not amx() and hasattr(torch.backends.mkldnn, "matmul")


@cache
def _left_to_blas(device: str) -> bool:
    """Whether products on this type of device are best left to the BLAS that torch has there."""
    return device == "cpu" and "AVX512" not in torch.backends.cpu.get_cpu_capability()


@cache
def fast_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16."""
    supported: Callable[[], bool] = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return _onednn() and supported()


def linear(left: Tensor, right: Tensor, bias: Tensor | None = None, *, exact: bool = True) -> Tensor:
    """left [..., k] @ right.T + bias for right [n, k]; of float32 on a CPU by oneDNN. exact: see `fast_linears`."""
    plain = left.device.type == "cpu" and left.dtype == right.dtype == torch.float32 and 0 not in left.shape
    if not (plain and _onednn()):
        return torch.nn.functional.linear(left, right, bias)
    if torch.is_grad_enabled() and (left.requires_grad or right.requires_grad):
        result: Tensor = _Differentiable.apply(left, right, exact)  # type: ignore[no-untyped-call]
        return result if bias is None else result + bias
    if not (right.is_contiguous() or right.T.is_contiguous()):  # oneDNN has no kernel for others, only a reference
        right = right.contiguous()
    if not exact and fast_bfloat16():
        half = None if bias is None else bias.bfloat16()
        return _pointwise(left.bfloat16(), right.bfloat16(), half).float()
    return _pointwise(left, right, bias)


class _Differentiable(torch.autograd.Function):
    """`linear` of left and right, and its gradients, without a bias."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, exact: bool) -> Tensor:
        ctx.save_for_backward(left, right)
        ctx.exact = exact
        return linear(left, right, exact=exact)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        left, right = ctx.saved_tensors
        wants_left, wants_right, _ = ctx.needs_input_grad
        to_left = linear(gradient, right.T, exact=ctx.exact) if wants_left else None
        rows = gradient.flatten(0, -2)
        to_right = linear(rows.T, left.flatten(0, -2).T, exact=ctx.exact) if wants_right else None
        return to_left, to_right, None


def _pointwise(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")  # type: ignore[no-any-return]


def fast_16bit(like: Tensor) -> bool:
    """Whether 16-bit products with a float32 result are there, and faster."""
    return like.is_cuda and _float32_of_16bit()


@cache
def _float32_of_16bit() -> bool:
    return hasattr(torch.ops.aten.addmm, "dtype_out")


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    return x.split(TERMS_AT_ONCE) if x.dtype == torch.float32 else (x,)


def _terms(left: Tensor, right: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """The 16-bit matrices whose product left.T @ right is."""
    if left.dtype != torch.float32:
        return left, right
    if not exact:
        return left.bfloat16(), right.bfloat16()
    (a1, a2), (b1, b2) = _split(left), _split(right)
    return torch.cat([a1, a1, a2]), torch.cat([b1, b2, b1])


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    high = x.bfloat16()
    return high, (x - high).bfloat16()


def _accumulate_16bit(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return torch.ops.aten.addmm.dtype_out(total, left.T, right, torch.float32, out=total)  # type: ignore[no-any-return]
