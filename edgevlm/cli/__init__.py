"""The command `edgevlm`: one file a command, loaded when it is called.

Answers go to stdout, everything else to stderr. An error is one line; the exit code is 1, 2 for
wrong usage, 130 after Ctrl-C, and 128 plus its number after another signal.
"""

from __future__ import annotations

import atexit
import importlib
import sys
import traceback
from collections.abc import Iterable

import click

import edgevlm
from edgevlm.cli import signals, streams
from edgevlm.errors import EdgeVLMError

_COMMANDS = {
    "answer": "edgevlm.cli.tasks",
    "ask": "edgevlm.cli.ask",
    "bench": "edgevlm.cli.bench",
    "caption": "edgevlm.cli.tasks",
    "chat": "edgevlm.cli.chat",
    "classify": "edgevlm.cli.classify",
    "detect": "edgevlm.cli.find",
    "doctor": "edgevlm.cli.doctor",
    "du": "edgevlm.cli.store",
    "embed": "edgevlm.cli.embed",
    "export": "edgevlm.cli.export",
    "gc": "edgevlm.cli.store",
    "ground": "edgevlm.cli.tasks",
    "models": "edgevlm.cli.models",
    "ocr": "edgevlm.cli.tasks",
    "point": "edgevlm.cli.find",
    "pull": "edgevlm.cli.pull",
    "push": "edgevlm.cli.push",
    "requantize": "edgevlm.cli.requantize",
    "rm": "edgevlm.cli.store",
    "search": "edgevlm.cli.search",
    "segment": "edgevlm.cli.find",
    "serve": "edgevlm.cli.serve",
    "tune": "edgevlm.cli.tune",
    "use": "edgevlm.cli.store",
}

# Columns from which on click's two columns of help are readable.
_WIDE = 72


class _Formatter(click.HelpFormatter):
    """Help whose descriptions stand below the options where a terminal is narrow."""

    def write_dl(
        self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2
    ) -> None:
        """See click.HelpFormatter."""
        super().write_dl(
            list(rows), col_max if self.width >= _WIDE else self.width // 6, col_spacing
        )


class _Context(click.Context):
    formatter_class = _Formatter


def _with_help(command: click.Command) -> click.Command:
    """The command with this help, and so are those of a group."""
    command.context_class = _Context
    for child in getattr(command, "commands", {}).values():
        _with_help(child)
    return command


class _Lazy(click.Group):
    """A group whose commands are imported when they are needed."""

    context_class = _Context

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command = getattr(importlib.import_module(_COMMANDS[cmd_name]), cmd_name)
        assert isinstance(command, click.Command)
        return _with_help(command)


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(edgevlm.__version__, prog_name="edgevlm")
def cli() -> None:
    """Ask vision-language models about pictures, on this machine, offline."""


def main() -> None:
    """Runs the command line; the entry point of the installed script."""
    try:
        with signals.handling(), streams.prepared():
            sys.exit(_run())
    finally:
        atexit.register(signals.ignore)


def _run() -> int:
    try:
        code = int(cli.main(prog_name="edgevlm", standalone_mode=False) or 0)
        streams.flush()
        return code
    except EdgeVLMError as error:
        click.echo(f"edgevlm: {_one_line(error)}", err=True)
        return 1
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return error.exit_code
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "edgevlm"
        message = _one_line(error.format_message()).rstrip(".")
        click.echo(f"edgevlm: {message}; see `{command} --help`", err=True)
        return error.exit_code
    except click.ClickException as error:
        click.echo(f"edgevlm: {_one_line(error.format_message())}", err=True)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo(err=True)
        return 130
    except BrokenPipeError:
        # The reader went away (`| head`): nothing more to say.
        return 1
    except MemoryError:
        click.echo(
            "edgevlm: not enough memory; close other programs or take less at once", err=True
        )
        return 1
    except ImportError as error:
        package = _foreign_package(error)
        if not package:
            raise  # A module of edgevlm's own: a bug.
        click.echo(
            f"edgevlm: {package} cannot be loaded ({_one_line(error)}); free memory if that is "
            "short, or install edgevlm again",
            err=True,
        )
        return 1
    except OSError as error:
        # Such as a disk that is full; any other exception is a bug, whose traceback is wanted.
        named = f"{error.filename}: " if error.filename else ""
        click.echo(f"edgevlm: {named}{_one_line(error.strerror or error)}", err=True)
        return 1


def _foreign_package(error: ImportError) -> str:
    """The package that could not be loaded: one that is missing, or in whose code it ended; ""
    where that is edgevlm itself.
    """
    frames = traceback.walk_tb(error.__traceback__)
    modules = [str(frame.f_globals.get("__name__", "")) for frame, _ in frames]
    package = (error.name or modules[-1]).partition(".")[0]
    return "" if package == "edgevlm" else package


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
