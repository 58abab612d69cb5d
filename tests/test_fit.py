# SPDX-License-Identifier: Apache-2.0
"""Bytes before compute: known models to the byte, files that are there to the byte, and which engines load them."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import quantkit
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.writer import write_index, write_json, write_shard
from quantkit.dtypes import torch_dtype
from quantkit.errors import InputError, ModelError
from quantkit.formats import FORMATS
from quantkit.model.config import config_from_dict
from quantkit.model.skeleton import Architecture, build
from quantkit.plan import Plan, make_plan
from quantkit.recipe import shipped
from quantkit.records import Fit
from quantkit.report.terminal.fit import table
from quantkit.scheme import Scheme
from quantkit.serving.engines import LOADERS, engines, heads_of, shard, why_not
from quantkit.serving.fit import fit, fit_checkpoint
from quantkit.serving.stored import KINDS
from tests.running import done

GIB = 2**30
DEMO = Path(quantkit.__file__).parent / "demo"
TINY = {
    "model_type": "qwen2",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
}
MEASURED = {  # recipe -> layers, parameters as the hub counts them
    "deepseek-r1-1.5b": (28, 1_777_088_000),
    "deepseek-r1-7b": (28, 7_615_616_512),
    "deepseek-r1-8b": (32, 8_030_261_248),
    "deepseek-r1-14b": (48, 14_770_033_664),
    "deepseek-r1-32b": (64, 32_763_876_352),
    "deepseek-r1-70b": (80, 70_553_706_496),
}
BUILT: dict[str, Architecture] = {}


def recipe_model(name: str) -> Architecture:
    if name not in BUILT:
        config = shipped()[name].config
        assert config is not None
        BUILT[name] = build(config_from_dict(config))
    return BUILT[name]


def tiny(**changes: Any) -> Architecture:
    return build(config_from_dict(TINY | changes))


def plan_of(architecture: Architecture, fmt: str = "awq", scheme: Scheme | None = None, **kept: Scheme | None) -> Plan:
    """kept: kind of linear -> another scheme for it."""
    default = scheme or Scheme(4, 128, False)
    return make_plan(architecture, lambda name, _: kept.get(name.rpartition(".")[2], default), FORMATS[fmt])


def fitted(architecture: Architecture, plan: Plan, **options: Any) -> dict[str, Any]:
    return fit(architecture, plan, **({"budget": 22 * GIB, "context": 8192} | options)).content()


# ---------------------------------------------------------------- known models


@pytest.mark.parametrize(
    ("name", "group", "expected"),
    [
        ("deepseek-r1-32b", 64, 19_938_289_664),
        ("deepseek-r1-32b", 128, 19_328_804_864),
        ("deepseek-r1-32b", 256, 19_024_062_464),
        ("deepseek-r1-14b", 64, 10_238_076_928),
        ("deepseek-r1-14b", 128, 9_980_028_928),
        ("deepseek-r1-14b", 256, 9_851_004_928),
    ],
)
def test_the_weights_of_the_distilled_models_are_known(name: str, group: int, expected: int) -> None:
    model = recipe_model(name)
    result = fitted(model, plan_of(model, scheme=Scheme(4, group, False)))
    assert result["weights"]["total"] == expected
    assert sum(result["weights"][kind] for kind in KINDS) == expected
    assert 0 < result["file_bytes"] - expected < 1_000_000  # headers
    assert result["weights_16bit"] == {"deepseek-r1-32b": 65_527_752_704, "deepseek-r1-14b": 29_540_067_328}[name]
    assert result["kv_bytes_per_token"] == {"deepseek-r1-32b": 262_144, "deepseek-r1-14b": 196_608}[name]


def test_the_kinds_of_the_32b() -> None:
    model = recipe_model("deepseek-r1-32b")
    quantizable = 31_205_621_760
    weights = fitted(model, plan_of(model))["weights"]
    assert weights["embeddings"] == weights["lm_head"] == 152064 * 5120 * 2
    assert weights["codes"] == quantizable // 2
    assert weights["scales"] == quantizable // 128 * 2
    assert weights["zeros"] == quantizable // 128 // 2
    assert weights["norms"] == (2 * 64 + 1) * 5120 * 2
    assert weights["biases"] == 64 * (5120 + 2 * 1024) * 2
    assert weights["indices"] == weights["linears_16bit"] == weights["other"] == 0


@pytest.mark.parametrize("name", MEASURED)
def test_every_recipe_answers_without_a_download(name: str) -> None:
    layers, parameters = MEASURED[name]
    model = recipe_model(name)
    assert len(model.layers) == layers
    assert fitted(model, plan_of(model))["weights_16bit"] == 2 * parameters
    assert model.config.max_position_embeddings == 131072


def test_the_answer_makes_no_weights() -> None:
    """That is what keeps it near a second: no weight is ever filled, whatever the model's size."""
    model = recipe_model("deepseek-r1-32b")
    fitted(model, plan_of(model), tensor_parallel=2)
    assert all(parameter.is_meta for parameter in model.model.parameters())
    assert sum(buffer.nbytes for buffer in model.model.buffers()) < 2**20


# ---------------------------------------------------------------- memory


def test_the_command_asks_for_what_the_recipe_says_as_a_run_does(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("budget: {memory: 20GiB, context: 4k, kv: fp8}\n")

    def asked(*words: str) -> dict[str, Any]:
        return dict(json.loads(done("fit", "deepseek-r1-32b", "--recipe", str(recipe), "--json", *words).stdout))

    said = asked()
    assert (said["budget_bytes"], said["context"], said["kv"]) == (20 * GIB, 4096, "fp8")
    said = asked("--budget", "22GiB", "--kv", "fp16")
    assert (said["budget_bytes"], said["context"], said["kv"]) == (22 * GIB, 4096, "fp16")


def test_everything_counts_against_the_budget() -> None:
    model = recipe_model("deepseek-r1-32b")
    result = fitted(model, plan_of(model))
    assert result["total_bytes"] == 19_328_804_864 + 8192 * 262_144 + result["workspace"]["total"]
    assert result["fits"]
    assert result["margin_bytes"] == 22 * GIB - result["total_bytes"]
    # 18 GiB of weights and 4 GiB of cache fill 22 GiB: nothing is left for the engine.
    assert not fitted(model, plan_of(model), context=16384)["fits"]
    assert fitted(model, plan_of(model), context=16384, kv="fp8")["fits"]
    # The peak of a prefill: gate and up, their product, and four hidden states, of 1024 tokens in 16 bit.
    assert result["workspace"]["activations"] == 1024 * 2 * (3 * 27648 + 4 * 5120)


@given(room=st.integers(0, 30 * GIB), kv=st.sampled_from(["fp16", "fp8"]))
@settings(deadline=None, max_examples=25)
def test_the_longest_context_is_the_last_that_fits(room: int, kv: str) -> None:
    model = BUILT.setdefault("windowed", tiny(use_sliding_window=True, sliding_window=100, max_window_layers=1))
    plan = plan_of(model)
    result = fitted(model, plan, budget=max(1, room), context=2**30 - 1, kv=kv)
    longest = result["longest_context_in_memory"]
    if longest:
        assert fitted(model, plan, budget=room, context=longest, kv=kv)["fits"]
    assert not fitted(model, plan, budget=max(1, room), context=longest + 1, kv=kv)["fits"]
    assert result["longest_context"] == min(longest, 4096)


def test_a_sliding_window_stops_the_cache() -> None:
    per_token = 2 * 2 * 64 * 2  # of one layer
    full = tiny()
    assert fitted(full, plan_of(full), context=4096)["kv_bytes"] == 3 * per_token * 4096
    some = tiny(use_sliding_window=True, sliding_window=1000, max_window_layers=1)
    assert fitted(some, plan_of(some), context=4096)["kv_bytes"] == per_token * (4096 + 2 * 1000)
    unused = tiny(use_sliding_window=False, sliding_window=1000, max_window_layers=1)
    assert fitted(unused, plan_of(unused), context=4096)["kv_bytes"] == 3 * per_token * 4096
    every = build(config_from_dict(TINY | {"model_type": "mistral", "sliding_window": 1000}))
    result = fitted(every, plan_of(every), context=4096)
    assert result["kv_bytes"] == 3 * per_token * 1000
    assert result["longest_context_in_memory"] is None  # no context fills the memory
    assert result["longest_context"] == 4096  # but the model has its limit


def test_nothing_fits_a_budget_below_the_weights() -> None:
    model = tiny()
    result = fitted(model, plan_of(model), budget=1000)
    assert not result["fits"]
    assert result["margin_bytes"] < 0
    assert result["longest_context"] == 0


@pytest.mark.parametrize("wrong", [{"kv": "fp4"}, {"context": 0}, {"tensor_parallel": 0}, {"budget": 0}])
def test_senseless_questions_are_refused(wrong: dict[str, Any]) -> None:
    model = tiny()
    with pytest.raises(InputError, match="--"):
        fitted(model, plan_of(model), **wrong)


def test_what_quantizing_needs() -> None:
    model = recipe_model("deepseek-r1-32b")
    plan = plan_of(model)
    result = fitted(model, plan)
    assert result["disk_bytes"] > plan.file_bytes
    assert result["hidden_states_bytes"] == 128 * 2048 * 5120 * 4
    assert result["ram_bytes"] > 4 * 27648**2  # a Gram matrix of down_proj at the least
    assert result["ram_bytes"] < 65_527_752_704 / 2  # and never the model


# ---------------------------------------------------------------- tensor parallel


@pytest.mark.parametrize("fmt", ["awq", "gptq", "compressed-tensors"])
@pytest.mark.parametrize("group", [32, -1])
@pytest.mark.parametrize("cards", [2, 4])
def test_a_card_has_its_part_of_every_linear(fmt: str, group: int, cards: int) -> None:
    """Against an oracle that packs each shard as a linear of its own."""
    model = tiny()
    plan = plan_of(model, fmt, Scheme(4, group, False), o_proj=None)
    heads = heads_of(model.config)
    expected = 2 * 320 * 256 * 2 // cards + 7 * 256 * 2  # embeddings and head, norms
    for linear in plan.linears:
        out_features, in_features = shard(linear, heads, cards)
        if linear.scheme is None:
            expected += out_features * in_features * 2
        else:
            expected += sum(s.nbytes for s in FORMATS[fmt].specs(linear.scheme, out_features, in_features).values())
        if linear.local in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            expected += out_features * 2  # bias
    card = fitted(model, plan, tensor_parallel=cards)["tensor_parallel"]
    assert card["problems"] == []
    assert card["weights_bytes"] == expected


def test_key_value_heads_are_copied_when_there_are_fewer_than_cards() -> None:
    model = recipe_model("deepseek-r1-70b")  # 64 heads, 8 of them kept
    for cards, kept in ((2, 4), (8, 1), (16, 1)):
        result = fitted(model, plan_of(model), tensor_parallel=cards)
        assert result["tensor_parallel"]["kv_bytes_per_token"] == 80 * kept * 128 * 2 * 2
        assert result["kv_bytes_per_token"] == 80 * 8 * 128 * 2 * 2
        rows = {row["linear"]: row for row in result["tensor_parallel"]["shards"]}
        assert rows["self_attn.k_proj"]["on_card"] == [kept * 128, 8192]
        assert rows["self_attn.q_proj"]["on_card"] == [8192 // cards, 8192]
        assert rows["mlp.down_proj"]["on_card"] == [8192, 28672 // cards]


@pytest.mark.parametrize(
    ("name", "group", "cards", "fails"),
    [
        ("deepseek-r1-32b", 256, 4, False),
        ("deepseek-r1-32b", 256, 8, True),
        ("deepseek-r1-32b", 128, 8, False),
        ("deepseek-r1-14b", 256, 4, True),
        ("deepseek-r1-14b", 128, 4, False),
        ("deepseek-r1-14b", 128, 8, True),
        ("deepseek-r1-14b", 64, 8, False),
    ],
)
def test_groups_must_not_lie_on_two_cards(name: str, group: int, cards: int, fails: bool) -> None:
    model = recipe_model(name)
    plan = plan_of(model, "compressed-tensors", Scheme(4, group, False))
    result = fitted(model, plan, tensor_parallel=cards)
    problems = result["tensor_parallel"]["problems"]
    assert any("down_proj" in line and f"group_size {group}" in line for line in problems) == fails
    assert (result["engines"]["vllm"] is not None) == fails


def test_heads_must_be_divisible_by_the_cards() -> None:
    model = recipe_model("deepseek-r1-32b")
    result = fitted(model, plan_of(model), tensor_parallel=16)
    assert "self_attn.q_proj: 40 attention heads are not divisible by 16 cards" in result["tensor_parallel"]["problems"]
    assert "40 attention heads" in result["engines"]["sglang"]


# ---------------------------------------------------------------- checkpoints that are there


def written(folder: Path, architecture: Architecture, plan: Plan, raw: dict[str, Any]) -> Path:
    """The planned checkpoint, all zeros."""
    names: dict[str, str] = {}
    for part in plan.shards:
        write_shard(
            folder / part.file, {n: torch.zeros(s.shape, dtype=torch_dtype(s.dtype)) for n, s in part.tensors.items()}
        )
        names |= dict.fromkeys(part.tensors, part.file)
    write_index(folder, names, plan.tensor_bytes)
    write_json(folder / "config.json", raw | {"quantization_config": plan.quantization_config})
    return folder


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("fmt", "scheme"),
    [
        ("awq", Scheme(4, 128, False)),
        ("awq", Scheme(4, -1, False)),
        ("gptq", Scheme(4, 64, True)),
        ("gptq", Scheme(3, 32, True)),
        ("gptq_v2", Scheme(8, 128, False)),
        ("compressed-tensors", Scheme(4, 128, True)),
        ("compressed-tensors", Scheme(3, 64, False)),
        ("compressed-tensors", Scheme(8, -1, True)),
    ],
)
def test_files_that_are_there_equal_their_plan(tmp_path: Path, fmt: str, scheme: Scheme, tied: bool) -> None:
    raw = TINY | {"tie_word_embeddings": tied}
    model = build(config_from_dict(raw))
    plan = plan_of(model, fmt, scheme, o_proj=None)
    out = written(tmp_path, model, plan, raw)
    planned = fitted(model, plan, tensor_parallel=2)
    found = fit_checkpoint(out, budget=22 * GIB, context=8192, tensor_parallel=2).content()
    assert found == {key: planned[key] for key in found}
    assert found["weights"]["total"] == sum(e.nbytes for e in open_checkpoint(out).entries.values())
    assert found["file_bytes"] == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert found["weights"]["linears_16bit"] == 3 * 256 * 256 * 2
    assert (found["weights"]["lm_head"] == 0) == tied


def test_mixed_precision_is_read_from_the_shapes(tmp_path: Path) -> None:
    model = tiny()
    plan = plan_of(model, "compressed-tensors", Scheme(4, 128, True), down_proj=Scheme(8, 32, True))
    found = fit_checkpoint(written(tmp_path, model, plan, TINY), budget=GIB, context=128).content()
    schemes = {row["linear"]: row["scheme"] for row in found["tensor_parallel"]["shards"]}
    assert schemes["mlp.down_proj"] == "W8 g32 sym"
    assert schemes["mlp.up_proj"] == "W4 g128 sym"


def test_a_16_bit_model_is_a_checkpoint_too() -> None:
    result = fit_checkpoint(DEMO, budget=GIB, context=128).content()
    assert result["weights"]["total"] == result["weights_16bit"]
    assert result["file_bytes"] == (DEMO / "model.safetensors").stat().st_size
    assert result["weights"]["codes"] == 0
    assert set(result["engines"].values()) == {None}


def test_a_format_that_is_not_known_is_not_called_loadable(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(DEMO / "model.safetensors")
    raw = json.loads((DEMO / "config.json").read_text()) | {"quantization_config": {"quant_method": "quanto"}}
    write_json(tmp_path / "config.json", raw)
    result = fit_checkpoint(tmp_path, budget=GIB, context=128).content()
    assert all("not known to read quanto" in str(reason) for reason in result["engines"].values())


def test_files_of_another_model_are_refused(tmp_path: Path) -> None:
    model = tiny()
    out = written(tmp_path, model, plan_of(model), TINY | {"hidden_size": 128, "intermediate_size": 200})
    with pytest.raises(ModelError, match=r"does config\.json belong to these files"):
        fit_checkpoint(out, budget=GIB, context=128)
    with pytest.raises(ModelError, match=r"no config\.json"):
        fit_checkpoint(tmp_path / "nowhere", budget=GIB, context=128)


@pytest.mark.parametrize("raw", [{}, {"model_type": "t5"}, {"model_type": ["qwen2"]}, {"model_type": None}])
def test_only_causal_language_models_are_taken(raw: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="model_type"):
        config_from_dict(raw)


# ---------------------------------------------------------------- engines

LOADS = {  # format, scheme -> the engines that load it
    ("awq", Scheme(4, 128, False)): "vllm sglang transformers gptqmodel",
    ("awq", Scheme(4, 64, True)): "vllm sglang transformers gptqmodel",
    ("awq", Scheme(4, 256, False)): "vllm sglang transformers",
    ("gptq", Scheme(4, 128, True)): "vllm sglang transformers gptqmodel llama.cpp",
    ("gptq", Scheme(8, 32, True)): "vllm sglang transformers gptqmodel llama.cpp",
    ("gptq", Scheme(4, 128, False)): "transformers llama.cpp",
    ("gptq", Scheme(3, 128, True)): "transformers gptqmodel",
    ("gptq_v2", Scheme(4, 128, False)): "transformers gptqmodel llama.cpp",
    ("gptq_v2", Scheme(4, 256, True)): "transformers gptqmodel llama.cpp",
    ("compressed-tensors", Scheme(4, 128, True)): "vllm sglang transformers llama.cpp",
    ("compressed-tensors", Scheme(4, 128, False)): "vllm sglang llama.cpp",
    ("compressed-tensors", Scheme(4, 256, False)): "vllm llama.cpp",
    ("compressed-tensors", Scheme(8, -1, True)): "vllm sglang transformers llama.cpp",
    ("compressed-tensors", Scheme(8, 128, False)): "vllm llama.cpp",
    ("compressed-tensors", Scheme(8, -1, False)): "llama.cpp",
    ("compressed-tensors", Scheme(3, 64, True)): "vllm transformers",
    ("compressed-tensors", Scheme(5, 128, False)): "vllm",
}


@pytest.mark.parametrize(("fmt", "scheme"), LOADS)
def test_engines_and_the_alternative_they_are_offered(fmt: str, scheme: Scheme) -> None:
    model = recipe_model("deepseek-r1-14b")
    heads = heads_of(model.config)
    reasons = engines(fmt, plan_of(model, fmt, scheme).linears, heads)
    assert [engine for engine in LOADERS if reasons[engine] is None] == LOADS[fmt, scheme].split()
    for engine, reason in reasons.items():
        if reason is not None:
            assert "\n" not in reason
            offered = reason.removesuffix(" would load").rpartition("; ")[2].split()
            name = offered.pop(0) if offered[0] in FORMATS else fmt
            bits, group, kind = offered
            other = Scheme(int(bits[1:]), -1 if group == "rows" else int(group[1:]), kind == "sym")
            assert why_not(engine, name, plan_of(model, name, other).linears, heads) is None


def test_engines_on_mixed_precision() -> None:
    model = tiny()
    heads = heads_of(model.config)
    mixed = {"down_proj": Scheme(8, 128, True)}
    gptq = plan_of(model, "gptq", Scheme(4, 128, True), **mixed).linears
    assert why_not("vllm", "gptq", gptq, heads) is None
    assert "one scheme" in str(why_not("transformers", "gptq", gptq, heads))  # it ignores `dynamic`
    assert why_not("transformers", "compressed-tensors", gptq, heads) is None
    # q, k and v of different schemes: `make_plan` refuses them, a file of another tool may have them
    torn = [
        replace(x, scheme=Scheme(8, 128, True)) if x.layer == 1 and x.local == "self_attn.v_proj" else x
        for x in plan_of(model, "gptq", Scheme(4, 128, True)).linears
    ]
    assert "fuses self_attn.q_proj" in str(why_not("vllm", "gptq", torn, heads))
    assert why_not("gptqmodel", "gptq", torn, heads) is None


def test_engines_on_act_order_and_odd_shapes() -> None:
    model = tiny()
    heads = heads_of(model.config)
    linears = plan_of(model, "gptq", Scheme(4, 128, True)).linears
    assert "act-order" in str(why_not("vllm", "gptq", linears, heads, act_order=True))
    assert why_not("gptqmodel", "gptq", linears, heads, act_order=True) is None
    narrow = tiny(intermediate_size=544)  # 544 = 17 x 32: groups of 32 only, and no multiple of 64 rows
    groups_of_32 = plan_of(narrow, "awq", Scheme(4, 32, False)).linears
    assert why_not("vllm", "awq", groups_of_32, heads) is None  # Marlin pads
    with pytest.raises(InputError, match="expected one of vllm"):
        why_not("onnx", "awq", linears, heads)


def test_linears_are_cut_as_their_neighbours_need() -> None:
    cut = {x.local for x in plan_of(tiny()).linears if x.role.by_input}
    assert cut == {"self_attn.o_proj", "mlp.down_proj"}


# ---------------------------------------------------------------- shown


def test_the_document_is_json_and_the_table_comes_from_it() -> None:
    model = recipe_model("deepseek-r1-32b")
    result = json.loads(json.dumps(fitted(model, plan_of(model), tensor_parallel=16)))
    shown = io.StringIO()
    Console(file=shown, width=200).print(table(Fit.model_validate(result)))
    text = shown.getvalue()
    for expected in (
        "19,328,804,864",
        "each of 16 cards",
        "BUT CANNOT BE CUT",
        "cannot be cut over 16 cards",
        "does not read awq",
        "RAM",
    ):
        assert expected in text


def test_latent_attention_keeps_what_keys_and_values_are_made_of() -> None:
    sizes = {"kv_lora_rank": 32, "q_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
    changes = {"num_key_value_heads": 4, "max_position_embeddings": 64}
    for kind, kept in (("minicpm3", 2 * 4 * (16 + 16)), ("deepseek_v3", 32 + 16)):
        experts = {"first_k_dense_replace": 3} if kind == "deepseek_v3" else {}
        model = tiny(model_type=kind, **sizes, **changes, **experts)
        plan = make_plan(model, lambda name, _: Scheme(4, 32, False), FORMATS["compressed-tensors"])
        result = fit(model, plan, budget=2**30, context=8)
        assert result.kv_bytes_per_token == 3 * 2 * kept
