# SPDX-License-Identifier: Apache-2.0
"""The command fit."""

import os
from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.console import answer, print_json, told
from quantkit.cli.options import (
    Budget,
    Context,
    For,
    FormatOption,
    Group,
    Json,
    Kv,
    Offline,
    RecipeOption,
    SchemeOption,
    Sym,
    WBit,
)
from quantkit.cli.requests import size, tokens
from quantkit.errors import InputError


def fit(
    model: Annotated[
        str, typer.Argument(metavar="MODEL|OUT", help="A recipe name, folder or hub id, or a folder that is quantized.")
    ],
    w_bit: WBit = None,
    group: Group = None,
    sym: Sym = None,
    scheme: SchemeOption = None,
    format: FormatOption = None,
    recipe: RecipeOption = None,
    budget: Budget = None,
    context: Context = None,
    kv: Kv = None,
    tensor_parallel: Annotated[int, typer.Option("--tensor-parallel", min=1, help="Cards it is cut over.")] = 1,
    engine: For = None,
    picture: Annotated[Path | None, typer.Option("--picture", help="Write the chart as an HTML page.")] = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Predict memory, context and engines. Reads no weights: bytes of weights, KV cache and workspace, the longest
    context that fits, and which engines load it.
    """
    with told():
        from quantkit.commands.fit import FitRequest, fit_page, fit_request
        from quantkit.report.terminal.fit import table

        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it is imported only where it must be
        request = FitRequest(
            model=model,
            bits=w_bit,
            group_size=group,
            symmetric=sym,
            scheme=scheme,
            format=format,
            recipe=recipe,
            budget=size(budget, "--budget"),
            context=tokens(context, "--context"),
            kv=kv,
            tensor_parallel=tensor_parallel,
            offline=offline,
            engine=engine,
        )
        if picture and picture.suffix not in (".html", ".htm"):
            raise InputError(f"--picture {picture}: expected a name that ends in .html")
        result = fit_request(request)
        print_json(result.content()) if json else answer(table(result.fit, result.would_fit))
        if picture:
            fit_page(result, picture)
