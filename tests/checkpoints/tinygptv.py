"""Random TinyGPT-V checkpoints: the four downloads that a model is assembled from, as published.

Tiny by default; with SIZES a model of the published size, of which one file, or one shard of Phi-2,
is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.checkpoints.paligemma import Tensors, write_safetensors
from tests.checkpoints.phi_vocabulary import write_phi_tokenizer
from tests.checkpoints.vocabulary import write_json

EVA, BLIP2, STAGE = "eva_vit_g.pth", "blip2_pretrained_flant5xxl.pth", "TinyGPT-V_for_Stage{}.pth"
# Every stage, every layout of Phi-2, every spelling of the adapters and of the places of files.
ORIGINALS: dict[str, dict[str, Any]] = {
    "stage-1": {"stage": 1, "layout": "microsoft", "adapters": ""},
    "stage-2": {"stage": 2, "layout": "fused", "weights": "bin", "tokenizer_kind": "both"},
    "stage-3": {"stage": 3, "layout": "split", "below": False, "shards": 3, "norm_biases": True},
    "stage-4": {
        "stage": 4,
        "layout": "microsoft",
        "shards": 2,
        "weights": "bin",
        "adapters": "0.3",
    },
    "stage-4-first": {"stage": 4, "layout": "fused", "own_qformer": True, "tokenizer_kind": "fast"},
}
# Of the published model.
SIZES = {
    "size": 224,
    "grid": 16,
    "vision_width": 1408,
    "vision_layers": 39,
    "vision_mlp": 6144,
    "queries": 32,
    "q_width": 768,
    "q_layers": 12,
    "q_mlp": 3072,
    "middle": 4096,
    "width": 2560,
    "layers": 32,
    "heads": 32,
    "mlp": 10240,
    "rank": 64,
    "n_vocab": 51200,
    "shards": 8,
}

Array = NDArray[np.float32]
Named = Iterator[tuple[str, Array]]


@dataclass(frozen=True)
class Tiny:
    """Sizes and layout of a checkpoint.

    `layout` is Phi-2's: "fused" as transformers 4.36 saved it, "split" as it is published now,
    "microsoft" as Microsoft's own code saved it.
    `size` is the side in pixels of stages 1 to 3 (stage 4 has twice as many), `grid` that of the
    tower's stored positions. `below` puts Phi-2 into a folder of its own; `adapters` is the
    release of peft whose names the stage has, "" for none; `own_qformer` lets it hold a Q-Former,
    as the first files of stage 4 do; `said` keeps the config of the run in it,
    `datasets` what that says of them. `tokenizer` is a folder with GPT-2's real vocabulary.
    """

    stage: int = 3
    layout: str = "fused"
    weights: str = "safetensors"
    shards: int = 1
    dtype: str = "float16"
    below: bool = True
    adapters: str = "0.2"
    own_qformer: bool = False
    norm_biases: bool = False
    said: bool = True
    datasets: Mapping[str, Any] = field(default_factory=dict)
    name: str = STAGE
    tokenizer: Path | None = None
    tokenizer_kind: str = "slow"
    rotary: float = 0.4
    seed: int = 0
    size: int = 56
    grid: int = 4
    patch: int = 14
    vision_width: int = 176
    vision_layers: int = 2
    vision_mlp: int = 384
    queries: int = 8
    q_width: int = 128
    q_layers: int = 3
    q_mlp: int = 256
    middle: int = 192
    width: int = 256
    layers: int = 2
    heads: int = 8
    mlp: int = 512
    rank: int = 8
    n_vocab: int = 0

    @property
    def head(self) -> int:
        """Width of a head."""
        return self.width // self.heads


def write_tinygptv(folder: Path, **options: Any) -> Path:
    """Writes a folder with the four parts; the options are Tiny's fields. Returns the folder."""
    tiny = Tiny(**options)
    phi = folder / "phi-2" if tiny.below else folder
    phi.mkdir(parents=True, exist_ok=True)
    tokens = write_phi_tokenizer(phi, tiny.tokenizer, tiny.tokenizer_kind)
    rows = tiny.n_vocab or tokens + 27
    write_json(phi / "config.json", config(tiny, rows))
    _write_phi(phi, tiny, phi2(tiny, rows))
    _save(folder / EVA, eva(tiny), "float16" if tiny.dtype == "float16" else "float32")
    _save(folder / BLIP2, blip2(tiny), "float32", {})
    run: dict[str, Any] = {}
    if tiny.said:
        run = {"run": {"task": "image_text_pretrain"}, "model": _run(tiny)}
        run |= {"datasets": dict(tiny.datasets)} if tiny.datasets else {}
    rest: dict[str, Any] = {"config": run, "scaler": {"scale": 65536.0}, "epoch": 4}
    _save(folder / tiny.name.format(tiny.stage), stage(tiny), "float32", rest)
    return folder


def config(tiny: Tiny, rows: int) -> dict[str, Any]:
    """Phi-2's config.json in its layout's words."""
    if tiny.layout == "microsoft":
        return {
            "activation_function": "gelu_new",
            "architectures": ["PhiForCausalLM"],
            "attn_pdrop": 0.0,
            "auto_map": {"AutoConfig": "configuration_phi.PhiConfig"},
            "layer_norm_epsilon": 1e-05,
            "model_type": "phi-msft",
            "n_embd": tiny.width,
            "n_head": tiny.heads,
            "n_head_kv": None,
            "n_inner": tiny.mlp if tiny.mlp != 4 * tiny.width else None,
            "n_layer": tiny.layers,
            "n_positions": 2048,
            "rotary_dim": int(tiny.rotary * tiny.head),
            "tie_word_embeddings": False,
            "torch_dtype": tiny.dtype,
            "vocab_size": rows,
        }
    return {
        "architectures": ["PhiForCausalLM"],
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "hidden_act": "gelu_new",
        "hidden_size": tiny.width,
        "intermediate_size": tiny.mlp,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "model_type": "phi",
        "num_attention_heads": tiny.heads,
        "num_hidden_layers": tiny.layers,
        **({"num_key_value_heads": tiny.heads} if tiny.layout == "split" else {}),
        "partial_rotary_factor": tiny.rotary,
        "qk_layernorm": False,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": tiny.dtype,
        "vocab_size": rows,
    }


def _run(tiny: Tiny) -> dict[str, Any]:
    return {
        "arch": "minigpt_v2" if tiny.stage == 4 else "minigpt4",
        "image_size": tiny.size * (2 if tiny.stage == 4 else 1),
        "end_sym": "###",
        "lora_r": tiny.rank,
        "lora_alpha": 16,
    }


class _Random:
    """Random weights of one file, the same on every run."""

    def __init__(self, tiny: Tiny, file: int) -> None:
        self._rng = np.random.default_rng([tiny.seed, file])

    def __call__(self, *shape: int, std: float) -> Array:
        return self._rng.standard_normal(shape, np.float32) * np.float32(std)

    def linear(self, name: str, rows: int, columns: int, gain: float = 1.0) -> Named:
        """A matrix that scales its input by `gain`, and its bias."""
        yield f"{name}.weight", self(rows, columns, std=gain * columns**-0.5)
        yield f"{name}.bias", self(rows, std=0.1)

    def norm(self, name: str, width: int) -> Named:
        """A norm's weight near one, and its bias."""
        yield f"{name}.weight", 1 + self(width, std=0.2)
        yield f"{name}.bias", self(width, std=0.1)


def eva(tiny: Tiny) -> Named:
    """eva_vit_g.pth: one block more than is run, a final norm and a head."""
    r, d = _Random(tiny, 0), tiny.vision_width
    yield "cls_token", r(1, 1, d, std=0.5)
    yield "pos_embed", r(1, 1 + tiny.grid**2, d, std=0.5)
    yield "patch_embed.proj.weight", r(d, 3, tiny.patch, tiny.patch, std=0.05)
    yield "patch_embed.proj.bias", r(d, std=0.1)
    # The published file may hold a 40th block; fewer are all run.
    for i in range(tiny.vision_layers + (tiny.vision_layers == SIZES["vision_layers"])):
        p = f"blocks.{i}."
        yield from r.norm(f"{p}norm1", d)
        yield f"{p}attn.q_bias", r(d, std=0.1)
        yield f"{p}attn.v_bias", r(d, std=0.1)
        yield f"{p}attn.qkv.weight", r(3 * d, d, std=1.5 * d**-0.5)
        yield from r.linear(f"{p}attn.proj", d, d)
        yield from r.norm(f"{p}norm2", d)
        yield from r.linear(f"{p}mlp.fc1", tiny.vision_mlp, d)
        yield from r.linear(f"{p}mlp.fc2", d, tiny.vision_mlp)
    yield from r.norm("norm", d)
    yield from r.linear("head", 10, d)


def blip2(tiny: Tiny) -> Named:
    """BLIP-2's file: ln_vision, the Q-Former with what is never run of it, a projection to T5."""
    r = _Random(tiny, 1)
    yield from r.norm("ln_vision", tiny.vision_width)
    yield from qformer(tiny, r)
    yield "Qformer.bert.embeddings.word_embeddings.weight", r(40, tiny.q_width, std=0.1)
    for i in range(tiny.q_layers):
        yield from r.linear(f"Qformer.bert.encoder.layer.{i}.output.dense", 8, 8)
    yield from r.linear("Qformer.cls.predictions.decoder", 40, 8)
    yield from r.linear("t5_proj", 16, tiny.q_width)


def qformer(tiny: Tiny, r: _Random) -> Named:
    """What the model runs of a Q-Former, and its queries."""
    d, bert = tiny.q_width, "Qformer.bert."
    yield "query_tokens", r(1, tiny.queries, d, std=1.0)
    yield from r.norm(f"{bert}embeddings.LayerNorm", d)
    for i in range(tiny.q_layers):
        p = f"{bert}encoder.layer.{i}."
        for name in ("attention", "crossattention")[: 2 - i % 2]:
            width = tiny.vision_width if name == "crossattention" else d
            yield from r.linear(f"{p}{name}.self.query", d, d, 2.0)
            yield from r.linear(f"{p}{name}.self.key", d, width, 2.0)
            yield from r.linear(f"{p}{name}.self.value", d, width, 2.0)
            yield from r.linear(f"{p}{name}.output.dense", d, d)
            yield from r.norm(f"{p}{name}.output.LayerNorm", d)
        yield from r.linear(f"{p}intermediate_query.dense", tiny.q_mlp, d)
        yield from r.linear(f"{p}output_query.dense", d, tiny.q_mlp)
        yield from r.norm(f"{p}output_query.LayerNorm", d)


def stage(tiny: Tiny) -> Named:
    """What a stage trained: norms' weights, projections, adapters, perhaps a Q-Former."""
    r, d = _Random(tiny, 2 + tiny.stage), tiny.width
    plain = not tiny.adapters
    root = "llama_model.model." if plain else "llama_model.base_model.model.model."
    up = {"": "", "0.2": "weight"}.get(tiny.adapters, "default.weight")
    for i in range(tiny.layers):
        p = f"{root}layers.{i}."
        yield f"{p}input_layernorm.weight", 1 + r(d, std=0.2)
        # Without a gain the normed branch would vanish beside the token's own row.
        yield f"{p}post_layernorm.weight", 1.5 + r(d, std=0.2)
        for name in ("q_layernorm", "k_layernorm"):
            yield f"{p}self_attn.{name}.weight", 1.5 + r(tiny.head, std=0.3)
            if tiny.norm_biases:
                yield f"{p}self_attn.{name}.bias", r(tiny.head, std=0.2)
        for name, rows in (("query_key_value", 3 * d), ("dense", d)) if up else ():
            std = tiny.rank**0.5 / 16
            yield f"{p}self_attn.{name}.lora_A.{up}", r(tiny.rank, d, std=d**-0.5)
            yield f"{p}self_attn.{name}.lora_B.{up}", r(rows, tiny.rank, std=std)
    yield f"{root}final_layernorm.weight", 1 + r(d, std=0.2)
    yield from r.linear("llama_proj", tiny.middle, tiny.q_width)
    yield from r.linear("llama_proj2", d, tiny.middle)
    if tiny.own_qformer:
        yield from qformer(tiny, r)


def phi2(tiny: Tiny, rows: int) -> Named:
    """Phi-2 under the names of its layout; the same model in each."""
    r, d = _Random(tiny, 2), tiny.width
    own = tiny.layout == "microsoft"
    top = ("transformer.embd.wte", "transformer.h.", "lm_head.ln", "lm_head.linear")
    if not own:
        top = ("model.embed_tokens", "model.layers.", "model.final_layernorm", "lm_head")
    yield f"{top[0]}.weight", r(rows, d, std=1.0)
    for i in range(tiny.layers):
        p = f"{top[1]}{i}."
        yield from r.norm(p + ("ln" if own else "input_layernorm"), d)
        yield from _attention(tiny, p, r)
        yield from r.linear(p + ("mixer.out_proj" if own else "self_attn.dense"), d, d, 2.0)
        yield from r.linear(f"{p}mlp.fc1", tiny.mlp, d, 1.5)
        yield from r.linear(f"{p}mlp.fc2", d, tiny.mlp, 2.0)
    yield from r.norm(top[2], d)
    yield from r.linear(top[3], rows, d, 5.0)


def _attention(tiny: Tiny, p: str, r: _Random) -> Named:
    d = tiny.width
    for kind, values in r.linear("", 3 * d, d, 2.0):
        # The draw is [q, k, v][heads][width of a head].
        apart = values.reshape(3, tiny.heads, tiny.head, *values.shape[1:])
        if tiny.layout == "microsoft":
            yield f"{p}mixer.Wqkv{kind}", values
        elif tiny.layout == "fused":
            yield f"{p}self_attn.query_key_value{kind}", apart.swapaxes(0, 1).reshape(values.shape)
        else:
            for name, one in zip("qkv", apart, strict=True):
                yield f"{p}self_attn.{name}_proj{kind}", one.reshape(d, *values.shape[1:])


def _save(path: Path, tensors: Named, dtype: str, rest: Mapping[str, Any] | None = None) -> None:
    """Writes a .pth: the tensors alone, or {"model": tensors, ...} as a training run saves them."""
    torch = pytest.importorskip("torch", reason=".pth files are written with torch")
    kind = getattr(torch, dtype)
    state: dict[str, Any] = {
        n: torch.from_numpy(np.ascontiguousarray(v)).to(kind) for n, v in tensors
    }
    if rest is None:
        torch.save(state, path)
        return
    state["Qformer.bert.embeddings.position_ids"] = torch.arange(512)[None]
    moments = {i: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(4)} for i in range(2)}
    optimizer = {"state": moments, "param_groups": [{"lr": 1e-5, "params": [0, 1]}]}
    torch.save({"model": state, "optimizer": optimizer, **rest}, path)


def _write_phi(folder: Path, tiny: Tiny, tensors: Named) -> None:
    """Phi-2's files, a shard at a time."""
    suffix = "safetensors" if tiny.weights == "safetensors" else "bin"
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    write = write_safetensors if suffix == "safetensors" else _write_bin
    if tiny.shards == 1:
        write(folder / f"{stem}.{suffix}", dict(tensors), tiny.dtype)
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(_shards(tensors, tiny)):
        file = f"{stem}-{i + 1:05}-of-{tiny.shards:05}.{suffix}"
        write(folder / file, shard, tiny.dtype)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": weight_map}
    write_json(folder / f"{stem}.{suffix}.index.json", index)


def _shards(tensors: Named, tiny: Tiny) -> Iterator[Tensors]:
    per_layer = 12 if tiny.layout == "split" else 10
    n = -(-(1 + tiny.layers * per_layer + 4) // tiny.shards)
    shard: Tensors = {}
    for name, values in tensors:
        shard[name] = values
        if len(shard) == n:
            yield shard
            shard = {}
    if shard:
        yield shard


def _write_bin(path: Path, data: Tensors, dtype: str) -> None:
    import torch

    kind = getattr(torch, dtype)
    torch.save(
        {n: torch.from_numpy(np.ascontiguousarray(v)).to(kind) for n, v in data.items()}, path
    )
