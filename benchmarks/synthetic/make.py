"""A synthetic bundle by name: made once, then found where installed models lie."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

from edgevlm.benchmarks.synthetic.decoder import QUANTS, decoder_bytes, write_decoder
from edgevlm.benchmarks.synthetic.models import MODELS, PREFIX
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
from edgevlm.family import Family, Model, Source, by_model_type
from edgevlm.models import directory
from edgevlm.parts import Part

# Room for headers and the tokenizer.
_SPARE_BYTES = 64 << 20


def synthetic(name: str, quant: str, starts: Callable[[str], None] = lambda _: None) -> Bundle:
    """The bundle of a name in MODELS at a precision in QUANTS, made if it is not there yet;
    `starts` is told its name before that, since it takes minutes.

    Raises BenchError for another name or precision or a full disk, EngineMissing without onnx.
    """
    if name not in MODELS:
        raise BenchError(f"{name!r} cannot be synthesized; choose from {', '.join(MODELS)}")
    if quant not in QUANTS:
        raise BenchError(f"quant {quant!r} cannot be synthesized; choose from {', '.join(QUANTS)}")
    folder = directory().parent / "synthetic" / f"{name}-{quant}"
    if not (folder / MANIFEST).is_file():
        starts(folder.name)
        try:
            make(folder, f"{PREFIX}{name}-{quant}", MODELS[name], quant)
        except OSError as e:
            raise BenchError(
                f"{folder}: cannot be written ({e.strerror or e}); EDGEVLM_HOME names another place"
            ) from None
    return open_bundle(folder)


def describe(source: Source, name: str) -> tuple[Family, Model]:
    """The family of a checkpoint and what it says of the model."""
    family = by_model_type(source.files["config.json"]["model_type"], name)
    return family, family.describe(source)


def make(destination: Path, name: str, source: Source, quant: str) -> None:
    """Writes a bundle of random weights in the shapes of a checkpoint.

    Raises BenchError without room on the disk, EngineMissing without onnx.
    """
    from edgevlm.benchmarks.synthetic.connectors import precision, write_projector
    from edgevlm.benchmarks.synthetic.towers import write_encoder

    family, model = describe(source, name)
    _check_disk(destination, model, quant)
    with writing(destination) as folder:
        write_decoder(folder / FILE, name, model, quant)
        write_encoder(folder / "vision.onnx", model.vision)
        write_projector(folder / "projector.onnx", model)
        manifest = Manifest(
            format=FORMAT,
            family=family.name,
            name=name,
            license="none: random weights",
            components={
                "vision": _component("int8", folder, "vision.onnx"),
                "projector": _component(precision(model.projector), folder, "projector.onnx"),
                "decoder": _component(quant, folder, FILE),
            },
            image=model.image,
            prompt=model.prompt,
            decoder=model.decoder,
            answer=model.answer,
            token_embedding=embedding_place(folder / FILE),
        )
        write_manifest(folder, manifest)


def _check_disk(destination: Path, model: Model, quant: str) -> None:
    weights: dict[str, Part] = {"vision": model.vision, "projector": model.projector}
    need = decoder_bytes(model, quant) + _SPARE_BYTES
    for part, width in (("vision", 1), ("projector", 4)):
        shapes = weights[part].tensors().values()
        need += width * sum(math.prod(shape) for shape in shapes)
    place = destination.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < need:
        raise BenchError(
            f"{destination.name} takes {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free in "
            f"{place}; make room, or EDGEVLM_HOME names another place"
        )


def _component(precision: str, folder: Path, main: str) -> Component:
    files = [folder / main, folder / f"{main}.data"]
    return Component(precision, tuple(record(path) for path in files if path.exists()))
