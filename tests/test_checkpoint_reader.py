# SPDX-License-Identifier: Apache-2.0
"""Reading model folders and finding models: what is read back, and one clear line for everything that is wrong."""

import json
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from quantkit import network
from quantkit.checkpoint import reader
from quantkit.checkpoint.header import DTYPES, decode, encode
from quantkit.checkpoint.reader import fingerprint, open_checkpoint, require_finite
from quantkit.checkpoint.source import resolve
from quantkit.dtypes import torch_dtype
from quantkit.errors import ModelError, NumericsError

# ---------------------------------------------------------------------------------------------------------- reading


def random_tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Random bits, or zeros and ones for bool."""
    count = dtype.itemsize * torch.Size(shape).numel()
    return torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8).view(dtype).view(shape)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    flat = [x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


def write_raw(path: Path, header: Any, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def sharded(folder: Path, **weight_map: str) -> Path:
    """A folder with shards s1 (tensor a) and s2 (tensor b) and an index with this weight map."""
    save_file({"a": torch.ones(2)}, folder / "s1.safetensors")
    save_file({"b": torch.ones(3)}, folder / "s2.safetensors")
    weight_map = weight_map or {"a": "s1.safetensors", "b": "s2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_every_dtype_reads_as_the_library_reads_it(tmp_path: Path) -> None:
    tensors = {name: random_tensor(torch_dtype(dtype), 3, 5) for name, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4, dtype=torch.int64)}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    assert set(checkpoint.entries) == set(tensors)
    for name, tensor in expected.items():
        assert same_bits(checkpoint.read(name), tensor), name
    assert list(checkpoint.read_many(["U8", "F16"])) == ["U8", "F16"]


def test_shards_and_single_files_of_another_name(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(sharded(tmp_path))
    assert checkpoint.files == ["s1.safetensors", "s2.safetensors"]
    assert checkpoint.read("b").shape == (3,)
    other = tmp_path / "other"
    other.mkdir()
    save_file({"w": torch.ones(1)}, other / "weights.safetensors")
    assert open_checkpoint(other).read("w").item() == 1


def test_links_into_a_blob_folder_are_followed(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    save_file({"a": torch.ones(2)}, tmp_path / "blobs" / "1f00")
    (snapshot / "model.safetensors").symlink_to("../../blobs/1f00")
    checkpoint = open_checkpoint(snapshot)
    assert checkpoint.entries["a"].file == "model.safetensors"
    assert checkpoint.read("a").sum() == 2


def test_a_tensor_that_is_dropped_is_gone_from_memory(tmp_path: Path) -> None:
    program = """
import sys, torch, psutil
from pathlib import Path
from quantkit.checkpoint.reader import open_checkpoint
rss = lambda: psutil.Process().memory_info().rss
checkpoint = open_checkpoint(Path(sys.argv[1]))
checkpoint.read("small")
before = rss()
tensor = checkpoint.read("big")
held = rss() - before
del tensor
print(held, rss() - before)
"""
    big = torch.zeros(200 * 2**20, dtype=torch.uint8).view(torch.bfloat16)
    save_file({"big": big, "small": torch.ones(4)}, tmp_path / "model.safetensors")
    held, left = map(int, subprocess.check_output([sys.executable, "-c", program, str(tmp_path)]).split())
    assert 195 * 2**20 < held < 230 * 2**20  # once, not once mapped and once copied
    assert left < 10 * 2**20


# --------------------------------------------------------------------------------------------------- what is refused


def header_of(**tensors: Any) -> dict[str, Any]:
    return {name: {"dtype": d, "shape": s, "data_offsets": o} for name, (d, s, o) in tensors.items()}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (header_of(a=("F32", [2], [0, 8])), b"\0" * 7, "truncated"),
        (header_of(a=("F32", [2], [0, 8])), b"\0" * 9, "follow the last tensor"),
        (header_of(a=("F32", [2], [0, 4])), b"\0" * 4, "takes 8 bytes"),
        (header_of(a=("F32", [1], [0, 4]), b=("F32", [1], [2, 6])), b"\0" * 6, "overlaps"),
        (header_of(a=("F32", [1], [0, 4]), b=("F32", [1], [0, 4])), b"\0" * 4, "overlaps"),
        (header_of(a=("F32", [1], [0, 4]), b=("F32", [1], [8, 12])), b"\0" * 12, "hole"),
        (header_of(a=("F32", [1], [4, 8])), b"\0" * 8, "hole"),
        (header_of(a=("F32", [1], [8, 4])), b"\0" * 8, "data_offsets"),
        (header_of(a=("F32", [1], [0, True])), b"\0" * 8, "data_offsets"),
        (header_of(a=("F32", [1], [-4, 0])), b"\0" * 8, "data_offsets"),
        (header_of(a=("F32", [-1], [0, 4])), b"\0" * 4, "shape"),
        (header_of(a=("F32", [1.0], [0, 4])), b"\0" * 4, "shape"),
        (header_of(a=("F32", [0, 2**62, 2**62], [0, 0])), b"", "shape"),
        (header_of(a=("Q4", [1], [0, 4])), b"\0" * 4, "dtype 'Q4'"),
        (header_of(a=(["F32"], [1], [0, 4])), b"\0" * 4, "dtype"),
        ({"a": 3}, b"", "not described"),
        ({"a\nb": 3}, b"", "printable"),
        ([1], b"", "got list"),
        (b"nonsense", b"", "JSON object"),
        (b"\xff\xfe{}", b"", "JSON object"),
        (b"[" * 100_000, b"", "JSON object"),
        (b'{"a":' + b"9" * 5000 + b"}", b"", "JSON object"),
        (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}', b"", "JSON object"),
    ],
)
def test_damaged_headers(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    write_raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(ModelError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated"),
        (b"\x01\0\0", "truncated"),
        (struct.pack("<Q", 100) + b"{}", "truncated"),
        (struct.pack("<Q", 100_000_001) + b"{}", "header of 100000001 bytes"),
        (struct.pack("<Q", 2**64 - 1), "header of"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "git lfs pull"),
    ],
)
def test_files_that_are_not_safetensors(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        open_checkpoint(tmp_path)


numbers = st.one_of(st.integers(-1, 9), st.just(2**63), st.floats(allow_nan=False), st.none(), st.booleans())
fields = st.fixed_dictionaries(
    {"dtype": st.sampled_from([*DTYPES, "X", None])},
    optional={"shape": st.lists(numbers, max_size=3), "data_offsets": st.lists(numbers, max_size=3)},
)


@given(st.one_of(st.binary(max_size=60), st.dictionaries(st.text(max_size=3), fields, max_size=3)), st.integers(0, 40))
def test_any_header_is_decoded_or_refused(header: Any, data_bytes: int) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    try:
        spans = decode(text, data_bytes, "x")
    except ModelError as error:
        assert str(error).isprintable()  # noqa: PT017 (both outcomes are right; a message is one line)
    else:
        assert sum(span.nbytes for span in spans.values()) == data_bytes


@given(st.binary(max_size=200), st.integers(0, 150))
def test_any_bytes_of_a_file_are_opened_or_refused(tmp_path_factory: Any, content: bytes, cut: int) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    good = encode({"a": ("float16", (3,)), "b": ("uint8", (2, 2))})[0] + bytes(10)
    for damaged in (content, good[:cut], good[:cut] + content + good[cut + len(content) :]):
        (folder / "model.safetensors").write_bytes(damaged)
        try:
            checkpoint = open_checkpoint(folder)
        except ModelError as error:
            assert "\n" not in str(error)  # noqa: PT017
        else:
            checkpoint.read_many(checkpoint.entries)


@pytest.mark.parametrize(
    "name",
    ["../s1.safetensors", "/etc/s1.safetensors", "d/s1.safetensors", "..", "", "s1.bin", "a\0.safetensors", 3, None],
)
def test_an_index_names_plain_files_only(tmp_path: Path, name: Any) -> None:
    sharded(tmp_path, a=name)
    with pytest.raises(ModelError, match=r"expected a file name \*\.safetensors"):
        open_checkpoint(tmp_path)


def test_an_index_that_does_not_fit_its_shards(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"1 of 2 shards missing \(s3.safetensors\)"):
        open_checkpoint(sharded(tmp_path, a="s1.safetensors", b="s3.safetensors"))
    with pytest.raises(ModelError, match=r"expected c in s1.safetensors, which lacks it"):
        open_checkpoint(sharded(tmp_path, a="s1.safetensors", c="s1.safetensors"))
    with pytest.raises(ModelError, match=r"expected a in s2.safetensors, which lacks it"):
        open_checkpoint(sharded(tmp_path, a="s2.safetensors", b="s1.safetensors"))
    sharded(tmp_path)
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path / "s2.safetensors")
    with pytest.raises(ModelError, match=r"a is in both s1.safetensors and s2.safetensors"):
        open_checkpoint(tmp_path)
    for text in ("[]", "{}", "{", '{"weight_map": {}}', '{"weight_map": 3}'):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ModelError, match=r"index.json: expected a"):
            open_checkpoint(tmp_path)


def test_folders_without_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(ModelError, match=r"looked for model\.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match="only pickle weights"):
        open_checkpoint(tmp_path)
    with pytest.raises(ModelError, match="is a file"):
        open_checkpoint(tmp_path / "pytorch_model.bin")
    for name in ("a", "b"):
        save_file({name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ModelError, match="2 safetensors files, but neither"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ModelError, match="expected a regular file"):
        open_checkpoint(tmp_path)


def test_a_file_that_changes_after_it_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(100)}, path)
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(ModelError, match="expected a tensor named b"):
        checkpoint.read("b")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ModelError, match="ended after 350 of 400 bytes"):
        checkpoint.read("a")
    path.unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        checkpoint.read("a")


def test_the_fingerprint_sees_any_change_in_a_small_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(100)}, path)
    (tmp_path / "config.json").write_text("{}")
    before = fingerprint(open_checkpoint(tmp_path))
    assert set(before) == {"model.safetensors", "config.json"}
    assert all(value.startswith("sha256:") for value in before.values())
    assert fingerprint(open_checkpoint(tmp_path)) == before
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert fingerprint(open_checkpoint(tmp_path))["model.safetensors"] != before["model.safetensors"]


def test_a_large_file_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "HASHED_WHOLE_BYTES", 1000)
    monkeypatch.setattr(reader, "SAMPLE_BYTES", 16)
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(64_000, dtype=torch.uint8)}, path)
    good = path.read_bytes()

    def value(content: bytes) -> str:
        path.write_bytes(content)
        return fingerprint(open_checkpoint(tmp_path))["model.safetensors"]

    before = value(good)
    assert before.startswith("sampled:")
    assert value(good[:-1] + b"\1") != before  # in the last sample
    assert value(good.replace(b'"a"', b'"b"')) != before  # in the header
    assert value(good) == before


# -------------------------------------------------------------------------------------------------- finite numbers


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_values_that_are_not_finite_are_named(dtype: torch.dtype) -> None:
    tensor = torch.ones(40, 50).to(dtype)
    require_finite("w", tensor)
    tensor[3, 4] = float("nan")
    tensor[7, 4] = float("nan")
    with pytest.raises(NumericsError, match=r"w in f.safetensors: 2 of 2000 values"):
        require_finite("w", tensor, "f.safetensors")


def test_sums_that_cancel_or_overflow_do_not_mislead() -> None:
    require_finite("w", torch.full((4000,), 6e4, dtype=torch.float16))  # the sum is infinite, the values are not
    with pytest.raises(NumericsError, match="2 of 2"):
        require_finite("w", torch.tensor([float("inf"), float("-inf")]))
    require_finite("w", torch.ones(3, dtype=torch.int32))
    require_finite("w", torch.empty(0))


# ----------------------------------------------------------------------------------------------- what MODEL stands for

HUB_ID = "org/tiny"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A Hugging Face cache with a whole model, two shards behind links."""
    repository = tmp_path / "cache" / "models--org--tiny"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    build = tmp_path / "build"
    build.mkdir()
    sharded(build)
    (build / "config.json").write_text("{}")
    for number, path in enumerate(sorted(build.iterdir())):
        path.rename(repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    return tmp_path / "cache"


def snapshot_of(cache: Path) -> Path:
    return cache / "models--org--tiny" / "snapshots" / ("a" * 40)


def test_folders_recipes_and_cached_models(cache: Path, tmp_path: Path) -> None:
    recipes = {"tiny": HUB_ID, "demo": str(tmp_path)}
    for offline in (True, False):  # what is in the cache is found there without asking the network
        for name in (HUB_ID, "tiny"):
            found = resolve(name, offline=offline, recipe_models=recipes, cache_dir=cache)
            assert found == snapshot_of(cache)
            assert set(open_checkpoint(found).entries) == {"a", "b"}
    assert resolve("demo", offline=True, recipe_models=recipes) == tmp_path
    assert resolve(str(tmp_path), offline=True, recipe_models=recipes) == tmp_path
    assert resolve(HUB_ID, offline=True, revision="a" * 40, recipe_models={}, cache_dir=cache) == snapshot_of(cache)


def test_missing_models_offline(cache: Path) -> None:
    with pytest.raises(ModelError, match=r"org/other: not in the Hugging Face cache .*hf download org/other"):
        resolve("org/other", offline=True, recipe_models={}, cache_dir=cache)
    with pytest.raises(ModelError, match=r"org/tiny@v2: not in .*hf download org/tiny --revision v2"):
        resolve(HUB_ID, offline=True, revision="v2", recipe_models={}, cache_dir=cache)
    (snapshot_of(cache) / "s2.safetensors").resolve().unlink()
    with pytest.raises(ModelError, match=r"lacks s2.safetensors and offline"):
        resolve(HUB_ID, offline=True, recipe_models={}, cache_dir=cache)


def test_the_environment_can_say_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ModelError, match=str(tmp_path / "cache")):
        resolve(HUB_ID, offline=False, recipe_models={})


def test_what_looks_like_a_path_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "file").touch()
    for model in ("./x", "../x/y", "/nowhere/x", "~/no-such-model", "models/x", str(tmp_path / "x")):
        with pytest.raises(ModelError, match="no such folder"):
            resolve(model, offline=True, recipe_models={})
    with pytest.raises(ModelError, match="is a file"):
        resolve("file", offline=True, recipe_models={})
    for model in ("", "qwen", "a/b/c", "a b/c", "org/x?y", "org/x\n"):
        with pytest.raises(ModelError, match=r"not a recipe \(demo, tiny\), not a folder"):
            resolve(model, offline=True, recipe_models={"tiny": HUB_ID, "demo": str(tmp_path)})
    for model in ("x" * 300, "~no-such-user/x"):
        with pytest.raises(ModelError, match="cannot be opened"):
            resolve(model, offline=True, recipe_models={})


class Refusing(BaseHTTPRequestHandler):
    """A hub that answers every request with the server's status and error code."""

    def do_GET(self) -> None:
        status, code = self.server.answer  # type: ignore[attr-defined]
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", "no, hf_secret")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HTTPServer]:
    server = HTTPServer(("127.0.0.1", 0), Refusing)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (401, "", "HTTP 401.*hf auth login"),
        (400, "", "HTTP 400"),
        (404, "RepoNotFound", "no such model"),
        (403, "GatedRepo", "gated; accept its terms at http"),
        (404, "RevisionNotFound", "no revision main"),
        (403, "", "HTTP 403.*hf auth login"),
    ],
)
def test_a_hub_that_refuses(hub: HTTPServer, tmp_path: Path, status: int, code: str, message: str) -> None:
    hub.answer = (status, code)  # type: ignore[attr-defined]
    with pytest.raises(ModelError, match=message) as caught:
        resolve(HUB_ID, offline=False, revision="main", recipe_models={}, cache_dir=tmp_path)
    assert "\n" not in str(caught.value)
    assert "hf_secret" not in str(caught.value)
    assert caught.value.__cause__ is caught.value.__context__ is None  # where the library's own error would stand


def test_a_hub_that_stays_silent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It accepts connections and never answers."""
    monkeypatch.setattr(network, "ANSWER_SECONDS", 0.05)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.05)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the library's own tries
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        with pytest.raises(ModelError, match=r"org/tiny: .*cannot be reached"):
            resolve(HUB_ID, offline=False, recipe_models={}, cache_dir=tmp_path)


def test_a_hub_that_does_not_answer(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ModelError, match=r"org/other: .*cannot be reached"):
        resolve("org/other", offline=False, recipe_models={}, cache_dir=cache)
    (snapshot_of(cache) / "s2.safetensors").unlink()
    with pytest.raises(ModelError, match=r"s2.safetensors|cannot be reached"):
        resolve(HUB_ID, offline=False, recipe_models={}, cache_dir=cache)
