# SPDX-License-Identifier: Apache-2.0
"""What the machine has, and what this process has used of it."""

import ctypes
import platform
import re
import resource
import sys
import weakref
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from quantkit.errors import InputError
from quantkit.hardware.matmul import fast_bfloat16

PACKAGES = ("quantkit", "torch", "transformers", "safetensors", "tokenizers")


def peak_rss_bytes() -> int:
    """The most memory that this process has held at once."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage counts what a parent held before exec, too
        found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="ascii", errors="replace"))
        if found:
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def return_freed_memory() -> None:
    """Give pages that are free back to the system: glibc keeps them, and over many layers they add up."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)


def pin(tensor: Tensor) -> None:
    """Let a GPU copy from and to this tensor's memory directly; torch's own pinned memory comes in powers of two.

    Raises:
        InputError: there is not so much memory to pin.
    """
    runtime, address = torch.cuda.cudart(), tensor.data_ptr()
    code = int(runtime.cudaHostRegister(address, tensor.nbytes, 0))
    if code:
        size = f"{tensor.nbytes / 2**30:.2f} GiB of RAM"
        raise InputError(
            f"{size} cannot be pinned for the GPU (CUDA error {code}); free memory, or use fewer --samples"
        )
    weakref.finalize(tensor, runtime.cudaHostUnregister, address)


def peak_device_bytes(device: torch.device) -> int:
    """The most device memory that tensors have held at once; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def versions() -> dict[str, str]:
    """What took part in the result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def choose_device(name: str, process: int | None = None) -> torch.device:
    """The device that "auto", "cpu" or "cuda[:N]" names; with several processes of one run a GPU for each.

    A GPU becomes torch's current one, where events and kernels go that are not told where.

    process: the number of this one of several

    Raises:
        InputError: not such a name, or no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if process is not None and name != "cpu":
        if name != "cuda":
            raise InputError(f"--device {name}: each of several processes takes a GPU of its own; use --device cuda")
        name = f"cuda:{process}"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device: expected auto, cpu or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: {torch.cuda.device_count()} CUDA devices are visible; use --device cpu")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def device_name(device: torch.device) -> str:
    """What results may depend on in the last bit: the kind of GPU, or the CPU's instructions and threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    instructions = torch.backends.cpu.get_cpu_capability() + (" with bfloat16" if fast_bfloat16() else "")
    return f"cpu ({instructions}, {torch.get_num_threads()} threads)"
