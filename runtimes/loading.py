"""A bundle -> a VLM: engines chosen, files checked, load time measured."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from edgevlm import family
from edgevlm.bundle import MANIFEST, Bundle, open_bundle
from edgevlm.runtimes.decoder import LlamaDecoder
from edgevlm.runtimes.encoder import OrtEncoder
from edgevlm.runtimes.session import VLM


@dataclass(frozen=True)
class Settings:
    """How a model runs here.

    threads: of both engines; None for the number of physical cores this process may use.
    device: where the encoder runs ("auto" or "cpu").
    repack: whether llama.cpp re-orders quantized weights at load; None for the measured rule.
    """

    threads: int | None = None
    device: str = "auto"
    repack: bool | None = None


def load_bundle(
    folder: Path, settings: Settings, loaded: Callable[[str], None] = lambda _: None
) -> VLM:
    """Opens, checks and loads a bundle; `loaded` is told "vision" and "decoder" as each stands.

    Raises BundleError and EngineMissing.
    """
    start = time.perf_counter()
    bundle = open_bundle(folder)
    manifest = bundle.manifest
    kind = family.by_name(manifest.family, str(folder / MANIFEST))
    threads = settings.threads or default_threads()
    encoder = OrtEncoder(
        bundle.path("vision"), bundle.path("projector"), threads=threads, device=settings.device
    )
    loaded("vision")
    decoder = _decoder(bundle, threads, settings.repack)
    loaded("decoder")
    load_ms = (time.perf_counter() - start) * 1e3
    return VLM(manifest, kind, encoder, decoder, load_ms=load_ms)


def _decoder(bundle: Bundle, threads: int, repack: bool | None) -> LlamaDecoder:
    manifest = bundle.manifest
    return LlamaDecoder(
        bundle.path("decoder"),
        manifest.decoder,
        manifest.token_embedding,
        threads=threads,
        # Who keeps the decoder in f32 wants the original's numbers, not speed.
        exact=manifest.components["decoder"].precision == "f32",
        repack=repack,
    )


def default_threads() -> int:
    """Physical cores that this process may run on: hyper-threads only slow matrix products."""
    physical = psutil.cpu_count(logical=False) or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else physical
    return max(1, min(physical, allowed))
