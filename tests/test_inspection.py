# SPDX-License-Identifier: Apache-2.0
"""`quantkit inspect`: what runs wrote down, and what other tools' files say."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from quantkit.commands.inspect import inspect_folder
from quantkit.errors import ModelError, OutputError
from quantkit.records import Foreign, Result
from quantkit.report.terminal.inspect import inspect_table
from quantkit.scheme import Scheme
from tests.foreign import edit, foreign, run, shuffled, tensors, to

W4 = Scheme(4, 32, True)


def shown(result: Result | Foreign) -> str:
    text = io.StringIO()
    Console(width=250, file=text).print(inspect_table(result))
    return text.getvalue()


@pytest.mark.parametrize("fmt", ["awq", "gptq", "gptq_v2", "compressed-tensors"])
def test_other_tools_files(tmp_path: Path, fmt: str) -> None:
    schemes = {"down_proj": Scheme(8, 64, True)} if fmt != "awq" else {}
    scheme = Scheme(4, 32, fmt != "awq")
    kept = ("model.layers.1.self_attn.o_proj",)
    held = foreign(tmp_path / "out", fmt, scheme, schemes=schemes, kept=kept)
    result = inspect_folder(tmp_path / "out")
    state = tensors(tmp_path / "out")
    assert isinstance(result, Foreign)
    assert {row.name: row.scheme for row in result.layers} == {name: q.scheme for name, q in held.items()}
    for row in result.layers:
        own = [t for n, t in state.items() if n.startswith(f"{row.name}.") and not n.endswith(".bias")]
        assert row.bytes == sum(t.numel() * t.element_size() for t in own)
    assert result.kept == [*kept, "lm_head"]
    assert result.format == fmt
    assert result.tensor_bytes == sum(t.numel() * t.element_size() for t in state.values())
    json.dumps(result.content())
    assert "model.layers.1.self_attn.o_proj" in shown(result)


def test_who_made_it_and_act_order(tmp_path: Path) -> None:
    foreign(tmp_path / "out", "gptq", W4, change=shuffled)
    edit(tmp_path / "out", lambda raw: raw["quantization_config"].update(meta={"quantizer": "gptqmodel:7.7.0"}))
    result = inspect_folder(tmp_path / "out")
    assert isinstance(result, Foreign)
    assert (result.made_by, result.act_order) == ("gptqmodel:7.7.0", True)
    assert "gptqmodel:7.7.0" in shown(result)
    assert "desc_act" in shown(result)


def test_our_own_and_converted_folders(tmp_path: Path, qwen2: Path) -> None:
    written = run(qwen2, tmp_path / "awq")
    assert inspect_folder(tmp_path / "awq").content() == written
    foreign(tmp_path / "theirs")
    to(tmp_path / "theirs", "gptq_v2", tmp_path / "gptq")
    text = shown(inspect_folder(tmp_path / "gptq"))
    assert "converted from" in text
    assert "awq, made by" in text
    to(tmp_path / "theirs", "fp16", tmp_path / "fp16")
    assert "fp16" in shown(inspect_folder(tmp_path / "fp16"))


def test_what_is_no_checkpoint(tmp_path: Path, qwen2: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        inspect_folder(tmp_path / "nothing")
    with pytest.raises(ModelError, match="no quantization_config"):
        inspect_folder(qwen2)
    (tmp_path / "journal.jsonl").touch()
    with pytest.raises(OutputError, match="unfinished"):
        inspect_folder(tmp_path)


def test_inspecting_safetensors_imports_no_torch() -> None:
    code = "import sys, quantkit.commands.inspect; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
