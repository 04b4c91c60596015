"""edgevlm models: list, show, verify"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import click
from rich.console import Console
from rich.table import Table

from edgevlm.bundle import Bundle, Component, WeightFileRecord, open_bundle
from edgevlm.errors import BundleError
from edgevlm.image.plan import limited, plan
from edgevlm.models import directory, installed, resolve
from edgevlm.specs import ImageSpec

# A photograph of 12 megapixels, as telephones take them.
_PHOTO = (4000, 3000)


@click.group(invoke_without_command=True)
@click.pass_context
def models(ctx: click.Context) -> None:
    """List models, show one, check its files."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_models)


@models.command("list")
def list_models() -> None:
    """List the models that go by a name."""
    table = _table("name", "family", "decoder", "vision", "size", "licence")
    for name, folder in installed().items():
        try:
            bundle = open_bundle(folder)
        except BundleError as error:
            click.echo(f"{name}: {error}", err=True)
            continue
        parts = bundle.manifest.components
        table.add_row(
            name,
            bundle.manifest.family,
            parts["decoder"].precision,
            ", ".join(bundle.vision_precisions),
            _mib(bundle.bytes),
            bundle.manifest.license,
        )
    _console().print(table)
    click.echo(f"Bundles in {directory()} go by their folder's name.", err=True)


@models.command()
@click.argument("model")
def show(model: str) -> None:
    """Show what a bundle says about itself."""
    bundle = open_bundle(resolve(model))
    console, manifest, decoder = _console(), bundle.manifest, bundle.manifest.decoder
    table = _table("", "")
    for key, value in (
        ("name", manifest.name),
        ("family", manifest.family),
        ("licence", manifest.license),
        ("folder", str(bundle.folder)),
        ("picture", picture_text(manifest.image)),
        ("decoder", f"{decoder.architecture}, width {decoder.n_embd}, {decoder.n_layer} layers"),
        ("context", f"{decoder.context_length} tokens, {decoder.attention} attention"),
        ("tasks", ", ".join(manifest.prompt.tasks)),
        *manifest.versions.items(),
    ):  # fmt: skip
        table.add_row(key, value)
    console.print(table)
    console.print(_files(bundle, lambda _: ""))
    if manifest.weight_files or manifest.notes:
        console.print(weight_files_text(manifest.weight_files, manifest.notes))
    if manifest.parity:
        console.print(parity_table(bundle))


@models.command()
@click.argument("model")
def verify(model: str) -> None:
    """Hash every byte of a bundle and compare it with its manifest."""
    bundle = open_bundle(resolve(model), check="full")
    _console().print(_files(bundle, lambda _: "ok"))


def parity_table(bundle: Bundle) -> Table:
    """A table of each stage's distance from the source, as measured at export."""
    table = _table("stage", "metric", "worst", "tolerance", "")
    for stage in bundle.manifest.parity:
        table.add_row(
            stage.stage,
            stage.metric,
            f"{stage.worst:.3g}",
            f"{stage.tolerance:.3g}",
            "ok" if stage.ok else "beyond",
        )
    return table


def picture_text(spec: ImageSpec) -> str:
    """The size of a picture to the model, and its cost in tokens; of tiles, a photo's."""
    if spec.tiles is None:
        return f"{spec.size} px ({spec.fit}), {spec.tokens} tokens"
    costs = []
    for named, limit in (("", None), (" with --max-tiles 1", 1)):
        planned = plan(*_PHOTO, limited(spec, limit))
        plural = "s" if planned.n_tiles > 1 else ""
        costs.append(f"{planned.n_tiles} tile{plural}, {planned.rows} tokens{named}")
    width, height = _PHOTO
    return f"tiles of {spec.size} px; a photo of {width} x {height}: {'; '.join(costs)}"


def weight_files_text(
    files: Sequence[WeightFileRecord], notes: Sequence[str], *, used: bool = False
) -> str:
    """Lists the tensors that an assembled model did not use, with `used` also those that it took,
    and the notes of its export.
    """
    lines = []
    for file in files:
        lines.append(f"{file.name:<9} {file.file}")
        for what, names in (
            ("used", file.used if used else ()),
            ("replaced by a later file", file.replaced),
            ("never read", file.unused),
        ):
            if names:
                lines += [f"  {what}:", *(f"    {name}" for name in names)]
    return "\n".join([*lines, *(f"- {note}" for note in notes)])


def _files(bundle: Bundle, verdict: Callable[[Component], str]) -> Table:
    table = _table("component", "precision", "file", "size", "sha256", "")
    parts = [*bundle.manifest.components.items()]
    parts += [("vision", component) for component in bundle.manifest.alternatives.values()]
    for name, component in parts:
        for entry in component.files:
            table.add_row(
                name,
                component.precision,
                entry.file,
                _mib(entry.bytes),
                entry.sha256[:16],
                verdict(component),
            )
    return table


def _console() -> Console:
    """Names and paths are shown as they are: brackets in them are no markup."""
    return Console(markup=False, highlight=False)


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.1f} MiB"
