# SPDX-License-Identifier: Apache-2.0
"""The GPU that an engine would run on here. Without a driver nothing is imported to find that out."""

import os
from dataclasses import dataclass
from pathlib import Path

DRIVER = (Path("/proc/driver/nvidia/version"), Path("/dev/nvidiactl"))


@dataclass(frozen=True)
class Card:
    """A GPU: its name, all of its memory, its compute capability, and the kernels that vLLM is told not to take."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]
    disabled: tuple[str, ...] = ()


def visible_card() -> Card | None:
    """The first GPU that this process sees, or None."""
    if not any(path.exists() for path in DRIVER):
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    disabled = tuple(os.environ.get("VLLM_DISABLED_KERNELS", "").split(","))
    return Card(properties.name, int(properties.total_memory), (properties.major, properties.minor), disabled)
