# SPDX-License-Identifier: Apache-2.0
"""A model of the hub: what it is and whether it can be is known from small files and headers, before any weights."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from quantkit.errors import ModelError
from quantkit.settings.defaults import find_source
from tests.conftest import make_tokenizer
from tests.fake_hub import FakeHub, Repository, Stored
from tests.running import Answer, done, quantkit, run_words
from tests.tiny import save_tiny

REPO = "org/tiny"
Publish = Callable[[Path], None]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with FakeHub() as fake:
        monkeypatch.setattr(constants, "ENDPOINT", fake.endpoint)
        template = fake.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.chdir(tmp_path)
        yield fake
        getattr(huggingface_hub, "close_session", lambda: None)()


@pytest.fixture
def publish(hub: FakeHub) -> Publish:
    def publish(folder: Path) -> None:
        files = {
            path.relative_to(folder).as_posix(): Stored(path.read_bytes(), large=path.suffix == ".safetensors")
            for path in folder.rglob("*")
            if path.is_file()
        }
        hub.repos[REPO] = Repository(private=False)
        hub.repos[REPO].commit("main", files)

    return publish


def weights(hub: FakeHub) -> list[str]:
    """The weights of which all was asked for."""
    return [name for name in hub.whole if name.endswith((".safetensors", ".bin"))]


def spoil_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_fit_downloads_no_weights(hub: FakeHub, publish: Publish, qwen2: Path) -> None:
    publish(qwen2)
    there = json.loads(done("fit", REPO, "--group", "32", "--budget", "1GiB", "--json").stdout)
    here = json.loads(done("fit", str(qwen2), "--group", "32", "--budget", "1GiB", "--json").stdout)
    assert weights(hub) == []
    assert there | {"name": ""} == here | {"name": ""}


def test_fit_of_a_quantized_model_on_the_hub(
    hub: FakeHub, publish: Publish, qwen2: Path, ids: Path, tmp_path: Path
) -> None:
    done(*run_words("rtn", qwen2, tmp_path / "out", ids, "--no-verify"))
    publish(tmp_path / "out")
    there = json.loads(done("fit", REPO, "--budget", "1GiB", "--json").stdout)
    here = json.loads(done("fit", str(tmp_path / "out"), "--budget", "1GiB", "--json").stdout)
    assert weights(hub) == []
    assert there | {"name": ""} == here | {"name": ""}


def missing_tensor(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(path)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"][name]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def other_shape(folder: Path) -> None:
    spoil_config(folder, intermediate_size=64)


def encoder_decoder(folder: Path) -> None:
    spoil_config(folder, is_encoder_decoder=True)


def quantized_already(folder: Path) -> None:
    spoil_config(folder, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 32})


def pickled(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")


def adapter(folder: Path) -> None:
    for path in [*folder.glob("model*"), folder / "config.json"]:
        path.unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")


REFUSED = [
    (missing_tensor, [], "is missing; config.json asks for"),
    (other_shape, [], "has shape"),
    (encoder_decoder, [], "is an encoder-decoder"),
    (quantized_already, [], "already quantized"),
    (pickled, [], "only pickle weights"),
    (adapter, [], "LoRA adapter of org/base; merge it into its model first"),
    (lambda folder: None, ["--group", "48"], "group_size 48"),
    (lambda folder: None, ["--for", "sglang", "--format", "compressed-tensors", "--w-bit", "3"], "SGLang"),
    (lambda folder: None, ["--calib", "nowhere.txt"], "nowhere.txt"),
]


@pytest.mark.parametrize(("spoil", "more", "told"), REFUSED, ids=lambda value: getattr(value, "__name__", str(value)))
def test_what_cannot_be_is_refused_before_weights(
    hub: FakeHub, publish: Publish, qwen2: Path, ids: Path, tmp_path: Path, spoil: Any, more: list[str], told: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(qwen2, model)
    spoil(model)
    publish(model)
    refused = quantkit(*run_words("awq", Path(REPO), tmp_path / "out", ids, *more))
    assert refused.returncode == 1
    assert told in refused.stderr
    assert "Traceback" not in refused.stderr
    assert weights(hub) == []
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    assert told in quantkit(*run_words("awq", model, tmp_path / "out", ids, *more)).stderr  # as of a folder


@pytest.mark.parametrize("single", [False, True])
def test_a_run_of_a_hub_id_equals_that_of_a_folder(
    hub: FakeHub, publish: Publish, qwen2: Path, ids: Path, tmp_path: Path, single: bool
) -> None:
    model = qwen2
    if single:
        model = save_tiny(tmp_path / "model", "qwen2", hidden_size=64, intermediate_size=128)
        make_tokenizer(model)
    (folder := tmp_path / "published").mkdir()
    shutil.copytree(model, folder, dirs_exist_ok=True)
    for name in ("tekken.json", "additional_chat_templates/tool.jinja", "onnx/model.onnx", "banner.png", "old.bin"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    publish(folder)
    done(*run_words("rtn", Path(REPO), tmp_path / "there", ids, "--no-verify"))
    done(*run_words("rtn", model, tmp_path / "here", ids, "--no-verify"))
    for path in (tmp_path / "here").glob("*.safetensors"):
        assert (tmp_path / "there" / path.name).read_bytes() == path.read_bytes()
    assert (tmp_path / "there" / "tekken.json").is_file()
    assert (tmp_path / "there" / "additional_chat_templates" / "tool.jinja").is_file()
    assert not {"onnx/model.onnx", "banner.png", "old.bin"} & set(hub.whole)
    result = json.loads((tmp_path / "there" / "quantkit.json").read_text())
    assert result["base_model"] == {"id": REPO, "license": "mit"}

    hub.whole.clear()
    done(*run_words("rtn", Path(REPO), tmp_path / "again", ids, "--no-verify"))
    assert hub.whole == []  # all was in the cache


def test_a_download_goes_on_with_the_commit_that_it_began_with(hub: FakeHub, publish: Publish, qwen2: Path) -> None:
    publish(qwen2)
    source = find_source(REPO, offline=False)
    repo = hub.repos[REPO]
    files = dict(repo.commits[repo.branches["main"]])
    repo.commit("main", {**files, "config.json": Stored(b"{}", large=False)})
    folder = find_source(REPO, offline=False).fetch()
    assert folder == source.directory
    assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen2"
    assert sorted(path.name for path in folder.glob("*.safetensors")) == sorted(
        path.name for path in qwen2.glob("*.safetensors")
    )


def test_weights_for_which_there_is_no_room(
    hub: FakeHub, publish: Publish, qwen2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(qwen2)
    source = find_source(REPO, offline=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: _Usage())
    with pytest.raises(ModelError, match=r"KiB are to be downloaded to .*, where 1.00 KiB are free; make room"):
        source.fetch()
    assert weights(hub) == []


class _Usage:
    free = 1024


def test_what_offline_can_say(hub: FakeHub, publish: Publish, qwen2: Path) -> None:
    publish(qwen2)
    find_source(REPO, offline=False)
    hub.calls.clear()
    done("fit", REPO, "--group", "32", "--budget", "1GiB", "--offline")
    with pytest.raises(ModelError, match=r"lacks model-.* and offline; run `hf download org/tiny`"):
        find_source(REPO, offline=True).fetch()
    assert not hub.calls


def test_a_hub_that_fails_between_the_steps(
    hub: FakeHub, publish: Publish, qwen2: Path, ids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the library's own tries
    publish(qwen2)
    hub.fail("resolve", 500, times=1000)
    answer: Answer = quantkit(*run_words("rtn", Path(REPO), Path("out"), ids))
    assert answer.returncode == 1
    assert "org/tiny: " in answer.stderr
    assert "Traceback" not in answer.stderr
