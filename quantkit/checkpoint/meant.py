# SPDX-License-Identifier: Apache-2.0
"""Which model a name was meant for, where there is none of that name."""

import re
from collections.abc import Collection
from difflib import get_close_matches

HUB_ADDRESS = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?:models/)?([^/?#\s]+/[^/?#\s]+)")


def meant(name: str, recipes: Collection[str]) -> str:
    """The question at the end of a message: a recipe of nearly that name, or the model of a pasted hub address."""
    address = HUB_ADDRESS.match(name.strip())
    if address:
        return f"; did you mean {address[1]}?"
    near = get_close_matches(name.strip().lower(), list(recipes), n=1, cutoff=0.75)
    return f"; did you mean {near[0]}?" if near else ""
