"""edgevlm chat"""

from __future__ import annotations

import io
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from edgevlm.cli.common import Run, answering, print_stats, read_sources, show, tile_progress
from edgevlm.cli.forms import forms
from edgevlm.cli.signals import raising
from edgevlm.errors import EdgeVLMError

if TYPE_CHECKING:
    from edgevlm.runtimes.chat import Chat
    from edgevlm.runtimes.session import VLM

_HELP = """\
/image PATH|URL   look at another picture
/image            look at no picture
/clear            forget the questions; the picture stays
/stats            how long the last answer took
/help             this text
/exit             leave (also Ctrl-D)
Ctrl-C stops an answer. Anything else goes to the model as it is."""


@click.command()
@answering
@forms
def chat(images: tuple[str, ...], run: Run) -> None:
    """Talk about a picture. /help lists what can be typed besides questions."""
    sources = read_sources(images)
    if sys.stdin is None:
        raise click.ClickException("stdin is closed; a chat reads its questions there")
    with run.load(sources, "chat") as vlm:
        conversation = vlm.chat(sources)
        click.echo(f"{vlm.manifest.name}: ask away; /help for commands.", err=True)
        _loop(conversation, vlm, run)


def _loop(conversation: Chat, vlm: VLM, run: Run) -> None:
    read_line = _reader()
    while True:
        try:
            with raising():
                line = read_line().strip()
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        if line == "/exit":
            return
        if line:
            _one_turn(conversation, vlm, line, run)


def _one_turn(conversation: Chat, vlm: VLM, line: str, run: Run) -> None:
    try:
        with raising():
            if line.startswith("/"):
                _command(conversation, line)
            else:
                _ask(conversation, vlm, line, run)
    except EdgeVLMError as error:
        click.echo(str(error), err=True)
    except KeyboardInterrupt:
        click.echo(" (stopped)", err=True)
    except (OSError, click.Abort, click.exceptions.Exit):
        raise  # The terminal is gone, or nothing can be printed any more.
    except Exception:
        # A defect of edgevlm's own is shown whole; it costs an answer, not the conversation.
        traceback.print_exc()
        click.echo("This is a defect of edgevlm; the chat goes on.", err=True)


def _ask(conversation: Chat, vlm: VLM, question: str, run: Run) -> None:
    all_of_it = conversation.left_out == 0
    answer = conversation.stream(question, progress=tile_progress, **run.sampling)
    if all_of_it and conversation.left_out:
        click.echo(
            "The conversation no longer fits the model's context: from now on its oldest "
            "questions are left out; /clear starts afresh.",
            err=True,
        )
    show(answer, vlm, as_json=False, stats=run.stats)


def _command(conversation: Chat, line: str) -> None:
    name, _, argument = line.partition(" ")
    if name == "/image":
        from edgevlm.image.names import each_located

        conversation.image = each_located(argument.strip()) if argument.strip() else None
        if conversation.image is None:
            click.echo("Looking at no picture.", err=True)
    elif name == "/clear":
        conversation.clear()
    elif name == "/stats":
        print_stats(conversation.reply, conversation.devices)
    elif name == "/help":
        click.echo(_HELP, err=True)
    else:
        click.echo(f"{line}: no such command; /help lists them", err=True)


def _reader() -> Callable[[], str]:
    """Line editing and history on a terminal, plain lines from a pipe."""
    if not sys.stdin.isatty():
        if isinstance(sys.stdin, io.TextIOWrapper):
            # Bytes that are no text may name a file; in a question they are refused by themselves.
            sys.stdin.reconfigure(errors="surrogateescape")
        return _next_line
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter

    from edgevlm.cli.history import history
    from edgevlm.models import directory

    session: PromptSession[str] = PromptSession(
        "> ",
        history=history(directory().parent / "chat-history"),
        completer=WordCompleter(["/image", "/clear", "/stats", "/help", "/exit"], sentence=True),
        complete_while_typing=False,
    )
    return session.prompt


def _next_line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line
