# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a model's folder: whatever its files hold, it works or is refused in one line."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantkit.errors import InputError
from quantkit.model.tokenizer import tokenizer_of
from quantkit.resources import demo_dir

Json = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_dir() / name, tmp_path / name)
    return tmp_path


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | fields), encoding="utf-8")


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        tokenizer_of(folder)()
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


def test_it_loads(folder: Path) -> None:
    assert tokenizer_of(folder)()("some words")["input_ids"]


@pytest.mark.parametrize("field", ["model", "pre_tokenizer", "normalizer", "decoder", "post_processor"])
def test_a_part_of_a_later_version_is_refused(folder: Path, field: str) -> None:
    change(folder / "tokenizer.json", **{field: {"type": "OfTomorrow"}})
    assert "no tokenizer that transformers can load" in refusal(folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b'{"version"', b"\xff\xfe\x00", b"[" * 100_000])
def test_a_damaged_vocabulary_is_refused(folder: Path, content: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    assert "copy its files anew" in refusal(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokenizer_class", 5),
        ("tokenizer_class", ["Qwen2Tokenizer"]),
        ("model_max_length", "4096"),
        ("model_max_length", [4096]),
        ("added_tokens_decoder", "none"),
        ("auto_map", "none"),
    ],
)
def test_a_field_of_another_type_is_named(folder: Path, field: str, value: object) -> None:
    change(folder / "tokenizer_config.json", **{field: value})
    assert f"tokenizer_config.json: {field}: expected" in refusal(folder)


@pytest.mark.parametrize("content", ["[]", "null", "{", ""])
def test_a_config_that_is_no_object_is_refused(folder: Path, content: str) -> None:
    (folder / "tokenizer_config.json").write_text(content)
    assert "tokenizer_config.json" in refusal(folder)


FIELDS = "bos_token eos_token extra_special_tokens padding_side model_input_names add_prefix_space tokenizer_class"
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(FIELDS.split()), VALUES, min_size=1, max_size=3))
def test_any_config_works_or_is_refused_in_one_line(folder: Path, fields: Json) -> None:
    shutil.copy(demo_dir() / "tokenizer_config.json", folder / "tokenizer_config.json")
    change(folder / "tokenizer_config.json", **fields)
    message = ""
    try:
        assert tokenizer_of(folder)()("some words")["input_ids"]
    except InputError as error:
        message = str(error)
    assert "\n" not in message


def test_a_vocabulary_of_sentencepiece_names_the_packages_that_it_needs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02")
    find_spec = importlib.util.find_spec
    absent = ("sentencepiece", "google.protobuf")
    monkeypatch.setattr("quantkit.model.tokenizer.find_spec", lambda name: None if name in absent else find_spec(name))
    assert "pip install sentencepiece protobuf" in refusal(folder)


def test_an_empty_tokenizer_is_not_taken(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "qwen.tiktoken").write_bytes(b"IQ== 0\n")
    change(folder / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    refusal(folder)


def test_a_folder_without_a_tokenizer_says_so(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer (tokenizer.json or a vocabulary)" in refusal(folder)
