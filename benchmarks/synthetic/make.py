"""A synthetic bundle by name: made once, then found where installed models lie."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edgevlm.benchmarks.synthetic.decoder import QUANTS, write_decoder
from edgevlm.benchmarks.synthetic.models import CONFIGS, PREFIX
from edgevlm.bundle import (
    FORMAT,
    MANIFEST,
    Bundle,
    Component,
    Manifest,
    open_bundle,
    record,
    write_manifest,
    writing,
)
from edgevlm.errors import BenchError
from edgevlm.export.decoder import FILE, embedding_place
from edgevlm.family import Config, Source, by_model_type
from edgevlm.models import directory


def synthetic(name: str, quant: str, starts: Callable[[str], None] = lambda _: None) -> Bundle:
    """The bundle of a name in CONFIGS at a precision in QUANTS, made if it is not there yet;
    `starts` is told its name before that, since it takes minutes.

    Raises BenchError for another name or precision, EngineMissing without onnx.
    """
    if name not in CONFIGS:
        raise BenchError(f"{name!r} cannot be synthesized; choose from {', '.join(CONFIGS)}")
    if quant not in QUANTS:
        raise BenchError(f"quant {quant!r} cannot be synthesized; choose from {', '.join(QUANTS)}")
    folder = directory().parent / "synthetic" / f"{name}-{quant}"
    if not (folder / MANIFEST).is_file():
        starts(folder.name)
        make(folder, f"{PREFIX}{name}-{quant}", CONFIGS[name], quant)
    return open_bundle(folder)


def make(destination: Path, name: str, config: Config, quant: str) -> None:
    """Writes a bundle of random weights in the shapes of a checkpoint's config.json.

    Raises EngineMissing without onnx.
    """
    from edgevlm.benchmarks.synthetic.vision import write_encoder, write_projector

    family = by_model_type(config["model_type"], name)
    model = family.describe(Source({"config.json": config}))
    with writing(destination) as folder:
        write_decoder(folder / FILE, name, model, quant)
        write_encoder(folder / "vision.onnx", model.vision)
        write_projector(folder / "projector.onnx", model.projector, model.image.tokens)
        manifest = Manifest(
            format=FORMAT,
            family=family.name,
            name=name,
            license="none: random weights",
            components={
                "vision": _component("int8", folder, "vision.onnx"),
                "projector": _component("fp32", folder, "projector.onnx"),
                "decoder": _component(quant, folder, FILE),
            },
            image=model.image,
            prompt=model.prompt,
            decoder=model.decoder,
            answer=model.answer,
            token_embedding=embedding_place(folder / FILE),
        )
        write_manifest(folder, manifest)


def _component(precision: str, folder: Path, main: str) -> Component:
    files = [folder / main, folder / f"{main}.data"]
    return Component(precision, tuple(record(path) for path in files if path.exists()))
