"""The precisions that a bundle can have, what they are to each engine, and how exact they are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from edgevlm.errors import ExportError


@dataclass(frozen=True)
class Bounds:
    """Bounds on the logits' distance from the float32 source's.

    `logit` is the largest difference of one, in standard deviations of the source's logits; `kl`
    the mean divergence of the next token's distribution, in nats.
    """

    logit: float
    kl: float


@dataclass(frozen=True)
class Quant:
    """A decoder precision: llama.cpp's file type, and bits per weight for estimates of size.

    `direct` names the ggml type that is written without llama.cpp's quantizer. `imatrix` is for
    types that llama.cpp makes with an importance matrix only.
    """

    name: str
    ftype: int
    bits: float
    bounds: Bounds
    direct: str = ""
    imatrix: bool = False


@dataclass(frozen=True)
class VisionPrecision:
    """A precision of the vision encoder: bits per weight, bounds on what it may change.

    `cosine` bounds 1 - cosine of any feature row, `bounds` what that does to the logits.
    """

    name: str
    bits: float
    cosine: float
    bounds: Bounds


@dataclass(frozen=True)
class Recipe:
    """The choice of a tower's nodes that stay in float32.

    First those whose noise (export/onnx/quantize.py says what that is for each precision) is beyond
    one of `limits`, which are tried in turn until the features are near enough; then, if none was
    enough, these `shares` of all nodes, the noisiest.
    """

    limits: tuple[float, ...]
    shares: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)

    def attempts(self, noise: Mapping[str, float]) -> Iterator[list[str]]:
        """The names of the nodes that stay, more every time; each set once."""
        ranked = sorted(noise, key=lambda name: (-noise[name], name))
        sizes = [sum(noise[name] > limit for name in ranked) for limit in self.limits]
        sizes += [math.ceil(share * len(ranked)) for share in self.shares]
        last = -1
        for size in sizes:
            if size > last:
                last = size
                yield sorted(ranked[:size])


# llama_ftype numbers are llama.h's. The bits of K-quants count the embedding table, which
# llama.cpp keeps at Q6_K or Q8_0 and which is a large part of a Gemma.
#
# The bound of f32 is the promise: 5e-3 on logits with a deviation of 5. The others are about
# twice the worst of six random tiny models (three of each version, 17 rows of 2,211 logits each).
# Their small matrices average nothing out and no training made them robust, so that a real
# model stays far below; a model that is broken has a divergence beyond 20.
#
# Left out: tq1_0, tq2_0, q1_0 and q2_0, which are for weights that were trained to three or two
# values and turn any others into noise; mxfp4, which llama.cpp gives to mixtures of experts alone;
# nvfp4, which it reads but does not make.
# The bounds of three and fewer bits are guesses above those of four, not measured as the others.
_FOUR, _THREE, _TWO = Bounds(6.0, 5.0), Bounds(8.0, 9.0), Bounds(10.0, 16.0)
_QUANTS = (
    Quant("f32", 0, 32, Bounds(0.001, 1e-6), "F32"),
    Quant("f16", 1, 16, Bounds(0.06, 5e-4), "F16"),
    Quant("bf16", 32, 16, Bounds(0.3, 0.01), "BF16"),
    Quant("q8_0", 7, 8.5, Bounds(1.0, 0.1)),
    Quant("q6_k", 18, 6.8, Bounds(3.0, 0.6)),
    Quant("q5_1", 9, 6.3, Bounds(4.0, 2.5)),
    Quant("q5_k_m", 17, 6.1, Bounds(4.0, 2.5)),
    Quant("q5_k_s", 16, 6.0, Bounds(4.0, 2.5)),
    Quant("q5_0", 8, 6.0, Bounds(4.0, 2.5)),
    Quant("q4_1", 3, 5.6, _FOUR),
    Quant("q4_k_m", 15, 5.4, _FOUR),
    Quant("q4_k_s", 14, 5.3, _FOUR),
    Quant("q4_0", 2, 5.2, _FOUR),
    Quant("iq4_nl", 25, 5.2, _FOUR),
    Quant("iq4_xs", 30, 5.0, _FOUR),
    Quant("q3_k_l", 13, 5.0, _THREE),
    Quant("q3_k_m", 12, 4.7, _THREE),
    Quant("iq3_m", 27, 4.6, _THREE),
    Quant("q3_k_s", 11, 4.5, _THREE),
    Quant("iq3_s", 26, 4.5, _THREE),
    Quant("iq3_xs", 22, 4.3, _THREE, imatrix=True),
    Quant("iq3_xxs", 23, 4.1, _THREE, imatrix=True),
    Quant("q2_k", 10, 4.2, _TWO),
    Quant("q2_k_s", 21, 3.9, _TWO, imatrix=True),
    Quant("iq2_m", 29, 3.6, _TWO, imatrix=True),
    Quant("iq2_s", 28, 3.5, _TWO, imatrix=True),
    Quant("iq2_xs", 20, 3.4, _TWO, imatrix=True),
    Quant("iq2_xxs", 19, 3.2, _TWO, imatrix=True),
    Quant("iq1_m", 31, 3.0, _TWO, imatrix=True),
    Quant("iq1_s", 24, 2.8, _TWO, imatrix=True),
)
_VISION = (
    # torch and onnxruntime add in another order.
    VisionPrecision("fp32", 32, 1e-6, Bounds(0.0, 0.0)),
    # Rounds every weight and the pixels. A random tiny model had 1.4e-3 nats together with f16.
    VisionPrecision("fp16", 16, 1e-5, Bounds(0.12, 2e-3)),
    # The exporter leaves out of quantization what would go beyond this.
    VisionPrecision("int8", 8, 0.01, Bounds(2.5, 0.8)),
    VisionPrecision("qdq8", 8, 0.01, Bounds(2.5, 0.8)),
    VisionPrecision("int4", 5, 0.05, Bounds(4.0, 2.0)),
)
# Which nodes lie beyond a limit is found anew for every checkpoint, from its own activations and
# weights, and stands in the graph's metadata.
#
# 8 bits: noise over signal of the rounded activations. Inputs without outliers lie near 1e-4.
# fp16: the share of the range. Sums of products pass through values larger than their result.
# int4: noise over signal of the rounded weights, 6e-3 where they are Gaussian.
_RECIPES = {
    "fp16": Recipe((1 / 8, 1 / 64)),
    "int8": Recipe((1e-3, 3e-4, 1e-4, 5e-5)),
    "qdq8": Recipe((1e-3, 3e-4, 1e-4, 5e-5)),
    "int4": Recipe((0.02,)),
}
QUANTS = tuple(q.name for q in _QUANTS)
VISION_PRECISIONS = tuple(v.name for v in _VISION)


def quant(name: str) -> Quant:
    """The decoder precision of that name; raises ExportError."""
    for q in _QUANTS:
        if q.name == name:
            return q
    raise ExportError(f"quant {name!r} is not known; choose from {', '.join(QUANTS)}")


def by_file_type(number: int) -> Quant | None:
    """The decoder precision of llama.cpp's file type, None for one that is not known."""
    return next((q for q in _QUANTS if q.ftype == number), None)


def vision_precision(name: str) -> VisionPrecision:
    """The vision precision of that name; raises ExportError."""
    for v in _VISION:
        if v.name == name:
            return v
    raise ExportError(
        f"vision precision {name!r} is not known; choose from {', '.join(VISION_PRECISIONS)}"
    )


def vision_precisions(names: str | Sequence[str]) -> tuple[VisionPrecision, ...]:
    """The precision of that name, or those of several, the main one first; raises ExportError."""
    names = [names] if isinstance(names, str) else list(names)
    if len(set(names)) != len(names) or not names:
        raise ExportError("name each vision precision once, and at least one")
    return tuple(vision_precision(name) for name in names)


def recipe(precision: str) -> Recipe:
    """The recipe for towers in a precision other than fp32."""
    return _RECIPES[precision]


def wants_imatrix(precision: Quant, asked: bool | None) -> bool:
    """True if an importance matrix is made: as asked, and where llama.cpp insists on one.

    Raises ExportError where the two disagree.
    """
    if asked and precision.direct:
        raise ExportError(
            f"quant {precision.name!r} rounds every weight alike; leave out --imatrix"
        )
    if asked is False and precision.imatrix:
        raise ExportError(
            f"quant {precision.name!r} is made with an importance matrix only; "
            "leave out --no-imatrix or choose another quant"
        )
    return precision.imatrix if asked is None else asked
