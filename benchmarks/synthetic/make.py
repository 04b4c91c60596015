"""A synthetic bundle by name: made once, then found where installed models lie."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from edgevlm import machine
from edgevlm.benchmarks.synthetic.decoder import QUANTS, decoder_bytes, write_decoder
from edgevlm.benchmarks.synthetic.models import MODELS, PREFIX
from edgevlm.benchmarks.synthetic.tensors import random_part
from edgevlm.bundle import Bundle, open_bundle, record, writing
from edgevlm.errors import BenchError
from edgevlm.export.components import write_newline
from edgevlm.export.gguf.decoder import FILE, embedding_location
from edgevlm.export.parts import net
from edgevlm.family import Family, Model, Source, by_config
from edgevlm.manifest import FORMAT, MANIFEST, Component, Manifest, write_manifest
from edgevlm.models import directory
from edgevlm.parts import Connector, VisionTower
from edgevlm.progress import Stage

# Room for headers and the tokenizer.
_SPARE_BYTES = 64 << 20


def synthetic(name: str, quant: str, starts: Callable[[str], None] = lambda _: None) -> Bundle:
    """The bundle of a name in MODELS at a precision in QUANTS, made if it is not there yet;
    `starts` is told its name before that, since it takes minutes.

    Raises BenchError for another name or precision or a full disk.
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
    family = by_config(source.files["config.json"], name)
    return family, family.describe(source)


def make(destination: Path, name: str, source: Source, quant: str) -> None:
    """Writes a bundle of random weights in the shapes of a checkpoint; raises BenchError without
    room on the disk.
    """
    family, model = describe(source, name)
    _check_disk(destination, model, quant)
    with writing(destination) as folder:
        graphs = write_graphs(folder, model)
        added = {text: token.id for text, token in source.tokenizer.added.items()}
        write_decoder(folder / FILE, name, model, quant, added)
        decoder = Component(quant, (record(folder / FILE),))
        manifest = Manifest(
            format=FORMAT,
            family=family.name,
            name=name,
            license="none: random weights",
            components={**graphs, "decoder": decoder, **write_regions(folder, model)},
            image=model.image,
            prompt=model.prompt,
            decoder=model.decoder,
            answer=model.answer,
            token_embedding=embedding_location(folder / FILE),
            regions=model.regions,
        )
        write_manifest(folder, manifest)


def write_graphs(folder: Path, model: Model) -> dict[str, Component]:
    """Writes the tower and the connector with random weights as an export at int8 has them, without
    its search for nodes that have to stay in float32.
    """
    return {
        "vision": _write_graph(folder / "vision.onnx", model.vision, model.vision.pixels),
        "projector": _write_graph(
            folder / "projector.onnx",
            model.projector,
            (model.vision.features[0], model.projector.in_features),
        ),
    }


def write_regions(folder: Path, model: Model) -> dict[str, Component]:
    """Writes the region model with random weights, where there is one."""
    if model.region_model is None:
        return {}
    from edgevlm.export.parts import regions

    tensors = random_part(model.region_model)
    written = regions.write(model.region_model, tensors, folder, None)
    return {"regions": Component("fp32", tuple(map(record, written)))}


def _write_graph(path: Path, part: VisionTower | Connector, shape: tuple[int, ...]) -> Component:
    from edgevlm.export.onnx import dynamic8, quantize
    from edgevlm.export.onnx.storage import files
    from edgevlm.export.onnx.write import write

    tensors, quantized = random_part(part), net(part).quantized
    with tempfile.TemporaryDirectory(dir=path.parent) as work:
        whole = Path(work) / path.name if quantized else path
        write(part, shape, tensors, whole, Stage(None, path.stem, 1, "tensors"))
        if quantized:
            dynamic8.write(whole, path, quantize.linear_maps(whole))
    written = (*files(path), *write_newline(part, tensors, path.parent))
    return Component("int8" if quantized else "fp32", tuple(map(record, written)))


def _check_disk(destination: Path, model: Model, quant: str) -> None:
    vision, projector = (
        sum(map(math.prod, part.tensors().values())) for part in (model.vision, model.projector)
    )
    # Both graphs are there in float32 first.
    making = max(4 * vision, 4 * projector, decoder_bytes(model, quant))
    need = vision + 4 * projector + making + _SPARE_BYTES
    place = machine.nearest(destination.absolute())
    free = shutil.disk_usage(place).free
    if free < need:
        raise BenchError(
            f"{destination.name} takes {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free in "
            f"{place}; make room, or EDGEVLM_HOME names another place"
        )
