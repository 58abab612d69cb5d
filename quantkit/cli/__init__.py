# SPDX-License-Identifier: Apache-2.0
"""The command line: parse, call, print. Exit codes: 0 done, 1 a problem the user can fix, 2 wrong usage, 3 a verdict
of FAIL, 130 interrupted.

Heavy imports wait until a command runs, so that `--help` answers at once.
"""

import os
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from quantkit import __version__
from quantkit.cli import allocate, chat, convert, doctor, fit, inspect, models, push, quantize, serve, sweep, verify
from quantkit.cli.console import PROBLEM, Commands, fail, processes, tell_bug
from quantkit.cli.help import WORDS, Command, epilog
from quantkit.hardware.launch import launch
from quantkit.methods.table import METHODS

app = typer.Typer(
    cls=Commands,
    help="The most accurate quantized checkpoint that fits your card, with the measurements that prove it.",
    no_args_is_help=True,
    epilog=WORDS,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for _method in METHODS.values():
    app.command(_method.name, help=_method.help, cls=Command, epilog=epilog(_method.name))(
        quantize.command_of(_method.name)
    )
for _command in (
    fit.fit,
    verify.verify,
    sweep.sweep,
    allocate.allocate,
    convert.convert,
    inspect.inspect,
    serve.serve,
    chat.chat,
    doctor.doctor,
    push.push,
    models.models,
):
    app.command(cls=Command, epilog=epilog(_command.__name__))(_command)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"quantkit {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Quantize, verify and publish large language models on one card."""
    if processes() > 1 and context.invoked_subcommand not in METHODS:
        if launch().rank == 0:
            fail(f"{context.invoked_subcommand}: runs in one process; only {', '.join(METHODS)} take several")
        from quantkit.hardware.ranks import give_way

        give_way(PROBLEM)


def main() -> None:
    """The `quantkit` console script."""
    _let_memory_grow()
    _spin_briefly()
    try:
        _run()
    except Exception as error:
        tell_bug(error)
        sys.exit(PROBLEM)


def _run() -> None:
    if launch().rank == 0:
        app(prog_name="quantkit")
    try:  # what is wrong with the words is told once, by the first of several processes
        sys.exit(app(prog_name="quantkit", standalone_mode=False))
    except Exception as error:
        if not hasattr(error, "exit_code"):  # click's, wherever typer has it from
            raise
        from quantkit.hardware.ranks import give_way

        give_way(error.exit_code)


def _spin_briefly() -> None:
    """Have the threads of OpenMP spin for some 0.1 ms before they sleep, instead of 3 ms.

    torch's wheels for Linux, with and without CUDA, ship GNU's libgomp, which reads this when it is loaded. Its own
    choice lets two programs on one machine spin against each other (see `benchmarks/busy.py`); no spinning at all
    costs 20% when alone. LLVM's and Intel's runtimes yield while they spin. What the user has set stays.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = "10000"


def _let_memory_grow() -> None:
    """Have torch, which reads this when it is imported, extend a GPU's memory in place: what is cached in pieces that
    fit nothing would count against --vram. What the user has set stays.
    """
    old, new = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"
    if not {old, new} & set(os.environ):
        known = tuple(int(part) for part in version("torch").split(".")[:2]) >= (2, 11)  # seen; earlier ones ignore it
        os.environ[new if known else old] = "expandable_segments:True"
