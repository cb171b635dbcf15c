"""Makes the application out of its commands: every module of this package whose name has no underscore in front.

A command is the function named as its module, and ``EXAMPLES`` end its help. Any help imports all of these modules, so
they import what takes long within their functions.
"""

from __future__ import annotations

import importlib
import pkgutil
from inspect import cleandoc
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup, TyperOption

from ti_fx._version import __version__

_INTRODUCTION = """Rewrite a trained transformer's graph into ternary weights, train it, and export it as packed ONNX.

Begin with  ti-fx inspect MODEL , which shows what would become ternary and changes nothing.

Exit codes: 0 done, 1 a check failed, 2 bad input.
"""


class _Commands(TyperGroup):
    """The group whose ``--help`` is False by default: to convert its usual default, None, typer would load pydantic."""

    def get_help_option(self, ctx: Any) -> TyperOption | None:
        option = super().get_help_option(ctx)
        if option is not None:
            option.default = False
        return option


def make_app() -> typer.Typer:
    """Return the application with every command there is."""
    app = typer.Typer(
        cls=_Commands,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # rich would double the time that a help takes
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(help=_INTRODUCTION)(_options)
    for found in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if not found.name.startswith("_"):
            module = importlib.import_module(f"ti_fx.cli.{found.name}")
            command = getattr(module, found.name)
            app.command(found.name, help=f"{cleandoc(command.__doc__)}\n\n{module.EXAMPLES}")(command)
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
