# SPDX-License-Identifier: Apache-2.0
"""The command doctor."""

import os
from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.console import answer, print_json, told
from quantkit.cli.options import Json


def doctor(
    folder: Annotated[
        Path | None, typer.Argument(metavar="[OUT]", help="A folder that is to run here.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Say what this machine can run, and why not. What is installed; of a folder memory, engines and kernels."""
    with told():
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        from quantkit.commands.doctor import diagnose
        from quantkit.report.terminal.doctor import doctor_table

        found = diagnose(folder).model_dump(exclude_unset=True)
        print_json(found) if json else answer(doctor_table(found))
