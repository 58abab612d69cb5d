# SPDX-License-Identifier: Apache-2.0
"""The command push."""

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.console import answer, print_json, told
from quantkit.cli.options import Json
from quantkit.errors import ModelError
from quantkit.report.terminal.screen import Terminal


def push(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that quantkit wrote.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="The repository: org/name.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option("--revision", help="A branch.  [default: main]")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List files and sizes; touch no network.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Without a passing verification; the card says so.")] = False,
    json: Json = False,
) -> None:
    """Upload a verified checkpoint to the Hub. Only with a verification of these very files, unless --force."""
    with told():
        from quantkit.hub.push import push as upload
        from quantkit.report.card import named, render_card
        from quantkit.report.terminal.summary import push_document, push_summary
        from quantkit.results.document import RESULT, read_result

        if not folder.is_dir():
            raise ModelError(f"{folder}: no such folder; expected one that quantkit wrote")
        if (folder / RESULT).is_file():
            read_result(folder)  # a damaged one is told before anything goes up
        terminal = Terminal()
        result = upload(
            folder,
            repo_id,
            private=private,
            revision=revision,
            dry_run=dry_run,
            force=force,
            say=terminal.say,
            bars=terminal.live,
            card=lambda reasons: render_card(read_result(folder), repo_id, reasons),
            named=lambda text: named(text, repo_id),
        )
        print_json(push_document(result)) if json else answer(push_summary(result))
