# SPDX-License-Identifier: Apache-2.0
"""The command inspect."""

import os
from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.console import answer, print_json, told
from quantkit.cli.options import Json


def inspect(
    folder: Annotated[
        Path, typer.Argument(metavar="OUT", help="A quantized checkpoint: of quantkit, or another AWQ, GPTQ or CT one.")
    ],
    json: Json = False,
) -> None:
    """Show what a checkpoint holds. Bits, group, method, bytes and error per layer; totals; who made it."""
    with told():
        from quantkit.commands.inspect import inspect_folder
        from quantkit.report.terminal.inspect import inspect_table

        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it is imported only where it must be
        result = inspect_folder(folder)
        print_json(result.content()) if json else answer(inspect_table(result))
