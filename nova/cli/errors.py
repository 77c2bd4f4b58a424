"""How the command line reports what went wrong: one line, and a traceback only where asked for."""

import contextlib
import errno
import sys
import warnings
from collections.abc import Iterator
from typing import Annotated, Any, TextIO

import typer
from typer.core import TyperGroup

from nova_kernels.errors import BackendError

from ..errors import NovaError

_DEBUG = "nova.debug"
INTERRUPTED = 130  # what shells give for a process that Ctrl-C ended


def _remember_debug(context: typer.Context, value: bool) -> bool:
    context.meta[_DEBUG] = value
    return value


DebugOption = Annotated[
    bool,
    typer.Option(
        "--debug",
        callback=_remember_debug,
        envvar="NOVA_DEBUG",
        help="Show the traceback of an error.",
    ),
]


class CommandGroup(TyperGroup):
    """Commands whose errors and warnings reach stderr as one line each.

    Exit codes: 1 for a `NovaError`, where a backend of the ops was asked for that cannot run, or
    where a disk is full; 2 for a usage error (typer's), 130 after Ctrl-C. Any other exception is a
    bug and keeps its traceback.
    """

    def invoke(self, ctx: typer.Context) -> Any:
        try:
            with warnings_as_notes():
                return super().invoke(ctx)
        except (NovaError, BackendError) as error:
            if ctx.meta.get(_DEBUG):
                raise
            print(f"error: {one_line(error)}", file=sys.stderr)
            raise typer.Exit(1) from None
        except OSError as error:
            if ctx.meta.get(_DEBUG) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            print(f"error: {one_line(error)}; make room, or write elsewhere", file=sys.stderr)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            if ctx.meta.get(_DEBUG):
                raise
            print("interrupted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None


@contextlib.contextmanager
def warnings_as_notes() -> Iterator[None]:
    """Inside, this package's own warnings appear as "note: ...", without file and line."""
    with warnings.catch_warnings():
        show_other = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if category.__module__.partition(".")[0] in ("nova", "nova_kernels"):
                print(f"note: {one_line(message)}", file=sys.stderr)
            else:
                show_other(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield


def one_line(message: object) -> str:
    return " ".join(line.strip() for line in str(message).splitlines())
