"""Published GGUF files of a model: the decoder, and llama.cpp's multimodal projector file (mmproj),
which holds the vision tower and the connector.

Knows their names alone, as they stand in a folder or in a repository's listing.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from edgevlm.errors import SourceError
from edgevlm.export import precisions
from edgevlm.export.checkpoint.source import CONFIG, TOKENIZERS
from edgevlm.processors import PROCESSORS

SUFFIX = ".gguf"
# Beside weights in these formats GGUF files are not looked at.
_WEIGHTS = (".safetensors", ".bin")
_PART = re.compile(r".*-\d{5}-of-\d{5}\.gguf")
_QUANT = re.compile(
    rf"(?<![a-z0-9])({'|'.join(sorted(precisions.QUANTS, key=len, reverse=True))})(?![a-z0-9_])"
)
# Fewer bits are taken only where somebody asks for them.
_FEWEST_BITS = 4


@dataclass(frozen=True)
class Choice:
    """A decoder's precision among several, and whether another is refused."""

    quant: str = "q4_k_m"
    insists: bool = False


ANY = Choice()


@dataclass(frozen=True)
class Published:
    """Names of a decoder's file and of an mmproj file."""

    decoder: str
    mmproj: str


def has_weights(names: Collection[str]) -> bool:
    """True where any of these files is a checkpoint's weights."""
    return any(name.endswith(_WEIGHTS) for name in names)


def has_settings(names: Collection[str]) -> bool:
    """True where these files say what the model is: config, tokenizer, picture processor."""
    return CONFIG in names and all(any(n in names for n in g) for g in (TOKENIZERS, PROCESSORS))


def find(folder: Path, choice: Choice) -> Published | None:
    """The files of a folder without other weights, None where it has no GGUF; raises SourceError
    as `choose`.
    """
    names = [p.name for p in folder.iterdir() if p.is_file()]
    return None if has_weights(names) else choose(names, choice, str(folder))


def choose(names: Collection[str], choice: Choice, where: str) -> Published | None:
    """The decoder of the chosen precision, or the nearest to it, and the most precise mmproj file;
    None where there is no GGUF.

    Raises SourceError where one of the two is missing or the precision that is insisted on.
    """
    files = sorted(n for n in names if n.endswith(SUFFIX) and "/" not in n)
    if not files:
        return None
    towers = [name for name in files if "mmproj" in name.lower()]
    decoders = [name for name in files if name not in towers and not _PART.fullmatch(name)]
    if not towers:
        raise SourceError(
            f"{where}: has GGUF files but no mmproj file, which holds the vision tower; "
            "name the original checkpoint"
        )
    if not decoders:
        raise SourceError(
            f"{where}: has {towers[0]} but no decoder in one GGUF file; name the "
            "original checkpoint"
        )
    mmproj = max(towers, key=lambda name: _bits(_quant(name)))
    return Published(_decoder(decoders, choice, where), mmproj)


def _decoder(files: list[str], choice: Choice, where: str) -> str:
    quants = {name: _quant(name) for name in files}
    fitting = [name for name in files if quants[name] == choice.quant]
    # Of a single file whose name says nothing its metadata does.
    if not fitting and choice.insists and [*quants.values()] != [None]:
        known = ", ".join(sorted({q for q in quants.values() if q})) or "none that names say"
        raise SourceError(f"{where}: has no decoder in {choice.quant}; choose from {known}")
    if not fitting and len(files) > 1:
        enough = [name for name in files if _nominal(quants[name]) >= _FEWEST_BITS]
        fewest = min((_bits(quants[name]) for name in enough), default=0)
        fitting = [name for name in enough if _bits(quants[name]) == fewest]
    fitting = fitting or files
    if len(fitting) > 1:
        raise SourceError(
            f"{where}: has several decoders ({', '.join(fitting)}); name one by its precision "
            "(--quant), or keep one"
        )
    return fitting[0]


def _quant(file: str) -> str | None:
    """The precision that a file's name states."""
    found = _QUANT.findall(file.lower())
    return found[-1] if found else None


def _bits(quant: str | None) -> float:
    """Bits per weight of a file; bfloat16's are a little fewer than float16's of a projector, which
    lies within float16's range.
    """
    if not quant:
        return 0
    return precisions.quant(quant).bits - 0.1 * (quant == "bf16")


def _nominal(quant: str | None) -> int:
    """The bits that a precision is called by."""
    found = re.search(r"\d+", quant or "")
    return int(found[0]) if found else 0
