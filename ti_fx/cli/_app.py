"""The commands: every module of this package whose name has no underscore in front is one, its function named as it."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Annotated

import typer

from ti_fx import __version__

_INTRODUCTION = """Rewrite a trained transformer's graph into ternary weights, train it, and export it as packed ONNX.

Begin with  ti-fx inspect MODEL , which shows what would become ternary and changes nothing.

Exit codes: 0 done, 1 a check failed, 2 bad input.
"""


def make_app() -> typer.Typer:
    """Return the application with every command there is."""
    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(help=_INTRODUCTION)(_options)
    for module in sorted(pkgutil.iter_modules([str(Path(__file__).parent)]), key=lambda module: module.name):
        if not module.name.startswith("_"):
            command = getattr(importlib.import_module(f"ti_fx.cli.{module.name}"), module.name)
            app.command(module.name)(command)
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"ti_fx {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    """Take what belongs to no command."""
