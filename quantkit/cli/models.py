# SPDX-License-Identifier: Apache-2.0
"""The command models."""

from quantkit.cli.console import print_json, screen, told
from quantkit.cli.options import Json


def models(json: Json = False) -> None:
    """List the recipes that ship. Says what of each is in the local cache."""
    with told():
        from quantkit.settings.models import catalogue, catalogue_table

        rows = catalogue()
        print_json(rows) if json else screen().print(catalogue_table(rows))
