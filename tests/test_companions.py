# SPDX-License-Identifier: Apache-2.0
"""What goes along with the weights: all of the model but weights, quantization, junk, and what is huge."""

import json
import shutil
from pathlib import Path

import pytest

from quantkit.checkpoint import companions as companions_of
from quantkit.checkpoint.companions import companions, is_companion, is_file_name, left_out
from quantkit.hub.files import files_to_push
from tests.running import done, run_words

ALONG = [
    "tekken.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
    "merges.txt",
    "added_tokens.json",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "qwen.tiktoken",
    "generation_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "LICENSE",
    "NOTICE.txt",
    "USE_POLICY.md",
    "tokenization_other.py",
    "configuration_other.py",
    "normalizer.json",
    "new_thing_of_2027.json",
    "dict.txt",
]
NOT_ALONG = [
    "model.safetensors",
    "model-00001-of-00002.safetensors",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "tf_model.h5",
    "pytorch_model.bin.index.json",
    "model.gguf",
    "training_args.bin",
    "quantize_config.json",
    "hf_quant_config.json",
    "quant_config.json",
    "config.json",
    "README.md",
    "README_zh.md",
    "quantkit.json",
    "report.html",
    "journal.jsonl",
    ".gitattributes",
    "banner.PNG",
    "trainer_state.json",
    "all_results.json",
    "adapter_config.json",
    "onnx/config.json",
    "1_Pooling/config.json",
    "additional_chat_templates/a/b.jinja",
    "../x.json",
    "server.key",
    "token",
    "credentials.json",
    "original/tokenizer.model",
]


@pytest.mark.parametrize("name", ALONG)
def test_what_goes_along(name: str) -> None:
    assert is_companion(name)
    assert is_file_name(name)


@pytest.mark.parametrize("name", NOT_ALONG)
def test_what_stays(name: str) -> None:
    assert not is_companion(name)


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", ".x", "", "additional_chat_templates/../x", None, 3, "a\n"])
def test_names_that_leave_the_folder(name: object) -> None:
    assert not is_file_name(name)


def test_a_run_copies_them_and_names_the_rest(
    qwen2: Path, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(qwen2, model)
    for name in [*ALONG, *(name for name in NOT_ALONG if "safetensors" not in name and "config.json" not in name)]:
        path = model / name
        if ".." not in name and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
    (model / "onnx").mkdir()
    (model / "huge.json").write_text("x" * 2000)
    kept = {path.relative_to(model).as_posix() for path in companions(model)}
    assert kept >= set(ALONG)
    monkeypatch.setattr(companions_of, "LARGEST", 100_000)
    (model / "huge.json").write_text("x" * 200_000)
    (model / "tokenizer.model").unlink()
    (model / "tokenizer.model").symlink_to(qwen2 / "config.json")
    done(*run_words("rtn", model, out, ids, "--no-verify"))
    written = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    left = {"huge.json", "tokenizer.model"}
    assert written >= (kept - left)
    assert not written & left
    assert not written & {"training_args.bin", "banner.PNG", "tf_model.h5", "token", "README_zh.md"}
    assert (out / "tekken.json").read_bytes() == (model / "tekken.json").read_bytes()

    result = json.loads((out / "quantkit.json").read_text())
    assert {entry["name"] for entry in result["files"]} >= (kept - left)
    notes = [note for note in result["fallbacks"] if "not copied" in note]
    assert any(note.startswith("tokenizer.model is a link out of") for note in notes)
    for name in ("banner.PNG", "README_zh.md", "and "):
        assert any(name in note for note in notes)

    uploads = {upload.name for upload in files_to_push(out)}
    assert uploads >= (kept - left)
    done(*run_words("rtn", qwen2, out, ids, "--no-verify", "--fresh"))
    assert not (out / "tekken.json").exists()  # of the other model
    assert not list((out / "additional_chat_templates").glob("*"))


def test_nothing_is_said_where_nothing_is_left_out(qwen2: Path) -> None:
    assert left_out(qwen2) == []
