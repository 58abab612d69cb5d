# SPDX-License-Identifier: Apache-2.0
"""What a user asks of a run, and what that comes to over a recipe and the defaults."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from quantkit.methods.table import Options
from quantkit.model.shapes import Shapes
from quantkit.recipe import Recipe
from quantkit.records import Limits
from quantkit.settings.defaults import AskedScheme, choose_serving, positions
from quantkit.verdict import asked_limits, choose_limits


@dataclass(frozen=True)
class Request:
    """What the user asked for. None means: not said, so the recipe or the default decides."""

    method: str
    model: str
    command: str
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    scheme: str | None = None
    format: str | None = None
    recipe: Path | None = None
    calib: str | None = None
    samples: int | None = None
    seqlen: int | None = None
    seed: int = 0
    evaluation: str | None = None
    eval_samples: int | None = None
    budget: int | None = None
    context: int | None = None
    kv: str | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    options: Options = field(default_factory=Options)
    max_ppl_increase: float | None = None
    max_kl: float | None = None
    out: Path | None = None
    fresh: bool = False
    offline: bool = False
    verify: bool = True
    place: str | None = None
    engine: str | None = None
    vram: int | None = None
    ram: int | None = None
    inputs: str = "quantized"
    one_file: bool = False  # leave a .gguf alone, without the checkpoint that it is made of
    outside: str = "f16"  # of a .gguf: the type of the embedding and the head
    amend: bool = False  # another recipe than that of the finished layers makes anew what differs

    @property
    def asked_scheme(self) -> AskedScheme:
        return AskedScheme(self.bits, self.group_size, self.symmetric, self.scheme)


def serving(request: Request, recipe: Recipe, model: Shapes) -> dict[str, Any]:
    """What the result is to be served with; see `defaults.choose_serving`."""
    return choose_serving(
        positions(model.config), recipe.budget, budget=request.budget, context=request.context, kv=request.kv
    )


def config_options(options: Options) -> dict[str, Any]:
    """What only some formats write down of how a method worked."""
    return {"damp_percent": options.damp, "desc_act": False, "static_groups": options.act_order}


def limits_of(request: Request, recipe: Recipe) -> Limits:
    """The command line comes before the recipe, which comes before the defaults."""
    return choose_limits(asked_limits(request.max_ppl_increase, request.max_kl), recipe.limits)
