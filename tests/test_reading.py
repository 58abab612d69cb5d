# SPDX-License-Identifier: Apache-2.0
"""Configs as the tools write them, held against the files; and layouts that only other tools write."""

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantkit.dtypes import dtype_name
from quantkit.errors import ModelError
from quantkit.formats import FORMATS, QuantizedLayer, TensorSpec
from quantkit.formats.reading import read_schemes, unpack
from quantkit.grids.registry import dequantize
from quantkit.model.family import FUSED
from quantkit.scheme import QuantizedTensor, Scheme

SHAPE = (64, 128)
NAMES = [f"model.layers.{i}.{n}" for i in (0, 1, 11) for n in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")]
W4, W8 = Scheme(4, 32, True), Scheme(8, 64, True)


def stored(fmt: str, schemes: dict[str, Scheme | None]) -> dict[str, TensorSpec]:
    """The headers of a checkpoint whose linears are these."""
    tensors: dict[str, TensorSpec] = {}
    for name, scheme in schemes.items():
        specs = FORMATS[fmt].specs(scheme, *SHAPE) if scheme else {"weight": TensorSpec("float16", SHAPE)}
        tensors |= {f"{name}.{key}": spec for key, spec in specs.items()}
    return tensors


def read(config: dict[str, Any], tensors: dict[str, TensorSpec], names: list[str] = NAMES) -> Any:
    fmt, schemes = read_schemes(config, dict.fromkeys(names, SHAPE), tensors)
    return fmt.name, schemes


@pytest.mark.parametrize(
    ("fmt", "changes"),
    [
        ("awq", {}),
        ("awq", {NAMES[1]: None}),
        ("gptq", {}),
        ("gptq", {NAMES[2]: W8, NAMES[4]: None, NAMES[8]: Scheme(4, -1, True)}),
        ("gptq_v2", {NAMES[5]: Scheme(3, 32, False)}),
        ("compressed-tensors", {}),
        ("compressed-tensors", {NAMES[2]: W8, NAMES[4]: None, NAMES[8]: Scheme(3, -1, False)}),
    ],
)
def test_our_own_configs_are_read_back(fmt: str, changes: dict[str, Scheme | None]) -> None:
    base = Scheme(4, 32, False) if fmt == "awq" else W4
    schemes = dict.fromkeys(NAMES, base) | changes
    quantized = [QuantizedLayer(name, scheme) for name, scheme in schemes.items() if scheme]
    config = FORMATS[fmt].config(quantized, [*(n for n, s in schemes.items() if s is None), "lm_head"], FUSED)
    assert read(config, stored(fmt, schemes)) == (fmt, schemes)


AUTOAWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
AUTOGPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": True, "damp_percent": 0.1}
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False}


def ct(groups: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    groups = groups or {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}}
    head = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"]}
    return head | {"config_groups": groups} | more


def test_autoawq_leaves_the_16_bit_layers_to_the_files() -> None:
    schemes = dict.fromkeys(NAMES, Scheme(4, 32, False)) | {NAMES[0]: None}
    found = stored("awq", schemes)
    for listed in (None, ["q_proj"], ["model.layers.0", "lm_head"], [NAMES[0]]):
        assert read(AUTOAWQ | {"modules_to_not_convert": listed}, found) == ("awq", schemes)
    older = {"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}
    assert read(older, found) == ("awq", schemes)


def test_a_gptq_config_without_a_checkpoint_format_is_v1() -> None:
    found = stored("gptq", dict.fromkeys(NAMES, W4))
    assert read(AUTOGPTQ, found)[0] == "gptq"
    assert read(AUTOGPTQ | {"format": "gptq_v2"}, found)[0] == "gptq_v2"
    assert read(AUTOGPTQ | {"checkpoint_format": "gptq_v2", "format": "gptq"}, found)[0] == "gptq_v2"


def test_dynamic_takes_the_first_rule_that_matches_from_the_start_of_the_name() -> None:
    dynamic = {
        r"-:.*\.layers\.1\..*": {},
        r"+:.*\.down_proj": {"bits": 8, "group_size": 64},
        r".*\.layers\.11\..*": {"group_size": -1},
        r"down_proj": {"bits": 2},  # matches nothing: not at the start
    }
    expected: dict[str, Scheme | None] = {}
    for name in NAMES:
        layer, kind = name.split(".")[2], name.rpartition(".")[2]
        scheme = W8 if kind == "down_proj" else Scheme(4, -1, True) if layer == "11" else W4
        expected[name] = None if layer == "1" else scheme
    assert read(AUTOGPTQ | {"dynamic": dynamic}, stored("gptq", expected)) == ("gptq", expected)


@given(
    ignore=st.lists(st.sampled_from([*NAMES, "re:.*q_proj", "re:.*layers\\.1\\b.*", "q_proj"]), max_size=2),
    targets=st.permutations([NAMES[0], "re:.*o_proj$", "re:.*layers.1.*", "Linear", NAMES[8]]),
    cut=st.integers(1, 5),
)
def test_targets_are_matched_as_the_library_matches_them(ignore: list[str], targets: list[str], cut: int) -> None:
    library = pytest.importorskip("compressed_tensors.utils.match")
    bits = {target: 2 + index for index, target in enumerate(targets[:cut])}
    groups = {f"group_{b}": {"targets": [t], "weights": WEIGHTS | {"num_bits": b}} for t, b in bits.items()}
    linear = torch.nn.Linear(1, 1)
    expected: dict[str, Scheme | None] = {}
    for name in NAMES:
        matched = library.match_targets(name, linear, bits)
        skipped = not library.is_match(name, linear, bits, ignore)
        expected[name] = None if skipped else Scheme(bits[matched[0]], 32, True)
    found = read(ct(groups, ignore=ignore), stored("compressed-tensors", expected))
    assert found == ("compressed-tensors", expected)


def test_strategies_and_formats_of_llm_compressor() -> None:
    def one(weights: dict[str, Any], scheme: Scheme, **more: Any) -> None:
        config = ct({"group_0": {"targets": ["Linear"], "weights": weights} | more.pop("group", {})}, **more)
        schemes: dict[str, Scheme | None] = dict.fromkeys(NAMES, scheme)
        assert read(config, stored("compressed-tensors", schemes)) == ("compressed-tensors", schemes)

    one(WEIGHTS | {"strategy": "channel", "group_size": None}, Scheme(4, -1, True))
    one({"num_bits": 4, "group_size": -1}, Scheme(4, -1, True))
    one({"num_bits": 4, "group_size": 64, "symmetric": False}, Scheme(4, 64, False))
    one(WEIGHTS | {"actorder": "static", "observer": "mse"}, W4)
    one(WEIGHTS, W4, format="mixed-precision", group={"format": "pack-quantized"})


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({}, "quant_method"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": ["awq"]}, "quant_method"),
        (AUTOAWQ | {"version": "gemv"}, "gemv"),
        (AUTOAWQ | {"backend": "llm-awq"}, "llm-awq"),
        (AUTOAWQ | {"bits": 3}, "4 bits only"),
        (AUTOAWQ | {"bits": "4"}, "whole number"),
        (AUTOAWQ | {"bits": 16}, "bits"),
        (AUTOAWQ | {"modules_to_not_convert": "lm_head"}, "modules_to_not_convert"),
        (AUTOGPTQ | {"checkpoint_format": "marlin"}, "marlin"),
        (AUTOGPTQ | {"is_marlin_format": True}, "marlin"),
        (AUTOGPTQ | {"dynamic": {"-:(": {}}}, "regular expression"),
        (AUTOGPTQ | {"group_size": 128}, "does config.json belong"),
        (AUTOGPTQ | {"group_size": 48}, "group_size 48"),
        (ct(format="float-quantized"), "float-quantized"),
        (ct(format="int-quantized"), "int-quantized"),
        (ct(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
        (ct(transform_config={"config_groups": {"R1": {}}}), "transform_config"),
        (ct(sparsity_config={"format": "sparse-24-bitmask"}), "sparse"),
        (ct({"g": {"targets": ["Linear"], "weights": WEIGHTS | {"type": "float"}}}), "float"),
        (ct({"g": {"targets": ["Linear"], "weights": WEIGHTS | {"actorder": "group"}}}), "actorder"),
        (ct({"g": {"targets": ["Linear"], "weights": WEIGHTS | {"strategy": "block"}}}), "block"),
        (ct({"g": {"targets": ["Linear"], "weights": WEIGHTS | {"group_size": None, "strategy": None}}}), "tensor"),
        (ct({"g": {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": {"num_bits": 8}}}), "activations"),
        (ct({"g": "Linear"}), "config_groups.g"),
        (ct(config_groups=["Linear"]), "config_groups"),
    ],
)
def test_what_is_not_supported_is_told_in_one_line(config: dict[str, Any], told: str) -> None:
    method = config.get("quant_method")
    fmt = method if isinstance(method, str) and method in FORMATS else "awq"
    tensors = stored(fmt, dict.fromkeys(NAMES, Scheme(4, 32, False) if fmt == "awq" else W4))
    with pytest.raises(ModelError, match=re.escape(told)) as caught:
        read(config, tensors)
    assert "\n" not in str(caught.value)


def test_files_that_contradict_the_config_are_refused() -> None:
    whole = stored("compressed-tensors", dict.fromkeys(NAMES, W4))
    plain = {f"{NAMES[3]}.weight": TensorSpec("bfloat16", SHAPE)}
    without = {name: spec for name, spec in whole.items() if not name.startswith(f"{NAMES[3]}.")}
    for tensors, config, told in (
        (without, ct(), "neither weight nor"),
        (whole | plain, ct(), "both weight and weight_packed"),
        (without | plain, ct(), "should be in ignore"),
        (whole, ct(ignore=[NAMES[3]]), "readers differ"),
        (whole | {f"{NAMES[3]}.weight_g_idx": TensorSpec("int32", (128,))}, ct(), "act-order"),
        ({n: s for n, s in whole.items() if n != f"{NAMES[3]}.weight_scale"}, ct(), "weight_scale is missing"),
    ):
        with pytest.raises(ModelError, match=told) as caught:
            read(config, tensors)
        assert NAMES[3] in str(caught.value)


def quantized(scheme: Scheme, out_features: int, in_features: int) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(0)
    groups = scheme.groups(in_features)

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(0, scheme.max_code + 1, shape, generator=generator).to(torch.uint8)

    zeros = codes(out_features, groups)
    zeros = torch.full_like(zeros, scheme.middle) if scheme.symmetric else zeros.clamp(min=1)
    scales = torch.rand(out_features, groups, generator=generator).half() * 0.01 + 1e-4
    return QuantizedTensor(codes(out_features, in_features), scales, zeros, scheme)


def padded(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """compressed-tensors before 0.20, code by code: 32 // bits codes in a word, the rest of it zero."""
    per = 32 // bits
    rows = []
    for row in codes.tolist():
        words = [sum(code << bits * i for i, code in enumerate(row[k : k + per])) for k in range(0, len(row), per)]
        rows.append([word - 2**32 if word >= 2**31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_padded_words_of_older_compressed_tensors(bits: int, symmetric: bool) -> None:
    scheme, fmt = Scheme(bits, 32, symmetric), FORMATS["compressed-tensors"]
    tensor = quantized(scheme, *SHAPE)
    files = fmt.pack(tensor) | {"weight_packed": padded(tensor.codes, bits)}
    if not symmetric:
        files["weight_zero_point"] = padded(tensor.zeros.t(), bits).t().contiguous()
    headers = {f"x.{key}": TensorSpec(dtype_name(file.dtype), tuple(file.shape)) for key, file in files.items()}
    config = ct({"g": {"targets": ["Linear"], "weights": WEIGHTS | {"num_bits": bits, "symmetric": symmetric}}})
    assert read(config, headers, ["x"])[1] == {"x": scheme}
    assert torch.equal(dequantize(unpack(fmt, files, scheme, SHAPE)), dequantize(tensor))


@pytest.mark.parametrize("fmt", [name for name in FORMATS if name != "gguf"])
def test_scales_in_bfloat16_stay_exact(fmt: str) -> None:
    """A scale of 1e-6 has 11 bits less in float16."""
    scheme = Scheme(4, 32, False)
    tensor = quantized(scheme, *SHAPE)
    key = "weight_scale" if fmt == "compressed-tensors" else "scales"
    files = FORMATS[fmt].pack(tensor)
    small = (files[key].float() * 1e-4).to(torch.bfloat16)
    found = unpack(FORMATS[fmt], files | {key: small}, scheme, SHAPE)
    scales = (small if fmt == "compressed-tensors" else small.t()).float()
    expected = (tensor.codes.float() - tensor.zeros.float().repeat_interleave(32, 1)) * scales.repeat_interleave(32, 1)
    assert torch.equal(dequantize(found), expected)


@pytest.mark.parametrize("text", ["(.*?,?){40}[!-]$", ".{99999999999}"])
def test_a_foreign_pattern_cannot_hold_up_the_reading(text: str) -> None:
    name = "model.layers.1.self_attn.a_projection-of_a_long_name"
    for config in (ct(ignore=[f"re:{text}"]), {"quant_method": "gptq", "bits": 4, "dynamic": {f"-:{text}": {}}}):
        with pytest.raises(ModelError, match=r"takes too long|not a regular expression"):
            read_schemes(config, {name: (64, 64)}, {})
