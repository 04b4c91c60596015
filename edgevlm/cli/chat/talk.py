"""A conversation on the command line: what a line means, and what is said about it on stderr."""

from __future__ import annotations

import re
import traceback
from typing import TYPE_CHECKING

import click

from edgevlm.cli.chat.commands import COMMANDS, ChatCommand
from edgevlm.cli.common import Run, print_stats, show, tile_progress
from edgevlm.cli.signals import raising
from edgevlm.errors import EdgeVLMError
from edgevlm.image.listing import dropped, dropped_video
from edgevlm.sampling import SamplingOptions

if TYPE_CHECKING:
    from edgevlm.runtimes.answer import Answer
    from edgevlm.runtimes.chat import Chat
    from edgevlm.runtimes.session import VLM

BLOCK = '"""'
_SEEDS = 2**32 - 1
_WORD = re.compile(r"/[A-Za-z?_-]*")


class Talk:
    """A chat with its settings; `turn` does what a line says, whatever goes wrong."""

    def __init__(self, vlm: VLM, run: Run, chat: Chat, plain: bool, *, previews: bool) -> None:
        self.vlm, self.chat, self.previews = vlm, chat, previews
        self.sampling: SamplingOptions = {**run.sampling}
        self.ended = False
        self._plain, self._stats = plain, run.stats

    @property
    def name(self) -> str:
        """The model's name."""
        return self.vlm.manifest.name

    def greet(self) -> None:
        """Says who is there, and shows the pictures."""
        from edgevlm.cli.chat.pictures import look_at, pictures_text

        say(f"{self.name}: ask away; /help for commands.")
        if shown := pictures_text(self.chat):
            look_at(self)
            say(f"Looking at {shown}.")

    def turn(self, line: str) -> None:
        """A command, what was dropped on the prompt, or a question."""
        try:
            with raising():
                self._turn(line)
        except EdgeVLMError as error:
            say(str(error))
        except KeyboardInterrupt:
            say(" (stopped)")
        except (OSError, click.Abort, click.exceptions.Exit):
            raise  # The terminal is gone, or nothing can be printed any more.
        except Exception:
            # A defect of edgevlm's own is shown whole; it costs an answer, not the conversation.
            traceback.print_exc()
            say("This is a defect of edgevlm; the chat goes on.")

    def _turn(self, line: str) -> None:
        text = line.strip()
        if text.startswith(BLOCK):
            self._ask_block(text)
            return
        word, _, argument = text.partition(" ")
        command = command_of(word) if line.startswith("/") else None
        if command:
            command.run(self, argument.strip())
        elif dropped(text):
            COMMANDS[0].run(self, text)
        elif dropped_video(text):
            COMMANDS[1].run(self, text)
        elif line.startswith("/") and _WORD.fullmatch(word):
            meant = [c.name for c in COMMANDS if c.name.startswith(word)]
            cure = f"did you mean {' or '.join(meant)}?" if meant else "/help lists them"
            say(f"{word}: no such command; {cure} (With a space before it, it is a question.)")
        elif text:
            self.ask(text)

    def _ask_block(self, text: str) -> None:
        if len(text) < 2 * len(BLOCK) or not text.endswith(BLOCK):
            say(f"{BLOCK} begins a question, which needs {BLOCK} at its end; nothing was asked")
        elif question := text[len(BLOCK) : -len(BLOCK)].strip("\r\n"):
            self.ask(question)

    def ask(self, question: str) -> None:
        """Asks a question and shows the answer. One that was stopped before its answer began gives
        way to it.
        """
        turns = self.chat.turns
        if turns and (last := turns[-1][1].reply).finish_reason == "cancelled" and not last.text:
            self.chat.undo()
        before = self.chat.left_out
        self._show(self.chat.stream(question, progress=tile_progress, **self.sampling), before)

    def retry(self) -> None:
        """Asks the last question again, with the next seed where there is one."""
        options = self.sampling
        if not options.get("temperature"):
            say("Without a temperature the answer is the same; /set temperature 0.7 draws others.")
        elif (seed := options.get("seed")) is not None:
            options["seed"] = (seed + 1) % _SEEDS
        before = self.chat.left_out
        self._show(self.chat.retry(progress=tile_progress, **options), before)

    def _show(self, answer: Answer, left_out: int) -> None:
        """Shows an answer; says so where questions began to be left out with it."""
        if not left_out and self.chat.left_out:
            say(
                "The conversation no longer fits the model's context: from now on its oldest "
                "questions are left out; /clear starts afresh."
            )
        show(answer, self.vlm, as_json=False, stats=self._stats, markdown=not self._plain)

    def stats(self) -> None:
        """Prints the stages of the last answer."""
        reply = self.chat.reply
        if reply.timings.total_ms:
            print_stats(reply, self.chat.devices)
        else:
            say("The last answer came from a file; nothing was measured.")


def command_of(word: str) -> ChatCommand | None:
    """The command of that name."""
    return next((c for c in COMMANDS if word in (c.name, *c.others)), None)


def say(text: str) -> None:
    """Prints a note to stderr."""
    click.echo(text, err=True)
