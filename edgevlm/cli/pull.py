"""edgevlm pull"""

from __future__ import annotations

import click

from edgevlm import machine, store
from edgevlm.bundle import Bundle
from edgevlm.cli.names import CatalogueName
from edgevlm.cli.precisions import added, quant_and_vision
from edgevlm.cli.progress import ProgressBars, err_console, mib
from edgevlm.cli.signals import Aside
from edgevlm.export import TARGETS
from edgevlm.export.options import uncompared
from edgevlm.hub.refusals import page
from edgevlm.pulling import Precisions, Pull, carry_out, prepare


@click.command(cls=Aside)
@click.argument("model", type=CatalogueName())
@click.option("--name", metavar="NAME", help="Name of the model here  [default: MODEL's]")
@click.option(
    "--target",
    type=click.Choice(list(TARGETS)),
    help="Kind of device, which picks the precisions not named  [default: laptop]",
)
@added(quant_and_vision("the target's"))
@click.option(
    "--verify/--no-verify",
    default=None,
    show_default="where edgevlm[export] is installed",
    help="Compare every stage with the original.",
)
@click.option(
    "--keep-checkpoint/--remove-checkpoint",
    default=True,
    show_default=True,
    help="Keep what was downloaded in the hub's cache after the export.",
)
def pull(model: str, name: str | None, target: str | None, quant: str | None,
         vision_precisions: tuple[str, ...], verify: bool | None,
         keep_checkpoint: bool) -> None:  # fmt: skip
    """Download MODEL and install it under a short name.

    MODEL is a name that `edgevlm models --all` lists, or a repository on the hub such as
    google/paligemma-3b-mix-224. One that holds a bundle is taken as it is; another's checkpoint is
    exported, or its GGUF files where it has nothing else. A pull that was cut off goes on where it
    was.
    """
    console = err_console()
    wanted = Precisions(target, quant, vision_precisions)
    plan = prepare(model, wanted, name=name)
    for line in _about(plan):
        console.print(line, soft_wrap=True)
    with ProgressBars(console) as bars:
        bundle = carry_out(
            plan,
            wanted,
            verify=verify,
            keep_checkpoint=keep_checkpoint,
            progress=bars.update,
        )
    for line in _done(plan, bundle, keep_checkpoint):
        console.print(line, soft_wrap=True)


def _about(plan: Pull) -> list[str]:
    """The lines before a download: whose it is, under which licence, what it costs."""
    repository, entry = plan.repository, plan.entry
    licence = repository.license or (entry.license if entry else "") or "not stated"
    lines = [
        f"{plan.name}: {repository.id} at {repository.commit[:7]}, licence {licence} "
        f"({page(repository.id)})"
    ]
    if plan.folder:
        return [*lines, "The hub cannot be reached; taken from its cache."]
    costs = [f"{mib(plan.missing)} to download"] if plan.missing else ["downloaded already"]
    if entry and not plan.ready:
        costs += [f"about {mib(entry.bundle)} installed"]
    if entry:
        costs += [f"{mib(entry.memory)} of memory to answer"]
    lines.append(", ".join(costs))
    memory = machine.memory().total_bytes
    if entry and entry.memory > memory:
        lines.append(f"This machine has {mib(memory)} of memory, which is too little to answer.")
    return lines


def _done(plan: Pull, bundle: Bundle, kept: bool) -> list[str]:
    """The lines after it: the size, the model that `ask` takes, what to try."""
    parity = bundle.manifest.parity
    compared = f", compared with the original in {len(parity)} stages" if parity else ""
    lines = [f"{plan.name}: {mib(bundle.bytes)}{compared}"]
    lines += [f"Note: {note}." for note in uncompared(bundle.manifest.notes)]
    if kept and plan.missing and not plan.ready:
        lines.append(
            f"The checkpoint stays in the hub's cache ({mib(plan.missing)}); `edgevlm gc` "
            "removes it."
        )
    is_default = store.default() == plan.name
    lines.append(
        "It is the default model now."
        if is_default
        else f"`edgevlm use {plan.name}` makes it the default model."
    )
    chosen = "" if is_default else f" -m {plan.name}"
    return [*lines, f'Try it: edgevlm ask "What is in this photo?" -i photo.jpg{chosen}']
