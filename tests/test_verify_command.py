# SPDX-License-Identifier: Apache-2.0
"""`quantkit verify`: the figures of the run from its files, files of other tools, and what it refuses."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantkit.checkpoint.journal import locked
from quantkit.checkpoint.reader import Checkpoint, open_checkpoint
from quantkit.errors import InputError, ModelError, OutputError, QuantkitError
from quantkit.scheme import Scheme
from tests.conftest import make_qwen2, make_tokenizer
from tests.running import command, quantkit, run_process
from tests.verified import GPTQ, run, verify, write_foreign

MIXED = "rules:\n  - {kind: down_proj, bits: 8, group_size: 64}\n  - {layers: '1', match: '*.o_proj', keep: 16bit}\n"


def recorded(out: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((out / "quantkit.json").read_text())
    return document


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, qwen2: Path, ids: Path) -> Path:
    """A finished run; tests copy it."""
    out = tmp_path_factory.mktemp("finished") / "out"
    run(qwen2, out, ids)
    return out


@pytest.fixture
def out(tmp_path: Path, finished: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


def test_limits_that_cannot_be_are_told_before_the_work(out: Path) -> None:
    with pytest.raises(InputError, match="--max-kl"):
        verify(out, max_kl=-1.0, against="nowhere")


def test_windows_longer_than_the_model_are_refused(out: Path, tmp_path: Path) -> None:
    limit = json.loads((out / "config.json").read_text())["max_position_embeddings"]
    save_file({"input_ids": torch.zeros(2, limit + 1, dtype=torch.int64)}, tmp_path / "long.safetensors")
    with pytest.raises(InputError, match=f"windows of {limit + 1} tokens, but the model has {limit} positions"):
        verify(out, evaluation=str(tmp_path / "long.safetensors"))


@pytest.mark.parametrize(
    "said",
    [
        {"method": "awq"},
        {"symmetric": True},
        {"method": "gptq", "format": "gptq", "symmetric": False},
        {"method": "gptq", "bits": 3},
        {"format": "gptq_v2", "bits": 2, "symmetric": False},
        {"format": "compressed-tensors", "symmetric": True},
        {"format": "compressed-tensors", "bits": 8, "group_size": -1},
        {"format": "compressed-tensors", "mixed": True},
        {"format": "gptq", "symmetric": True, "mixed": True},
    ],
)
def test_the_whole_document_is_that_of_the_run(tmp_path: Path, qwen2: Path, ids: Path, said: dict[str, Any]) -> None:
    if said.pop("mixed", False):
        (tmp_path / "mixed.yaml").write_text(MIXED)
        said["recipe"] = tmp_path / "mixed.yaml"
    result = run(qwen2, tmp_path / "out", ids, calib=str(ids), **said)
    report = (tmp_path / "out" / "report.html").read_bytes()
    assert result["verification"]["tokens"] == 6 * 31
    assert verify(tmp_path / "out") == result == recorded(tmp_path / "out")
    assert (tmp_path / "out" / "report.html").read_bytes() == report


@pytest.mark.parametrize("method", ["rtn", "awq", "gptq"])
def test_quantizing_and_verifying_read_each_layer_of_the_original_once(
    tmp_path: Path, qwen2: Path, ids: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: Counter[str] = Counter()
    plain = Checkpoint.read

    def read(self: Checkpoint, name: str, *args: Any, **named: Any) -> Tensor:
        if self.directory == qwen2:
            seen[name] += 1
        return plain(self, name, *args, **named)

    monkeypatch.setattr(Checkpoint, "read", read)
    assert run(qwen2, tmp_path / "out", ids, calib=str(ids), method=method)["verification"]["tokens"] > 0
    layers = {name: count for name, count in seen.items() if ".layers." in name}
    assert len(layers) == sum(".layers." in name for name in open_checkpoint(qwen2).entries)
    assert {count for name, count in layers.items() if name.endswith("_proj.weight")} == {1}
    assert max(layers.values()) <= 2  # norms and biases are looked at before the first layer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tied_heads(tmp_path: Path, ids: Path, dtype: torch.dtype) -> None:
    model = make_qwen2(tmp_path / "model", tie_word_embeddings=True, dtype=dtype)
    result = run(model, tmp_path / "out", ids)
    assert verify(tmp_path / "out") == result


def test_a_run_without_verification_gets_one(tmp_path: Path, qwen2: Path, ids: Path, finished: Path) -> None:
    assert run(qwen2, tmp_path / "out", ids, verify=False)["verification"] is None
    found = verify(tmp_path / "out", evaluation=str(ids), max_ppl_increase=9.0)["verification"]
    expected = recorded(finished)["verification"]
    assert {key: found[key] for key in found if key != "fit"} == {key: expected[key] for key in found if key != "fit"}


def test_options_come_before_what_was_recorded(out: Path, tmp_path: Path, ids: Path) -> None:
    fewer = tmp_path / "fewer.safetensors"
    save_file({"input_ids": load_file(ids)["input_ids"][:2, :16].contiguous()}, fewer)
    found = verify(out, evaluation=str(fewer), max_kl=0.0, budget=2**30, context=64, kv="fp8")["verification"]
    assert found["tokens"] == 2 * 15
    assert found["limits"]["max_kl"] == 0.0
    assert (found["fit"]["budget_bytes"], found["fit"]["context"], found["fit"]["kv"]) == (2**30, 64, "fp8")
    assert found["verdict"] == "fail"
    assert "KL" in found["reasons"][0]
    assert recorded(out)["verification"] == found


def test_text_is_cut_as_it_was_in_the_run(tmp_path: Path) -> None:
    model = make_qwen2(tmp_path / "model", max_position_embeddings=64)
    make_tokenizer(model)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 100)
    result = run(model, tmp_path / "out", text, seqlen=32)
    assert "all windows" in result["verification"]["eval"]["protocol"]
    assert verify(tmp_path / "out") == result
    assert verify(tmp_path / "out", seqlen=64, eval_samples=3)["verification"]["tokens"] == 3 * 63
    text.unlink()
    instead = verify(tmp_path / "out", eval_samples=2)["verification"]["eval"]
    assert instead["source"] == "eval"
    assert str(text) in instead["notes"][-1]


def test_a_flipped_byte_is_told_and_fails_until_it_is_mended(out: Path) -> None:
    before = recorded(out)
    shard = out / "model-00003-of-00004.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for _ in range(2):
        found = verify(out)["verification"]
        assert found["verdict"] == "fail"
        assert [shard.name in reason for reason in found["reasons"]] == [True]
        assert recorded(out)["verification"] == found
    assert shard.name in (out / "report.html").read_text()
    shard.write_bytes(whole)
    assert verify(out) == before


def test_a_damaged_shard_fails_without_figures(out: Path) -> None:
    shard = out / "model-00002-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    (out / "tokenizer.json").unlink()
    found = verify(out)["verification"]
    assert found["verdict"] == "fail"
    assert found["perplexity"] is found["kl_divergence"] is None
    told = " ".join(found["reasons"])
    assert f"{shard.name} is not the file" in told
    assert "tokenizer.json is missing" in told
    assert "cannot be measured" in told
    assert "not measured" in (out / "report.html").read_text()


def test_a_shard_beside_the_list_fails(out: Path) -> None:
    shutil.copy(out / "model-00002-of-00004.safetensors", out / "model-00009-of-00004.safetensors")
    assert "model-00009-of-00004.safetensors" in verify(out)["verification"]["reasons"][0]


def no_config(out: Path) -> None:
    (out / "config.json").unlink()


def other_model(out: Path) -> None:
    raw = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(raw | {"num_attention_heads": 8}))


def not_quantized(out: Path) -> None:
    raw = json.loads((out / "config.json").read_text())
    del raw["quantization_config"]
    (out / "config.json").write_text(json.dumps(raw))


def lacks_a_shard(out: Path) -> None:
    (out / "model-00002-of-00004.safetensors").unlink()


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (no_config, "config.json"),
        (other_model, "num_attention_heads"),
        (not_quantized, "quantization_config"),
        (lacks_a_shard, "model-00002"),
    ],
)
def test_foreign_folders_that_cannot_be_measured(
    out: Path, qwen2: Path, ids: Path, spoil: Callable[[Path], None], told: str
) -> None:
    for name in ("quantkit.json", "journal.jsonl"):
        (out / name).unlink()
    spoil(out)
    with pytest.raises(ModelError, match=told):
        verify(out, against=str(qwen2), evaluation=str(ids))


def refuses(error: type[QuantkitError], told: str, out: Path, **said: Any) -> None:
    with pytest.raises(error, match=told) as caught:
        verify(out, **said)
    assert "\n" not in str(caught.value)


def test_the_original_must_be_known_there_and_unchanged(tmp_path: Path, ids: Path) -> None:
    model, out = make_qwen2(tmp_path / "model"), tmp_path / "out"
    result = run(model, out, ids)
    model.rename(tmp_path / "moved")
    refuses(ModelError, "--against", out)
    assert verify(out, against=str(tmp_path / "moved")) == result
    make_qwen2(model, seed=1)
    refuses(ModelError, "not as it was.*--against", out)
    other = verify(out, against=str(model))["verification"]
    assert other["perplexity"] == result["verification"]["perplexity"]
    assert other["perplexity_fp16"] != result["verification"]["perplexity_fp16"]
    for name in ("quantkit.json", "journal.jsonl"):
        (out / name).unlink()
    refuses(ModelError, "--against", out, evaluation=str(ids))


def test_folders_that_are_not_finished_or_not_there(out: Path, tmp_path: Path) -> None:
    (out / "quantkit.json").unlink()
    refuses(OutputError, "unfinished", out)
    refuses(ModelError, "no such folder", tmp_path / "nowhere")


def test_evaluations_that_cannot_be_had(out: Path) -> None:
    refuses(InputError, r"nowhere\.txt", out, evaluation="nowhere.txt")
    refuses(InputError, "128 positions", out, evaluation="eval", seqlen=256)


def test_a_length_that_a_file_of_windows_leaves_out_is_told(out: Path) -> None:
    evaluated = verify(out, seqlen=16)["verification"]["eval"]
    assert evaluated["seqlen"] == 32
    assert evaluated["notes"] == ["--seqlen 16 was left out here: the file is used as it is, 6 x 32 tokens"]


def test_names_that_leave_the_folder_are_refused(out: Path) -> None:
    document = recorded(out)
    document["files"][0]["name"] = "../../etc/passwd"
    (out / "quantkit.json").write_text(json.dumps(document))
    refuses(OutputError, "passwd", out)


def test_exit_codes_and_json(out: Path) -> None:
    passed = quantkit("verify", str(out), "--device", "cpu", "--json")
    assert passed.returncode == 0, passed.stderr
    assert json.loads(passed.stdout) == recorded(out)
    shard = out / "model-00004-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x00")
    failed = quantkit("verify", str(out), "--device", "cpu")
    assert failed.returncode == 3, failed.stderr
    assert shard.name in failed.stdout
    assert "FAIL" in failed.stdout


def test_peak_memory_does_not_grow_with_depth(tmp_path: Path, ids: Path) -> None:
    """Twenty more layers of 9 MB in float32 would show."""
    peaks = []
    for layers in (4, 24):
        model, foreign = tmp_path / f"model-{layers}", tmp_path / f"foreign-{layers}"
        make_qwen2(model, layers=layers, hidden_size=512, intermediate_size=1024, num_attention_heads=8)
        write_foreign(foreign, model, "gptq", Scheme(4, 32, True), GPTQ)
        words = ["--against", str(model), "--eval", str(ids), "--max-ppl-increase", "900%", "--json"]
        found = run_process(command("verify", str(foreign), *words))
        assert found.returncode in (0, 3), found.stderr  # a random model predicts nothing
        peaks.append(json.loads(found.stdout)["peak_rss_bytes"])
    assert peaks[1] < 1.1 * peaks[0], peaks


def spoilt(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = recorded(out)
    change(document)
    (out / "quantkit.json").write_text(json.dumps(document))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda out: (out / "quantkit.json").write_bytes((out / "quantkit.json").read_bytes()[:200]),
    "empty": lambda out: (out / "quantkit.json").write_text(""),
    "a list": lambda out: (out / "quantkit.json").write_text("[]"),
    "deep": lambda out: (out / "quantkit.json").write_text("[" * 100_000),
    "layers": lambda out: spoilt(out, lambda d: d.pop("layers")),
    "layers.0.kind": lambda out: spoilt(out, lambda d: d["layers"][0].pop("kind")),
    "layers.1": lambda out: spoilt(out, lambda d: d["layers"].__setitem__(1, "q_proj")),
    "scheme": lambda out: spoilt(out, lambda d: d.update(scheme="W4")),
    "total_bytes": lambda out: spoilt(out, lambda d: d.update(total_bytes="many")),
    "files.0": lambda out: spoilt(out, lambda d: d["files"].__setitem__(0, 7)),
    "files": lambda out: spoilt(out, lambda d: d.update(files={"a": 1})),
    "model": lambda out: spoilt(out, lambda d: d.update(model=None)),
    "verification.eval": lambda out: spoilt(out, lambda d: d["verification"].update(eval=["eval"])),
    "verification.fit": lambda out: spoilt(out, lambda d: d["verification"].update(fit={"context": "8k"})),
    "verification.limits": lambda out: spoilt(out, lambda d: d["verification"].update(limits=3)),
    "verification": lambda out: spoilt(out, lambda d: d.update(verification="pass")),
    "fallbacks": lambda out: spoilt(out, lambda d: d.update(fallbacks="none")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_document_is_one_line_everywhere(out: Path, damage: str) -> None:
    DAMAGES[damage](out)
    for words in (["verify"], ["inspect"], ["push", "me/model", "--dry-run", "--force"], ["fit"]):
        done = quantkit(words[0], str(out), *words[1:])
        if words[0] == "fit":  # asks config.json and the files only
            assert done.returncode == 0, done.stderr
            continue
        assert done.returncode == 1, (words, done.stderr)
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("quantkit: ")
        assert "quantkit.json" in done.stderr
        assert damage in done.stderr or damage in ("truncated", "empty", "a list", "deep")


def test_fit_refuses_more_context_than_the_model_allows(out: Path, qwen2: Path) -> None:
    for model in (out, qwen2):
        done = quantkit("fit", str(model), "--group", "32", "--context", "129")
        assert done.returncode == 1
        assert "--context 129: the model allows 128 tokens" in done.stderr
        assert quantkit("fit", str(model), "--group", "32", "--context", "128").returncode == 0


@pytest.mark.parametrize("journal", [True, False])
def test_a_folder_in_use_is_left_alone(out: Path, journal: bool) -> None:
    """Also one that came from the hub, where no journal is."""
    if not journal:
        (out / "journal.jsonl").unlink()
    with locked(out):
        refuses(OutputError, "another run is writing here", out)
    assert verify(out) == recorded(out)


def test_nothing_is_left_by_a_verification_that_is_killed(out: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in out.iterdir())
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom quantkit.report.terminal.screen import Terminal\n"
        "from quantkit.pipeline import activations, measure\n"
        "from quantkit.commands.verify import VerifyRequest, verify_files\n"
        "activations.SPARE = 0.0\n"  # hidden states go to files
        "measure.relative_error = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "request = VerifyRequest(out=Path(sys.argv[1]), command='', offline=True)\n"
        "verify_files(request, Terminal(quiet=True))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, check=False)
    assert done.returncode == -9, done.stderr
    assert sorted(path.name for path in out.iterdir()) == before
    assert verify(out) == recorded(out)


def test_a_finished_run_repeated_without_verification_keeps_the_one_it_has(
    tmp_path: Path, qwen2: Path, ids: Path
) -> None:
    out = tmp_path / "out"
    before = run(qwen2, out, ids)["verification"]
    assert before is not None
    assert run(qwen2, out, ids, verify=False)["verification"] == before
    assert recorded(out)["verification"] == before
    spoilt(out, lambda document: document["files"][0].update(sha256="0" * 64))
    assert run(qwen2, out, ids, verify=False)["verification"] is None


def test_the_document_says_what_was_computed_in(out: Path) -> None:
    assert recorded(out)["verification"]["dtype"] == "float32"
    assert "computed in float32" in (out / "README.md").read_text()
    assert "float32" in (out / "report.html").read_text()
