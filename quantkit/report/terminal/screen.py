# SPDX-License-Identifier: Apache-2.0
"""The terminal: text from anywhere is shown as it is, and commands tell there what they do."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from quantkit.text import printable

if TYPE_CHECKING:
    import torch

    from quantkit.report.terminal.progress import Display

T = TypeVar("T")


class Screen(Console):
    """A console to which every text is only text: no markup, no emoji names, no escape sequences, no lines of its own.

    This holds for cells of tables as well, since a table has its console render them.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, highlight=False, emoji=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As rich's, of printable text."""
        if isinstance(renderable, str):
            renderable = printable(renderable)
        elif isinstance(renderable, Text) and not renderable.plain.isprintable():
            renderable = renderable.copy()
            renderable.plain = printable(renderable.plain)
        return super().render(renderable, options)


class Terminal:
    """What a command tells on stderr while it works. Its answer is not among that."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._screen = Screen(stderr=True, quiet=quiet)

    @property
    def live(self) -> bool:
        """Whether lines can be drawn anew."""
        return self._screen.is_terminal

    def say(self, line: str) -> None:
        """One line, however long it is."""
        self._screen.print(line, soft_wrap=True)

    def warn(self, line: str) -> None:
        """One line that stands out."""
        self._screen.print(line, soft_wrap=True, style="bold red")

    def show(self, table: RenderableType) -> None:
        """A table of `report`."""
        self._screen.print(table)

    def steps(self, items: Sequence[T], name: str) -> Iterable[T]:
        """The items, with a bar that moves as they are taken."""
        from rich.progress import track  # not needed where nothing moves

        return track(items, name, console=self._screen, transient=True, disable=not self.live)

    def progress(self, device: "torch.device") -> "AbstractContextManager[Display]":
        """What a run over the layers shows."""
        from quantkit.report.terminal.progress import display  # imports torch

        return display(self._screen, device)
