"""Least cost of an answer: bytes read and operations done, stage by stage.

The decoder's numbers come from its tensor table. The graphs' are estimates from the size of their
files: one multiply-add for every weight and position, attention left out (4 % in SigLIP-So400m at
224 px).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgevlm.benchmarks.latency.report import Limit, Physics
from edgevlm.benchmarks.latency.stats import Metric
from edgevlm.bundle import Bundle
from edgevlm.gguf_file import opened

# Of one weight; 8-bit precisions are not listed. Those from 2 on are computed in float32.
_WEIGHT_BYTES = {"fp32": 4, "f32": 4, "fp16": 2, "f16": 2, "bf16": 2, "int4": 0.5}
_KV_BYTES = 2


@dataclass(frozen=True)
class Cost:
    """Bytes and operations of one bundle's decoder.

    decoder_bytes: read for every token of an answer (all matrices, the output table included, a
    tied embedding table once). layer_weights: weights that multiply every position of a prefill.
    output_weights: those of the last layer's table, used for the last position only.
    attention_ops: a position attending to one other. kv_bytes: read for each earlier position.
    """

    decoder_bytes: int
    layer_weights: int
    output_weights: int
    attention_ops: int
    kv_bytes: int


def cost(bundle: Bundle) -> Cost:
    """Reads the tensor table of the decoder."""
    spec = bundle.manifest.decoder
    with opened(bundle.path("decoder")) as file:
        tensors = file.tensors()
        heads = file.heads(spec)
    output = tensors.get("output.weight", tensors["token_embd.weight"])
    layers = [t for name, t in tensors.items() if name.startswith("blk.")]
    sizes = heads.key_size + heads.value_size
    return Cost(
        decoder_bytes=sum(t.n_bytes for t in layers) + output.n_bytes,
        layer_weights=sum(t.elements for t in layers if t.rows > 1),
        output_weights=output.elements,
        attention_ops=2 * spec.n_layer * heads.query * sizes,
        kv_bytes=_KV_BYTES * spec.n_layer * heads.key_value * sizes,
    )


def limits(
    needs: Cost, bundle: Bundle, physics: Physics, metrics: Mapping[str, Metric],
    rows: tuple[int, int, int], vision_precision: str = "",
) -> dict[str, Limit]:  # fmt: skip
    """Stage -> what the machine would need at its measured peaks, beside what was measured.

    `rows` are the length of the prefill, the rows in the vision encoder and the image embeddings. A
    projector's first layers may see more of them than come out: its limit is one from below.
    """
    parts, found = dict(bundle.manifest.components), {}
    parts["vision"] = bundle.manifest.alternatives.get(vision_precision, parts["vision"])
    n_prompt, n_positions, n_image = rows
    passed = {"vision": n_positions, "projector": min(n_positions, n_image)}
    for name, n in passed.items():
        size = sum(f.bytes for f in parts[name].files)
        ops = 2 * size / _WEIGHT_BYTES.get(parts[name].precision, 1) * n
        if (ms := _median(metrics, f"{name}_ms")) is not None:
            found[name] = _limit(physics, parts[name].precision, ops, size, ms)
    precision = parts["decoder"].precision
    if (ms := _median(metrics, "prefill_ms")) is not None:
        ops = 2 * (needs.layer_weights * n_prompt + needs.output_weights)
        ops += needs.attention_ops * n_prompt**2
        found["prefill"] = _limit(physics, precision, ops, needs.decoder_bytes, ms)
    if rate := _median(metrics, "decode_tokens_per_s"):
        ops = 2 * (needs.layer_weights + needs.output_weights) + needs.attention_ops * n_prompt
        size = needs.decoder_bytes + needs.kv_bytes * n_prompt
        found["decode"] = _limit(physics, precision, ops, size, 1e3 / rate)
    return found


def _limit(
    physics: Physics, precision: str, ops: float, n_bytes: float, measured_ms: float
) -> Limit:
    in_float = _WEIGHT_BYTES.get(precision, 1) >= 2
    peak = physics.float32_ops_per_s if in_float else physics.int8_ops_per_s
    floor_ms = 1e3 * max(ops / peak, n_bytes / physics.bytes_per_s)
    return Limit(ops, n_bytes, peak, floor_ms, measured_ms)


def _median(metrics: Mapping[str, Metric], name: str) -> float | None:
    return metrics[name].median if name in metrics else None
