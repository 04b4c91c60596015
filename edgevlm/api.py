"""load, load_dual: a name or a folder in, a VLM or a DualEncoder out."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from edgevlm.byte_sizes import byte_size
from edgevlm.errors import PromptError
from edgevlm.manifest import read_manifest
from edgevlm.models import check_answers, is_dual, resolve

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from edgevlm.image import ImageSource
    from edgevlm.runtimes.dual import DualEncoder
    from edgevlm.runtimes.rules import Goal
    from edgevlm.runtimes.session import VLM
    from edgevlm.types import Progress, Repacking


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    device: str = "auto",
    vision_device: str | None = None,
    decoder_device: str | None = None,
    threads: int | None = None,
    repack: bool | Repacking | None = None,
    kv: str | None = None,
    max_tiles: int | None = None,
    max_pixels: int | None = None,
    goal: Goal = "both",
    cache: bool = True,
    image: ImageSource | Sequence[ImageSource] | None = None,
    progress: Callable[[Progress], None] | None = None,
    max_memory: int | str | None = None,
) -> VLM:
    """Loads a model: a bundle folder, the name of an installed one, or None for the built-in pico.

    What is None follows what `edgevlm tune` measured here for the goal, else what was measured on
    such processors.

    * device: what it runs on, "auto", "cpu", "gpu", "npu" or a name such as "cuda", "openvino",
      "vulkan" (docs/devices.md lists them); vision_device and decoder_device override it for one
      part.
    * threads: those of both engines.
    * repack: llama.cpp's weight re-ordering at load; "decode" is a re-ordered copy that only draws
      tokens.
    * kv: type of the KV cache, "f16" or "q8_0", half as large; None is f16, and float32 for
      decoders in f32.
    * max_tiles: the most tiles that a picture is cut into by a model that cuts them, its overview
      among them; fewer are faster and show less, 1 cuts none.
    * max_pixels: the most pixels of a picture to a model that takes pictures in their own size, up
      to what it was trained on; fewer are faster and show less.
    * goal: what is to be fast, a first short answer ("caption"), long ones ("chat") or "both".
    * cache: whether image embeddings, and the KV cache of pictures where the model reads causally,
      are kept in the cache folder, so that a picture that is asked about again, also by another
      process, costs no encoding (docs/caches.md).
    * image: the picture, or pictures, of the first question: they are read at once and encoded
      while the decoder loads, which brings that answer forward (name the same object again when
      you ask); `progress` is told of their tiles.
    * max_memory: the most that this process may hold, in bytes or such as "2GB": encoder and
      decoder take turns in it where it has no room for both (docs/caches.md); None is what the
      machine has.

    `VLM.devices` says what runs where, and why, `VLM.settings` how. A model that embeds pictures
    and texts (CLIP, SigLIP) comes as what `load_dual` makes of it, whose type no name can tell.

    >>> with edgevlm.load(device="cpu", threads=2) as vlm:
    ...     print(vlm.devices.vision.device, vlm.settings.threads)
    cpu 2

    Raises BundleError for a folder without a sound bundle, PromptError for options that are not
    known or that a dual encoder does not have, EngineMissing for a device that is not installed,
    EngineError for one that cannot run its part ("auto" falls back instead) or where max_memory is
    too small, ImageError for a picture that cannot be read.
    """
    from edgevlm.runtimes.loading import LoadOptions, load_bundle
    from edgevlm.runtimes.messages import pictures
    from edgevlm.runtimes.rules import GOALS
    from edgevlm.types import REPACKINGS

    _check_threads(threads)
    if kv not in (None, "f16", "q8_0"):
        raise PromptError(f"kv {kv!r} is not known; choose f16 or q8_0")
    if max_tiles is not None and max_tiles < 1:
        raise PromptError("max_tiles must be at least 1")
    if max_pixels is not None and max_pixels < 1:
        raise PromptError("max_pixels must be at least 1")
    if goal not in GOALS:
        raise PromptError(f"goal {goal!r} is not known; choose {', '.join(GOALS)}")
    if repack not in (None, True, False, *REPACKINGS):
        raise PromptError(f"repack {repack!r} is not known; choose True, False or 'decode'")
    options = LoadOptions(
        threads=threads,
        device=device,
        repack=repack,
        vision_device=vision_device,
        decoder_device=decoder_device,
        kv=kv,
        max_tiles=max_tiles,
        max_pixels=max_pixels,
        goal=goal,
        cache=cache,
        images=pictures(image),
        progress=progress,
        max_memory=None if max_memory is None else byte_size(max_memory, "max_memory"),
    )
    folder = resolve(model)
    if is_dual(folder):
        if image is not None:  # of a question
            check_answers(read_manifest(folder))
        given = {
            "decoder_device": decoder_device,
            "repack": repack,
            "kv": kv,
            "max_tiles": max_tiles,
            "max_pixels": max_pixels,
            "max_memory": max_memory,
        }
        for name, value in given.items():
            if value is not None:
                raise PromptError(f"{folder.name}: a model that embeds has no {name}; leave it out")
        return cast("VLM", load_dual(folder, device=vision_device or device, threads=threads))
    return load_bundle(folder, options)


def load_dual(
    model: str | os.PathLike[str], *, device: str = "auto", threads: int | None = None
) -> DualEncoder:
    """Loads a model that embeds pictures and texts (CLIP, SigLIP): a bundle folder or the name of
    an installed one. docs/understanding.md has an example.

    * device: what the vision tower runs on, as in `load`; the text tower runs on the processor.
    * threads: those of both towers; None follows what was measured on such processors.

    Each tower is loaded with its first use. Raises BundleError for a folder without a sound bundle,
    PromptError for one that answers questions, EngineMissing for a device that is not installed.
    """
    from edgevlm.runtimes.dual_loading import open_dual

    _check_threads(threads)
    return open_dual(resolve(model), device, threads)


def _check_threads(threads: int | None) -> None:
    if threads is not None and threads < 1:
        raise PromptError("threads must be at least 1")
