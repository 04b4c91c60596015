"""A source folder -> its main checkpoint and the pieces that the model is assembled from.

Pieces are recognised by the names of their tensors, never by the names of their files. What they
mean is the family's business.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from edgevlm import family as families
from edgevlm.errors import SourceError
from edgevlm.export.checkpoint.adapters import Adapter
from edgevlm.export.checkpoint.source import (
    CONFIG,
    Checkpoint,
    read_checkpoint,
    read_file,
    read_json,
)
from edgevlm.family import Config, Family, Piece

_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")


def read_source(
    folder: Path, given: Mapping[str, Path], adapter: Adapter | None = None
) -> Checkpoint:
    """The checkpoint of a folder, with its pieces where its family is assembled from several.

    An `adapter` that LLaVA's own code saved has the model's config.json with it.

    The main checkpoint lies in the folder or in one below it, the other pieces in either; `given`
    names files of pieces that lie elsewhere, or the one that is meant of several. Raises
    SourceError or UnknownFamily.
    """
    main = read_checkpoint(_main(folder))
    if adapter and adapter.model_config and adapter.folder != main.folder:
        config = read_json(adapter.model_config)
        main = replace(main, configs={**main.configs, CONFIG: config}, config=adapter.model_config)
    family = family_of(main)
    if adapter and family.pieces:
        raise SourceError(
            f"{adapter.folder}: a {family.name} has its adapters in a part of its own"
        )
    names = [piece.name for piece in family.pieces]
    for name in given:
        if name not in names:
            what = ", ".join(names) or "none: a checkpoint of it is whole"
            raise SourceError(f"unknown part {name!r} of a {family.name}; its parts are {what}")
    if not family.pieces:
        return main
    beside = {f"{f.parent.name}/{CONFIG}": config for f, config in _configs_below(folder)}
    return replace(
        main,
        configs={**beside, **main.configs},
        pieces=_pieces(family, main, folder, given),
    )


def family_of(checkpoint: Checkpoint) -> Family:
    """The family that config.json's model_type names; raises SourceError or UnknownFamily."""
    path, config = checkpoint.config_path, checkpoint.configs[CONFIG]
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise SourceError(f"{path}: has no 'model_type'; name the folder of a whole checkpoint")
    return families.by_model_type(model_type, str(path))


def _main(folder: Path) -> Path:
    """The folder itself, or the one below it that holds the main checkpoint of a family which is
    assembled from pieces.
    """
    if (folder / CONFIG).is_file():
        return folder
    types = {t for f in families.every() if f.pieces for t in f.model_types}
    found = [f.parent for f, config in _configs_below(folder) if config.get("model_type") in types]
    if len(found) > 1:
        names = " and ".join(f.name for f in found)
        raise SourceError(f"{folder}: has {names}; name one of them and the other parts (--part)")
    if not found:
        _refuse_pieces_alone(folder)
    return found[0] if found else folder


def _refuse_pieces_alone(folder: Path) -> None:
    """Says what is missing beside files that are pieces; other folders are not spoken of here."""
    for path in _loose(folder, ()):
        try:
            inside = read_file(path)
        except SourceError:
            continue
        for family in families.every():
            if any(_is(piece, inside) for piece in family.pieces):
                types = " or ".join(family.model_types)
                raise SourceError(
                    f"{folder}: has {path.name}, a part of a {family.name}, but not its main "
                    f"checkpoint, a folder with a {CONFIG} of model_type {types}; put that there"
                )


def _configs_below(folder: Path) -> Iterator[tuple[Path, Config]]:
    for path in sorted(folder.glob(f"*/{CONFIG}")):
        yield path, read_json(path)


def _pieces(
    family: Family, main: Checkpoint, folder: Path, given: Mapping[str, Path]
) -> dict[str, Checkpoint]:
    """The family's pieces, in its order."""
    opened = {name: _given(family, name, path) for name, path in given.items()}
    wanted = [piece for piece in family.pieces if piece.name not in opened]
    found: dict[str, list[Checkpoint]] = {piece.name: [] for piece in wanted}
    unread: list[SourceError] = []
    for path in _loose(folder, main.weights) if wanted else ():
        try:
            inside = read_file(path)
        except SourceError as e:
            unread.append(e)
            continue
        for piece in wanted:
            if _is(piece, inside):
                found[piece.name].append(inside)
    for piece in wanted:
        several = found[piece.name]
        if len(several) > 1:
            names = ", ".join(c.weights[0].name for c in several)
            raise SourceError(
                f"{folder}: has several files of one part ({names}); "
                f"name the one that is meant (--part {piece.name}=FILE)"
            )
        if not several:
            raise unread[0] if unread else _missing(family, piece, folder)
        opened[piece.name] = several[0]
    return {piece.name: opened[piece.name] for piece in family.pieces}


def _missing(family: Family, piece: Piece, folder: Path) -> SourceError:
    return SourceError(
        f"{folder}: lacks a part of a {family.name}, published as {piece.published}: no file has "
        f"{piece.holds}; put it there or name it (--part {piece.name}=FILE)"
    )


def _given(family: Family, name: str, path: Path) -> Checkpoint:
    piece = next(p for p in family.pieces if p.name == name)
    if not path.is_file():
        raise SourceError(f"{path}: no such file (--part {name})")
    inside = read_file(path)
    if not _is(piece, inside):
        what = f"has {piece.lacks}" if piece.holds in inside.tensors else f"lacks {piece.holds}"
        raise SourceError(f"{path}: is not {piece.published}, it {what} (--part {name})")
    return inside


def _is(piece: Piece, inside: Checkpoint) -> bool:
    return piece.holds in inside.tensors and piece.lacks not in inside.tensors


def _loose(folder: Path, known: Collection[Path]) -> Iterator[Path]:
    """Files of weights in a folder and in those below it that are no checkpoints themselves."""
    below = [f for f in folder.iterdir() if f.is_dir() and not (f / CONFIG).is_file()]
    for place in (folder, *sorted(below)):
        for path in sorted(place.iterdir()):
            if path.suffix in _SUFFIXES and path.is_file() and path not in known:
                yield path
