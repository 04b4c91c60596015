"""A bundle -> a VLM: devices and options chosen, files checked, load time measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from edgevlm import family
from edgevlm.bundle import MANIFEST, Bundle, check_path, open_bundle
from edgevlm.errors import BundleCorrupt, EngineError
from edgevlm.image.plan import limited
from edgevlm.runtimes import devices, rules
from edgevlm.runtimes.joining import read_newline
from edgevlm.runtimes.llama import backends, ggml
from edgevlm.runtimes.llama.backends import ON_THE_CPU, LlamaDevice, Offload
from edgevlm.runtimes.llama.decoder import LlamaDecoder
from edgevlm.runtimes.session import VLM
from edgevlm.runtimes.vision import providers
from edgevlm.runtimes.vision.choose import Wish, open_encoder
from edgevlm.runtimes.vision.ort import Ort
from edgevlm.specs import DecoderSpec
from edgevlm.types import Devices, Placement


@dataclass(frozen=True)
class LoadOptions:
    """Options of loading a model; None follows the measured rules (`rules.py`).

    threads: of both engines. device: of both engines; vision_device and decoder_device
    override it for one. repack: whether llama.cpp re-orders quantized weights at load. kv: type of
    the KV cache, "f16" or "q8_0". max_tiles: of a picture, where the model cuts it into tiles.
    """

    threads: int | None = None
    device: str = "auto"
    repack: bool | None = None
    vision_device: str | None = None
    decoder_device: str | None = None
    kv: str | None = None
    max_tiles: int | None = None


def load_bundle(
    folder: Path, options: LoadOptions, loaded: Callable[[str], None] = lambda _: None
) -> VLM:
    """Opens, checks and loads a bundle; `loaded` is told "vision" and "decoder" as each stands.

    A bundle without a decoder makes a VLM that can only embed pictures. Raises BundleError,
    EngineMissing for a device that is not installed and EngineError for one that cannot run its
    part.
    """
    start = time.perf_counter()
    check_path(folder)
    bundle = open_bundle(folder)
    manifest = bundle.manifest
    manifest = replace(manifest, image=limited(manifest.image, options.max_tiles))
    kind = family.by_name(manifest.family, str(folder / MANIFEST))
    if lacking := [role for role in kind.needs if role not in manifest.components]:
        raise BundleCorrupt(folder / MANIFEST, f"has no {lacking[0]}, which {kind.name} needs")
    newline = read_newline(bundle)
    text = manifest.components.get("decoder")
    facts = rules.this_machine(ggml.cpu_features(), text.precision if text else "")
    threads = options.threads or rules.decide("threads", facts)
    ort, offered = Ort(), ggml.devices()
    for_vision, for_decoder = words(options, ort, offered)
    wish = Wish(
        for_vision,
        threads,
        spin=rules.decide("spinning", facts),
        cpu_precisions=rules.decide("vision", facts),
    )
    encoder, vision = open_encoder(bundle, wish, ort)
    loaded("vision")
    repack = rules.decide("repacking", facts) if options.repack is None else options.repack
    decoder, placed = None, Placement(for_decoder, "none", "no decoder")
    if text:
        decoder, placed = open_decoder(
            bundle, for_decoder, offered, threads=threads, repack=repack, kv=options.kv
        )
        loaded("decoder")
    load_ms = (time.perf_counter() - start) * 1e3
    placements = Devices(vision, placed)
    return VLM(
        manifest, kind, encoder, decoder, newline=newline, load_ms=load_ms, devices=placements
    )


def words(options: LoadOptions, ort: Ort, offered: Sequence[LlamaDevice]) -> tuple[str, str]:
    """The words for the encoder and the decoder; raises EngineMissing for one nobody knows."""
    return devices.split(
        options.device,
        options.vision_device,
        options.decoder_device,
        vision_words={*providers.WORDS, *(o.provider.word for o in ort.offers())},
        decoder_words={*backends.WORDS, *(d.backend.word for d in offered)},
    )


def open_decoder(
    bundle: Bundle,
    word: str,
    offered: Sequence[LlamaDevice],
    *,
    threads: int,
    repack: bool,
    kv: str | None = None,
) -> tuple[LlamaDecoder, Placement]:
    """The bundle's decoder on the first device that has room for layers of it, or on the CPU.

    Raises EngineMissing where nothing of that name is offered, EngineError where what was named
    takes no layer or the decoder's heads do not fit the `kv` cache.
    """
    spec = bundle.manifest.decoder
    if kv == "q8_0":
        ggml.check_heads(bundle.path("decoder"), spec)
    # Who keeps the decoder in f32 wants the original's numbers, not speed.
    exact = bundle.manifest.components["decoder"].precision == "f32"
    make = partial(
        LlamaDecoder,
        bundle.path("decoder"),
        spec,
        bundle.manifest.token_embedding,
        threads=threads,
        exact=exact,
        kv=kv,
        repack=repack,
    )
    notes: list[str] = []
    found = backends.candidates(word, offered)
    if found and word == "auto" and (reason := _stays(spec, exact)):
        notes.append(f"{found[0].name}: {reason}")
        found = []
    needs = ggml.layer_bytes(bundle.path("decoder"), spec, exact) if found else None
    for device in found:
        assert needs is not None
        try:
            decoder = make(offload=backends.offload(device, needs, spec.context_length))
        except EngineError as e:
            notes.append(str(e))
            continue
        placed, total = decoder.layers
        if placed:
            return decoder, backends.placement(word, Offload(device, placed), total, notes)
        decoder.close()
        notes.append(f"{device.name}: llama.cpp put no layer there")
    if found and word != "auto":
        raise backends.refused(word, notes)
    return make(), backends.placement(word, ON_THE_CPU, spec.n_layer + 1, notes)


def _stays(spec: DecoderSpec, exact: bool) -> str:
    """A reason to leave the decoder on the CPU; empty where there is none."""
    if exact:
        return "the decoder is in f32, for the CPU's exact numbers"
    if spec.extra_norms:
        return (
            "the decoder's extra norms are computed on the CPU; every layer would wait for copies"
        )
    return ""
