"""TinyGPT-V's decoder in numpy, float64, and as the GGUF that edgevlm runs, apart from its code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

from edgevlm.specs import DecoderSpec, TensorLocation

Weights = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Tiny:
    """Sizes; heads are as wide as the original's and a part of each turns, so that no two agree."""

    layers: int = 3
    heads: int = 4
    head_dim: int = 80
    rotary: int = 32
    ff: int = 640
    n_vocab: int = 512
    context: int = 2048

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


NORMS = {
    "tinygptv.attn_q_norm.weight": "q_norm",
    "tinygptv.attn_q_norm.bias": "q_norm_bias",
    "tinygptv.attn_k_norm.weight": "k_norm",
    "tinygptv.attn_k_norm.bias": "k_norm_bias",
    "tinygptv.post_attention_norm.weight": "post_norm",
}


def random_weights(tiny: Tiny, seed: int = 1) -> dict[str, NDArray[np.float32]]:
    """Every tensor by its GGUF name, the extra norms as [layers, size]; logits of deviation 5."""
    rng = np.random.default_rng(seed)
    d, f, v = tiny.width, tiny.ff, tiny.n_vocab

    def normal(*shape: int, std: float = 1.0, mean: float = 0.0) -> NDArray[np.float32]:
        return rng.normal(mean, std, shape).astype(np.float32)

    w = {"token_embd.weight": normal(v, d)}
    for i in range(tiny.layers):
        w |= {
            f"blk.{i}.attn_norm.weight": normal(d, std=0.2, mean=1),
            f"blk.{i}.attn_norm.bias": normal(d, std=0.2),
            f"blk.{i}.attn_qkv.weight": normal(3 * d, d, std=2 * d**-0.5),
            f"blk.{i}.attn_qkv.bias": normal(3 * d, std=0.5),
            f"blk.{i}.attn_output.weight": normal(d, d, std=d**-0.5),
            f"blk.{i}.attn_output.bias": normal(d, std=0.2),
            f"blk.{i}.ffn_up.weight": normal(f, d, std=1.5 * d**-0.5),
            f"blk.{i}.ffn_up.bias": normal(f, std=0.2),
            f"blk.{i}.ffn_down.weight": normal(d, f, std=f**-0.5),
            f"blk.{i}.ffn_down.bias": normal(d, std=0.2),
        }
    w |= {
        "output_norm.weight": normal(d, std=0.2, mean=1),
        "output_norm.bias": normal(d, std=0.2),
        "output.weight": normal(v, d, std=5 * d**-0.5),
        "output.bias": normal(v, std=0.5),
    }
    for name in NORMS.values():
        size = d if name == "post_norm" else tiny.head_dim
        mean = 0.0 if name.endswith("bias") else 1.5
        w[name] = normal(tiny.layers, size, std=0.4, mean=mean)
    return w


def forward(w: Weights, tiny: Tiny, rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """Rows [n, width] -> logits [n, n_vocab] after each, float64."""
    x = rows.astype(np.float64)
    n = len(x)
    mask = np.triu(np.full((n, n), -np.inf), 1)
    for i in range(tiny.layers):
        h = _layer_norm(x, w[f"blk.{i}.attn_norm.weight"], w[f"blk.{i}.attn_norm.bias"], 1e-5)
        qkv = _linear(w, f"blk.{i}.attn_qkv", h).reshape(n, 3, tiny.heads, tiny.head_dim)
        q = _layer_norm(qkv[:, 0], w["q_norm"][i], w["q_norm_bias"][i], 1e-5)
        k = _layer_norm(qkv[:, 1], w["k_norm"][i], w["k_norm_bias"][i], 1e-5)
        q, k = _turned(q, tiny.rotary), _turned(k, tiny.rotary)
        scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(tiny.head_dim) + mask
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        mixed = np.einsum("hij,jhd->ihd", scores, qkv[:, 2]).reshape(n, -1)
        branch = _linear(w, f"blk.{i}.attn_output", mixed)
        branch = branch / np.sqrt((branch**2).mean(-1, keepdims=True) + 1e-6) * w["post_norm"][i]
        hidden = _linear(w, f"blk.{i}.ffn_up", h)
        inner = np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)
        x = x + branch + _linear(w, f"blk.{i}.ffn_down", 0.5 * hidden * (1 + np.tanh(inner)))
    return _linear(
        w, "output", _layer_norm(x, w["output_norm.weight"], w["output_norm.bias"], 1e-5)
    )


def _linear(w: Weights, name: str, x: NDArray[np.float64]) -> NDArray[np.float64]:
    y: NDArray[np.float64] = x @ w[f"{name}.weight"].astype(np.float64).T + w[f"{name}.bias"]
    return y


def _layer_norm(
    x: NDArray[np.float64], weight: NDArray[np.float32], bias: NDArray[np.float32], eps: float
) -> NDArray[np.float64]:
    centred = x - x.mean(-1, keepdims=True)
    spread = np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    y: NDArray[np.float64] = centred / spread * weight + bias
    return y


def _turned(x: NDArray[np.float64], rotary: int) -> NDArray[np.float64]:
    """[n, heads, head_dim] at positions 0..n-1; what turns does so in pairs half of it apart."""
    half = rotary // 2
    angle = np.arange(len(x))[:, None, None] * 10000.0 ** (-np.arange(half) / half)
    a, b, rest = x[..., :half], x[..., half:rotary], x[..., rotary:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)


def write_gguf(
    path: Path, w: Weights, tiny: Tiny, kind: str = "F32", without: tuple[str, ...] = ()
) -> dict[str, NDArray[np.float32]]:
    """Writes the decoder with its matrices as a ggml type; returns the weights that it then has.

    `without` names metadata to leave out.
    """
    writer = gguf.GGUFWriter(path, "phi2")
    writer.add_context_length(tiny.context)
    writer.add_embedding_length(tiny.width)
    writer.add_block_count(tiny.layers)
    writer.add_feed_forward_length(tiny.ff)
    writer.add_head_count(tiny.heads)
    writer.add_head_count_kv(tiny.heads)
    writer.add_layer_norm_eps(1e-5)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(tiny.rotary)
    writer.add_vocab_size(tiny.n_vocab)
    writer.add_tokenizer_model("llama")
    others = tiny.n_vocab - 256
    pieces = [f"<0x{i:02X}>" for i in range(256)]
    writer.add_token_list([*pieces, *(f"<{i}>" for i in range(others))])
    writer.add_token_scores([0.0] * tiny.n_vocab)
    writer.add_token_types([gguf.TokenType.BYTE] * 256 + [gguf.TokenType.NORMAL] * others)
    for key, name in NORMS.items():
        if key not in without:
            writer.add_array(key, w[name].ravel().tolist())
    stored = dict(w)
    raw_type = GGMLQuantizationType[kind]
    for name, array in w.items():
        if name in NORMS.values():
            continue
        if array.ndim == 2:
            data = quantize(array, raw_type)
            stored[name] = dequantize(data, raw_type).reshape(array.shape)
            writer.add_tensor(name, data, raw_dtype=raw_type)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def spec(tiny: Tiny) -> DecoderSpec:
    """What a manifest states of it."""
    return DecoderSpec(
        "phi2", "causal", tiny.width, tiny.layers, tiny.n_vocab, tiny.context, extra_norms=True
    )


def place(path: Path) -> TensorLocation:
    """Where its embedding table lies."""
    (table,) = (t for t in gguf.GGUFReader(path).tensors if t.name == "token_embd.weight")
    width, rows = (int(n) for n in table.shape)
    return TensorLocation(int(table.data_offset), table.tensor_type.name, rows, width)
