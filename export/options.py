"""Options of an export: `ReadOptions` for its source, `WriteOptions` for its bundle."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgevlm.export import precisions
from edgevlm.export.precisions import Quant, VisionPrecision
from edgevlm.specs import Fit

# A folder, or the id of a model on the hub.
Location = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """Choices for what a source's files leave out or open; `export_bundle` says what each means."""

    name: str | None = None
    vision_tower: Location | None = None
    template: str | None = None
    image_fit: Fit | None = None
    parts: Mapping[str, Location] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    adapter: Location | None = None


AS_FOUND = ReadOptions()
# Stands among the notes of a bundle that nothing was there to compare with.
UNCOMPARED = (
    "not compared with the original, which torch and transformers run; to have it compared, "
    'pip install "edgevlm[export]" and export again'
)
# Begins the note of a bundle that was put together from published files.
PUT_TOGETHER = "put together from published GGUF files"


def uncompared(notes: Iterable[str]) -> list[str]:
    """Those of a manifest's notes that say that nothing was compared with the original."""
    return [note for note in notes if note.startswith((UNCOMPARED, PUT_TOGETHER))]


@dataclass(frozen=True)
class WriteOptions:
    """The precisions of a bundle, the main vision encoder's first, and what they are made with: the
    decoder's importance matrix, a folder of pictures to calibrate on. `segment_decoder` is
    big_vision's file with the decoder of masks. `verify` None is for where
    there is something to compare with. `insists` is true where the user named `quant`, so that of
    several published decoders no other is taken. `languages` are those whose tokens alone the
    decoder's output matrix keeps; without any it keeps all.
    """

    quant: Quant
    vision: tuple[VisionPrecision, ...]
    imatrix: bool = False
    calibration: Path | None = None
    verify: bool | None = None
    insists: bool = False
    languages: tuple[str, ...] = ()
    segment_decoder: Path | None = None

    @classmethod
    def checked(
        cls,
        quant: str,
        vision: str | Sequence[str],
        *,
        imatrix: bool | None = None,
        calibration: Location | None = None,
        verify: bool | None = None,
        insists: bool = False,
        languages: str | Sequence[str] = (),
        segment_decoder: Location | None = None,
    ) -> WriteOptions:
        """Options by name; without a choice of `imatrix` one is made where llama.cpp insists on it.

        Raises ExportError for a name that is not known and for choices that disagree, EngineMissing
        where languages are named and the package that knows them is not there.
        """
        from edgevlm.export.languages import checked

        wanted = precisions.quant(quant)
        return cls(
            wanted,
            precisions.vision_precisions(vision),
            precisions.wants_imatrix(wanted, imatrix),
            Path(calibration) if calibration else None,
            verify,
            insists,
            checked(languages),
            Path(segment_decoder) if segment_decoder else None,
        )
