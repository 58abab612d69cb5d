# SPDX-License-Identifier: Apache-2.0
"""What the system holds against a command: names, links, pipes, variables of a cluster, terminals."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from quantkit.errors import ModelError
from quantkit.gguf.file import open_gguf
from quantkit.hardware.launch import Launch, launch
from tests.conftest import make_qwen2, make_tokenizer
from tests.foreign import edit, foreign
from tests.running import command, done, quantkit, run_process, run_words

LONG = "x" * 300


def assert_one_line(words: list[str], told: str) -> None:
    refused = quantkit(*words)
    assert refused.returncode == 1, refused.stderr
    last = refused.stderr.strip().splitlines()[-1]
    assert last.startswith("quantkit: ")
    assert told in last
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize("name", [LONG, f"{LONG}/x", "loop", "loop/x"])
def test_names_that_the_system_refuses(
    tmp_path: Path, qwen2: Path, ids: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loop").symlink_to("back")
    (tmp_path / "back").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    for words in (
        run_words("rtn", qwen2, Path(name), ids),
        ["convert", name, "--to", "fp16"],
        ["verify", name],
        ["inspect", name],
        ["fit", name],
        ["fit", "demo", "--picture", f"{name}.html"],
        ["sweep", str(qwen2), "--calib", str(ids), "--eval", str(ids), "--group", "32", "--out", name],
        ["push", name, "org/name", "--dry-run"],
        ["rtn", "demo", "--recipe", name],
    ):
        if words[:2] != ["fit", "demo"] or "loop" not in name:
            assert_one_line(words, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "loop"]


def test_names_in_bytes_that_are_no_text(tmp_path: Path, qwen2: Path, ids: Path) -> None:
    out = tmp_path / os.fsdecode(b"\xff\xfe")
    done(*run_words("rtn", qwen2, out, ids))
    assert os.fsdecode(b"\xff\xfe") in json.loads((out / "quantkit.json").read_text())["command"]
    done("inspect", str(out))
    done("verify", str(out))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json", "more.model"])
def test_a_pipe_in_a_models_folder(tmp_path: Path, ids: Path, name: str) -> None:
    model = make_qwen2(tmp_path / "model")
    make_tokenizer(model)
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    assert_one_line(run_words("rtn", model, tmp_path / "out", ids), name)


@pytest.mark.parametrize("name", ["config.json", "quantkit.json", "journal.jsonl", "model.safetensors"])
def test_a_pipe_in_a_quantized_folder(tmp_path: Path, qwen2: Path, name: str) -> None:
    foreign(tmp_path / "packed")
    (tmp_path / "packed" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "packed" / name)
    packed = str(tmp_path / "packed")
    for words in (["inspect", packed], ["fit", packed], ["verify", packed, "--against", str(qwen2)]):
        assert_one_line(words, "")


def gguf(metadata: bytes, keys: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, 0, keys) + metadata


def key(name: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    "value",
    [
        key("general.alignment", 4, struct.pack("<I", 0)),
        key("general.alignment", 5, struct.pack("<i", -32)),
        key("general.alignment", 6, struct.pack("<f", float("nan"))),
        key("general.alignment", 9, struct.pack("<IQI", 4, 1, 32)),
        key("general.alignment", 8, struct.pack("<Q", 2) + b"32"),
    ],
)
def test_an_alignment_that_is_none(tmp_path: Path, value: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf(value, 1))
    with pytest.raises(ModelError, match=r"general.alignment: expected a positive number"):
        open_gguf(path)
    assert_one_line(["inspect", str(path)], "general.alignment")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_labels": 2**31}, "num_labels"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"text_config": {"num_labels": 2**31}}, "num_labels"),
        ({"vocab_size": 2**70}, "vocab_size"),
    ],
)
def test_numbers_that_would_fill_the_memory(tmp_path: Path, ids: Path, changes: dict[str, Any], told: str) -> None:
    model = make_qwen2(tmp_path / "model")
    edit(model, lambda raw: raw.update(changes))
    assert_one_line(run_words("rtn", model, tmp_path / "out", ids), told)
    assert_one_line(["fit", str(model)], told)
    foreign(tmp_path / "packed")
    edit(tmp_path / "packed", lambda raw: raw.update(changes))
    for words in (["inspect"], ["fit"]):
        assert_one_line([*words, str(tmp_path / "packed")], told)


def test_outputs_that_a_config_asks_for_change_nothing(tmp_path: Path, ids: Path) -> None:
    model = make_qwen2(tmp_path / "model")
    done(*run_words("gptq", model, tmp_path / "usual", ids))
    asked = {"return_dict": False, "output_hidden_states": True, "output_attentions": True, "torchscript": True}
    edit(model, lambda raw: raw.update(asked))
    done(*run_words("gptq", model, tmp_path / "asked", ids))
    usual, other = (json.loads((tmp_path / name / "quantkit.json").read_text()) for name in ("usual", "asked"))
    assert usual["verification"]["perplexity"] == other["verification"]["perplexity"]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Launch()),
        ({"RANK": "3", "WORLD_SIZE": "8"}, Launch()),
        ({"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "node", "MASTER_PORT": ""}, Launch()),
        ({"RANK": "x", "WORLD_SIZE": "8", "MASTER_ADDR": "node", "MASTER_PORT": "1"}, Launch()),
        ({"RANK": "8", "WORLD_SIZE": "8", "MASTER_ADDR": "node", "MASTER_PORT": "1"}, Launch()),
        ({"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "node", "MASTER_PORT": "1"}, Launch(3, 8, 0, 8)),
        (
            {
                "RANK": "3",
                "WORLD_SIZE": "8",
                "MASTER_ADDR": "node",
                "MASTER_PORT": "1",
                "LOCAL_RANK": "1",
                "LOCAL_WORLD_SIZE": "2",
            },
            Launch(3, 8, 1, 2),
        ),
    ],
)
def test_the_processes_of_torchrun(environment: dict[str, str], expected: Launch) -> None:
    assert launch(environment) == expected


def test_a_clusters_variables_without_a_master(tmp_path: Path, qwen2: Path, ids: Path) -> None:
    words = command(*run_words("rtn", qwen2, tmp_path / "out", ids, "--no-verify"))
    alone = run_process(words, RANK="3", WORLD_SIZE="8", LOCAL_RANK="3")
    assert alone.returncode == 0, alone.stderr
    listed = run_process(command("models"), RANK="1", WORLD_SIZE="many")
    assert listed.returncode == 0, listed.stderr


@pytest.mark.parametrize("encoding", ["ascii", "ascii:strict"])
def test_a_terminal_that_cannot_show_every_character(tmp_path: Path, qwen2: Path, ids: Path, encoding: str) -> None:
    words = command(*run_words("rtn", qwen2, tmp_path / "out", ids, "--json"))
    finished = run_process(words, PYTHONIOENCODING=encoding)
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout)["verification"]["verdict"] == "pass"
    assert "Traceback" not in finished.stderr
