# SPDX-License-Identifier: Apache-2.0
"""From a model that was found to one that can be run, with what is to be done with it planned in between."""

from collections.abc import Callable
from typing import TypeVar

from quantkit.checkpoint.source import Source
from quantkit.model.skeleton import Architecture, described
from quantkit.model.streaming import StreamedModel, open_model

T = TypeVar("T")


def open_planned(source: Source, plan: Callable[[Architecture], T]) -> tuple[StreamedModel, T]:
    """Open a model, and plan with it: what cannot be is refused before a hub's weights are downloaded.

    Raises:
        ModelError: see `streaming.open_model`. Whatever `plan` raises.
    """
    if source.hub is None:
        model = open_model(source.directory)
        return model, plan(model)
    planned = plan(described(source.directory, source.headers()))
    return open_model(source.fetch()), planned
