"""The command line ``ti-fx`` runs a command and returns its exit code: 0 done, 1 a check failed, 2 bad input."""

from __future__ import annotations

import os
import sys

import typer

from ti_fx.errors import TiFxError


def main() -> None:
    """Run ``ti-fx``; a user's mistake is one line on stderr, without a traceback."""
    from ti_fx.cli._app import make_app

    try:
        code = make_app()(prog_name="ti-fx", standalone_mode=False)
        sys.stdout.flush()  # here, where a reader that has gone is no error
        sys.exit(code)
    except typer.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _complain("stopped")
        sys.exit(130)
    except typer.exceptions.TyperException as error:
        if message := error.format_message().rstrip("."):  # without one, the help was shown
            _complain(f"{message}; ti-fx --help and ti-fx COMMAND --help say what there is")
        sys.exit(2)
    except TiFxError as error:
        _complain(str(error))
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader of our output has gone (`ti-fx inspect ... | head`): nobody is left to tell. typer exits so, too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _complain(
            f"{where}{error.strerror or error}; check that the file is there and can be read or written"
        )
        sys.exit(2)


def _complain(message: str) -> None:
    print("ti-fx: " + " ".join(message.split()), file=sys.stderr)
