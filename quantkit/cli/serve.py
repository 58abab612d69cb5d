# SPDX-License-Identifier: Apache-2.0
"""The command serve."""

import os
from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.console import heed_termination, screen, told
from quantkit.cli.options import Budget, Context, KvOption, ServerEngine


def serve(
    folder: Annotated[Path, typer.Argument(metavar="OUT|FILE.gguf", help="A folder with a checkpoint, or a .gguf.")],
    extra: Annotated[
        list[str] | None, typer.Argument(metavar="[-- FLAGS]", help="Behind --: flags for the engine, as they are.")
    ] = None,
    engine: Annotated[
        ServerEngine | None, typer.Option("--engine", help="The engine.  [default: the first that loads it]")
    ] = None,
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
    kv: KvOption = None,
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
        from quantkit.units import parse_bytes, parse_tokens

        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        request = ServeRequest(
            folder=folder,
            engine=engine.value if engine else None,
            python=engine_python,
            host=host,
            port=port,
            api_key=api_key,
            budget=parse_bytes(budget, "--budget") if budget else None,
            context=parse_tokens(context, "--context") if context else None,
            kv=kv.value if kv else None,
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
        shown = screen()
        run(request, lambda line: shown.print(line, highlight=False, markup=False, soft_wrap=True))
