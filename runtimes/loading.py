"""A bundle -> a VLM: devices and options chosen, files checked, load time measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from edgevlm import family
from edgevlm.bundle import REGION_ROWS, Bundle, check_path, open_bundle
from edgevlm.errors import BundleCorrupt, EngineError
from edgevlm.image import ImageSource
from edgevlm.image.plan import limited
from edgevlm.machine import free_address_space, memory
from edgevlm.manifest import MANIFEST
from edgevlm.models import check_answers
from edgevlm.runtimes import budget, checks, devices, rules, shelves, tuned
from edgevlm.runtimes.ahead import Ahead
from edgevlm.runtimes.budget import Budget
from edgevlm.runtimes.cache import EmbeddingCache
from edgevlm.runtimes.engines import TextDecoder
from edgevlm.runtimes.interrupt import SideThread
from edgevlm.runtimes.joining import read_newline
from edgevlm.runtimes.llama import backends, ggml
from edgevlm.runtimes.llama.backends import ON_THE_CPU, LlamaDevice, Offload
from edgevlm.runtimes.llama.decoder import LlamaDecoder
from edgevlm.runtimes.llama.paired import PairedDecoder
from edgevlm.runtimes.model import Engines
from edgevlm.runtimes.rules import EngineSettings, Goal
from edgevlm.runtimes.session import VLM
from edgevlm.runtimes.vision import providers
from edgevlm.runtimes.vision.choose import Wish, open_encoder
from edgevlm.runtimes.vision.masks import OrtMasks
from edgevlm.runtimes.vision.ort import Ort
from edgevlm.runtimes.vision.providers import Offer, pick
from edgevlm.runtimes.vision.regions import OrtRegions
from edgevlm.specs import DecoderSpec
from edgevlm.types import REPACKINGS, Devices, Placement, Progress, Repacking

_REPACKING: dict[bool | Repacking, Repacking] = {
    True: "on",
    False: "off",
    **{word: word for word in REPACKINGS},
}
# The file's pages, a re-ordered copy, and as much for everything else.
_SPARE_COPIES = 3
# A machine with so much memory has room for any way to run a bundle. To know what one needs takes
# reading the decoder's metadata, 57 ms for the 257,216 tokens of PaliGemma-3B.
_ROOMY_COPIES, _ROOMY_BYTES = 4, 4 << 30
# Tiles from which on packing the encoder's 8-bit weights takes less than not to: PaliGemma-3B's are
# packed in 0.45 s, and without each tile takes 0.08 s more of 1.65, on two cores with AVX2.
_PACKED_FROM = 6


@dataclass(frozen=True)
class LoadOptions:
    """Options of loading a model; None follows what was measured, here (`tuned.py`) or elsewhere
    (`rules.py`).

    threads: of both engines. device: of both engines; vision_device and decoder_device
    override it for one. repack: whether llama.cpp re-orders quantized weights at load, or "decode".
    kv: type of the KV cache, "f16" or "q8_0". max_tiles: of a picture, where the model cuts it into
    tiles, max_pixels: of one whose size the model keeps. goal: what is to be fast. cache: whether
    what was computed of pictures is kept on disk and read from there. images: pictures of the first
    request, which are encoded while the decoder loads; `progress` is told of their tiles.
    max_memory: bytes that the process may hold.
    """

    threads: int | None = None
    device: str = "auto"
    repack: bool | Repacking | None = None
    vision_device: str | None = None
    decoder_device: str | None = None
    kv: str | None = None
    max_tiles: int | None = None
    max_pixels: int | None = None
    goal: Goal = "both"
    cache: bool = False
    images: Sequence[ImageSource] = ()
    progress: Callable[[Progress], None] | None = None
    max_memory: int | None = None


def load_bundle(
    folder: Path, options: LoadOptions, loaded: Callable[[str], None] | None = None
) -> VLM:
    """Opens, checks and loads a bundle: encoder and decoder side by side or, where `loaded` is
    told "vision" and "decoder" as each stands, one after the other.

    A bundle without a decoder makes a VLM that can only embed pictures. Raises BundleError,
    PromptError for a dual encoder's, EngineMissing for a device that is not installed and
    EngineError for one that cannot run its part, ImageError for a picture of the options' that
    cannot be read.
    """
    start = time.perf_counter()
    check_path(folder)
    bundle = open_bundle(folder)
    check_answers(bundle.manifest)
    manifest = bundle.manifest
    image = limited(manifest.image, options.max_tiles, options.max_pixels)
    manifest = replace(manifest, image=image)
    kind = family.by_name(manifest.family, str(folder / MANIFEST))
    if lacking := [role for role in kind.needs if role not in manifest.components]:
        raise BundleCorrupt(folder / MANIFEST, f"has no {lacking[0]}, which {kind.name} needs")
    newline = read_newline(bundle)
    features = ggml.cpu_features()  # not while the decoder loads: llama.cpp has one log
    settings, measured = choose(bundle, options, features)
    ort, offered = Ort(), ggml.devices()
    for_vision, for_decoder = words(options, ort, offered)
    ahead = Ahead(options.images, options.progress)
    small = image.native is None and 0 < ahead.n_tiles(image) < _PACKED_FROM
    once = options.goal == "caption" and small
    wish = Wish(
        for_vision, settings.vision_threads, settings.spinning, settings.vision, prepack=not once
    )
    fit = budgeted(replace(bundle, manifest=manifest), options, settings, offered)
    apart = fit is not None and fit.apart
    if fit:
        settings = replace(settings, repacking=fit.repacking)
    if apart:
        # It is loaded again for every new picture, and mapped pages need no time for that.
        wish = replace(wish, prepack=False)

    def open_vision() -> tuple[Engines, Placement]:
        encoder, placement = open_encoder(bundle, wish, ort, options.progress)
        cache = EmbeddingCache()
        if options.cache:
            cache = shelves.embeddings(bundle, placement, features, ort)
        engines = Engines(
            manifest,
            kind,
            encoder,
            None,
            newline,
            masks=_masks(bundle, ort, settings.vision_threads),
            regions=_regions(bundle, ort, settings.vision_threads),
            cache=cache,
            read=ahead.read,
            budget=fit,
        )
        ahead.encode(engines)
        return engines, placement

    def open_text() -> tuple[TextDecoder | None, Placement]:
        if "decoder" not in manifest.components:
            return None, Placement(for_decoder, "none", "no decoder")
        if apart:
            placed = backends.placement(for_decoder, ON_THE_CPU, manifest.decoder.n_layer + 1, [])
            return single(bundle, settings, repack=False, kv=options.kv, whole=False), placed
        return open_decoder(bundle, for_decoder, offered, settings, kv=options.kv)

    if loaded or apart:
        told = loaded or (lambda _: None)
        engines, vision = open_vision()
        told("vision")
        decoder, placed = open_text()
        told("decoder")
    else:
        with SideThread(open_vision, ahead.stop) as beside:
            decoder, placed = open_text()
            engines, vision = beside.result()
    load_ms = (time.perf_counter() - start) * 1e3
    vlm = VLM(
        manifest,
        kind,
        engines.encoder,
        decoder,
        newline=newline,
        load_ms=load_ms,
        devices=Devices(vision, placed),
        vision_threads=settings.vision_threads,
        tuned=measured,
    )
    prefixes = None
    if options.cache and decoder:
        prefixes = shelves.prefixes(bundle, placed, features, decoder.reading)
    vlm.engines = replace(engines, text=decoder, prefixes=prefixes)
    return vlm


def _masks(bundle: Bundle, ort: Ort, threads: int) -> OrtMasks | None:
    """The mask decoder on the CPU, where the bundle has one: it is small and seldom asked."""
    if "masks" not in bundle.manifest.components:
        return None
    path = bundle.path("masks")
    checks.graph(path, bundle.names)
    return OrtMasks(
        ort.session(path, Offer(providers.CPU, ort.version), threads, False, path.parent)
    )


def _regions(bundle: Bundle, ort: Ort, threads: int) -> OrtRegions | None:
    """The region model on the CPU, where the bundle has one."""
    if "regions" not in bundle.manifest.components:
        return None
    paths = (bundle.path("regions"), bundle.folder / REGION_ROWS)
    for path in paths:
        checks.graph(path, bundle.names)
    offer = Offer(providers.CPU, ort.version)
    return OrtRegions(*(ort.session(path, offer, threads, False, path.parent) for path in paths))


def choose(
    bundle: Bundle, options: LoadOptions, features: Sequence[str], *, tunings: bool = True
) -> tuple[EngineSettings, bool]:
    """The settings for a bundle, the caller's before those of a tuning before those of the rules,
    and whether there is a tuning; without `tunings` none is looked for. `features` are llama.cpp's
    words for the processor's.
    """
    text = bundle.manifest.components.get("decoder")
    facts = rules.this_machine(
        text.precision if text else "",
        goal=options.goal,
        short_answers=not bundle.manifest.prompt.turn,
    )
    found = tuned.chosen(bundle, features, options.goal) if tunings else None
    settings = found or rules.settings(facts)
    if text and settings.repacking == "decode" and not _has_room(bundle):
        settings = replace(settings, repacking="off")
    if options.threads:
        settings = replace(
            settings,
            vision_threads=options.threads,
            prefill_threads=options.threads,
            decode_threads=options.threads,
        )
    if options.repack is not None:
        settings = replace(settings, repacking=_REPACKING[options.repack])
    return settings, found is not None


def budgeted(
    bundle: Bundle,
    options: LoadOptions,
    settings: EngineSettings,
    offered: Sequence[LlamaDevice],
) -> Budget | None:
    """The way that the model stays within the memory that it may hold, None where nothing is in its
    way; raises EngineError.

    Without `max_memory` it is the machine's or the container's, all of it: what is free changes
    from minute to minute, and the system drops pages of files for whoever needs them. Where other
    devices may take the decoder nothing is decided unasked. Address space is another matter:
    engines end the process where they get none for a thread.
    """
    alone, total = "decoder" not in bundle.manifest.components, memory().total_bytes
    threads = max(settings.vision_threads, settings.prefill_threads, settings.decode_threads)
    limit = budget.limit_of(options.max_memory, free_address_space(), threads)
    roomy = _ROOMY_COPIES * bundle.bytes + _ROOMY_BYTES < total
    if limit is None and (alone or offered or roomy):
        return None
    if not alone:
        # What is needed stands in the file, which nobody has looked at yet.
        spec = bundle.manifest.decoder
        checks.decoder(bundle.path("decoder"), tokenizer=spec.outputs == spec.n_vocab)
    kv = options.kv or ("f16" if alone or not _exact(bundle) else "f32")
    needs = budget.needs(bundle, pick(settings.vision, bundle.vision_precisions), kv)
    return budget.fitted(needs, settings.repacking, limit, total)


def _has_room(bundle: Bundle) -> bool:
    """True if a second copy of the decoder's weights leaves this machine memory for other work."""
    weights = bundle.manifest.components["decoder"].files[0].bytes
    return memory().free_bytes > _SPARE_COPIES * weights


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
    settings: EngineSettings,
    *,
    kv: str | None = None,
) -> tuple[LlamaDecoder | PairedDecoder, Placement]:
    """The bundle's decoder on the first device that has room for layers of it, or on the CPU.

    Raises EngineMissing where nothing of that name is offered, EngineError where what was named
    takes no layer or the decoder's heads do not fit the `kv` cache.
    """
    spec, exact = bundle.manifest.decoder, _exact(bundle)
    if kv == "q8_0":
        ggml.check_heads(bundle.path("decoder"), spec)
    make = partial(single, bundle, settings, kv=kv)
    notes: list[str] = []
    found = backends.candidates(word, offered)
    if found and word == "auto" and (reason := _stays(spec, exact)):
        notes.append(f"{found[0].name}: {reason}")
        found = []
    needs = ggml.layer_bytes(bundle.path("decoder"), spec, exact) if found else None
    for device in found:
        assert needs is not None
        try:
            decoder = make(
                repack=settings.repacking != "off",
                offload=backends.offload(device, needs, spec.context_length),
            )
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
    placed_here = backends.placement(word, ON_THE_CPU, spec.n_layer + 1, notes)
    if settings.repacking == "decode":
        return PairedDecoder(make(repack=False), make(repack=True), spec), placed_here
    return make(repack=settings.repacking == "on"), placed_here


def single(
    bundle: Bundle,
    settings: EngineSettings,
    *,
    repack: bool,
    kv: str | None = None,
    offload: Offload = ON_THE_CPU,
    whole: bool = True,
) -> LlamaDecoder:
    """The bundle's decoder on one device, all its weights in one order, or with none yet. Raises
    EngineError where the device takes no layer.
    """
    return LlamaDecoder(
        bundle.path("decoder"),
        bundle.manifest.decoder,
        bundle.manifest.token_embedding,
        threads=settings.decode_threads,
        prefill_threads=settings.prefill_threads,
        batch=settings.batch,
        exact=_exact(bundle),
        kv=kv,
        flash_attention=settings.flash_attention,
        repack=repack,
        offload=offload,
        input=bundle.input,
        whole=whole,
        tokenizer=bundle.tokenizer,
    )


def _exact(bundle: Bundle) -> bool:
    """True if the decoder is in f32: who keeps it so wants the original's numbers, not speed."""
    return bundle.manifest.components["decoder"].precision == "f32"


def _stays(spec: DecoderSpec, exact: bool) -> str:
    """A reason to leave the decoder on the CPU; empty where there is none."""
    if exact:
        return "the decoder is in f32, for the CPU's exact numbers"
    if spec.extra_norms:
        return (
            "the decoder's extra norms are computed on the CPU; every layer would wait for copies"
        )
    return ""
