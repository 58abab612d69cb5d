# SPDX-License-Identifier: Apache-2.0
"""What the command line says: answers on stdout, all else on stderr, problems in one line with an exit code."""

import errno
import io
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from rich.console import RenderableType
from typer.core import TyperGroup

from quantkit.errors import EngineError, QuantkitError
from quantkit.hardware.launch import launch
from quantkit.report.terminal.screen import Screen
from quantkit.text import json_text, one_line, printable, printable_lines, without_secrets

PROBLEM, FAIL, INTERRUPTED = 1, 3, 130
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


def quiet_libraries() -> None:
    """Keep stderr for our own lines: progress bars and advice of the libraries are for other programs."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def heed_termination() -> None:
    """From here on SIGTERM ends the work as Ctrl-C does: what is finished is kept, and how to go on is told.

    To be called behind the imports, some of which do not survive being interrupted; torchrun has its own way.
    """

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    if processes() == 1 and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)


class Commands(TyperGroup):
    """The group of all commands; what is wrong with the words is shown as printable text, for it quotes them."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """As typer's."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a terminal of ASCII shows ± as \xb1
                stream.reconfigure(errors="backslashreplace")
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except Exception as error:
            if not standalone_mode or not hasattr(error, "show"):  # click's, wherever typer has it from
                raise
            text = io.StringIO()
            error.show(file=text)
            for line in text.getvalue().splitlines():
                typer.echo(printable(line), err=True)
            code = getattr(error, "exit_code", PROBLEM)
        return sys.exit(code) if standalone_mode else code


def answer(shown: RenderableType, *, json: bool = False, quiet: bool = False) -> None:
    """Print a command's answer on stdout; json: on stderr, since stdout holds the document.

    Lines that must not wrap, as commands to copy, go on beyond the terminal's width.
    """
    Screen(stderr=json, quiet=quiet).print(shown, crop=False)


def print_json(document: Any) -> None:
    """The one document on stdout."""
    typer.echo(json_text(document, ascii_only=not (sys.stdout.encoding or "").lower().startswith("utf")))


def command(*, without: tuple[str, ...] = ()) -> str:
    """The command as it was given, to repeat it."""
    started = launch()
    several = ["torchrun", "--nproc-per-node", str(started.local_size), "-m"] if started.size > 1 else []
    return shlex.join([*several, "quantkit", *(word for word in sys.argv[1:] if word not in without)])


def given(here: typer.Context) -> set[str]:
    """The parameters that the command's words name, without those that have their defaults."""
    sources = {name: here.get_parameter_source(name) for name in here.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def processes() -> int:
    """How many processes torchrun has started."""
    return launch().size


def _interrupted(resumes: bool) -> NoReturn:
    kept = "; finished layers are kept. To continue" if resumes else ". To run it again"
    typer.echo(f"\ninterrupted{kept}: {printable(command(without=('--fresh',)))}", err=True)
    raise typer.Exit(INTERRUPTED) from None


@contextmanager
def told(*, resumes: bool = False) -> Iterator[None]:
    """Problems the user can fix in one line on stderr, with the exit code; anything else is a bug and goes on.

    resumes: whether the same command goes on from where it stopped.
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except EngineError as error:
        fail(*str(error).splitlines())
    except QuantkitError as error:
        fail(str(error))
    except KeyboardInterrupt:
        _interrupted(resumes)
    except RuntimeError as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # it came while torch was changing its modes
            _interrupted(resumes)
        if isinstance(error.__context__, OSError):  # pathlib's, of links that lead in a circle
            _unusable(error.__context__)
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
            raise
        again = "; finished layers are kept" if resumes else ""
        fail(f"the device is out of memory{again}; use --states ram, a shorter --seqlen, or --device cpu")
    except OSError as error:
        if error.errno not in FULL_DISK:
            _unusable(error)
            raise
        fail(
            f"{error.filename or 'disk'}: full; finished layers are kept. To continue: {command(without=('--fresh',))}"
        )
    finally:
        if signal.getsignal(signal.SIGTERM) is not before:
            signal.signal(signal.SIGTERM, before)


def _unusable(error: OSError) -> None:
    """Tell which file the system refuses, and end; an error that names none is ours."""
    if isinstance(error.filename, str | os.PathLike):
        fail(f"{error.filename}: {error.strerror}; give another name, or repair what is there")


def fail(*lines: str) -> None:
    """Tell a problem that the user can fix, and end."""
    for line in lines:
        tell(line)
    raise typer.Exit(PROBLEM) from None


def tell(line: str) -> None:
    """One line on stderr."""
    typer.echo(f"quantkit: {without_secrets(one_line(line))}", err=True)


def tell_bug(error: Exception) -> None:
    """The traceback of a bug without the errors before it and without secrets: what libraries raise quotes requests."""
    text = "".join(traceback.format_exception(error, chain=False))
    typer.echo(printable_lines(without_secrets(text)), err=True)
