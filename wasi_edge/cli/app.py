"""The command `wasi-edge`: its commands, and what becomes of whatever they raise.

Importing this module must stay cheap (`wasi-edge --help` in under 0.3 s on two cores): commands import numpy,
Pillow, Rich and torch when they run, not before.

Every error ends here. With `--json`, stdout holds exactly one JSON value also when a command fails, or is not
even understood. Exit codes: 0 done, 1 failed, 2 usage, 3 budget, 4 no usable photos, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
import typer.main

from wasi_edge import __version__
from wasi_edge.cli import console
from wasi_edge.cli.bench import bench
from wasi_edge.cli.convert import convert
from wasi_edge.cli.doctor import doctor
from wasi_edge.cli.evaluate import evaluate
from wasi_edge.cli.export import export
from wasi_edge.cli.finetune import finetune
from wasi_edge.cli.info import info
from wasi_edge.cli.predict import predict
from wasi_edge.errors import BudgetInfeasible, Interrupted, WasiEdgeError

DEBUG_VARIABLE = "WASI_EDGE_DEBUG"
# Typer brings its own copy of click or uses the installed one, by its version: ask it for the class.
_CommandLineError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

app = typer.Typer(
    name="wasi-edge",
    help="Fine-tune a vision transformer on your own photos, on a Raspberry Pi, inside a memory budget.",
    epilog="Start with: wasi-edge finetune ./photos --budget 512MB",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
for _command in (finetune, predict, evaluate, export, convert, info, bench, doctor):
    app.command()(_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"wasi-edge {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and leave.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    console.settle_streams()
    words = list(arguments) or ["--help"]
    try:
        code = _invoke(words)
        try:
            sys.stdout.flush()  # here, where a closed pipe is still an error that can be met
        except BrokenPipeError:
            raise
        except OSError:  # the terminal has gone, the work is done
            _silence_stdout()
        return code
    except BrokenPipeError:
        # Whoever read our output has gone (`| head`): the interpreter's own last flush must not complain either.
        _silence_stdout()
        return 1


def _silence_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _invoke(words: list[str]) -> int:
    as_json = "--json" in (words[: words.index("--")] if "--" in words else words)
    try:
        command = typer.main.get_command(app)
        with command.make_context("wasi-edge", list(words)) as context:
            command.invoke(context)
        return 0
    except typer.Exit as error:
        return error.exit_code
    except _CommandLineError as error:
        where = getattr(error, "ctx", None)
        hint = f"\ntry: {where.command_path} --help" if where is not None else ""
        return _fail(error.format_message(), error.exit_code, as_json, hint)
    except WasiEdgeError as error:
        details: dict[str, Any] = {}
        if isinstance(error, BudgetInfeasible):
            details["smallest_feasible_budget_bytes"] = error.smallest_feasible_budget_bytes
        if isinstance(error, Interrupted):
            details["status"] = "interrupted"
        _show_traceback()
        return _fail(str(error), error.exit_code, as_json, **details, **getattr(error, "details", {}))
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", Interrupted.exit_code, as_json, status="interrupted")
    except BrokenPipeError:
        raise
    except MemoryError:
        _show_traceback()
        return _fail("not enough memory: close other programs, or take a smaller --budget", 1, as_json)
    except OSError as error:
        _show_traceback()
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", 1, as_json)
    except Exception as error:
        hint = f"run it again with {DEBUG_VARIABLE}=1 for the traceback, and report it"
        summary = f"{type(error).__name__}: {error}".splitlines()[0]
        _show_traceback()
        return _fail(f"this is a bug in wasi-edge ({summary}); {hint}", 1, as_json)


def _fail(message: str, exit_code: int, as_json: bool, hint: str = "", **details: Any) -> int:
    console.say(f"error: {message}{hint}")
    if as_json:
        known = {key: value for key, value in details.items() if value is not None}
        console.print_json({"status": "failed", "error": message, **known})
    return exit_code


def _show_traceback() -> None:
    """For whoever looks for the cause: only where WASI_EDGE_DEBUG is set."""
    if os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0"):
        import traceback

        traceback.print_exc(file=sys.stderr)
