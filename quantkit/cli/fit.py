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
    KvOption,
    Offline,
    RecipeOption,
    SchemeOption,
    Sym,
    WBit,
)
from quantkit.cli.requests import engine_name
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
    kv: KvOption = None,
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
        from quantkit.units import parse_bytes, parse_tokens

        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it is imported only where it must be
        request = FitRequest(
            model=model,
            bits=int(w_bit) if w_bit else None,
            group_size=group,
            symmetric=sym,
            scheme=scheme,
            format=format.value if format else None,
            recipe=recipe,
            budget=parse_bytes(budget, "--budget") if budget else None,
            context=parse_tokens(context, "--context") if context else None,
            kv=kv.value if kv else None,
            tensor_parallel=tensor_parallel,
            offline=offline,
            engine=engine_name(engine),
        )
        if picture and picture.suffix not in (".html", ".htm"):
            raise InputError(f"--picture {picture}: expected a name that ends in .html")
        result = fit_request(request)
        print_json(result.content()) if json else answer(table(result.fit))
        if picture:
            fit_page(result, picture)
