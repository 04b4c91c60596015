"""Options that the commands which write bundles share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from edgevlm.export import QUANTS, VISION_PRECISIONS

Command = Callable[..., Any]


def precisions(
    default: str, compared: str, verify: bool | None = True, unasked: str = ""
) -> Callable[[Command], Command]:
    """Adds the options of precisions; `default` says what holds where one is not named, `compared`
    what a bundle is compared with, and `unasked` when, if `verify` is None.
    """
    options = (
        *quant_and_vision(default),
        click.option(
            "--verify/--no-verify",
            default=verify,
            show_default=unasked or True,
            help=f"Compare every stage with {compared}.",
        ),
        click.option(
            "--calibration",
            type=click.Path(path_type=Path),
            metavar="FOLDER",
            help="Pictures like those the model will see, for precisions that measure ranges.",
        ),
        click.option(
            "--imatrix/--no-imatrix",
            default=None,
            help="Round the decoder's weights by how much they matter to pictures and prompts "
            "[default: for quants that need it]",
        ),
        click.option(
            "--languages",
            default="",
            metavar="CODES",
            help="Languages of the answers, such as en,fr: tokens that their texts do not need "
            "leave the output matrix, which makes answers faster  [default: all tokens stay]",
        ),
    )

    return added(options)


def quant_and_vision(default: str) -> tuple[Callable[[Command], Command], ...]:
    """The options of the decoder's and the vision encoder's precision."""
    return (
        click.option(
            "--quant",
            type=click.Choice(QUANTS),
            metavar="QUANT",
            help=f"Precision of the decoder: {', '.join(QUANTS)}  [default: {default}]",
        ),
        click.option(
            "--vision-precision",
            "vision_precisions",
            type=click.Choice(VISION_PRECISIONS),
            multiple=True,
            help="Precision of the vision encoder; repeatable, the main one first  "
            f"[default: {default}]",
        ),
    )


def added(
    options: Sequence[Callable[[Command], Command]],
) -> Callable[[Command], Command]:
    """Adds options to a command, in this order."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate
