"""edgevlm use, rm, du, gc"""

from __future__ import annotations

import click

from edgevlm import disk_cache, store
from edgevlm.cli.names import InstalledName
from edgevlm.cli.progress import mib
from edgevlm.cli.tables import out_console, table
from edgevlm.hub import cache
from edgevlm.models import BUILT_IN, installed
from edgevlm.pulling import remove_checkpoint


@click.command()
@click.argument("model", type=InstalledName(folders=False), required=False)
def use(model: str | None) -> None:
    """Make MODEL the one that is asked where none is named; without MODEL, say which it is.

    `edgevlm use pico` goes back to the built-in one.
    """
    if model is None:
        click.echo(store.default() or BUILT_IN)
        return
    store.set_default(model)
    click.echo(f"{model} is the default model now.", err=True)


@click.command()
@click.argument("models", nargs=-1, required=True, type=InstalledName(folders=False))
def rm(models: tuple[str, ...]) -> None:
    """Remove installed MODELS."""
    for name in models:
        was_default = store.default() == name
        freed = store.remove(name)
        note = "; pico is the default model again" if was_default else ""
        click.echo(f"{name}: removed, {mib(freed)} freed{note}.", err=True)


@click.command()
def du() -> None:
    """List what takes room: models, what broken pulls left, pulled checkpoints, cached pictures."""
    rows = [(name, "model", store.folder_bytes(folder)) for name, folder in installed().items()]
    rows += [(found.path.name, "broken pull", found.bytes) for found in store.leftovers()]
    for repo, commit in store.noted_checkpoints():
        size = cache.checkpoint_bytes(repo, commit)
        rows.append((f"{repo}@{commit[:7]}", "checkpoint", size))
    if cached := disk_cache.pictures_folder().bytes():
        rows.append(("pictures", "cache", cached))
    listed = table("name", "", "size")
    for name, kind, size in sorted(rows, key=lambda row: -row[2]):
        listed.add_row(name, kind, mib(size))
    listed.add_row("", "in all", mib(sum(size for *_, size in rows)))
    out_console().print(listed)


@click.command()
@click.option("--dry-run", is_flag=True, help="Say what would go; remove nothing.")
def gc(dry_run: bool) -> None:
    """Remove what broken pulls left, the checkpoints that pulls put into the hub's cache, and what
    was computed of pictures.
    """
    total = 0
    for found in store.leftovers():
        total += found.bytes
        click.echo(f"{found.path.name}: {mib(found.bytes)}")
        if not dry_run:
            store.remove_leftover(found)
    for repo, commit in store.noted_checkpoints():
        size = cache.checkpoint_bytes(repo, commit)
        total += size
        click.echo(f"{repo}@{commit[:7]}: {mib(size)}")
        if not dry_run:
            remove_checkpoint(repo, commit)
    cached = disk_cache.pictures_folder()
    if size := cached.bytes():
        total += size
        click.echo(f"cached pictures: {mib(size)}")
        if not dry_run:
            cached.clear()
    click.echo(f"{mib(total)} {'would be ' if dry_run else ''}freed.", err=True)
