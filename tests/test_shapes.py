# SPDX-License-Identifier: Apache-2.0
"""Shapes from a config.json as data: equal to those of the modules that transformers builds, or left to it."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import quantkit
from quantkit.formats import FORMATS
from quantkit.model.architectures import FAMILIES, family_of
from quantkit.model.config import config_from_dict, load_config
from quantkit.model.shapes import Shapes, shapes_of
from quantkit.model.skeleton import build
from quantkit.plan import make_plan
from quantkit.recipe import shipped
from quantkit.scheme import Scheme
from quantkit.serving.fit import fit

DEMO = Path(quantkit.__file__).parent / "demo"
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
}
WINDOWLESS = {"mistral": {"sliding_window": None}}


def plain(kind: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": kind, **SIZES, **WINDOWLESS.get(kind, {}), **changes}


def assert_equal_to_transformers(raw: dict[str, Any]) -> None:
    found, expected = shapes_of(raw), build(config_from_dict(raw))
    assert found is not None
    for field in dataclasses.fields(Shapes):
        if field.name != "config":
            assert getattr(found, field.name) == getattr(expected, field.name), field.name
    assert [list(names) for names in found.layer_linears] == [list(names) for names in expected.layer_linears]
    documents = [
        fit(model, make_plan(model, lambda *_: Scheme(4, -1, True), FORMATS["gptq"]), budget=2**30, context=64)
        for model in (found, expected)
    ]
    assert documents[0] == documents[1]


@pytest.mark.parametrize("kind", [kind for kind, family in FAMILIES.items() if family.optional is not None])
@given(data=st.data())
@settings(deadline=None, max_examples=12)
def test_what_is_answered_is_what_transformers_builds(kind: str, data: st.DataObject) -> None:
    usual = FAMILIES[kind].optional or {}
    switches = [key for key, value in usual.items() if type(value) is bool and key != "use_sliding_window"]
    changes: dict[str, Any] = {key: data.draw(st.booleans(), key) for key in switches if data.draw(st.booleans())}
    if data.draw(st.booleans(), "its own head_dim"):
        changes["head_dim"] = data.draw(st.sampled_from([8, 24, 32]))
    if "use_sliding_window" in usual and data.draw(st.booleans()):
        changes |= {"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 1}
    heads = data.draw(st.sampled_from([(4, 4), (4, 2), (8, 1), (1, 1)]))
    changes |= {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    assert_equal_to_transformers(plain(kind, **changes))


@pytest.mark.parametrize(
    "name", [n for n, r in shipped().items() if r.config and family_of(r.config["model_type"]).optional is not None]
)
def test_the_recipes_are_answered(name: str) -> None:
    config = shipped()[name].config
    assert config is not None
    assert_equal_to_transformers(config | {"num_hidden_layers": 2})


def test_the_bundled_model_is_answered() -> None:
    found = shapes_of(json.loads((DEMO / "config.json").read_text()))
    assert found is not None
    assert found.outside() == build(load_config(DEMO)).outside()


@pytest.mark.parametrize(
    "raw",
    [
        plain("gemma2"),
        plain("qwen2", model_type=7),
        plain("qwen2", num_experts=8),
        plain("qwen2", is_encoder_decoder=True),
        plain("qwen2", hidden_size="64"),
        plain("qwen2", hidden_size=True),
        plain("qwen2", vocab_size=0),
        plain("qwen2", vocab_size=None),
        {key: value for key, value in plain("llama").items() if key != "num_key_value_heads"},
        plain("qwen2", num_attention_heads=3),
        plain("qwen2", num_attention_heads=5, num_key_value_heads=1),
        plain("llama", num_key_value_heads=3),
        plain("llama", tie_word_embeddings="yes"),
        plain("llama", head_dim=0),
        plain("qwen3", head_dim=None),
        plain("qwen2", head_dim=None),
        plain("qwen2", use_sliding_window=True, sliding_window=16),
        plain("llama", sliding_window=16),
        {key: value for key, value in plain("mistral").items() if key != "sliding_window"},
        {},
    ],
)
def test_what_is_not_plain_is_left_to_transformers(raw: dict[str, Any]) -> None:
    assert shapes_of(raw) is None


@pytest.mark.parametrize("quantized", [False, True])
def test_fit_needs_neither_torch_nor_transformers(tmp_path: Path, quantized: bool) -> None:
    """A second is gone before either is imported: fit answers from a config, a recipe, or the headers of files."""
    model = "deepseek-r1-32b"
    if quantized:
        model = str(tmp_path)
        raw = json.loads((DEMO / "config.json").read_text())
        (tmp_path / "model.safetensors").symlink_to(DEMO / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(raw | {"quantization_config": {"quant_method": "fp8"}}))
    code = (
        "import sys\nfrom quantkit.cli import app\n"
        f"app(['fit', {model!r}, '--json'], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'huggingface_hub', 'numpy', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["fits"]
