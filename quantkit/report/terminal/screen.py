# SPDX-License-Identifier: Apache-2.0
"""The terminal, as the one place where text from anywhere is shown as it is."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from quantkit.text import printable


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
