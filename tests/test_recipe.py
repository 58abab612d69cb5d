# SPDX-License-Identifier: Apache-2.0
"""Recipe files: which rule decides, and that every mistake is told with its place."""

import os
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.errors import InputError, SchemeError
from quantkit.files import read_bytes
from quantkit.model.family import FUSED
from quantkit.recipe import (
    Recipe,
    Rule,
    check_fused,
    explained,
    method_resolver,
    over,
    read_recipe,
    resolver,
    shipped,
    unmatched,
)
from quantkit.resources import recipes_dir
from quantkit.scheme import Scheme
from tests.running import done

DEFAULT = Scheme(4, 128, False)
BOMB = ["too many values", "write it shorter"]


def recipe(tmp_path: Path, text: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return read_recipe(path)


def resolved(tmp_path: Path, rules: str, name: str, layer: int = 0) -> Scheme | None:
    return resolver(recipe(tmp_path, f"rules:\n{rules}"), DEFAULT)(name, layer)


DOWN = "model.layers.5.mlp.down_proj"
UP = "model.layers.5.mlp.up_proj"


@pytest.mark.parametrize(
    ("rule", "name", "layer", "applies"),
    [
        ("{kind: down_proj, bits: 8}", DOWN, 5, True),
        ("{kind: down_proj, bits: 8}", UP, 5, False),
        ("{kind: proj, bits: 8}", DOWN, 5, False),
        ('{match: "*.down_proj", bits: 8}', DOWN, 5, True),
        ('{match: "model.layers.5.*", bits: 8}', DOWN, 5, True),
        ('{match: "layers.5.*", bits: 8}', DOWN, 5, False),
        ('{match: "MODEL.*", bits: 8}', DOWN, 5, False),
        ('{match: "model.layers.[0-4].*", bits: 8}', DOWN, 5, False),
        ('{match: "model.layers.?.mlp.*", bits: 8}', DOWN, 5, True),
        ('{layers: "5", bits: 8}', DOWN, 5, True),
        ('{layers: "0-4", bits: 8}', DOWN, 5, False),
        ('{layers: "0-5", bits: 8}', DOWN, 5, True),
        ('{layers: "0,3,5-7", bits: 8}', DOWN, 6, True),
        ('{layers: "0,3,5-7", bits: 8}', DOWN, 4, False),
        ('{layers: "5", kind: up_proj, bits: 8}', DOWN, 5, False),
        ('{layers: "5", kind: down_proj, match: "model.*", bits: 8}', DOWN, 5, True),
        ("{bits: 8}", DOWN, 5, True),
    ],
)
def test_what_a_rule_picks(rule: str, name: str, layer: int, applies: bool, tmp_path: Path) -> None:
    expected = Scheme(8, 128, False) if applies else DEFAULT
    assert resolved(tmp_path, f"- {rule}", name, layer) == expected


def test_the_last_rule_that_matches_decides(tmp_path: Path) -> None:
    rules = "- {kind: down_proj, bits: 8}\n- {kind: down_proj, bits: 3}\n- {kind: up_proj, bits: 2}"
    assert resolved(tmp_path, rules, DOWN) == Scheme(3, 128, False)


def test_fields_that_a_rule_leaves_out_come_from_the_rules_before_it(tmp_path: Path) -> None:
    rules = "- {kind: down_proj, bits: 8, group_size: 32}\n- {match: '*', symmetric: true}"
    assert resolved(tmp_path, rules, DOWN) == Scheme(8, 32, True)
    assert resolved(tmp_path, rules, UP) == Scheme(4, 128, True)


def test_keep_leaves_a_linear_in_16_bit_until_a_later_rule_quantizes_it(tmp_path: Path) -> None:
    keep = '- {match: "model.layers.5.*", keep: 16bit}\n'
    assert resolved(tmp_path, keep, DOWN) is None
    assert resolved(tmp_path, keep, "model.layers.50.mlp.down_proj") == DEFAULT
    assert resolved(tmp_path, keep + "- {kind: down_proj, bits: 8}", DOWN) == Scheme(8, 128, False)
    assert resolved(tmp_path, keep + "- {kind: down_proj, bits: 8}", UP) is None
    assert resolved(tmp_path, keep + "- {kind: down_proj, method: awq}", DOWN) is None  # which says nothing of bits
    named = recipe(tmp_path, "rules:\n- {kind: lm_head, method: gptq}")
    assert resolver(named, DEFAULT)("lm_head", -1) == DEFAULT  # a head is quantized when it is named
    kept = recipe(tmp_path, "rules:\n- {kind: lm_head, keep: 16bit}\n- {kind: lm_head, method: gptq}")
    assert resolver(kept, DEFAULT)("lm_head", -1) is None


def test_whole_rows(tmp_path: Path) -> None:
    assert resolved(tmp_path, "- {group_size: -1}", DOWN) == Scheme(4, -1, False)


def test_a_recipe_may_be_empty(tmp_path: Path) -> None:
    assert recipe(tmp_path, "") == Recipe()
    assert resolver(Recipe(), DEFAULT)(DOWN, 5) == DEFAULT


@given(
    parts=st.lists(st.tuples(st.integers(0, 99), st.integers(0, 9)), min_size=1, max_size=5), layer=st.integers(0, 120)
)
def test_layer_ranges_hold_exactly_their_numbers(parts: list[tuple[int, int]], layer: int) -> None:
    text = ",".join(str(low) if more == 0 else f"{low}-{low + more}" for low, more in parts)
    expected = any(low <= layer <= low + more for low, more in parts)
    assert Rule(layers=text, bits=8).applies(DOWN, layer) == expected


def bomb(first: str, more: str) -> str:
    """A file whose every line holds the line before it twice."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    lines = [f"{name}: &{name} {more.format(before)}" for before, name in pairwise(letters)]
    return "\n".join([f"a: &a {first}", *lines])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("default: {bits: 4}\ndefault: {bits: 8}", ["line 2", "'default' is there twice"]),
        ("rules:\n- {kind: a,\n   kind: b}", ["line 3", "'kind' is there twice"]),
        ("rules:\n- {kind: a, bitz: 4}", ["rules.0.bitz", "did you mean bits?"]),
        ("rules:\n- {bits: 4}\n- {bits: 9}", ["line 3", "rules.1.bits", "7 or 8", "got 9"]),
        ("rules:\n- {bits: '4'}", ["rules.0.bits", "'4'"]),
        ("rules:\n- {bits: true}", ["rules.0.bits"]),
        ("rules:\n- {group_size: 0}", ["rules.0.group_size", "positive number", "got 0"]),
        ("rules:\n- {group_size: -2}", ["rules.0.group_size"]),
        ("rules:\n- {group_size: 12.5}", ["rules.0.group_size"]),
        ("rules:\n- {symmetric: 'no'}", ["rules.0.symmetric"]),
        ("rules:\n- {keep: 8bit}", ["rules.0.keep", "16bit", "8bit"]),
        ("rules:\n- {layers: 5}", ["rules.0.layers", "5"]),
        ("rules:\n- {layers: 'a-b'}", ["rules.0.layers", "layer numbers", "a-b"]),
        ("rules:\n- {layers: '7-3'}", ["rules.0.layers", "lower layer number first"]),
        ("rules:\n- {layers: ''}", ["rules.0.layers"]),
        ("rules:\n- 5", ["rules.0", "5"]),
        ("rules: 5", ["rules", "5"]),
        ("default: {bits: 16}", ["default.bits", "16"]),
        ("default: {keep: 16bit}", ["default.keep"]),
        ("layers: {}", ["layers"]),
        ("model: 5", ["model", "5"]),
        ("- a\n- b", ["file"]),
        ("just words", ["file", "just words"]),
        ("{unclosed", ["not YAML"]),
        ("a: b: c", ["not YAML"]),
        ("!!python/object/apply:os.system ['true']", ["not YAML"]),
        ("date: 2024-13-45", ["not YAML"]),
        ("[" * 5000, ["not YAML"]),
        (bomb("[x, x]", "[*{0}, *{0}]"), BOMB),
        (bomb("{x: 1}", "{{<<: [*{0}, *{0}]}}"), BOMB),
        ("rules: &r [*r]", ["line 1", "too deep"]),
        ("config: &c {a: *c}", ["line 1", "too deep"]),
        ("rules:\n- {match: 're:.{99999999999}', bits: 8}", ["line 2", "rules.0.match", "not a regular expression"]),
        (f"rules:\n- {{match: 're:{'(' * 5000}{')' * 5000}', bits: 8}}", ["line 2", "not a regular expression"]),
        ("rules:\n- {match: 're:(?R)', bits: 8}", ["line 2", "not a regular expression"]),
        (f"rules:\n- {{match: 're:{'a|' * 100_000}', bits: 8}}", ["line 2", "at most 100,000"]),
        ("budget: {memory: " + "9" * 400 + ".5GiB}", ["line 1", "budget.memory"]),
        ("x" * (2**22 + 1), ["at most 4,194,304 bytes"]),
        ("x: " + "y" * 5000, ["x", "expected one of model, "]),
    ],
)
def test_mistakes_are_told_in_one_line_with_their_place(text: str, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        recipe(tmp_path, text)
    message = str(refused.value)
    assert message.startswith(f"recipe {tmp_path / 'recipe.yaml'}")
    assert "\n" not in message
    assert len(message) < 500 + len(str(tmp_path))
    assert all(word in message for word in words), message


@pytest.mark.parametrize("text", ["(.*){1,32000}[-!]", "(.*?,?){40}[!-]", "(?:[a-z.0-9_]|[a-z.]|[a-z])*[!-]"])
def test_patterns_that_take_for_ever_are_refused(text: str, tmp_path: Path) -> None:
    endless = recipe(tmp_path, f"rules:\n- {{match: 're:{text}', bits: 8}}")
    with pytest.raises(InputError, match="takes too long"):
        resolver(endless, DEFAULT)("model.layers.1.self_attn.a_projection-of_a_long_name", 1)


def test_patterns_are_those_of_python(tmp_path: Path) -> None:
    rules = r"- {match: 're:model\.layers\.(?!5\.)\d+\..*(?<!up)_proj', bits: 8}"
    assert resolved(tmp_path, rules, DOWN.replace(".5.", ".6."), 6) == Scheme(8, 128, False)
    assert resolved(tmp_path, rules, DOWN) == DEFAULT
    assert resolved(tmp_path, rules, UP.replace(".5.", ".6."), 6) == DEFAULT


def test_the_shipped_recipes_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []

    def read(path: Path, most: int) -> bytes:
        names.append(path.name)
        return read_bytes(path, most)

    monkeypatch.setattr("quantkit.recipe.read_bytes", read)
    shipped.cache_clear()
    done("fit", "deepseek-r1-32b", "--offline")
    assert sorted(names) == sorted(path.name for path in recipes_dir().glob("*.yaml"))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"pipe: cannot be read \(expected a regular file\)"):
        read_recipe(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"none\.yaml: cannot be read"):
        read_recipe(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="cannot be read"):
        read_recipe(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(InputError, match="not YAML"):
        read_recipe(tmp_path / "bytes.yaml")


# ---------------------------------------------------------------- what engines fuse


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("self_attn.q_proj", "self_attn.k_proj"),
        ("self_attn.k_proj", "self_attn.v_proj"),
        ("mlp.gate_proj", "mlp.up_proj"),
    ],
)
@pytest.mark.parametrize("other", [None, Scheme(8, 128, False), Scheme(4, 64, False), Scheme(4, 128, True)], ids=str)
def test_linears_that_engines_fuse_need_one_scheme(first: str, second: str, other: Scheme | None) -> None:
    with pytest.raises(SchemeError) as refused:
        check_fused({first: DEFAULT, second: other}, FUSED)
    message = str(refused.value)
    assert first in message
    assert second in message
    assert "W4 g128 asym" in message
    assert ("16 bit" if other is None else str(other)) in message


def test_the_rules_that_part_what_engines_fuse_are_told_with_their_lines(tmp_path: Path) -> None:
    text = """
default: {bits: 4}
rules:
  - {layers: 0-7, group_size: 64}

  - {kind: v_proj, bits: 8}
  - {match: "*up_proj", method: awq}
"""
    parted = recipe(tmp_path, text)
    names = [f"model.layers.3.self_attn.{kind}_proj" for kind in "qkv"]
    with pytest.raises(SchemeError) as refused, explained(parted):
        check_fused({name: resolver(parted, DEFAULT)(name, 3) for name in names}, FUSED)
    assert str(refused.value) == (
        "model.layers.3.self_attn.q_proj is W4 g64 asym but model.layers.3.self_attn.v_proj is W8 g64 asym; "
        "engines fuse them, so give both one scheme "
        "(recipe: q_proj by rule 1, line 4; v_proj by rule 1, line 4 and rule 2, line 6)"
    )


def test_linears_that_engines_do_not_fuse_are_free() -> None:
    eight = Scheme(8, 128, False)
    check_fused(
        {
            "self_attn.q_proj": DEFAULT,
            "self_attn.k_proj": DEFAULT,
            "self_attn.v_proj": DEFAULT,
            "self_attn.o_proj": eight,
            "mlp.gate_proj": None,
            "mlp.up_proj": None,
            "mlp.down_proj": eight,
        },
        FUSED,
    )


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("default: {bits: 4}\nrules:\n- {bits: 4}\n# a comment\n- kind: a\n  bits: 9", 6),
        ("default: {bits: 4}\nrules:\n- {bits: 4}\n\n- kind: a\n  bitz: 4", 6),
        ("calibration:\n  samples: 4\n  seqlen: 1", 3),
        ("description: a\nlimit: 5", 2),
        ("rules:\n- {bits: 4}\n- 7", 3),
        ("rules:\n- match: 're:a('\n  bits: 4", 2),
        ("budget:\n  memory: 22GiB\n  context: soon", 3),
        ("- a", 1),
    ],
)
def test_mistakes_point_at_their_line(text: str, line: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"recipe\.yaml, line {line}: "):
        recipe(tmp_path, text)


def test_a_regular_expression_matches_the_whole_name(tmp_path: Path) -> None:
    rules = '- {match: "re:.*[.](up|down)_proj", bits: 8}'
    assert resolved(tmp_path, rules, DOWN) == Scheme(8, 128, False)
    assert resolved(tmp_path, rules, UP) == Scheme(8, 128, False)
    assert resolved(tmp_path, '- {match: "re:down_proj", bits: 8}', DOWN) == DEFAULT


def test_the_last_rule_that_names_a_method_decides(tmp_path: Path) -> None:
    said = recipe(tmp_path, "rules:\n- {method: awq}\n- {kind: down_proj, method: rtn}\n- {kind: down_proj, bits: 8}")
    method = method_resolver(said, "gptq")
    assert [method(name, 5) for name in (DOWN, UP)] == ["rtn", "awq"]
    assert method_resolver(Recipe(), "gptq")(UP, 5) == "gptq"


def test_what_a_recipe_leaves_out_is_that_of_the_model(tmp_path: Path) -> None:
    under = recipe(tmp_path, "default: {bits: 8}\ncalibration: {seqlen: 512}\nlimits: {max_ppl_increase: 0.1}")
    said = over(recipe(tmp_path, "rules: [{kind: down_proj, bits: 3}]\ncalibration: {samples: 4}"), under)
    assert (said.limits.max_ppl_increase, said.calibration.samples, said.calibration.seqlen) == (0.1, 4, 512)
    assert resolver(said, DEFAULT)(UP, 5) == DEFAULT  # the default belongs to the rules
    assert said.rule_lines == (1,)
    assert over(recipe(tmp_path, "budget: {kv: fp8}"), under).default.bits == 8


def test_rules_that_match_nothing_are_told(tmp_path: Path) -> None:
    said = recipe(
        tmp_path, "rules:\n- {kind: down_proj, bits: 8}\n- {kind: downproj, bits: 8}\n- {layers: '7', bits: 3}"
    )
    told = unmatched(said, [(DOWN, 5), (UP, 5)])
    assert len(told) == 2
    assert told[0] == "recipe rule 2, line 3 (bits: 8, kind: downproj) matches no linear; did you mean down_proj?"
    assert told[1].startswith("recipe rule 3")


def test_the_budget(tmp_path: Path) -> None:
    said = recipe(tmp_path, "budget: {memory: 22GiB, context: 16k, kv: fp8}").budget
    assert (said.memory_bytes, said.context_tokens, said.kv) == (22 * 2**30, 16384, "fp8")
    assert recipe(tmp_path, "budget: {context: 4096}").budget.context_tokens == 4096


# ---------------------------------------------------------------- what ships


def test_the_recipes_that_ship() -> None:
    names = {"demo", *(f"deepseek-r1-{size}" for size in ("1.5b", "7b", "8b", "14b", "32b", "70b"))}
    recipes = shipped()
    assert names <= set(recipes)
    for name in names:
        assert recipes[name].model
        assert recipes[name].license
    assert recipes["deepseek-r1-32b"].model == "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B"
    assert recipes["deepseek-r1-8b"].model == "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
    assert {path.suffix for path in recipes_dir().iterdir()} == {".yaml"}
