# SPDX-License-Identifier: Apache-2.0
"""The numbers that weights with scales beside them stand for: pure functions on what is stored.

FP8 (E4M3 or E5M2, OCP OFP8): w = q * scale, with one scale for the tensor, for each row, or for each block of 128 x 128
(DeepSeek-V3, arXiv 2412.19437, section 3.3; Qwen's FP8 releases).

MXFP4 (OCP Microscaling 1.0): two E2M1 numbers in a byte, the lower half first, and one power of two for 32 of them,
stored as its exponent + 127. gpt-oss has its experts so.
"""

import torch
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def dequantize_rows(weight: Tensor, scales: Tensor, begin: int, rows: int, block: tuple[int, int]) -> Tensor:
    """Rows of FP8 matrices that lie one after the other, as float32 [n, columns].

    weight: [n, columns], of which the first is row `begin` of all; scales: of all of them, [matrices or 1, counts of
    rows, counts of columns]; rows: of each matrix; block: rows and columns that share a scale
    """
    matrices, per_matrix, per_row = scales.shape
    index = torch.arange(begin, begin + len(weight), device=weight.device)
    place = (index // rows * per_matrix if matrices > 1 else 0) + (index % rows) // block[0]
    factors = powers(scales) if scales.dtype == torch.uint8 else scales.float()
    factors = factors.flatten(0, 1)[place]  # [n, counts of columns]
    if per_row > 1:
        factors = factors.repeat_interleave(block[1], 1)[:, : weight.shape[1]]
    return weight.float().mul_(factors)


def dequantize_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """uint8 [..., out, groups, 16] and uint8 [..., out, groups] -> float32 [..., groups * 32, out]."""
    halves = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2)  # [..., out, groups, 32]
    table = torch.tensor([*E2M1, *(-value for value in E2M1)], device=blocks.device)
    values = table[halves.int()].mul_(powers(scales).unsqueeze(-1))
    return values.flatten(-2).transpose(-1, -2).contiguous()


def powers(exponents: Tensor) -> Tensor:
    """E8M0 as uint8: 2 to the power of the byte less 127."""
    return torch.ldexp(torch.ones(exponents.shape, device=exponents.device), exponents.int() - 127)
