"""Memory that a model is going to need, from its files and shapes, and how it stays within a limit.

Estimates are of resident memory: pages of a mapped file count. They are upper bounds;
`python -m workshop.memory` measures how near they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgevlm.bundle import Bundle
from edgevlm.byte_sizes import in_gb
from edgevlm.errors import EngineError, PromptError
from edgevlm.image.plan import plan
from edgevlm.runtimes.llama import ggml
from edgevlm.specs import ImageSpec
from edgevlm.types import Repacking

# Python, the libraries of both engines, a decoded picture of a few megapixels, and what onnxruntime
# leaves with the allocator when the encoder goes.
_PROCESS = 230 << 20
# Address space that the engines reserve for each thread and never use, stacks and what the
# allocator keeps for itself: 180 MiB for one thread, 140 each for eight (glibc 2.36, pico).
_THREAD_ADDRESSES = 200 << 20
# llama.cpp's hashes and texts for each token.
_TOKEN = 220
# onnxruntime's arena holds the largest intermediate results about twice.
_WORK_FACTOR = 2.5
# Published towers have patches of 14 pixels and more, and 16 heads at most.
_PATCH, _HEADS = 14, 16
# Graphs that would have more scores of attention compute them in parts (export/onnx/layers.py).
_SCORES = 2 << 24
_PATCH_BYTES = 100_000
# With what turns rows and windows move beside it: 110 kB a patch in the largest picture.
_NATIVE_PATCH_BYTES = 130_000
_KV_BYTES = {"f32": 4.0, "f16": 2.0, "q8_0": 34 / 32}
# Contexts grow in steps, see decoder.py.
_STEP = 256
# A photograph, and words around it: what a model is loaded for.
PHOTO, _WORDS = (4000, 3000), 64
# Copies of the weights beside the mapped file, by repacking. With "decode" the file is mapped
# twice, and there are two KV caches.
_COPIES: dict[Repacking, int] = {"off": 0, "on": 1, "decode": 2}


@dataclass(frozen=True)
class Needs:
    """Bytes that the parts of a model need: the encoder with its work, the decoder's vocabulary,
    weights, KV cache for a position, and work. `usual` are the positions of a usual request.
    """

    vision: int
    vocabulary: int
    weights: int
    position: float
    work: int
    usual: int

    def decoder(self, positions: int, repacking: Repacking) -> int:
        """The decoder's, for a request of so many positions."""
        caches = 2 if repacking == "decode" else 1
        kept = math.ceil(positions / _STEP) * _STEP * self.position * caches
        return int(self.weights * (1 + _COPIES[repacking]) + kept + self.work)

    def peak(self, positions: int, repacking: Repacking, *, apart: bool) -> int:
        """The most that the process holds: both engines, or `apart` the larger of them and the
        vocabulary beside it.
        """
        decoder, words = self.decoder(positions, repacking), _PROCESS + self.vocabulary
        if apart:
            return words + max(self.vision, self.vocabulary + decoder)
        return words + self.vision + decoder


@dataclass(frozen=True)
class MemoryLimit:
    """Bytes that a model may hold, what says so, and what would allow more."""

    bytes: int
    said: str
    cure: str


def limit_of(max_memory: int | None, addresses: int | None, threads: int) -> MemoryLimit | None:
    """The smaller of `max_memory` and of what `addresses`, bytes of free address space, leave
    engines of so many threads; None where there is neither.
    """
    limits = []
    if max_memory is not None:
        limits.append(
            MemoryLimit(max_memory, f"max_memory is {in_gb(max_memory)}", "raise max_memory")
        )
    if addresses is not None:
        left = max(0, addresses + _PROCESS - threads * _THREAD_ADDRESSES)
        said = f"the address-space limit (ulimit -v) leaves {in_gb(left)} at threads={threads}"
        limits.append(MemoryLimit(left, said, "raise it, take fewer threads"))
    return min(limits, key=lambda limit: limit.bytes, default=None)


@dataclass(frozen=True)
class Budget:
    """The way that a model stays within a limit: encoder and decoder `apart` or both there, with
    weights re-ordered or not. `limit` is None where there is none.
    """

    needs: Needs
    limit: MemoryLimit | None
    apart: bool
    repacking: Repacking

    def check(self, positions: int) -> None:
        """Raises PromptError for a request of so many positions that would go beyond the limit."""
        need = self.needs.peak(positions, self.repacking, apart=self.apart)
        if self.limit and need > self.limit.bytes:
            raise PromptError(
                f"the request needs about {in_gb(need)} of memory for {positions} tokens and "
                f"{self.limit.said}; lower max_tokens, max_tiles or max_pixels, "
                f"or {self.limit.cure}"
            )


def needs(bundle: Bundle, precision: str, kv: str) -> Needs:
    """Needs of a bundle with the vision encoder at a precision and a type of the KV cache."""
    manifest, spec = bundle.manifest, bundle.manifest.decoder
    vision = 0
    if main := manifest.components.get("vision"):
        parts = (manifest.alternatives.get(precision, main), manifest.components["projector"])
        weights = sum(record.bytes for part in parts for record in part.files)
        vision = int(weights * 1.1 + _encoder_work(manifest.image))
    if "decoder" not in manifest.components:
        return Needs(vision, 0, 0, 0, 0, 0)
    # A mask decoder or region model stays as the vocabulary does, whichever engine is there.
    staying = [c for role in ("masks", "regions") if (c := manifest.components.get(role))]
    heads = sum(record.bytes for component in staying for record in component.files)
    found = ggml.layer_bytes(bundle.path("decoder"), spec, exact=False)
    rows = plan(*PHOTO, manifest.image).rows if vision else 0
    return Needs(
        vision,
        spec.n_vocab * _TOKEN + heads,
        sum(record.bytes for record in manifest.components["decoder"].files),
        found.position / 2 * _KV_BYTES[kv] * spec.n_layer,
        # Its rows are 512; a picture in a prefix-LM is one batch.
        int(found.work * max(1.0, rows / 512)),
        min(rows + _WORDS + manifest.answer.max_tokens, spec.context_length),
    )


def _encoder_work(image: ImageSpec) -> float:
    """Bytes of an encoder's intermediate results; one for pictures of any size keeps no scores."""
    if image.native:
        return math.prod(plan(*PHOTO, image).canvas) / _PATCH**2 * _NATIVE_PATCH_BYTES
    patches = (image.size / _PATCH) ** 2
    scores = min(_HEADS * patches**2, _SCORES)
    return scores * 4 * _WORK_FACTOR + patches * _PATCH_BYTES


def fitted(needs: Needs, repacking: Repacking, limit: MemoryLimit | None, machine: int) -> Budget:
    """The quickest way that fits a limit, with the repacking that is wished or none.

    Without a limit it is what the machine's memory, of so many bytes, has room for, and the
    smallest where it has not: the system can page mapped weights in and out, which is slow and
    still an answer. Raises EngineError where a limit is too small for anything.
    """
    ways = [
        Budget(needs, limit, apart=False, repacking=repacking),
        Budget(needs, limit, apart=False, repacking="off"),
        # Weights would be re-ordered anew for every picture.
        Budget(needs, limit, apart=True, repacking="off"),
    ]
    for way in ways:
        if _peak(way) <= (limit.bytes if limit else machine):
            return way
    smallest = min(ways, key=_peak)
    if limit is None:
        return smallest
    raise EngineError(
        f"{limit.said} and this model needs about {in_gb(_peak(smallest))} "
        f"(encoder {in_gb(needs.vision)}, then decoder "
        f"{in_gb(needs.decoder(needs.usual, 'off'))}); {limit.cure}, lower max_tiles or "
        "max_pixels, or take a smaller model or precision"
    )


def _peak(way: Budget) -> int:
    return way.needs.peak(way.needs.usual, way.repacking, apart=way.apart)
