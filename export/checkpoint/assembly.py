"""A source folder -> its main checkpoint and the weight files beside it.

Weight files are recognised by their tensors, never by their own names. What they mean is the
family's business.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from edgevlm import family as families
from edgevlm.errors import SourceError
from edgevlm.export.checkpoint.adapters import Adapter
from edgevlm.export.checkpoint.chats import read_chats
from edgevlm.export.checkpoint.source import (
    CONFIG,
    Checkpoint,
    read_checkpoint,
    read_file,
    read_json,
)
from edgevlm.family import Config, Family, WeightFile

_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")


def read_source(
    folder: Path, given: Mapping[str, Path], adapter: Adapter | None = None
) -> Checkpoint:
    """The checkpoint of a folder, with its weight files where its family has several.

    An `adapter` that LLaVA's own code saved has the model's config.json with it.

    The main checkpoint lies in the folder or in one below it, weight files in either; `given`
    names those that lie elsewhere, or the one that is meant of several. Raises
    SourceError or UnknownFamily.
    """
    main = read_checkpoint(_main(folder))
    main = replace(main, configs={**read_chats(main.folder), **main.configs})
    if adapter and adapter.model_config and adapter.folder != main.folder:
        config = read_json(adapter.model_config)
        main = replace(main, configs={**main.configs, CONFIG: config}, config=adapter.model_config)
    family = family_of(main)
    if adapter and family.weight_files:
        raise SourceError(
            f"{adapter.folder}: a {family.name} has its adapters in a weight file of its own"
        )
    names = [file.name for file in family.weight_files]
    for name in given:
        if name not in names:
            what = ", ".join(names) or "none: a checkpoint of it is whole"
            raise SourceError(f"unknown part {name!r} of a {family.name}; its parts are {what}")
    if not family.weight_files:
        return main
    beside = {f"{f.parent.name}/{CONFIG}": config for f, config in _configs_below(folder)}
    return replace(
        main,
        configs={**beside, **main.configs},
        extra=_weight_files(family, main, folder, given),
    )


def family_of(checkpoint: Checkpoint) -> Family:
    """The family that config.json's model_type names; raises SourceError or UnknownFamily."""
    path, config = checkpoint.config_path, checkpoint.configs[CONFIG]
    if not isinstance(config.get("model_type"), str):
        raise SourceError(f"{path}: has no 'model_type'; name the folder of a whole checkpoint")
    return families.by_config(config, str(path))


def _main(folder: Path) -> Path:
    """The folder itself, or the one below it that holds the main checkpoint of a family with
    several weight files.
    """
    if (folder / CONFIG).is_file():
        return folder
    types = {t for f in families.every() if f.weight_files for t in f.model_types}
    found = [f.parent for f, config in _configs_below(folder) if config.get("model_type") in types]
    if len(found) > 1:
        names = " and ".join(f.name for f in found)
        raise SourceError(f"{folder}: has {names}; name one of them and the weight files (--part)")
    if not found:
        _refuse_weight_files_alone(folder)
    return found[0] if found else folder


def _refuse_weight_files_alone(folder: Path) -> None:
    """Says what is missing beside weight files; other folders are not spoken of here."""
    for path in _loose(folder, ()):
        try:
            inside = read_file(path)
        except SourceError:
            continue
        for family in families.every():
            if any(_is(file, inside) for file in family.weight_files):
                types = " or ".join(family.model_types)
                raise SourceError(
                    f"{folder}: has {path.name}, a weight file of a {family.name}, but not its "
                    f"main checkpoint, a folder with a {CONFIG} of model_type {types}; put it there"
                )


def _configs_below(folder: Path) -> Iterator[tuple[Path, Config]]:
    for path in sorted(folder.glob(f"*/{CONFIG}")):
        yield path, read_json(path)


def _weight_files(
    family: Family, main: Checkpoint, folder: Path, given: Mapping[str, Path]
) -> dict[str, Checkpoint]:
    """The family's weight files, in its order."""
    opened = {name: _given(family, name, path) for name, path in given.items()}
    wanted = [file for file in family.weight_files if file.name not in opened]
    found: dict[str, list[Checkpoint]] = {file.name: [] for file in wanted}
    unread: list[SourceError] = []
    for path in _loose(folder, main.weights) if wanted else ():
        try:
            inside = read_file(path)
        except SourceError as e:
            unread.append(e)
            continue
        for file in wanted:
            if _is(file, inside):
                found[file.name].append(inside)
    for file in wanted:
        several = found[file.name]
        if len(several) > 1:
            names = ", ".join(c.weights[0].name for c in several)
            raise SourceError(
                f"{folder}: has several files for {file.published} ({names}); "
                f"name the one that is meant (--part {file.name}=FILE)"
            )
        if not several:
            raise unread[0] if unread else _missing(family, file, folder)
        opened[file.name] = several[0]
    return {file.name: opened[file.name] for file in family.weight_files}


def _missing(family: Family, file: WeightFile, folder: Path) -> SourceError:
    return SourceError(
        f"{folder}: lacks a weight file of a {family.name}, published as {file.published}: no "
        f"file has {file.holds}; put it there or name it (--part {file.name}=FILE)"
    )


def _given(family: Family, name: str, path: Path) -> Checkpoint:
    file = next(p for p in family.weight_files if p.name == name)
    if not path.is_file():
        raise SourceError(f"{path}: no such file (--part {name})")
    inside = read_file(path)
    if not _is(file, inside):
        what = f"has {file.lacks}" if file.holds in inside.tensors else f"lacks {file.holds}"
        raise SourceError(f"{path}: is not {file.published}, it {what} (--part {name})")
    return inside


def _is(file: WeightFile, inside: Checkpoint) -> bool:
    return file.holds in inside.tensors and file.lacks not in inside.tensors


def _loose(folder: Path, known: Collection[Path]) -> Iterator[Path]:
    """Weight files in a folder and in those below it that are no checkpoints themselves."""
    below = [f for f in folder.iterdir() if f.is_dir() and not (f / CONFIG).is_file()]
    for place in (folder, *sorted(below)):
        for path in sorted(place.iterdir()):
            if path.suffix in _SUFFIXES and path.is_file() and path not in known:
                yield path
