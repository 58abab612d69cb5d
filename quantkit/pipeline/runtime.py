# SPDX-License-Identifier: Apache-2.0
"""Where the layers of a model run, what they may use of the machine, and who is told how far they are."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from quantkit.dtypes import WIDER, stored_dtype, torch_dtype
from quantkit.hardware.ranks import ALONE, Ranks
from quantkit.model.streaming import StreamedModel


class Progress(Protocol):
    """What a long run tells while it goes through the layers. `report.terminal.progress` displays it."""

    def start(self, layers: int, tokens: int, places: Mapping[str, str]) -> None: ...
    def layer(self, index: int, stages: int) -> None: ...
    def stage(self, name: str) -> None: ...
    def finished(self, index: int, loss: float, reused: bool) -> None: ...
    def ending(self, name: str) -> None: ...


class Silent:
    """A `Progress` that tells nothing, for walks that are one stage of something longer."""

    def start(self, layers: int, tokens: int, places: Mapping[str, str]) -> None: ...
    def layer(self, index: int, stages: int) -> None: ...
    def stage(self, name: str) -> None: ...
    def finished(self, index: int, loss: float, reused: bool) -> None: ...
    def ending(self, name: str) -> None: ...


@dataclass(frozen=True)
class Memory:
    """What a run may use of the machine's memory. `memory.lay_out` chooses it.

    place: where hidden states live: "device", "ram", "file", or None for what has room
    batch: samples in a micro-batch; None: as many as are usual
    kept_width: the widest inputs of linears that are kept until their layer is done; 0: none (see `site_inputs`)
    """

    place: str | None = None
    batch: int | None = None
    kept_width: int = 0


@dataclass(frozen=True)
class Runtime:
    """A model and where its layers run.

    folder: for files of hidden states that memory cannot hold
    quantized: the model that the quantized weights run in, where their checkpoint says how it computes; None: as here
    ranks: the processes that share the work; their number changes no byte of the result on a CPU
    """

    model: StreamedModel
    device: torch.device
    folder: Path
    memory: Memory = Memory()
    ranks: Ranks = ALONE
    quantized: StreamedModel | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states and weights while running: as linears are stored, but 16-bit matmuls are slow on CPUs."""
        if self.device.type == "cpu":
            return torch.float32
        linear = f"{self.model.layer_name(0)}.{next(iter(self.model.layer_linears[0]))}.weight"
        entry = self.model.checkpoint.entries[linear]
        return torch_dtype(entry.dtype if entry.scaled is None else WIDER)

    def loaded(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors on the device; floats in the dtype of the run, but for the few that are stored in float32."""
        exact = torch_dtype("float32")
        return {
            name: tensor.to(self.device, exact if stored_dtype(name) == "float32" else self.dtype)
            if tensor.is_floating_point()
            else tensor.to(self.device)
            for name, tensor in tensors.items()
        }
