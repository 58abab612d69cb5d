# SPDX-License-Identifier: Apache-2.0
"""What a long run shows: stage, layer, time left, tokens/s, memory, the last error; plain lines off a terminal."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import psutil
import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from quantkit.units import format_bytes, format_seconds

SILENCE = 60.0  # seconds, before a line within a layer
WARM_UP = 1  # layers that say nothing about the time of later ones


class Display:
    """Implements the pipeline's Progress on a console."""

    def __init__(self, console: Console, device: torch.device) -> None:
        self.console = console
        self.device = device
        self.layers = self.tokens = self.done = self.index = 0
        self.rate = 0.0
        self.current = "reading"
        self.last = ""
        self.title = ""
        self.stages = self.stage_number = 0
        self.computed: list[float] = []  # seconds of the layers that were not taken from the disk
        self.begun = self.layer_begun = self.told_at = time.monotonic()
        self.bar = Progress(
            TextColumn("[bold]layer {task.fields[number]} of {task.total}"),
            BarColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self.task: TaskID | None = None

    def start(self, layers: int, tokens: int, places: Mapping[str, str]) -> None:
        """Called once: how many layers, how many tokens pass through each, and where their hidden states live."""
        self.layers, self.tokens = layers, tokens
        where = ", ".join(f"{name} in {place}" for name, place in places.items())
        self.console.print(f"{layers} layers, {tokens:,} tokens through each; hidden states: {where or 'none'}")
        self.task = self.bar.add_task("layers", total=layers, number=1)

    def layer(self, index: int, stages: int) -> None:
        """A layer begins; stages: about how many it will have, until one has told."""
        self.index, self.layer_begun = index, time.monotonic()
        self.stages, self.stage_number = max(self.stage_number, 1) if self.computed else stages, 0

    def stage(self, name: str) -> None:
        """A stage of the layer begins."""
        self.current = name
        self.stage_number += 1
        now = time.monotonic()
        if not self.console.is_terminal and now - self.told_at >= SILENCE:
            self.told_at = now
            self.console.print(
                f"layer {self.index + 1} of {self.layers}: {name} ({self.share():.0%} of it)  about {self.left()} left",
                soft_wrap=True,
            )

    def share(self) -> float:
        """How much of the current layer is done, by its stages."""
        return min((self.stage_number - 1) / self.stages, 0.95) if self.stage_number else 0.0

    def finished(self, index: int, loss: float, reused: bool) -> None:
        """A layer is done: its worst relative output error, and whether it was taken from an earlier run."""
        seconds = time.monotonic() - self.layer_begun
        if not reused:
            self.computed.append(seconds)
        self.done = index + 1
        self.rate = self.tokens / max(seconds, 1e-9)
        self.last = f"layer {self.done}: worst output error {loss:.2%}" + (" (from disk)" if reused else "")
        if self.task is not None:
            self.bar.update(self.task, completed=self.done, number=min(self.done + 1, self.layers))
        if not self.console.is_terminal:
            self.console.print(
                f"layer {self.done} of {self.layers}  {format_seconds(seconds)}  left {self.left()}  "
                f"{self.rate:,.0f} tokens/s  {self.memory()}  worst error {loss:.2%}{'  from disk' if reused else ''}",
                soft_wrap=True,
                highlight=False,
            )

    def ending(self, name: str) -> None:
        """What comes before the first layer, or after the last, begins; off a terminal once for all its layers."""
        self.current = name
        title, _, _ = name.partition(": ")
        now = time.monotonic()
        if not self.console.is_terminal and (title != self.title or now - self.told_at >= SILENCE):
            self.console.print(f"{name} ..." if title == self.title else f"{title} ...")
            self.title, self.told_at = title, now

    def left(self) -> str:
        """The time that the remaining layers will take, or "?" where nothing tells it yet."""
        begun, spent = self.share(), time.monotonic() - self.layer_begun
        if self.computed:
            known = self.computed[WARM_UP:] or self.computed
            layer = sum(known) / len(known)
            return format_seconds(
                max(layer * (self.layers - self.done) - min(spent, layer) * (self.index >= self.done), 0)
            )
        if begun == 0:
            return "?"
        return format_seconds(spent / begun * (self.layers - self.done) - spent)

    def memory(self) -> str:
        """What this process holds now."""
        text = f"RSS {format_bytes(psutil.Process().memory_info().rss)}"
        if self.device.type == "cuda":
            text += f", GPU {format_bytes(torch.cuda.memory_allocated(self.device))}"
        return text

    def __rich__(self) -> Group:
        """The picture, drawn anew a few times a second."""
        if self.task is not None and self.index >= self.done:
            self.bar.update(self.task, completed=self.done + self.share())
        status = f"{self.current}   left {self.left()}   {self.rate:,.0f} tokens/s   {self.memory()}"
        return Group(self.bar, Text(status, style="dim"), Text(self.last, style="dim"))


@contextmanager
def display(console: Console, device: torch.device) -> Iterator[Display]:
    """A live display on a terminal, plain lines elsewhere."""
    shown = Display(console, device)
    if not console.is_terminal:
        yield shown
        return
    with Live(shown, console=console, refresh_per_second=4, transient=True):
        yield shown
