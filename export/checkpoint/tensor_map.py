"""Maps the checkpoint's tensors to their canonical names.

Keeps the record of a model that is assembled from several weight files: what came from which.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import numpy as np

from edgevlm.dual import DualFamily, DualModel
from edgevlm.errors import SourceError
from edgevlm.export.checkpoint.adapters import Adapter
from edgevlm.export.checkpoint.lora import merge
from edgevlm.export.checkpoint.source import Checkpoint
from edgevlm.export.checkpoint.tensors import DTYPES, SourceTensor, Tensor, Weights
from edgevlm.export.parts import room
from edgevlm.family import IGNORED, TOWER, Family, Model
from edgevlm.manifest import WeightFileRecord
from edgevlm.parts import EMBED, LM_HEAD, Part


@dataclass(frozen=True)
class TensorMap:
    """The tensors of "vision", "projector" and "decoder", and of "regions" where there are some, by
    canonical name, and the records of the weight files; none for a checkpoint that is whole.
    `plain` are the tensors that an adapter was merged into, as they are without it; `notes` say
    what was done.
    """

    parts: Mapping[str, Weights]
    weight_files: tuple[WeightFileRecord, ...] = ()
    plain: Mapping[str, Weights] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Origin:
    """A tensor, its weight file ("" for the main checkpoint) and its canonical name."""

    tensor: SourceTensor
    file: str
    name: str | None


def assign(
    checkpoint: Checkpoint, family: Family, model: Model, adapter: Adapter | None = None
) -> TensorMap:
    """Maps every tensor to its canonical name, with an adapter merged.

    Raises SourceError when a tensor is missing, left over, or of another shape or type than the
    config says.
    """
    configs: dict[str, Part] = {
        "vision": model.vision,
        "projector": model.projector,
        "decoder": model.text,
        **({"regions": model.region_model} if model.region_model else {}),
    }
    origins = _origins(checkpoint, family, model)
    lenient = {file.name for file in family.weight_files if not file.strict}
    chosen = _chosen(origins, family.name, lenient)
    plain = {part: _part(chosen, part) for part in configs} if adapter else {}
    notes: tuple[str, ...] = ()
    if adapter:
        tied = LM_HEAD not in model.text.tensors()
        chosen, note = merge(chosen, adapter, family.locate, model.skipped, tied)
        notes = (note,)
    parts: dict[str, Weights] = {}
    for part, config in configs.items():
        found = _canonical(_part(chosen, part), config)
        parts[part] = _complete(found, part, config, checkpoint)
    records = _records(checkpoint, family, origins) if family.weight_files else ()
    return TensorMap(parts, records, plain, notes)


def assign_dual(checkpoint: Checkpoint, family: DualFamily, model: DualModel) -> dict[str, Weights]:
    """The tensors of "vision" and "text" by canonical name, and those of "score", the numbers that
    a cosine is turned into a score with; raises SourceError as `assign`.
    """
    origins = [_Origin(t, "", family.locate(t.name)) for t in checkpoint.tensors.values()]
    chosen = _chosen(origins, family.name)
    parts: dict[str, Weights] = {
        part: _complete(_canonical(_part(chosen, part), config), part, config, checkpoint)
        for part, config in model.parts.items()
    }
    return {**parts, "score": _part(chosen, "score")}


def _part(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    start = f"{part}."
    return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}


def _canonical(found: Weights, config: Part) -> dict[str, Tensor]:
    """A part's tensors in the canonical layout."""
    canonical = getattr(room(config), "canonical", None)
    if canonical:
        for tensor in found.values():
            _check_type(tensor)
        found = canonical(found, config)
    return dict(found)


def _origins(checkpoint: Checkpoint, family: Family, model: Model) -> list[_Origin]:
    """Every tensor with its canonical name, IGNORED where the model never reads it, None where the
    family does not know it.
    """
    found = [_Origin(t, "", family.locate(t.name)) for t in checkpoint.tensors.values()]
    tower = checkpoint.extra.get(TOWER.removesuffix("/"))
    if tower and tower.tensors:
        # A copy inside the checkpoint is rounded; the original projects never look at it.
        found = [o for o in found if not (o.name or "").startswith("vision.")]
    for file, inside in checkpoint.extra.items():
        found += [
            _Origin(t, file, family.locate(f"{file}/{t.name}")) for t in inside.tensors.values()
        ]
    return [
        replace(o, name=IGNORED) if (o.name or "").startswith(model.skipped) else o for o in found
    ]


def _chosen(
    origins: Iterable[_Origin], family: str, lenient: Collection[str] = ()
) -> dict[str, Tensor]:
    """The tensor of every canonical name: of several files that have it, the last one's. Of
    `lenient` files unknown tensors are left over.
    """
    found: dict[str, _Origin] = {}
    for origin in origins:
        if origin.name is None and origin.file not in lenient:
            raise SourceError(f"{at(origin.tensor)} is unknown to the family {family!r}")
        if not origin.name:
            continue
        other = found.get(origin.name)
        if other and other.file == origin.file:
            raise SourceError(
                f"{at(origin.tensor)} and {other.tensor.name} are the same; remove one"
            )
        found[origin.name] = origin
    return {name: origin.tensor for name, origin in found.items()}


def _complete(found: dict[str, Tensor], part: str, config: Part, where: Checkpoint) -> Weights:
    expected = config.tensors()
    head = found.pop(LM_HEAD, None) if LM_HEAD not in expected else None
    for name, tensor in found.items():
        if name not in expected:
            raise SourceError(f"{at(tensor)} is not a tensor of this model; check config.json")
    for name, shape in expected.items():
        if name not in found:
            beside = "".join(f", {p.weights[0].name}" for p in where.extra.values() if p.weights)
            raise SourceError(
                f"{where.folder}{beside}: lacks the tensor for {part}.{name}; download it again"
            )
        _check(found[name], shape)
    if head:
        _check_tied(head, found[EMBED], getattr(config, "tie_word_embeddings", False))
    return found


def _check(tensor: Tensor, shape: tuple[int, ...]) -> None:
    _check_type(tensor)
    if tensor.shape != shape:
        raise SourceError(
            f"{at(tensor)} has shape {list(tensor.shape)}, config.json says {list(shape)}"
        )


def _check_type(tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise SourceError(
            f"{at(tensor)} is stored as {tensor.dtype}, not as {', '.join(DTYPES)}; "
            "export the original float checkpoint"
        )


def _check_tied(head: Tensor, embed: Tensor, stated: bool) -> None:
    """A stored output table is allowed when it repeats the input table, which is written once;
    `stated` is whether a config says so, and could say otherwise.
    """
    _check(head, embed.shape)
    same = head.dtype == embed.dtype and all(np.array_equal(a, b) for a, b in _pairs(head, embed))
    if not same:
        raise SourceError(
            f"{at(head)} differs from {embed.name}; "
            + (
                "tie_word_embeddings in config.json says that they are one: "
                "write false there to use both, or remove the first"
                if stated
                else "this architecture has only one table for both"
            )
        )


def _pairs(a: Tensor, b: Tensor) -> Iterator[tuple[Any, Any]]:
    return zip_longest(a.blocks(), b.blocks())


def at(tensor: Tensor) -> str:
    """A tensor's file and name, for messages."""
    return f"{tensor.file}: {tensor.name}"


def _records(
    checkpoint: Checkpoint, family: Family, origins: list[_Origin]
) -> tuple[WeightFileRecord, ...]:
    last = {o.name: o.file for o in origins}
    records = []
    for file in ("", *(p.name for p in family.weight_files)):
        inside = checkpoint.extra[file] if file else checkpoint
        own = [o for o in origins if o.file == file]
        records.append(
            WeightFileRecord(
                file or checkpoint.configs["config.json"]["model_type"],
                inside.weights[0].name if file else checkpoint.folder.resolve().name,
                used=outline(o.tensor.name for o in own if o.name and last[o.name] == file),
                replaced=outline(o.tensor.name for o in own if o.name and last[o.name] != file),
                unused=outline(o.tensor.name for o in own if not o.name),
            )
        )
    return tuple(records)


def outline(names: Iterable[str]) -> tuple[str, ...]:
    """Names with their layers counted instead of listed, in order: "layers.*.mlp.fc1.bias x32"."""
    counts = Counter(re.sub(r"\.\d+\.", ".*.", name) for name in names)
    return tuple(name if n == 1 else f"{name} x{n}" for name, n in counts.items())
