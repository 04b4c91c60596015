"""Shelves for a loaded model: all that its image embeddings and its KV caches depend on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import version

from edgevlm import disk_cache
from edgevlm.bundle import Bundle
from edgevlm.manifest import Component
from edgevlm.runtimes.cache import EmbeddingCache, Shelf
from edgevlm.runtimes.llama import ggml
from edgevlm.runtimes.prefixes import PrefixCache
from edgevlm.runtimes.vision.ort import Ort
from edgevlm.types import Placement


def embeddings(
    bundle: Bundle, placement: Placement, features: Sequence[str], ort: Ort
) -> EmbeddingCache:
    """Image embeddings in memory and on disk. Raises PromptError, see disk_cache.pictures.

    `features` are the processor's: two machines that share a home compute with other instructions,
    whose last bits differ.
    """
    disk, manifest = disk_cache.pictures(), bundle.manifest
    if disk is None or "vision" not in manifest.components:
        return EmbeddingCache()
    main = manifest.components["vision"]
    vision = manifest.alternatives.get(placement.precision, main)
    files = (*_hashes(vision), *_hashes(manifest.components["projector"]))
    facts = (*_machine(placement, features), version("pillow"), ort.version, *files)
    return EmbeddingCache(Shelf(disk, "image embeddings", *facts))


def prefixes(
    bundle: Bundle, placement: Placement, features: Sequence[str], reading: str
) -> PrefixCache | None:
    """KV caches on disk of a decoder's `reading`; None for a prefix-LM, whose depend on the
    question.
    """
    disk, manifest = disk_cache.pictures(), bundle.manifest
    if disk is None or manifest.decoder.attention == "prefix":
        return None
    files = _hashes(manifest.components["decoder"])
    facts = (*_machine(placement, features), ggml.build(), reading, *files)
    return PrefixCache(Shelf(disk, "KV cache", *facts))


def _machine(placement: Placement, features: Sequence[str]) -> tuple[str, ...]:
    on = repr((placement.device, placement.engine, placement.hardware, placement.placed))
    return version("edgevlm"), sys.byteorder, on, *features


def _hashes(component: Component) -> tuple[str, ...]:
    return tuple(record.sha256 for record in component.files)
