# SPDX-License-Identifier: Apache-2.0
"""What is added by data alone: each test here adds it in the test, and leaves the package as it is."""

import json
from pathlib import Path

import pytest

from quantkit.model.architectures import FAMILIES
from quantkit.model.config import load_config
from quantkit.model.family import EVERY, KEYS_AND_VALUES, Family, Part, Site, folded_site
from quantkit.model.shapes import shapes_of
from quantkit.model.streaming import build
from tests.outputs import contents
from tests.running import done, run_words
from tests.tiny import save_tiny

# ---------------------------------------------------------------- an architecture

QKV, O, GATE_UP, DOWN = "self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"
PHI3 = Family(
    layers={
        EVERY: (
            Part(
                sites=(folded_site("input_layernorm", QKV), Site((O,))),
                sizes={
                    O: ("hidden_size", "num_attention_heads * head_dim"),  # in the order of its modules
                    QKV: ("(num_attention_heads + 2 * num_key_value_heads) * head_dim", "hidden_size"),
                },
                norms={"input_layernorm": "hidden_size"},
                per_token=KEYS_AND_VALUES,
            ),
            Part(
                sites=(Site((GATE_UP,)), Site((DOWN,))),  # its norm could take a scale; the row does not say so
                sizes={GATE_UP: ("2 * intermediate_size", "hidden_size"), DOWN: ("hidden_size", "intermediate_size")},
                norms={"post_attention_layernorm": "hidden_size"},
            ),
        )
    },
    optional={"tie_word_embeddings": False, "sliding_window": None},
    by_input=frozenset({"o_proj", "down_proj"}),
)


@pytest.fixture(scope="module")
def phi3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family that transformers has and quantkit has no row for."""
    assert "phi3" not in FAMILIES
    return save_tiny(tmp_path_factory.mktemp("phi3"), "phi3", hidden_size=64, vocab_size=96)


def test_a_row_tells_the_shapes_of_its_architecture(phi3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = json.loads((phi3 / "config.json").read_text())
    assert shapes_of(raw) is None
    monkeypatch.setitem(FAMILIES, "phi3", PHI3)
    found, expected = shapes_of(raw), build(load_config(phi3))
    assert found is not None
    assert found.layer_tensors == expected.layer_tensors
    assert found.layer_linears == expected.layer_linears
    assert found.outside() == expected.outside()
    words = ["fit", str(phi3), "--json", "--context", "64", "--group", "32"]
    by_row = done(*words)
    monkeypatch.delitem(FAMILIES, "phi3")
    assert done(*words).stdout == by_row.stdout


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_row_is_quantized_continued_and_verified(
    method: str, phi3: Path, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, "phi3", PHI3)
    out = tmp_path / "out"
    words = run_words(method, phi3, out, ids)
    done(*words)
    expected = contents(out)
    layers = json.loads((out / "quantkit.json").read_text())["layers"]
    assert {layer["kind"] for layer in layers} == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    scaled = {layer["kind"] for layer in layers if layer.get("scale", "1") != "1"}
    assert scaled == ({"qkv_proj"} if method == "awq" else set())  # the only fold of the row
    (out / "model-00003-of-00005.safetensors").unlink()
    done(*words)
    assert contents(out) == expected
    measured = json.loads((out / "quantkit.json").read_text())["verification"]["kl_divergence"]
    verify = ["verify", str(out), "--eval", str(ids), "--device", "cpu", "--max-ppl-increase", "900%", "--json"]
    assert json.loads(done(*verify).stdout)["verification"]["kl_divergence"] == measured
