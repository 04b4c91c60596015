"""edgevlm tune"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from edgevlm.cli.names import InstalledName
from edgevlm.cli.signals import Aside

if TYPE_CHECKING:
    from edgevlm.runtimes.rules import Goal
    from edgevlm.runtimes.tuned import Tuning


@click.command(cls=Aside)
@click.argument("model", required=False, type=InstalledName(), envvar="EDGEVLM_MODEL")
@click.option(
    "--for",
    "goal",
    type=click.Choice(["chat", "caption", "both"]),
    default="both",
    show_default=True,
    help="Long answers, a first short one, or for each command what it is for.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=1),
    default=150,
    show_default=True,
    metavar="S",
    help="Time to measure in; what does not fit is left as it is.",
)
@click.option("--forget", is_flag=True, help="Drop what was measured for MODEL on this machine.")
def tune(model: str | None, goal: Goal, seconds: float, forget: bool) -> None:
    """Measure the best settings for MODEL on this machine, and use them from now on.

    MODEL is a bundle folder or an installed name; without one it is the model that `edgevlm use`
    chose. Threads, weight repacking, batches, flash attention and the vision encoder's precision
    are compared on the CPU; run it while nothing else is busy.
    """
    from rich.console import Console

    from edgevlm import store
    from edgevlm.bundle import open_bundle
    from edgevlm.errors import PromptError
    from edgevlm.models import is_dual, resolve
    from edgevlm.runtimes import tuned, tuning
    from edgevlm.runtimes.llama import ggml
    from edgevlm.types import Progress

    folder = resolve(model if model is not None else store.default())
    if is_dual(folder):
        raise PromptError(
            f"{folder.name}: answers nothing, so there are no settings to be measured; `edgevlm "
            "bench` measures its speed"
        )
    if forget:
        gone = tuned.forget(open_bundle(folder), ggml.cpu_features())
        click.echo("forgotten" if gone else "nothing was measured for it here", err=True)
        return
    console = Console(stderr=True, markup=False, highlight=False)
    with console.status("measuring") as status:

        def show(progress: Progress) -> None:
            status.update(f"{progress.stage}, {progress.done + 1} of {progress.total}")

        found = tuning.tune(folder, goal, seconds=seconds, progress=show)
    path = tuned.remember(found)
    _show(found)
    click.echo(f"Kept in {path}", err=True)


def _show(found: Tuning) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("part", "setting", "measured", "chosen", "gain"):
        table.add_column(name, overflow="fold")
    for c in found.compared:
        times = ", ".join(f"{value} {ms:.4g} ms" for value, ms in c.choices.items())
        first = next(iter(c.choices.values()))
        gain = "" if c.choices[c.chosen] == first else f"{1 - c.choices[c.chosen] / first:.0%}"
        table.add_row(c.part, c.setting, times, c.chosen, gain)
    console = Console(markup=False, highlight=False)
    console.print(table)
    for goal, settings in found.goals.items():
        console.print(f"repacking for {goal}: {settings.repacking}")
    for name in found.skipped:
        console.print(f"{name}: not measured, the time was over; --seconds gives more")
