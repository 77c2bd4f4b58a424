"""The typer application.

torch and transformers are imported inside the commands, so that `nova --help` is quick.
"""

import json
from typing import Annotated

import typer

from .. import __version__
from .encode import encode
from .errors import CommandGroup, DebugOption
from .export import export
from .generate import generate
from .train import train
from .train_text_encoder import train_text_encoder
from .train_vae import train_vae

app = typer.Typer(
    name="nova",
    cls=CommandGroup,
    help="Autoregressive image and video generation with NOVA models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(generate)
app.command()(encode)
app.command()(train)
app.command()(train_vae)
app.command()(train_text_encoder)
app.command()(export)

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON in place of a table.")]


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"nova-kernels {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Options in front of a command."""


@app.command()
def doctor(as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """Show what is installed, which device will be used, and how to get what is missing."""
    from .doctor import examine, print_report

    report = examine()
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        print_report(report)
    if report["torch"]["version"] is None:
        raise typer.Exit(1)


@app.command()
def info(
    folder: Annotated[
        str, typer.Argument(metavar="FOLDER", help="Checkpoint folder, or a downloaded hub id.")
    ],
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Describe a checkpoint, without loading its weights."""
    from .info import describe, print_description

    description = describe(folder)
    if as_json:
        typer.echo(json.dumps(description, indent=2))
    else:
        print_description(description)


def main() -> None:
    """Entry of the console script."""
    app(prog_name="nova")
