# SPDX-License-Identifier: Apache-2.0
"""A model streamed one layer at a time computes what transformers computes, or is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

from quantkit.dtypes import to_stored
from quantkit.errors import ModelError, NumericsError
from quantkit.model import streaming
from quantkit.model.streaming import (
    StreamedModel,
    assign,
    drop,
    embed,
    layer_room,
    open_model,
    outside_loaded,
    read_layer,
    read_outside,
    run_layer,
    run_to,
)
from tests.tiny import as_float, load_whole, random_ids, save_tiny, stream_logits

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {"tie_word_embeddings": False}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 with a window in its last layer": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    ),
    "qwen3 with wide heads": ("qwen3", {"head_dim": 32}),
    "qwen3 with attention biases": ("qwen3", {"head_dim": 16, "attention_bias": True}),
    "llama with llama3 rope": ("llama", {"rope_parameters": LLAMA3_ROPE, "rope_scaling": LLAMA3_ROPE}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama without grouped queries": ("llama", {"num_key_value_heads": 4}),
    "mistral with a window": ("mistral", {"sliding_window": 6}),
    "mistral with wide heads": ("mistral", {"head_dim": 32, "sliding_window": None}),
    # families without a row
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma2": ("gemma2", {"head_dim": 16, "sliding_window": 8}),
    "gemma3_text": ("gemma3_text", {"head_dim": 16, "sliding_window": 8, "sliding_window_pattern": 2}),
    "phi": ("phi", {}),
    "phi3": ("phi3", {}),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 48}),
    "opt with a narrow embedding": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 32}),
    "olmo2": ("olmo2", {}),
    "starcoder2": ("starcoder2", {"sliding_window": 8}),
    "cohere": ("cohere", {"logit_scale": 0.25}),
    "cohere2": ("cohere2", {"sliding_window": 8}),
    "granite": ("granite", {"residual_multiplier": 0.5, "embedding_multiplier": 3.0, "logits_scaling": 2.0}),
    "stablelm": ("stablelm", {"hidden_size": 64}),
    "glm4": ("glm4", {"head_dim": 16}),
    "smollm3": ("smollm3", {}),
    "bloom": ("bloom", {"n_head": 4}),
    "falcon": ("falcon", {"num_kv_heads": 1}),
}


def case(name: str) -> tuple[str, dict[str, Any]]:
    kind, changes = FAMILIES[name]
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    return kind, changes


@pytest.mark.parametrize("name", FAMILIES)
def test_streamed_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    kind, changes = case(name)
    save_tiny(tmp_path, kind, **changes)
    ids = random_ids(5)  # the last micro-batch of 2 is short
    with torch.no_grad():
        expected = load_whole(tmp_path)(ids).logits
    torch.testing.assert_close(stream_logits(open_model(tmp_path), ids), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shard", ["50MB", "40KB"])
@pytest.mark.parametrize("kind", ["qwen2", "gemma2"])
def test_every_stored_dtype_in_one_file_or_many(kind: str, shard: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save_tiny(tmp_path, kind, dtype=dtype, shard=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "40KB")
    ids = random_ids(3)
    with torch.no_grad():
        expected = load_whole(tmp_path)(ids).logits
    torch.testing.assert_close(stream_logits(open_model(tmp_path), ids), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 7])
def test_the_size_of_micro_batches_does_not_matter(batch: int, tmp_path: Path) -> None:
    model = open_model(save_tiny(tmp_path, "gemma2", sliding_window=8))
    ids = random_ids(5)
    torch.testing.assert_close(stream_logits(model, ids, batch), stream_logits(model, ids, 5), rtol=0, atol=1e-5)


def test_lengths_may_differ_between_streams(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "mistral", sliding_window=6)
    model, whole = open_model(folder), load_whole(folder)
    for seqlen in (24, 9, 1, 24):
        ids = random_ids(2, seqlen)
        with torch.no_grad():
            expected = whole(ids).logits
        torch.testing.assert_close(stream_logits(model, ids), expected, rtol=0, atol=1e-4)


def materialised(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if not parameter.is_meta}


@pytest.mark.parametrize("tied", [True, False])
def test_nothing_is_held_but_what_is_in_use(tied: bool, tmp_path: Path) -> None:
    model = open_model(save_tiny(tmp_path, "qwen2", tie_word_embeddings=tied))
    assert not materialised(model.model)
    outside = as_float(read_outside(model))
    assert ("lm_head.weight" in outside) != tied
    with torch.no_grad():
        with outside_loaded(model, outside):
            assert all(not name.startswith("model.layers.") for name in materialised(model.model))
            hidden = embed(model, random_ids(2))
        assert not materialised(model.model)
        for index, layer in enumerate(model.layers):
            assign(layer, as_float(read_layer(model, index)))
            assert all(name.startswith(f"model.layers.{index}.") for name in materialised(model.model))
            hidden = run_layer(model, index, hidden)
            drop(layer)
            assert not materialised(model.model)
        with outside_loaded(model, outside):
            streaming.logits(model, hidden)
        assert not materialised(model.model)


def test_weights_are_dropped_and_layers_restored_after_an_error(tmp_path: Path) -> None:
    model = open_model(save_tiny(tmp_path, "qwen2"))
    with pytest.raises(RuntimeError, match="boom"), outside_loaded(model, as_float(read_outside(model))):
        raise RuntimeError("boom")
    assert not materialised(model.model)
    with outside_loaded(model, as_float(read_outside(model))), pytest.raises(IndexError):
        embed(model, torch.full((1, 4), 10_000))
    assert all("forward" not in vars(layer) for layer in model.layers)


def test_run_to_shows_the_input_of_a_linear_and_runs_no_further(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "qwen3", head_dim=16)
    model, whole = open_model(folder), load_whole(folder)
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: seen.__setitem__(name, args[0])

    linears = [name for name, module in whole.model.layers[0].named_modules() if isinstance(module, nn.Linear)]
    for name in linears:
        whole.model.layers[0].get_submodule(name).register_forward_pre_hook(keep(name))
    ids = random_ids(2)
    with torch.no_grad(), outside_loaded(model, as_float(read_outside(model))):
        whole(ids)
        hidden = embed(model, ids)
        assign(model.layers[0], as_float(read_layer(model, 0)))
        for name in linears:
            torch.testing.assert_close(run_to(model, 0, hidden, name)[0], seen[name])
            assert not model.layers[0].get_submodule(name)._forward_pre_hooks


# ---------------------------------------------------------------- what cannot be streamed is refused


def ids_twice(model: StreamedModel) -> None:
    with torch.no_grad(), outside_loaded(model, as_float(read_outside(model))):
        embed(model, random_ids(2))
        embed(model, random_ids(4)[2:])


def first(output: Any) -> Tensor:
    """The hidden states of what a layer returns, which is a tuple in transformers 4."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


class Between(nn.Module):
    """A stand-in for a decoder whose code does to its layers what `change` says."""

    def __init__(self, decoder: Any, change: Callable[[int, Tensor, Tensor], tuple[Tensor, dict[str, Any]]]):
        super().__init__()
        self.layers, self.embed_tokens, self.change = decoder.layers, decoder.embed_tokens, change
        self.norm = decoder.norm

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        hidden: Tensor = self.embed_tokens(input_ids)
        for index, layer in enumerate(self.layers):
            changed, kwargs = self.change(index, hidden, input_ids)
            hidden = first(layer(changed, **kwargs))
        return hidden


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda index, hidden, ids: (hidden * 2 if index == 1 else hidden, {}), "between its layers before layer 1"),
        (lambda index, hidden, ids: (hidden, {"per_token": ids + index}), "depends on the tokens"),
        (lambda index, hidden, ids: (hidden, {"shared": {}}), "layers share state"),
        (lambda index, hidden, ids: (hidden, {"past": (None, object())}), "layers share state"),
    ],
)
def test_a_model_that_does_more_than_call_its_layers_is_refused(
    change: Callable[[int, Tensor, Tensor], tuple[Tensor, dict[str, Any]]], reason: str, tmp_path: Path
) -> None:
    model = open_model(save_tiny(tmp_path, "qwen2"))
    model.model.model = Between(model.model.model, change)
    with pytest.raises(ModelError, match=reason) as refused:
        ids_twice(model)
    assert "qwen2 cannot be run one layer at a time" in str(refused.value)


def test_a_model_that_skips_layers_is_refused(tmp_path: Path) -> None:
    model = open_model(save_tiny(tmp_path, "qwen2"))
    half = Between(model.model.model, lambda index, hidden, ids: (hidden, {}))
    half.layers = half.layers[:2]
    model.model.model = half
    with pytest.raises(ModelError, match="2 of its 3 layers ran"):
        ids_twice(model)


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("gpt2", {}, "Conv1D"),
        ("rwkv", {"attention_hidden_size": 48}, "stacked weights"),
    ],
)
def test_architectures_that_cannot_be_streamed_are_refused(
    kind: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    save_tiny(tmp_path, kind, **changes)
    with pytest.raises(ModelError, match=reason) as refused:
        stream_logits(open_model(tmp_path), random_ids(2))
    assert "\n" not in str(refused.value)


# ---------------------------------------------------------------- a checkpoint that does not fit its config


def edited(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    edited(save_tiny(tmp_path, "qwen2"), lambda tensors: tensors.__delitem__("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        open_model(tmp_path)


def test_a_stored_head_is_the_embedding_that_it_is_tied_to(tmp_path: Path) -> None:
    """transformers 5 would take the head where it differs, and others the embedding."""
    folder = save_tiny(tmp_path / "tied", "qwen2", tie_word_embeddings=True)
    stored = load_file(folder / "model.safetensors")
    head = stored["model.embed_tokens.weight"].clone()
    save_file(stored | {"lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
    assert open_model(folder).ignored == ("lm_head.weight",)
    wider = stored | {"lm_head.weight": head.float()}
    save_file(wider, folder / "model.safetensors", metadata={"format": "pt"})
    assert open_model(folder).ignored == ("lm_head.weight",)
    head[-1, -1] += 1
    save_file(stored | {"lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lm_head.weight is not model.embed_tokens.weight.*tie_word_embeddings"):
        open_model(folder)


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    edited(save_tiny(tmp_path, "qwen2"), lambda tensors: tensors.update({"model.norm.weight": torch.ones(7)}))
    with pytest.raises(ModelError, match=r"model\.norm\.weight has shape \[7\], config\.json asks for \[48\]"):
        open_model(tmp_path)


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text"])
def test_attention_is_capped_as_the_config_says(kind: str, tmp_path: Path) -> None:
    """A cap of one half changes all logits. sdpa caps nothing, and transformers before 5.22 runs it all the same."""
    sizes: dict[str, Any] = {"head_dim": 12, "query_pre_attn_scalar": 1, "sliding_window": 8}
    folder = save_tiny(tmp_path, kind, attn_logit_softcapping=0.5, **sizes)
    opened = open_model(folder)
    assert opened.config._attn_implementation == "eager"
    whole = load_whole(folder)
    whole.config._attn_implementation = "eager"
    ids = random_ids(2)
    with torch.no_grad():
        expected = whole(ids).logits
    assert torch.allclose(stream_logits(opened, ids), expected, atol=1e-4)


def test_tensors_beside_the_decoder_are_copied(tmp_path: Path) -> None:
    more = {name: torch.ones(7) for name in ("extra.weight", "model.layers.3.norm.weight")}
    unneeded = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    edited(save_tiny(tmp_path, "qwen2"), lambda tensors: tensors.update(more | unneeded))
    model = open_model(tmp_path)
    assert model.ignored == tuple(unneeded)
    assert model.copied == dict.fromkeys(more, ("float32", (7,)))


@pytest.mark.parametrize("name", ["model.layers.0.q.bias", "model.embed_tokens.weight_scale", "lm_head.zeros"])
def test_tensors_within_it_that_have_no_place_are_refused(name: str, tmp_path: Path) -> None:
    edited(save_tiny(tmp_path, "qwen2"), lambda tensors: tensors.update({name: torch.ones(7)}))
    with pytest.raises(ModelError, match=f"1 tensors have no place in the model that config.json describes .{name}"):
        open_model(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_layers_are_read_into_memory_that_is_there_already(dtype: torch.dtype, tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen2", dtype=dtype)
    model = open_model(tmp_path)
    room = torch.full((layer_room(model),), 255, dtype=torch.uint8)
    begin, end = room.data_ptr(), room.data_ptr() + room.nbytes
    for index in (1, 0):  # one after the other in the same place
        found, expected = read_layer(model, index, room), read_layer(model, index)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert all(begin <= x.data_ptr() and x.data_ptr() + x.nbytes <= end for x in found.values())


def test_what_is_stored_stays_when_the_next_layer_is_read_into_its_place(tmp_path: Path) -> None:
    """In float16 above all, where storing changes nothing."""
    save_tiny(tmp_path, "qwen2", dtype=torch.float16)
    model = open_model(tmp_path)
    room = torch.empty(layer_room(model), dtype=torch.uint8)
    stored = {name: to_stored(name, tensor) for name, tensor in read_layer(model, 0, room).items()}
    read_layer(model, 1, room)
    expected = read_layer(model, 0)
    assert all(torch.equal(stored[name], expected[name]) for name in expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 7e4])
def test_what_float16_does_not_hold_is_named_wherever_it_is(value: float) -> None:
    for place in (0, 500, 999):
        values = torch.ones(1000)
        values[place] = value
        with pytest.raises(NumericsError, match=r"model\.norm\.weight"):
            to_stored("model.norm.weight", values)
    assert to_stored("empty", torch.ones(0)).numel() == 0


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    name = "model.layers.2.self_attn.q_proj.weight"
    edited(save_tiny(tmp_path, "qwen2"), lambda tensors: tensors[name].view(-1)[5].fill_(float("nan")))
    model = open_model(tmp_path)
    assert read_layer(model, 1)
    with pytest.raises(NumericsError, match=name.replace(".", r"\.")):
        read_layer(model, 2)


def test_a_norm_that_is_not_finite_is_named_when_the_model_is_opened(tmp_path: Path) -> None:
    edited(save_tiny(tmp_path, "qwen2"), lambda tensors: tensors["model.norm.weight"].fill_(float("inf")))
    with pytest.raises(NumericsError, match=r"model\.norm\.weight"):
        open_model(tmp_path)
