# SPDX-License-Identifier: Apache-2.0
"""The command models."""

from quantkit.cli.console import answer, print_json, told
from quantkit.cli.options import Json


def models(json: Json = False) -> None:
    """List the recipes that ship. Says what of each is in the local cache."""
    with told():
        from quantkit.report.terminal.summary import catalogue_table
        from quantkit.settings.models import catalogue

        rows = catalogue()
        print_json(rows) if json else answer(catalogue_table(rows))
