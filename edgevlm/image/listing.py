"""Pictures that a folder or a pattern stands for, by the extensions of their names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NoReturn

from PIL import Image

from edgevlm.errors import ImageError
from edgevlm.image.formats import FORMATS
from edgevlm.image.names import each_located, located
from edgevlm.image.urls import one_line, shortened

_WILD = re.compile(r"[*?[]")
# Pictures that take a package or a later Pillow, which their error says, and JPEGs of two pictures.
_FURTHER = frozenset((".avif", ".heic", ".heif", ".hif", ".mpo"))
# Extensions of videos' names.
VIDEOS = frozenset(
    (".3gp", ".asf", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv")
    + (".webm", ".wmv")
)


@cache
def extensions() -> frozenset[str]:
    """Extensions of pictures' names, in lower case, each with its dot."""
    known = Image.registered_extensions().items()
    read = {e for e, kind in known if kind in Image.OPEN and kind in FORMATS}
    return _FURTHER | read


def dropped(line: str) -> list[str]:
    """The names in a line that is nothing but names, as a terminal pastes files that are dropped on
    it: of files whose names end as pictures' do, and URLs. Empty for any other line.
    """
    names = each_located(line) if line.strip() else []
    return names if all(map(_is_dropped, names)) else []


def dropped_video(line: str) -> bool:
    """True for a line that is nothing but the name of a file whose name ends as videos' do."""
    found = located(line) if line.strip() else line
    return isinstance(found, Path) and found.suffix.lower() in VIDEOS and os.path.isfile(found)


def _is_dropped(name: str) -> bool:
    found = located(name)
    if isinstance(found, str):
        return not re.search(r"\s", found)
    return found.suffix.lower() in extensions() and os.path.isfile(found)


def listed(name: str, *, recursive: bool = False) -> list[Path] | None:
    """The pictures in the folder, or of the pattern, that a text names; None for other texts.

    They are sorted by name; hidden ones and files with other extensions are passed over.
    `recursive` goes into the folder's folders. A pattern has `*`, `?` or `[` and is not a file's
    name; `**` in it stands for folders at any depth. Links to folders are not followed. Raises
    ImageError for a folder that cannot be read and a pattern that is not valid.
    """
    place = located(name) if name.strip() else name
    if isinstance(place, str):
        return None
    if os.path.isdir(place):
        found = list(_in_folder(place, recursive))
    elif _WILD.search(str(place)) and not os.path.lexists(place):
        found = _matching(place)
    else:
        return None
    return sorted(filter(_is_picture, found))


def _in_folder(folder: Path, recursive: bool) -> Iterator[Path]:
    for here, folders, files in os.walk(folder, onerror=_refuse):
        folders[:] = [f for f in folders if recursive and not f.startswith(".")]
        yield from (Path(here, file) for file in files if not file.startswith("."))


def _refuse(error: OSError) -> NoReturn:
    raise ImageError(shortened(str(error.filename)), f"cannot be read ({one_line(error)})")


def _matching(pattern: Path) -> list[Path]:
    n_fixed = next(i for i, part in enumerate(pattern.parts) if _WILD.search(part))
    root, wild = Path(*pattern.parts[:n_fixed]), pattern.parts[n_fixed:]
    if wild[-1] == "**":  # Python 3.13 and those before it do not agree on what this matches.
        wild = (*wild, "*")
    try:
        found = list(root.glob("/".join(wild)))
    except ValueError:
        raise ImageError(
            shortened(str(pattern)), "not a valid pattern; ** stands alone, as in photos/**/*.jpg"
        ) from None
    hidden = any(part.startswith(".") for part in wild)
    return [path for path in found if hidden or not _is_hidden(path.relative_to(root))]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _is_picture(path: Path) -> bool:
    """By its name; of files alone, and of links that lead nowhere, which reading tells."""
    named = path.suffix.lower() in extensions()
    return named and (os.path.isfile(path) or not os.path.exists(path))
