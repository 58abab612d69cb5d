# SPDX-License-Identifier: Apache-2.0
"""The command serve."""

import os
from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.console import heed_termination, told
from quantkit.cli.options import Budget, Context, Kv, Server
from quantkit.cli.requests import size, tokens
from quantkit.report.terminal.screen import Terminal


def serve(
    folder: Annotated[Path, typer.Argument(metavar="OUT|FILE.gguf", help="A folder with a checkpoint, or a .gguf.")],
    extra: Annotated[
        list[str] | None, typer.Argument(metavar="[-- FLAGS]", help="Behind --: flags for the engine, as they are.")
    ] = None,
    engine: Server = None,
    engine_python: Annotated[
        Path | None, typer.Option("--engine-python", help="The python of the environment that has the engine.")
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Where it listens; others than this machine need a key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option("--port", min=1, max=65000, help="The port.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", envvar="QUANTKIT_API_KEY", help="What requests must carry.", show_envvar=True),
    ] = None,
    budget: Budget = None,
    context: Context = None,
    kv: Kv = None,
    tensor_parallel: Annotated[int, typer.Option("--tensor-parallel", min=1, help="Cards it is cut over.")] = 1,
    replicas: Annotated[int, typer.Option("--replicas", min=1, max=64, help="Servers behind nginx.")] = 1,
    nginx: Annotated[bool, typer.Option("--nginx", help="Write an nginx configuration in front, and run it.")] = False,
    log: Annotated[Path | None, typer.Option("--log", help="File of the engine's output.  [default: in /tmp]")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the engine's command alone.")] = False,
) -> None:
    """Serve a checkpoint. Starts the engine's own server with the flags of `fit`, and ends it with this command."""
    with told():
        from quantkit.commands.serve import ServeRequest
        from quantkit.commands.serve import dry_run as command_alone
        from quantkit.commands.serve import serve as run

        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        request = ServeRequest(
            folder=folder,
            engine=engine,
            python=engine_python,
            host=host,
            port=port,
            api_key=api_key,
            budget=size(budget, "--budget"),
            context=tokens(context, "--context"),
            kv=kv,
            tensor_parallel=tensor_parallel,
            replicas=replicas,
            nginx=nginx,
            log=log,
            extra=tuple(extra or ()),
        )
        if dry_run:
            typer.echo(command_alone(request))
            return
        heed_termination()
        run(request, Terminal().say)
