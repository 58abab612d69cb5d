# SPDX-License-Identifier: Apache-2.0
"""What config.json says of each format, by hand and as the clients read it."""

import re
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit import __version__
from quantkit.errors import SchemeError
from quantkit.formats import FORMATS, QuantizedLayer
from quantkit.formats.names import pattern, with_fused
from quantkit.model.family import FUSED
from quantkit.scheme import Scheme

W4 = Scheme(4, 128, symmetric=False)
W4_SYM = Scheme(4, 128, symmetric=True)

W8 = Scheme(8, -1, symmetric=True)
W3 = Scheme(3, 64, symmetric=True)
PARTS = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}


def linears(layers: int) -> list[str]:
    return [f"model.layers.{i}.{part}" for i in range(layers) for parts in PARTS.values() for part in parts]


def uniform(scheme: Scheme, layers: int = 12) -> list[QuantizedLayer]:
    return [QuantizedLayer(name, scheme) for name in linears(layers)]


def test_awq_config() -> None:
    assert FORMATS["awq"].config(uniform(W4), ["lm_head"], FUSED) == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }
    assert FORMATS["awq"].extra_files({}) == {}


@pytest.mark.parametrize("name", ["gptq", "gptq_v2"])
def test_gptq_config(name: str) -> None:
    config = FORMATS[name].config(uniform(W4_SYM), ["lm_head"], FUSED, damp_percent=0.05)
    assert config == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": name,
        "format": name,
        "lm_head": False,
        "damp_percent": 0.05,
        "true_sequential": True,
        "static_groups": False,
        "meta": {"quantizer": [f"quantkit:{__version__}"]},
    }
    assert FORMATS[name].extra_files(config) == {"quantize_config.json": config}


def test_compressed_tensors_config() -> None:
    def weights(**changed: Any) -> dict[str, Any]:
        plain = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 128}
        return {**plain, "dynamic": False, **changed}

    group = {"input_activations": None, "output_activations": None, "format": "pack-quantized"}
    assert FORMATS["compressed-tensors"].config(uniform(W4), ["lm_head", "model.layers.12.mlp.down_proj"], FUSED) == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", "model.layers.12.mlp.down_proj"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights(), **group}},
    }
    channel = FORMATS["compressed-tensors"].config(uniform(W8), [], FUSED)
    assert channel["ignore"] == ["lm_head"]  # tied: in no list, and still a Linear
    assert channel["config_groups"]["group_0"]["weights"] == weights(
        num_bits=8, symmetric=True, strategy="channel", group_size=None
    )


def gptq_lookup(dynamic: dict[str, dict[str, Any]], name: str) -> dict[str, Any] | bool | None:
    """What GPTQModel, vLLM and SGLang do: the first rule that matches decides; False: not quantized."""
    for rule, overrides in dynamic.items():
        if rule.startswith("-:"):
            if re.match(rule.removeprefix("-:"), name):
                return False
        elif re.match(rule.removeprefix("+:"), name):
            return overrides
    return None


@st.composite
def mixtures(draw: st.DrawFn) -> dict[str, Scheme | None]:
    """A scheme, or 16 bit, for each module as an engine fuses it."""
    layers = draw(st.integers(1, 12))
    choice = st.sampled_from([W4_SYM, W8, W3, None])
    chosen = {f"model.layers.{i}.{fused}": draw(choice) for i in range(layers) for fused in PARTS}
    chosen["model.layers.0.mlp.down_proj"] = W4_SYM  # at least one is quantized
    return chosen


def expand(chosen: dict[str, Scheme | None]) -> dict[str, Scheme | None]:
    """The separate modules of the checkpoint."""
    separate = {}
    for name, scheme in chosen.items():
        _, _, index, tail = name.split(".", 3)
        separate.update({f"model.layers.{index}.{part}": scheme for part in PARTS[tail]})
    return separate


def split(separate: dict[str, Scheme | None]) -> tuple[list[QuantizedLayer], list[str]]:
    quantized = [QuantizedLayer(name, scheme) for name, scheme in separate.items() if scheme]
    return quantized, [name for name, scheme in separate.items() if not scheme] + ["lm_head"]


@given(mixtures())
@settings(max_examples=40, deadline=None)
def test_mixed_configs_give_every_module_its_scheme(chosen: dict[str, Scheme | None]) -> None:
    separate = expand(chosen)
    quantized, kept = split(separate)
    everything = {**separate, **chosen}  # an engine asks with fused names, the others with separate ones

    config = FORMATS["gptq"].config(quantized, kept, FUSED)
    base = {key: config[key] for key in ("bits", "group_size", "sym")}
    for name, scheme in everything.items():
        found = gptq_lookup(config.get("dynamic", {}), name)
        if scheme is None:
            assert found is False, name
        else:
            expected = {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.symmetric}
            assert (base if found is None else found) == expected, name
    if None in separate.values():
        assert config["modules_in_block_to_quantize"] == [[name for name, _ in quantized]]

    groups = FORMATS["compressed-tensors"].config(quantized, kept, FUSED)["config_groups"].values()
    if len(groups) > 1:
        for name, scheme in everything.items():
            bits = [
                group["weights"]["num_bits"]
                for group in groups
                for target in group["targets"]
                if re.match(target.removeprefix("re:"), name)
            ]
            assert bits == ([] if scheme is None else [scheme.bits]), name


def test_gptq_base_is_the_most_common_scheme() -> None:
    layers = uniform(W4_SYM)
    layers[0] = QuantizedLayer("model.layers.0.self_attn.x_proj", W8)
    config = FORMATS["gptq"].config(layers, ["lm_head"], FUSED)
    assert (config["bits"], config["group_size"]) == (4, 128)
    assert config["dynamic"] == {
        r"+:^model\.layers\.0\.self_attn\.x_proj$": {"bits": 8, "group_size": -1, "sym": True},
    }
    assert "modules_in_block_to_quantize" not in config


def test_a_quantized_head() -> None:
    layers = [*uniform(W4_SYM), QuantizedLayer("lm_head", W8)]
    assert FORMATS["gptq"].config(layers, [], FUSED)["lm_head"] is True
    ct = FORMATS["compressed-tensors"].config(layers, [], FUSED)
    assert ct["ignore"] == []
    assert ct["config_groups"]["group_1"]["targets"] == ["re:^lm_head$"]
    with pytest.raises(SchemeError, match="lm_head"):
        FORMATS["awq"].config([*uniform(W4), QuantizedLayer("lm_head", W4)], [], FUSED)


def test_awq_lists_16_bit_layers_for_every_reader() -> None:
    kept = [f"model.layers.1.self_attn.{part}_proj" for part in "qkv"]
    layers = [layer for layer in uniform(W4) if layer.name not in kept]
    config = FORMATS["awq"].config(layers, [*kept, "lm_head"], FUSED)
    assert config["modules_to_not_convert"] == [*kept, "lm_head", "model.layers.1.self_attn.qkv_proj"]
    # vLLM and SGLang skip by substring: nothing that is quantized may contain a listed name
    for name in with_fused([layer.name for layer in layers], FUSED):
        assert not any(skipped in name for skipped in config["modules_to_not_convert"])
        assert gptq_lookup(config["dynamic"], name) is None
    assert gptq_lookup(config["dynamic"], "model.layers.1.self_attn.q_proj") is False
    assert gptq_lookup(config["dynamic"], "model.layers.11.self_attn.q_proj") is None


def test_awq_holds_one_scheme() -> None:
    assert {name for name, item in FORMATS.items() if not item.holds_mixed} == {"awq"}
    other = Scheme(4, 64, symmetric=False)
    layers = [*uniform(W4), QuantizedLayer("model.layers.12.mlp.down_proj", other)]
    with pytest.raises(SchemeError, match=r"one scheme, got W4 g128 asym for .* and W4 g64 asym for model.layers.12"):
        FORMATS["awq"].config(layers, ["lm_head"], FUSED)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_one_scheme_within_a_fused_module(name: str) -> None:
    layers = [layer for layer in uniform(W4) if layer.name != "model.layers.3.mlp.up_proj"]
    with pytest.raises(SchemeError, match=r"layers.3.mlp.up_proj: 16 bit but .*3.mlp.gate_proj: W4.*gate_up_proj"):
        FORMATS[name].config(layers, ["lm_head", "model.layers.3.mlp.up_proj"], FUSED)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_configs_refuse_nothing_and_duplicates(name: str) -> None:
    with pytest.raises(SchemeError, match="no linear layer is quantized"):
        FORMATS[name].config([], ["lm_head"], FUSED)
    with pytest.raises(SchemeError, match=r"model.layers.0.self_attn.q_proj: listed twice"):
        FORMATS[name].config(uniform(W4), ["model.layers.0.self_attn.q_proj"], FUSED)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_only_gptq_writes_act_order(name: str) -> None:
    if name.startswith("gptq"):
        config = FORMATS[name].config(uniform(W4), [], FUSED, desc_act=True, static_groups=True)
        assert config["desc_act"] is True
        assert config["static_groups"] is True
    else:
        with pytest.raises(SchemeError, match="gptq holds it"):
            FORMATS[name].config(uniform(W4), [], FUSED, desc_act=True)


def test_pattern_of_a_whole_model_is_short() -> None:
    found = pattern(f"model.layers.{i}.mlp.{part}" for i in (1, 5) for part in ("gate_proj", "up_proj"))
    assert found == r"^model\.layers\.(?:1|5)(?:\.mlp\.gate_proj|\.mlp\.up_proj)$"
    assert len(pattern(linears(64))) < 400


@given(st.sets(st.sampled_from([*linears(12), "lm_head", "model.layers.1.mlp.experts.11.up_proj"]), min_size=1))
@settings(deadline=None)
def test_pattern_matches_exactly_its_names(names: set[str]) -> None:
    compiled = re.compile(pattern(sorted(names)))
    tempting: Iterable[str] = [*linears(13), "lm_head", "model.layers.1.mlp.experts.11.up_proj", "model.layers.1"]
    assert {name for name in tempting if compiled.match(name)} == names
    for name in names:
        assert not compiled.match(f"{name}.x")
        assert not compiled.match(f"x.{name}")
        assert not compiled.match(name.replace(".", "_", 1) if "." in name else f"{name}_")


def test_with_fused_adds_each_fused_module_once() -> None:
    assert with_fused(["a.q_proj", "a.k_proj", "a.o_proj"], FUSED) == ["a.q_proj", "a.k_proj", "a.o_proj", "a.qkv_proj"]
    assert {part for parts in FUSED.values() for part in parts} == {
        "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj",
    }  # fmt: skip
