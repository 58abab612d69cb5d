# SPDX-License-Identifier: Apache-2.0
"""AutoRound's own exports, GPTQ files without g_idx, and settings that are in a file of their own."""

import json
from pathlib import Path
from typing import Any

import pytest

from quantkit.errors import ModelError
from quantkit.formats import FORMATS
from quantkit.formats.autoround import translated
from quantkit.formats.reading import read_schemes
from quantkit.quantized import read_config
from quantkit.scheme import Scheme
from tests.foreign import assert_held, edit, foreign, rewrite, to
from tests.running import done, quantkit

W4, W8 = Scheme(4, 32, True), Scheme(8, 64, True)
HEAD = "model.layers.0.mlp."


def auto_round(packing: str = "auto_round:auto_gptq", **more: Any) -> dict[str, Any]:
    """The config of AutoRound 0.16.1."""
    fixed = {"quant_method": "auto-round", "packing_format": packing, "bits": 4, "group_size": 32, "sym": True}
    return fixed | {"data_type": "int", "autoround_version": "0.16.1", "block_name_to_quantize": "model.layers"} | more


def without_g_idx(folder: Path) -> None:
    def drop(state: dict[str, Any]) -> None:
        for name in [name for name in state if name.endswith(".g_idx")]:
            del state[name]

    rewrite(folder, drop)


def test_the_real_export_has_its_figures(shared: Path) -> None:
    cases = shared / "cases"
    words = ["--against", str(cases / "llama-2layer-original"), "--eval", str(cases / "ids4096.safetensors")]
    verified = json.loads(done("verify", str(cases / "autoround-default"), *words, "--device", "cpu", "--json").stdout)
    assert verified["verification"]["perplexity"] == pytest.approx(4235.81, abs=0.1)  # of transformers with auto-round


@pytest.mark.parametrize(
    ("packing", "fmt", "scheme"),
    [
        ("auto_round:auto_gptq", "gptq", W4),
        ("auto_round:gptqmodel", "gptq_v2", Scheme(4, 32, False)),
        ("auto_round", "gptq_v2", Scheme(3, 32, False)),
        ("auto_round:auto_awq", "awq", Scheme(4, 32, False)),
    ],
)
def test_packings(tmp_path: Path, packing: str, fmt: str, scheme: Scheme) -> None:
    config = auto_round(packing, bits=scheme.bits, sym=scheme.symmetric)
    held = foreign(tmp_path / "packed", fmt, scheme, config=config)
    if packing != "auto_round:gptqmodel":
        without_g_idx(tmp_path / "packed")
    shown = json.loads(done("inspect", str(tmp_path / "packed"), "--json").stdout)
    assert (shown["format"], shown["made_by"], len(shown["layers"])) == (fmt, "auto-round:0.16.1", len(held))
    target = "compressed-tensors" if scheme.bits == 4 else "gptq_v2"
    to(tmp_path / "packed", target, tmp_path / "out")
    assert_held(tmp_path / "out", target, held)


def test_linears_of_their_own(tmp_path: Path) -> None:
    """Exact names count before patterns, which are searched in the name; what lies outside the blocks is in 16 bit."""
    named = {
        "lm_head": {"bits": 16},
        f"{HEAD}up_proj": {"bits": 16},
        "mlp\\.(up|down)_proj": {"bits": 8, "group_size": 64},
    }
    config = translated(auto_round(extra_config=named))
    names = [f"{HEAD}up_proj", f"{HEAD}down_proj", f"{HEAD}gate_proj", "lm_head", "model.extra.proj"]
    codes = {f"{HEAD}down_proj": W8, f"{HEAD}gate_proj": W4}
    stored: dict[str, Any] = {f"{name}.weight": None for name in names if name not in codes}
    for name, scheme in codes.items():
        stored |= {
            f"{name}.{key}": spec for key, spec in FORMATS["gptq"].specs(scheme, 64, 64).items() if key != "g_idx"
        }
    fmt, schemes = read_schemes(config, dict.fromkeys(names, (64, 64)), stored)
    assert fmt.name == "gptq"
    assert schemes == {name: codes.get(name) for name in names}
    outside = {key.replace(f"{HEAD}gate_proj", "model.extra.proj"): spec for key, spec in stored.items()}
    del outside["model.extra.proj.weight"]
    with pytest.raises(ModelError, match="16 bit by the quantization_config"):
        read_schemes(config, {"model.extra.proj": (64, 64)}, outside)


@pytest.mark.parametrize(
    "config",
    [
        auto_round("auto_round:llm_compressor"),
        auto_round("auto_round:fp8_static", act_bits=8),
        auto_round(data_type="mx_fp"),
        auto_round(act_bits=8),
        auto_round(extra_config=[1]),
    ],
)
def test_what_is_not_read_is_told(config: dict[str, Any]) -> None:
    with pytest.raises(ModelError):
        translated(config)


def test_engines_are_told_apart_by_the_packing(tmp_path: Path) -> None:
    for packing, fmt in (("auto_round:auto_gptq", "gptq"), ("auto_round", "gptq_v2")):
        foreign(tmp_path / fmt, fmt, W4, config=auto_round(packing), hidden_size=128, intermediate_size=256)
        without_g_idx(tmp_path / fmt)
        engines = json.loads(done("fit", str(tmp_path / fmt), "--json").stdout)["engines"]
        assert (engines["vllm"] is None) == (packing == "auto_round:auto_gptq")
        assert engines["transformers"] is None
        assert "auto-round" in engines["gptqmodel"]
    refused = quantkit("fit", str(tmp_path / "gptq"), "--for", "gptqmodel")
    assert refused.returncode == 1
    assert "does not read an auto-round config" in refused.stderr


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
def test_settings_in_a_file_of_their_own(tmp_path: Path, name: str) -> None:
    fmt = "gptq" if name == "quantize_config.json" else "awq"
    said = {
        "gptq": {"bits": 4, "group_size": 32, "desc_act": False, "sym": True, "damp_percent": 0.01},
        "awq": {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"},
    }[fmt]
    out = tmp_path / "packed"
    held = foreign(out, fmt, W4 if fmt == "gptq" else Scheme(4, 32, False))
    edit(out, lambda raw: raw.pop("quantization_config"))
    (out / name).write_text(json.dumps(said))
    assert read_config(out)["quantization_config"]["quant_method"] == fmt
    fitted = json.loads(done("fit", str(out), "--json").stdout)
    assert fitted["scheme"] == "as stored"
    assert fitted["format"] == fmt
    assert "looks for quantization_config in config.json" in fitted["engines"]["vllm"]
    assert len(json.loads(done("inspect", str(out), "--json").stdout)["layers"]) == len(held)
    to(out, "compressed-tensors", tmp_path / "out")
    assert_held(tmp_path / "out", "compressed-tensors", held)


def test_without_its_index_act_order_is_refused(tmp_path: Path) -> None:
    foreign(tmp_path / "packed", "gptq", W4)
    without_g_idx(tmp_path / "packed")
    done("inspect", str(tmp_path / "packed"))
    edit(tmp_path / "packed", lambda raw: raw["quantization_config"].update(desc_act=True))
    refused = quantkit("inspect", str(tmp_path / "packed"))
    assert refused.returncode == 1
    assert "no g_idx is stored" in refused.stderr
