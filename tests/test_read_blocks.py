# SPDX-License-Identifier: Apache-2.0
"""Blocks of types that are only read: the values of the `gguf` package, on random bytes and on its own rounding."""

import pytest
import torch

from quantkit.formats.blocks import dequantize_blocks
from quantkit.formats.gguf import READ_TYPES
from quantkit.formats.read_blocks import DEQUANTIZE
from tests.gguf_models import by_the_package


def test_every_type_has_its_function() -> None:
    assert DEQUANTIZE.keys() == READ_TYPES.keys()


@pytest.mark.parametrize("name", READ_TYPES)
@pytest.mark.parametrize("seed", range(3))
def test_values_are_those_of_the_package(name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    blocks = 512 if name == "bf16" else 3
    raw = torch.randint(0, 256, (5, blocks * READ_TYPES[name].nbytes), generator=generator, dtype=torch.uint8)
    values, expected = dequantize_blocks(raw, name), by_the_package(raw, name)
    assert values.shape == (5, blocks * READ_TYPES[name].columns)
    assert torch.equal(values.nan_to_num(7), expected.nan_to_num(7))
