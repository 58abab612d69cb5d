# SPDX-License-Identifier: Apache-2.0
"""Writing: the bytes, their exact size in advance, and that a file is whole or not there."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from quantkit.checkpoint.header import DTYPES
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.writer import (
    copy_file,
    require_disk,
    shard_bytes,
    shard_name,
    write_chunks,
    write_index,
    write_json,
    write_shard,
    write_text,
)
from quantkit.dtypes import torch_dtype
from quantkit.errors import ModelError, NumericsError, OutputError


def test_the_bytes_are_those_of_the_safetensors_library(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"layers.{layer}.{name}": torch.randint(0, 2, (3, layer), generator=generator).to(torch_dtype(dtype))
        for layer in range(3)
        for name, dtype in DTYPES.items()
    }
    tensors["scalar"] = torch.tensor(1.5)
    save_file(tensors, tmp_path / "library.safetensors", metadata={"format": "pt"})
    digest = write_shard(tmp_path / "ours.safetensors", dict(reversed(tensors.items())))
    ours = (tmp_path / "ours.safetensors").read_bytes()
    assert ours == (tmp_path / "library.safetensors").read_bytes()
    assert digest == hashlib.sha256(ours).hexdigest()


def test_golden_bytes(tmp_path: Path) -> None:
    tensors = {"b": torch.tensor([1, 2], dtype=torch.uint8), "a": torch.tensor([[1.0]], dtype=torch.float16)}
    write_shard(tmp_path / "x.safetensors", tensors)
    header = (
        b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F16","shape":[1,1],"data_offsets":[0,2]},'
        b'"b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}'
    )
    padded = header + b" " * (-len(header) % 8)
    assert (tmp_path / "x.safetensors").read_bytes() == len(padded).to_bytes(8, "little") + padded + b"\x00\x3c\x01\x02"


def test_views_and_transposes_are_written_as_their_values(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    tensors = {"t": base.T, "row": base[1], "column": base[:, 1], "same": base, "grad": base.clone().requires_grad_()}
    write_shard(tmp_path / "model.safetensors", tensors)
    loaded, checkpoint = load_file(tmp_path / "model.safetensors"), open_checkpoint(tmp_path)
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)
        assert torch.equal(checkpoint.read(name), tensor)


def test_a_dtype_that_safetensors_lacks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not hold complex64"):
        write_shard(tmp_path / "x", {"a": torch.empty(2, dtype=torch.complex64)})
    assert not list(tmp_path.iterdir())


specs = st.dictionaries(
    st.text(st.characters(min_codepoint=32, max_codepoint=0x2FFF), min_size=1, max_size=40),
    st.tuples(st.sampled_from(list(DTYPES.values())), st.lists(st.integers(0, 12), max_size=3).map(tuple)),
    max_size=30,
)


@given(specs)
def test_the_size_is_known_from_shapes_alone(tmp_path_factory: pytest.TempPathFactory, specs: dict) -> None:  # type: ignore[type-arg]
    path = tmp_path_factory.getbasetemp() / "size.safetensors"
    write_shard(path, {name: torch.zeros(shape, dtype=torch_dtype(dtype)) for name, (dtype, shape) in specs.items()})
    assert path.stat().st_size == shard_bytes(specs)


def test_shard_bytes_of_a_whole_model_needs_no_memory() -> None:
    specs = {f"model.layers.{i}.w": ("bfloat16", (27648, 5120)) for i in range(1000)}
    assert shard_bytes(specs) - 1000 * 27648 * 5120 * 2 == pytest.approx(100_000, rel=0.2)  # the header


def test_names_and_index(tmp_path: Path) -> None:
    assert shard_name(1, 66) == "model-00001-of-00066.safetensors"
    write_shard(tmp_path / shard_name(1, 2), {"b": torch.ones(2)})
    write_shard(tmp_path / shard_name(2, 2), {"a": torch.ones(3)})
    write_index(tmp_path, {"b": shard_name(1, 2), "a": shard_name(2, 2)}, total_size=20)
    assert (tmp_path / "model.safetensors.index.json").read_text() == (
        '{\n  "metadata": {\n    "total_size": 20\n  },\n  "weight_map": {\n'
        '    "a": "model-00002-of-00002.safetensors",\n    "b": "model-00001-of-00002.safetensors"\n  }\n}\n'
    )
    assert set(open_checkpoint(tmp_path).entries) == {"a", "b"}


def test_small_files_and_their_permissions(tmp_path: Path) -> None:
    previous = os.umask(0o077)
    try:
        written = {
            "text": write_text(tmp_path / "text", "模型\n"),
            "json": write_json(tmp_path / "json", {"b": 1, "a": "型"}),
            "bytes": write_chunks(tmp_path / "bytes", [b"\0\r\n"]),
            "copy": copy_file(tmp_path / "text", tmp_path / "copy"),
            "shard": write_shard(tmp_path / "shard", {}),
        }
    finally:
        os.umask(previous)
    for name, digest in written.items():
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o644
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest
    assert (tmp_path / "json").read_text() == '{\n  "b": 1,\n  "a": "型"\n}\n'
    assert (tmp_path / "copy").read_text() == "模型\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(written)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(NumericsError, match="not JSON compliant"):
        write_json(tmp_path / "x", {"loss": float("nan")})
    with pytest.raises(OutputError, match=r"x cannot be written: No such file or directory"):
        write_text(tmp_path / "nothing" / "x", "")
    with pytest.raises(ModelError, match="cannot be read"):
        copy_file(tmp_path / "nothing", tmp_path / "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="Is a directory"):
        write_text(tmp_path / "folder", "")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_folder_without_permission(tmp_path: Path) -> None:
    program = """
import os, sys
from pathlib import Path
from quantkit.checkpoint.writer import write_text
from quantkit.dtypes import torch_dtype
from quantkit.errors import OutputError
folder = Path(sys.argv[1])
folder.chmod(0o555)
if os.geteuid() == 0:
    os.setegid(65534), os.seteuid(65534)
try:
    write_text(folder / "x", "")
except OutputError as error:
    print(error)
"""
    tmp_path.chmod(0o755)
    (tmp_path / "out").mkdir()
    said = subprocess.run([sys.executable, "-c", program, tmp_path / "out"], capture_output=True, text=True, check=True)
    assert "cannot be written: Permission denied" in said.stdout


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_text(path, "old")

    def chunks() -> Iterator[bytes]:
        yield b"new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_chunks(path, chunks())
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


def test_a_temporary_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / ".x.tmp").symlink_to(tmp_path / "victim")
    write_text(tmp_path / "x", "new")
    assert (tmp_path / "victim").read_text() == "mine"
    assert not (tmp_path / "x").is_symlink()


def test_killed_in_the_middle_of_writing(tmp_path: Path) -> None:
    """The process is stopped when half of the second file is written: only whole files have their names."""
    program = """
import sys
from pathlib import Path
from quantkit.checkpoint.writer import write_chunks
folder = Path(sys.argv[1])

def chunks():
    yield bytes(100_000)
    print("half", flush=True)
    sys.stdin.read()

write_chunks(folder / "first", [bytes(200_000)])
write_chunks(folder / "second", chunks())
"""
    words = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"half\n"
        process.send_signal(signal.SIGKILL)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".second.tmp", "first"]
    assert (tmp_path / "first").read_bytes() == bytes(200_000)
    write_chunks(tmp_path / "second", [b"whole"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


def test_a_limit_on_file_size(tmp_path: Path) -> None:
    program = """
import resource, sys
from pathlib import Path
import torch
from quantkit.checkpoint.writer import write_shard
from quantkit.dtypes import torch_dtype
from quantkit.errors import OutputError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_shard(Path(sys.argv[1]) / "x", {"a": torch.zeros(50_000)})
except OutputError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True).stdout
    assert "cannot be written: File too large" in said
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mount.returncode:
        pytest.skip(f"a full disk needs a small one to be mounted: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    write_shard(small_disk / "first", {"a": torch.zeros(100_000)})
    message = (
        r"disk full while writing .*second: 0.6\d MiB free; the finished layers are kept.*run the same command again"
    )
    with pytest.raises(OutputError, match=message):
        write_shard(small_disk / "second", {"a": torch.zeros(200_000)})
    assert [path.name for path in small_disk.iterdir()] == ["first"]
    with pytest.raises(OutputError, match=r"disk: 2.00 MiB needed, 0.6\d MiB free"):
        require_disk(small_disk, 2 * 2**20)


def test_disk_space_is_asked_before_work(tmp_path: Path) -> None:
    require_disk(tmp_path / "not" / "yet" / "there", 1)
    with pytest.raises(OutputError, match=r"yet: 1048576.00 GiB needed, \d+\.\d\d .iB free; make room"):
        require_disk(tmp_path / "not" / "yet", 2**50)
    assert not list(tmp_path.iterdir())


def test_json_keeps_its_order(tmp_path: Path) -> None:
    value = {"z": [1, 2.5, None, True], "a": {"c": "x", "b": {}}}
    write_json(tmp_path / "x.json", value)
    assert json.dumps(json.loads((tmp_path / "x.json").read_text())) == json.dumps(value)
