"""The precisions that a bundle can have, what they are to each engine, and how exact they are."""

from __future__ import annotations

from dataclasses import dataclass

from edgevlm.errors import ExportError


@dataclass(frozen=True)
class Bounds:
    """How far logits may lie from the float32 source's.

    `logit` is the largest difference of one, in standard deviations of the source's logits; `kl`
    the mean divergence of the next token's distribution, in nats.
    """

    logit: float
    kl: float


@dataclass(frozen=True)
class Quant:
    """A decoder precision: llama.cpp's file type, and bits per weight for estimates of size.

    `direct` names the ggml type that is written without llama.cpp's quantizer.
    """

    name: str
    ftype: int
    bits: float
    bounds: Bounds
    direct: str = ""


@dataclass(frozen=True)
class VisionPrecision:
    """A precision of the vision encoder: bits per weight, bounds on what it may change.

    `cosine` bounds 1 - cosine of any feature row, `bounds` what that does to the logits.
    """

    name: str
    bits: float
    cosine: float
    bounds: Bounds


# llama_ftype numbers are llama.h's. The bits of K-quants count the embedding table, which
# llama.cpp keeps at Q6_K or Q8_0 and which is a large part of a Gemma.
#
# The bound of f32 is the promise: 5e-3 on logits with a deviation of 5. The others are about
# twice the worst of six random tiny models (three of each version, 17 rows of 2,211 logits each).
# Their small matrices average nothing out and no training made them robust, so that a real
# model stays far below; a model that is broken has a divergence beyond 20.
_QUANTS = (
    Quant("f32", 0, 32, Bounds(0.001, 1e-6), "F32"),
    Quant("f16", 1, 16, Bounds(0.06, 5e-4), "F16"),
    Quant("bf16", 32, 16, Bounds(0.3, 0.01), "BF16"),
    Quant("q8_0", 7, 8.5, Bounds(1.0, 0.1)),
    Quant("q6_k", 18, 6.8, Bounds(3.0, 0.6)),
    Quant("q5_k_m", 17, 6.1, Bounds(4.0, 2.5)),
    Quant("q4_k_m", 15, 5.4, Bounds(6.0, 5.0)),
    Quant("q4_0", 2, 5.2, Bounds(6.0, 5.0)),
    Quant("iq4_xs", 30, 5.0, Bounds(6.0, 5.0)),
)
_VISION = (
    # torch and onnxruntime add in another order.
    VisionPrecision("fp32", 32, 1e-6, Bounds(0.0, 0.0)),
    # Rounds the weights alone.
    VisionPrecision("fp16", 16, 1e-5, Bounds(0.06, 5e-4)),
    # The exporter leaves out of quantization what would go beyond this.
    VisionPrecision("int8", 8, 0.01, Bounds(2.5, 0.8)),
)
QUANTS = tuple(q.name for q in _QUANTS)
VISION_PRECISIONS = tuple(v.name for v in _VISION)


def quant(name: str) -> Quant:
    """The decoder precision of that name; raises ExportError."""
    for q in _QUANTS:
        if q.name == name:
            return q
    raise ExportError(f"quant {name!r} is not known; choose from {', '.join(QUANTS)}")


def vision_precision(name: str) -> VisionPrecision:
    """The vision precision of that name; raises ExportError."""
    for v in _VISION:
        if v.name == name:
            return v
    raise ExportError(
        f"vision precision {name!r} is not known; choose from {', '.join(VISION_PRECISIONS)}"
    )
