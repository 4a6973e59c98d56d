"""The command line. One small module a command; what is slow to import is imported inside the command that needs it."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from compress import __version__
from compress.cli import (
    allocate_bits,
    bench,
    doctor,
    export,
    generate,
    inspect,
    learn_mask,
    learn_routing,
    masks,
    prune,
    quantize,
    recipes,
    verify,
)
from compress.cli import eval as eval_
from compress.errors import CompressError

app = typer.Typer(
    name="compress",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make large language models smaller, and run them smaller.",
    epilog="Start with `compress recipes ls`, then `compress learn-mask quickstart`. Every command has examples under `--help`.",
)
app.command("learn-mask")(learn_mask.learn_mask)
app.command("learn-routing")(learn_routing.learn_routing)
app.command("prune")(prune.prune)
app.command("profile-experts")(quantize.profile_experts)
app.command("allocate-bits")(allocate_bits.allocate_bits)
app.command("quantize")(quantize.quantize)
app.command("run")(quantize.run)
app.command("export")(export.export)
app.command("generate")(generate.generate)
app.command("eval")(eval_.evaluate)
app.command("inspect")(inspect.inspect)
app.command("verify")(verify.verify)
app.command("validate")(recipes.validate)
app.command("schema")(recipes.schema)
app.command("bench")(bench.bench)
app.command("doctor")(doctor.doctor)
app.add_typer(recipes.app, name="recipes")
app.add_typer(masks.app, name="masks")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"compress {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Make large language models smaller, and run them smaller."""


def main() -> None:
    """Run the command line; errors that a user can mend are one message and an exit code, not a traceback."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of libraries: off where nobody watches them, as our own
    try:
        app()
    except CompressError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("stopped", 130)
    except ValueError as error:
        # maskllm's MaskError, looked up by name so that an error before any import of torch does not import it.
        if type(error).__name__ != "MaskError":
            raise
        _fail(str(error), 2)


def _fail(message: str, code: int) -> None:
    typer.secho("error: ", fg="red", bold=True, err=True, nl=False)
    typer.echo(message, err=True)
    sys.exit(code)
