# SPDX-License-Identifier: Apache-2.0
"""The formats: bytes written by hand, round trips, shapes before compute, configs, and what is refused."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.dtypes import dtype_name
from quantkit.errors import ModelError, NumericsError, SchemeError
from quantkit.formats import FORMATS, Format, TensorSpec
from quantkit.formats.bits import pack_bits, unpack_bits, words_for
from quantkit.grids.registry import dequantize
from quantkit.scheme import QuantizedTensor, Scheme

W4 = Scheme(4, 128, symmetric=False)
W4_SYM = Scheme(4, 128, symmetric=True)


def random_tensor(scheme: Scheme, out_features: int, in_features: int, seed: int, min_zero: int = 0) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(seed)
    groups = scheme.groups(in_features)
    codes = torch.randint(0, scheme.max_code + 1, (out_features, in_features), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(min_zero, scheme.max_code + 1, (out_features, groups), generator=generator, dtype=torch.uint8)
    if scheme.symmetric:
        zeros.fill_(scheme.middle)
    scales = torch.randn(out_features, groups, generator=generator).half()  # negative scales are legitimate
    return QuantizedTensor(codes, scales, zeros, scheme)


def assert_same(left: QuantizedTensor, right: QuantizedTensor) -> None:
    assert left.scheme == right.scheme
    for field in ("codes", "scales", "zeros"):
        a, b = getattr(left, field), getattr(right, field)
        assert a.dtype == b.dtype
        assert a.is_contiguous()
        assert torch.equal(a, b), field
    assert (left.g_idx is None) == (right.g_idx is None)
    if left.g_idx is not None and right.g_idx is not None:
        assert torch.equal(left.g_idx, right.g_idx)


def as_bytes(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()


def oracle_words(codes: list[int], bits: int) -> list[int]:
    """One Python integer as the whole bit stream, cut into signed words."""
    stream = sum(code << (bits * i) for i, code in enumerate(codes))
    words = [stream >> (32 * w) & 0xFFFFFFFF for w in range(-(-len(codes) * bits // 32))]
    return [word - 2**32 if word >= 2**31 else word for word in words]


@given(st.integers(1, 8), st.data())
@settings(max_examples=150, deadline=None)
def test_bit_stream_equals_one_big_integer(bits: int, data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 3))
    count = data.draw(st.integers(1, 70))
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=rows * count, max_size=rows * count))
    tensor = torch.tensor(codes, dtype=torch.uint8).view(rows, count)
    words = pack_bits(tensor, bits)
    assert words.dtype == torch.int32
    assert words.shape == (rows, words_for(count, bits))
    assert words.tolist() == [oracle_words(row, bits) for row in tensor.tolist()]
    assert torch.equal(unpack_bits(words, bits, count), tensor)


@pytest.mark.parametrize("bits", range(1, 9))
def test_bits_do_not_need_contiguous_input(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (48, 5), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    words = pack_bits(codes.t(), bits)
    assert torch.equal(words, pack_bits(codes.t().contiguous(), bits))
    assert torch.equal(unpack_bits(words.t().contiguous().t(), bits, 48), codes.t())


@pytest.mark.parametrize(
    "words", [torch.arange(5)[::5], torch.arange(5).view(1, 5).t(), torch.arange(7).view(1, 7)[:, ::7]]
)
def test_bits_do_not_need_plain_strides(words: Tensor) -> None:
    words = words.int()[..., :1]
    strided = torch.empty(words.numel() * 3, dtype=torch.int32)[::3].copy_(words.reshape(-1)).view(words.shape)
    assert unpack_bits(strided, 4, 1).tolist() == words.tolist()


def test_awq_bytes() -> None:
    n = torch.arange(8, dtype=torch.uint8)
    codes = torch.stack([n, 15 - n, n * 0, n * 0 + 15], dim=1)  # [out 8, in 4]: column k is one packed row
    zeros = torch.stack([n * 0 + 8, n], dim=1)
    scales = torch.tensor([[1.0, -2.0]] * 8).half()
    tensors = FORMATS["awq"].pack(QuantizedTensor(codes, scales, zeros, Scheme(4, 2, symmetric=False)))
    # nibbles, lowest first, are columns 0 2 4 6 1 3 5 7: the word of 0..7 reads 0x75316420
    assert as_bytes(tensors["qweight"]) == bytes.fromhex("20643175 DF9BCE8A 00000000 FFFFFFFF")
    assert tensors["qweight"].shape == (4, 1)
    assert as_bytes(tensors["qzeros"]) == bytes.fromhex("88888888 20643175")
    assert tensors["scales"].tolist() == [[1.0] * 8, [-2.0] * 8]


def test_awq_two_words_a_row() -> None:
    codes = torch.arange(16, dtype=torch.uint8).view(16, 1)
    scheme = Scheme(4, -1, symmetric=True)
    quantized = QuantizedTensor(codes, torch.ones(16, 1).half(), torch.full_like(codes, 8), scheme)
    assert as_bytes(FORMATS["awq"].pack(quantized)["qweight"]) == bytes.fromhex("20643175 A8ECB9FD")


@pytest.mark.parametrize(("name", "qzeros"), [("gptq", "10325476 77777777"), ("gptq_v2", "21436587 88888888")])
def test_gptq_4_bit_bytes(name: str, qzeros: str) -> None:
    codes = torch.ones(8, 8, dtype=torch.uint8)
    codes[0] = torch.arange(8)
    codes[1, 0] = 15
    codes[2, 7] = 14
    zeros = torch.stack([torch.arange(1, 9), torch.full((8,), 8)], dim=1).to(torch.uint8)
    quantized = QuantizedTensor(codes, torch.ones(8, 2).half(), zeros, Scheme(4, 4, symmetric=False))
    tensors = FORMATS[name].pack(quantized)
    words = "10325476 1F111111 111111E1" + " 11111111" * 5  # one word a column: its eight inputs, lowest first
    assert as_bytes(tensors["qweight"]) == bytes.fromhex(words)
    assert tensors["qweight"].shape == (1, 8)
    assert as_bytes(tensors["qzeros"]) == bytes.fromhex(qzeros)
    assert tensors["qzeros"].shape == (2, 1)
    assert tensors["g_idx"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(("name", "qzeros"), [("gptq", "DBB66D" * 4), ("gptq_v2", "244992" * 4)])
def test_gptq_3_bit_bytes(name: str, qzeros: str) -> None:
    codes = torch.arange(32, dtype=torch.uint8).remainder(8).repeat(32, 1)  # every row counts 0..7 four times
    quantized = QuantizedTensor(
        codes, torch.ones(32, 1).half(), torch.full((32, 1), 4, dtype=torch.uint8), Scheme(3, 32, symmetric=True)
    )
    tensors = FORMATS[name].pack(quantized)
    # 0..7 in 24 bits is octal 76543210 = 0xFAC688; 32 codes are 3 words, and codes 10 and 21 straddle them
    column = tensors["qweight"].t()[5].contiguous()
    assert as_bytes(column) == bytes.fromhex("88C6FA88 C6FA88C6 FA88C6FA")
    assert tensors["qweight"].shape == (3, 32)
    # v1 stores 3 everywhere (octal 33333333 = 0x6DB6DB), v2 stores 4 (octal 44444444 = 0x924924)
    assert as_bytes(tensors["qzeros"]) == bytes.fromhex(qzeros)


def test_gptq_2_and_8_bit_bytes() -> None:
    two = QuantizedTensor(
        torch.arange(16, dtype=torch.uint8).remainder(4).repeat(16, 1),
        torch.ones(16, 1).half(),
        torch.full((16, 1), 2, dtype=torch.uint8),
        Scheme(2, 16, symmetric=True),
    )
    assert as_bytes(FORMATS["gptq"].pack(two)["qweight"][:, 0].contiguous()) == bytes.fromhex("E4E4E4E4")
    assert as_bytes(FORMATS["gptq"].pack(two)["qzeros"]) == bytes.fromhex("55555555")
    eight = QuantizedTensor(
        torch.tensor([[1, 2, 3, 255]] * 4, dtype=torch.uint8),
        torch.ones(4, 1).half(),
        torch.full((4, 1), 128, dtype=torch.uint8),
        Scheme(8, -1, symmetric=True),
    )
    assert as_bytes(FORMATS["gptq_v2"].pack(eight)["qweight"][:, 0].contiguous()) == bytes.fromhex("010203FF")
    assert as_bytes(FORMATS["gptq_v2"].pack(eight)["qzeros"]) == bytes.fromhex("80808080")
    assert as_bytes(FORMATS["gptq"].pack(eight)["qzeros"]) == bytes.fromhex("7F7F7F7F")


def test_compressed_tensors_bytes() -> None:
    codes = torch.arange(16, dtype=torch.uint8).view(2, 8)
    zeros = torch.tensor([[1, 2], [15, 8]], dtype=torch.uint8)
    scales = torch.tensor([[0.5, 1.0], [1.5, -2.0]]).half()
    tensors = FORMATS["compressed-tensors"].pack(QuantizedTensor(codes, scales, zeros, Scheme(4, 4, symmetric=False)))
    assert as_bytes(tensors["weight_packed"]) == bytes.fromhex("10325476 98BADCFE")
    assert as_bytes(tensors["weight_zero_point"]) == bytes.fromhex("F1000000 82000000")  # packed down the two rows
    assert tensors["weight_zero_point"].shape == (1, 2)
    assert as_bytes(tensors["weight_scale"]) == bytes.fromhex("0038 003C 003E 00C0")
    assert tensors["weight_shape"].tolist() == [2, 8]


def test_compressed_tensors_3_bit_is_dense_and_rounds_the_words_up() -> None:
    codes = torch.arange(12, dtype=torch.uint8).remainder(8).view(1, 12)  # 36 bits: two words
    scheme = Scheme(3, 4, symmetric=True)
    quantized = QuantizedTensor(codes, torch.ones(1, 3).half(), torch.full((1, 3), 4, dtype=torch.uint8), scheme)
    tensors = FORMATS["compressed-tensors"].pack(quantized)
    assert set(tensors) == {"weight_packed", "weight_scale", "weight_shape"}
    assert as_bytes(tensors["weight_packed"]) == bytes.fromhex("88C6FA88 06000000")  # octal 3210 = 0x688 on top


@st.composite
def held(draw: st.DrawFn) -> tuple[Format, QuantizedTensor]:
    item = FORMATS[draw(st.sampled_from(sorted(set(FORMATS) - {"gguf"})))]
    bits = draw(st.sampled_from({"awq": [4], "compressed-tensors": list(range(2, 9))}.get(item.name, [2, 3, 4, 8])))
    step_out = {"awq": 8, "compressed-tensors": 1}.get(item.name, 32)
    step_in = 1 if item.name in ("awq", "compressed-tensors") else 32
    group = draw(st.sampled_from([1, 2, 3, 8, 32]))
    in_features = draw(st.integers(1, 4)) * group * step_in
    scheme = Scheme(bits, draw(st.sampled_from([group, -1, in_features])), draw(st.booleans()))
    out_features = draw(st.integers(1, 5)) * step_out
    seed = draw(st.integers(0, 2**31))
    return item, random_tensor(scheme, out_features, in_features, seed, item.min_zero(scheme))


@given(held())
@settings(max_examples=200, deadline=None)
def test_round_trip_and_specs(case: tuple[Format, QuantizedTensor]) -> None:
    item, quantized = case
    out_features, in_features = quantized.codes.shape
    assert item.why_not(quantized.scheme, out_features, in_features) is None
    tensors = item.pack(quantized)
    assert {
        key: TensorSpec(dtype_name(value.dtype), tuple(value.shape)) for key, value in tensors.items()
    } == item.specs(quantized.scheme, out_features, in_features)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    again = item.unpack({**tensors, "bias": torch.zeros(1)}, quantized.scheme, (out_features, in_features))
    assert_same(again, quantized)
    assert torch.equal(dequantize(again), dequantize(quantized))


def test_specs_count_bytes() -> None:
    sizes = {key: spec.nbytes for key, spec in FORMATS["gptq"].specs(W4, 256, 512).items()}
    assert sizes == {"qweight": 256 * 512 // 2, "qzeros": 4 * 256 // 2, "scales": 4 * 256 * 2, "g_idx": 512 * 4}


@pytest.mark.parametrize("name", ["gptq", "gptq_v2"])
def test_gptq_keeps_a_group_index(name: str) -> None:
    scheme = Scheme(4, 8, symmetric=True)
    plain = random_tensor(scheme, 8, 16, seed=1)
    g_idx = torch.tensor([0, 1] * 8, dtype=torch.int32)
    quantized = QuantizedTensor(plain.codes, plain.scales, plain.zeros, scheme, g_idx)
    tensors = FORMATS[name].pack(quantized)
    assert tensors["g_idx"].tolist() == g_idx.tolist()
    assert_same(FORMATS[name].unpack(tensors, scheme, (8, 16)), quantized)


def test_gptq_v1_wrapped_zero_point_is_read_as_0() -> None:
    scheme = Scheme(4, 8, symmetric=False)
    tensors = FORMATS["gptq"].pack(random_tensor(scheme, 8, 8, seed=2, min_zero=1))
    tensors["qzeros"] = torch.full_like(tensors["qzeros"], -1)  # AutoGPTQ wrote 0 - 1 as 15
    assert not FORMATS["gptq"].unpack(tensors, scheme, (8, 8)).zeros.any()


def test_scales_of_other_float_types_become_float16() -> None:
    scheme = Scheme(4, 8, symmetric=True)
    item = FORMATS["compressed-tensors"]
    quantized = random_tensor(scheme, 8, 8, seed=3)
    tensors = item.pack(quantized)
    tensors["weight_scale"] = tensors["weight_scale"].float()
    assert_same(item.unpack(tensors, scheme, (8, 8)), quantized)
    tensors["weight_scale"] = torch.full((8, 1), 1e6)
    with pytest.raises(NumericsError, match="weight_scale"):
        item.unpack(tensors, scheme, (8, 8))


@pytest.mark.parametrize(
    ("name", "scheme", "shape", "said"),
    [
        ("awq", Scheme(3, 32, symmetric=True), (32, 32), "awq holds 4 bits only, got 3; compressed-tensors"),
        ("awq", Scheme(4, 32, symmetric=True), (36, 32), "out_features divisible by 8, got 36; compressed-tensors"),
        ("awq", Scheme(4, 64, symmetric=True), (32, 96), "96 is not divisible by group_size 64; use 32"),
        ("gptq", Scheme(5, 32, symmetric=True), (32, 32), "got 5; compressed-tensors"),
        ("gptq_v2", Scheme(4, 4, symmetric=True), (8, 12), "in_features divisible by 8, got 12; compressed-tensors"),
        ("gptq", Scheme(4, 4, symmetric=True), (12, 8), "out_features divisible by 8, got 12; compressed-tensors"),
        ("gptq", Scheme(3, 8, symmetric=True), (32, 40), "in_features divisible by 32, got 40; compressed-tensors"),
        ("gptq", Scheme(4, 64, symmetric=True), (32, 96), "96 is not divisible by group_size 64; use 32"),
        ("compressed-tensors", Scheme(4, 64, symmetric=True), (32, 96), "96 is not divisible by group_size 64; use 32"),
    ],
)
def test_refusals_name_what_and_where_else(name: str, scheme: Scheme, shape: tuple[int, int], said: str) -> None:
    item = FORMATS[name]
    reason = item.why_not(scheme, *shape)
    assert reason is not None
    assert said in reason
    assert "\n" not in reason
    with pytest.raises(SchemeError, match=re.escape(said)):
        item.specs(scheme, *shape)
    groups = max(1, shape[1] // scheme.group_size)
    zeros = torch.full((shape[0], groups), scheme.middle, dtype=torch.uint8)
    quantized = QuantizedTensor(torch.zeros(shape, dtype=torch.uint8), torch.ones(zeros.shape).half(), zeros, scheme)
    with pytest.raises(SchemeError, match=re.escape(said)):
        item.pack(quantized)


def test_gptq_v1_refuses_a_zero_point_of_0() -> None:
    scheme = Scheme(4, 8, symmetric=False)
    quantized = random_tensor(scheme, 8, 8, seed=4, min_zero=1)
    quantized.zeros[3, 0] = 0
    with pytest.raises(SchemeError, match=r"zero point of 0.*gptq_v2"):
        FORMATS["gptq"].pack(quantized)
    assert_same(FORMATS["gptq_v2"].unpack(FORMATS["gptq_v2"].pack(quantized), scheme, (8, 8)), quantized)


def test_min_zero_is_1_only_for_asymmetric_gptq_v1() -> None:
    ones = {(name, s.symmetric) for name, item in FORMATS.items() for s in (W4, W4_SYM) if item.min_zero(s)}
    assert ones == {("gptq", False)}
    assert FORMATS["gptq"].min_zero(W4) == 1


@pytest.mark.parametrize("name", ["awq", "compressed-tensors"])
def test_a_group_index_is_refused_elsewhere(name: str) -> None:
    plain = random_tensor(Scheme(4, 8, symmetric=True), 8, 16, seed=5)
    g_idx = torch.tensor([0, 1] * 8, dtype=torch.int32)
    with pytest.raises(SchemeError, match="gptq holds it"):
        FORMATS[name].pack(QuantizedTensor(plain.codes, plain.scales, plain.zeros, plain.scheme, g_idx))


def test_unpack_checks_what_it_is_given() -> None:
    scheme = Scheme(4, 8, symmetric=True)
    quantized = random_tensor(scheme, 8, 16, seed=6)
    tensors = FORMATS["gptq"].pack(quantized)

    def unpack(**changed: Tensor) -> QuantizedTensor:
        return FORMATS["gptq"].unpack({**tensors, **changed}, scheme, (8, 16))

    with pytest.raises(ModelError, match=r"qweight: expected int32 \[2, 8\], got int32 \[3, 8\]"):
        unpack(qweight=torch.zeros(3, 8, dtype=torch.int32))
    with pytest.raises(ModelError, match="g_idx: expected groups 0 to 1, got 0 to 2"):
        unpack(g_idx=torch.tensor([0] * 15 + [2], dtype=torch.int32))
    with pytest.raises(ModelError, match=r"g_idx: expected int32"):
        unpack(g_idx=tensors["g_idx"].long())
    with pytest.raises(ModelError, match="scales: missing; found qweight"):
        FORMATS["awq"].unpack({"qweight": torch.zeros(16, 1).int(), "qzeros": torch.zeros(2, 1).int()}, scheme, (8, 16))
    with pytest.raises(ModelError, match="expected 8 everywhere in a symmetric scheme, got 7 to 7"):
        FORMATS["gptq_v2"].unpack(tensors, scheme, (8, 16))  # v1 zero points under the name of v2

    ct = FORMATS["compressed-tensors"]
    packed = ct.pack(quantized)
    with pytest.raises(ModelError, match=r"weight_shape: expected \[8, 16\], got \[8, 15\]"):
        ct.unpack({**packed, "weight_shape": torch.tensor([8, 15])}, scheme, (8, 16))
    with pytest.raises(SchemeError, match="weight_g_idx"):
        ct.unpack({**packed, "weight_g_idx": tensors["g_idx"]}, scheme, (8, 16))
