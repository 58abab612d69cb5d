# SPDX-License-Identifier: Apache-2.0
"""What torchrun says of the processes that it has started, without torch."""

import os
from collections.abc import Mapping
from typing import NamedTuple

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Launch(NamedTuple):
    """This process among those of a run; local_rank and local_size: among those on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """The launch of this process. A cluster's RANK and WORLD_SIZE without a master to meet at are not for us."""
    numbers = [environment.get(name, "") for name in (*NEEDED[:2], NEEDED[3])]
    if not environment.get("MASTER_ADDR") or not all(text.isascii() and text.isdigit() for text in numbers):
        return Launch()
    rank, size = int(numbers[0]), int(numbers[1])
    if not 0 <= rank < size:
        return Launch()
    local_rank, local_size = environment.get("LOCAL_RANK", ""), environment.get("LOCAL_WORLD_SIZE", "")
    return Launch(
        rank,
        size,
        int(local_rank) if local_rank.isdigit() else 0,
        int(local_size) if local_size.isdigit() else size,
    )
