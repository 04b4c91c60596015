"""edgevlm models: list, show, verify"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence

import click
from rich.table import Table

from edgevlm import catalogue, machine, store
from edgevlm.bundle import Bundle, open_bundle
from edgevlm.cli.names import InstalledName
from edgevlm.cli.progress import mib
from edgevlm.cli.tables import out_console, table
from edgevlm.errors import BundleError
from edgevlm.image.plan import limited, plan
from edgevlm.manifest import Component, Manifest, WeightFileRecord
from edgevlm.models import BUILT_IN, directory, installed, resolve
from edgevlm.specs import DecoderSpec, ImageSpec, NativeSpec, TextSpec

# A photograph of 12 megapixels, as telephones take them.
_PHOTO = (4000, 3000)


_ALL = click.option("--all", "everything", is_flag=True, help="Also those that can be had.")


@click.group(invoke_without_command=True)
@_ALL
@click.pass_context
def models(ctx: click.Context, everything: bool) -> None:
    """List models, show one, check its files."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_models, everything=everything)


@models.command("list")
@_ALL
def list_models(everything: bool) -> None:
    """List the models that go by a name, the default one with a star."""
    if everything:
        return _list_catalogue()
    chosen = store.default() or BUILT_IN
    rows = table("name", "family", "decoder", "vision", "size", "licence")
    for name, folder in installed().items():
        try:
            bundle = open_bundle(folder)
        except BundleError as error:
            click.echo(f"{name}: {error}", err=True)
            continue
        parts = bundle.manifest.components
        rows.add_row(
            f"{name} *" if name == chosen else name,
            bundle.manifest.family,
            parts["decoder"].precision if "decoder" in parts else "none, embeds",
            ", ".join(bundle.vision_precisions),
            mib(bundle.bytes),
            bundle.manifest.license,
        )
    out_console().print(rows)
    click.echo(
        f"Bundles in {directory()} go by their folder's name; `edgevlm models --all` lists what "
        "can be had.",
        err=True,
    )


def _list_catalogue() -> None:
    """Lists the catalogue, the smallest models first."""
    rows = table("name", "download", "installed", "memory", "licence", "here")
    here = installed()
    for entry in sorted(catalogue.entries().values(), key=lambda e: e.parameters):
        rows.add_row(
            entry.name,
            mib(entry.download),
            mib(entry.bundle),
            mib(entry.memory),
            entry.license + (", gated" if entry.gated else ""),
            "installed" if entry.name in here else fits(entry),
        )
    out_console().print(rows)
    click.echo("`edgevlm pull NAME` gets one, `edgevlm models show NAME` says more.", err=True)


def fits(entry: catalogue.CatalogueEntry) -> str:
    """Says whether this machine can take a model: "fits", or what it lacks."""
    if entry.memory > machine.memory().total_bytes:
        return "too little memory"
    if entry.download + entry.bundle > shutil.disk_usage(machine.nearest(directory())).free:
        return "too little disk"
    return "fits"


@models.command()
@click.argument("model", type=InstalledName())
def show(model: str) -> None:
    """Show what a bundle says about itself, or the catalogue about a model that is not here."""
    entry = catalogue.entry(model)
    if entry and model not in installed() and not os.path.exists(model):
        return _show_entry(entry)
    bundle = open_bundle(resolve(model))
    console, manifest = out_console(), bundle.manifest
    rows = table("", "")
    for key, value in (
        ("name", manifest.name),
        ("family", manifest.family),
        ("licence", manifest.license),
        ("source", manifest.origin or "a folder"),
        ("folder", str(bundle.folder)),
        ("picture", picture_text(manifest.image)),
        *_about(manifest),
        *manifest.versions.items(),
    ):  # fmt: skip
        rows.add_row(key, value)
    console.print(rows)
    console.print(_files(bundle, lambda _: ""))
    if manifest.weight_files or manifest.notes:
        console.print(weight_files_text(manifest.weight_files, manifest.notes))
    if manifest.parity:
        console.print(parity_table(bundle))


def _about(manifest: Manifest) -> tuple[tuple[str, str], ...]:
    """The rows about a model's texts."""
    decoder = manifest.decoder
    if manifest.text:
        return ("texts", text_text(manifest.text)), ("tasks", "classify, embed, search")
    return (
        ("decoder", f"{decoder.architecture}, width {decoder.n_embd}, {decoder.n_layer} layers"),
        ("context", f"{decoder.context_length} tokens, {decoder.attention} attention"),
        ("languages", languages_text(decoder)),
        ("tasks", ", ".join(manifest.prompt.tasks)),
        ("chat", chat_text(manifest)),
    )


def text_text(spec: TextSpec) -> str:
    """The texts of a dual encoder and its score."""
    kind = "sigmoid" if spec.sigmoid else "softmax"
    score = f"{kind} of {spec.scale:.4g} x cosine {spec.bias:+.4g}"
    return f"up to {spec.tokens} tokens, rows of {spec.width}; {score}; {spec.template!r}"


def _show_entry(entry: catalogue.CatalogueEntry) -> None:
    rows = table("", "")
    tiles = {0: "its own size", 1: "one square"}.get(entry.tiles, f"up to {entry.tiles} tiles")
    for key, value in (
        ("name", entry.name),
        ("family", entry.family),
        ("licence", entry.license + (", gated" if entry.gated else "")),
        ("source", entry.source),
        ("parameters", f"{entry.parameters / 1e6:.0f} million"),
        ("download", mib(entry.download)),
        ("installed", mib(entry.bundle)),
        ("memory", f"{mib(entry.memory)} ({fits(entry)})"),
        ("picture", tiles),
        ("context", f"{entry.context} tokens"),
        ("languages", ", ".join(entry.languages)),
        ("tasks", ", ".join(entry.tasks)),
    ):
        rows.add_row(key, value)
    out_console().print(rows)
    click.echo(f"Not installed; `edgevlm pull {entry.name}` gets it.", err=True)


@models.command()
@click.argument("model", type=InstalledName())
def verify(model: str) -> None:
    """Hash every byte of a bundle and compare it with its manifest."""
    bundle = open_bundle(resolve(model), check="full")
    out_console().print(_files(bundle, lambda _: "ok"))


def parity_table(bundle: Bundle) -> Table:
    """A table of each stage's distance from the source, as measured at export."""
    rows = table("stage", "metric", "worst", "tolerance", "")
    for stage in bundle.manifest.parity:
        rows.add_row(
            stage.stage,
            stage.metric,
            f"{stage.worst:.3g}",
            f"{stage.tolerance:.3g}",
            "ok" if stage.ok else "beyond",
        )
    return rows


def chat_text(manifest: Manifest) -> str:
    """Conversations that a model was trained on, and what may come with a question."""
    if not (turn := manifest.prompt.turn):
        return "single questions"
    later = "{image}" in turn and manifest.image.max_pictures > 1
    found = ["conversations", f"pictures with {'any' if later else 'the first'} question"]
    return ", ".join(found + ["system message"] * bool(manifest.prompt.system_template))


def languages_text(decoder: DecoderSpec) -> str:
    """The languages of a decoder's answers, where it was trimmed to some, and its tokens."""
    if not decoder.n_output:
        return f"not trimmed: answers can have all {decoder.n_vocab} tokens"
    named = ", ".join(decoder.languages)
    return f"{named}: answers can have {decoder.n_output} of {decoder.n_vocab} tokens"


def picture_text(spec: ImageSpec) -> str:
    """The size of a picture to the model, and its cost in tokens; of tiles, a photo's."""
    if spec.native:
        return _native_text(spec, spec.native)
    if spec.tiles is None:
        return f"{spec.size} px ({spec.fit}), {spec.tokens} token{'s' if spec.tokens > 1 else ''}"
    costs = []
    # Of a model that cuts nothing unless it is told to: what it does then.
    other = spec.tiles.most + 1 if spec.tiles.max_tiles == 1 else 1
    for named, limit in (("", None), (f" with --max-tiles {other}", other)):
        planned = plan(*_PHOTO, limited(spec, limit))
        plural = "s" if planned.n_tiles > 1 else ""
        costs.append(f"{planned.n_tiles} tile{plural}, {planned.rows} tokens{named}")
    width, height = _PHOTO
    return f"tiles of {spec.size} px; a photo of {width} x {height}: {'; '.join(costs)}"


def _native_text(spec: ImageSpec, native: NativeSpec) -> str:
    planned = plan(*_PHOTO, spec)
    (w, h), (width, height) = planned.canvas, _PHOTO
    usual = native.max_pixels or native.most
    more = f" (--max-pixels up to {native.most})" if usual < native.most else ""
    return (
        f"its own size in squares of {spec.size} px, {usual} px in all at most{more}; "
        f"a photo of {width} x {height}: {w} x {h} px, {planned.rows} tokens"
    )


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
    rows = table("component", "precision", "file", "size", "sha256", "")
    parts = [*bundle.manifest.components.items()]
    parts += [("vision", component) for component in bundle.manifest.alternatives.values()]
    for name, component in parts:
        for entry in component.files:
            rows.add_row(
                name,
                component.precision,
                entry.file,
                mib(entry.bytes),
                entry.sha256[:16],
                verdict(component),
            )
    return rows
