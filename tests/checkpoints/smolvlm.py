"""Tiny random checkpoints of SmolVLM's shape, in the layout of the published ones."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.checkpoints.paligemma import Tensors, write_weights
from tests.checkpoints.vocabulary import CORPUS, grown, write_json

# As SmolLM2's tokenizer has them, and those that SmolVLM adds behind its last.
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<file_sep>")
PLACES = ("<global-img>", *(f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)))
ADDED = ("<fake_token_around_image>", "<image>", "<end_of_utterance>")


@dataclass(frozen=True)
class Tiny:
    """Sizes of a tiny checkpoint; `places` says whether its tokenizer knows those of tiles, which
    the first SmolVLM-2.2B's does not. `processor` overrides keys of preprocessor_config.json.
    `n_vocab` are the tables' rows, 0 a few more than tokens; without `weights` whoever calls writes
    them.
    """

    model_type: str = "idefics3"
    places: bool = True
    tied: bool = False
    size: int = 32
    patch: int = 4
    factor: int = 4
    vision_width: int = 64
    vision_layers: int = 2
    vision_heads: int = 4
    vision_mlp: int = 128
    width: int = 256
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 512
    dtype: str = "float32"
    seed: int = 0
    shards: int = 1
    processor: Mapping[str, Any] = field(default_factory=dict)
    n_vocab: int = 0
    weights: bool = True
    config: Mapping[str, Any] = field(default_factory=dict)
    text_config: Mapping[str, Any] = field(default_factory=dict)


def write_smolvlm(folder: Path, **options: Any) -> Path:
    """Writes a checkpoint; `options` are Tiny's."""
    tiny = Tiny(**options)
    folder.mkdir(parents=True, exist_ok=True)
    tokens = _write_tokenizer(folder, tiny)
    vocab = tiny.n_vocab or len(tokens) + 3  # Rows that no token has, as the published tables.
    kind = "SmolVLM" if tiny.model_type == "smolvlm" else "Idefics3"
    config = {
        "architectures": [f"{kind}ForConditionalGeneration"],
        "image_token_id": tokens["<image>"],
        "model_type": tiny.model_type,
        "pad_token_id": 128002,
        "scale_factor": tiny.factor,
        "text_config": {
            "architectures": ["VLlama3ForCausalLM"],
            "head_dim": tiny.width // tiny.heads,
            "hidden_size": tiny.width,
            "intermediate_size": tiny.mlp,
            "max_position_embeddings": 8192,
            "model_type": "llama",
            "num_attention_heads": tiny.heads,
            "num_hidden_layers": tiny.layers,
            "num_key_value_heads": tiny.kv_heads,
            "perceiver_config": {"model_type": "vllama3"},
            "qk_layer_norms": False,
            "rms_norm_eps": 1e-05,
            "rope_theta": 100000,
            "tie_word_embeddings": tiny.tied,
            "use_resampler": False,
            "vocab_size": vocab,
            **tiny.text_config,
        },
        "tie_word_embeddings": tiny.tied,
        "torch_dtype": tiny.dtype,
        "use_cache": True,
        "vision_config": {
            "hidden_size": tiny.vision_width,
            "image_size": tiny.size,
            "intermediate_size": tiny.vision_mlp,
            "max_image_size": {"longest_edge": tiny.size},
            "model_type": "smolvlm_vision" if kind == "SmolVLM" else "idefics3",
            "num_attention_heads": tiny.vision_heads,
            "num_hidden_layers": tiny.vision_layers,
            "patch_size": tiny.patch,
            "size": {"longest_edge": 4 * tiny.size},
            "tie_word_embeddings": False,
        },
        "vocab_size": vocab,
        **tiny.config,
    }
    write_json(folder / "config.json", config)
    write_json(
        folder / "preprocessor_config.json",
        {
            "do_convert_rgb": True,
            "do_image_splitting": True,
            "do_normalize": True,
            "do_pad": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_processor_type": f"{kind}ImageProcessor",
            "image_std": [0.5, 0.5, 0.5],
            "max_image_size": {"longest_edge": tiny.size},
            "processor_class": f"{kind}Processor",
            "resample": 1,
            "rescale_factor": 0.00392156862745098,
            "size": {"longest_edge": 4 * tiny.size},
            **tiny.processor,
        },
    )
    generation = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2}
    write_json(folder / "generation_config.json", generation)
    if tiny.weights:
        write_weights(folder, _tensors(tiny, vocab), tiny.dtype, tiny.shards)
    return folder


@functools.cache
def _trained() -> str:
    """SmolLM2's kind of tokenizer: digits one by one, then GPT-2's pattern."""
    import tokenizers

    untyped: Any = tokenizers
    pre = untyped.pre_tokenizers
    tokenizer = untyped.Tokenizer(untyped.models.BPE())
    tokenizer.pre_tokenizer = pre.Sequence(
        [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = untyped.decoders.ByteLevel()
    trainer = untyped.trainers.BpeTrainer(
        vocab_size=800,
        initial_alphabet=sorted(pre.ByteLevel.alphabet()),
        special_tokens=list(SPECIALS),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS.splitlines(keepends=True), trainer)
    return str(tokenizer.to_str())


def _write_tokenizer(folder: Path, tiny: Tiny) -> dict[str, int]:
    """Writes the tokenizer's files; returns the ids of all tokens by text."""
    data = json.loads(grown(_trained(), tiny.n_vocab))
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    for text in (*(PLACES if tiny.places else ()), *ADDED):
        i = len(data["model"]["vocab"]) + len(data["added_tokens"]) - len(SPECIALS)
        data["added_tokens"].append({"id": i, "content": text, **plain, "special": True})
    write_json(folder / "tokenizer.json", data)
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(t["id"]): {k: v for k, v in t.items() if k != "id"}
                for t in data["added_tokens"]
            },
            "additional_special_tokens": list(ADDED),
            "bos_token": "<|im_start|>",
            "clean_up_tokenization_spaces": False,
            "eos_token": "<end_of_utterance>",
            "model_max_length": 8192,
            "pad_token": "<|im_end|>",
            "tokenizer_class": "GPT2Tokenizer",
            "unk_token": "<|endoftext|>",
        },
    )
    return {**data["model"]["vocab"], **{t["content"]: t["id"] for t in data["added_tokens"]}}


def _tensors(tiny: Tiny, vocab: int) -> Tensors:
    """Random tensors; the spread of the output table brings logits to a deviation of about 5."""
    rng = np.random.default_rng(tiny.seed)
    made: Tensors = {}

    def add(name: str, *shape: int, scale: float | None = None) -> None:
        spread = shape[-1] ** -0.5 if scale is None else scale
        made[name] = (rng.normal(size=shape) * spread).astype(np.float32)

    def norm(name: str, width: int, *, bias: bool) -> None:
        made[f"{name}.weight"] = (1 + 0.1 * rng.normal(size=width)).astype(np.float32)
        if bias:
            add(f"{name}.bias", width, scale=0.1)

    def linear(name: str, rows: int, columns: int) -> None:
        add(f"{name}.weight", rows, columns)
        add(f"{name}.bias", rows, scale=0.1)

    v, mlp, vision = tiny.vision_width, tiny.vision_mlp, "model.vision_model."
    patch = (v, 3, tiny.patch, tiny.patch)
    add(f"{vision}embeddings.patch_embedding.weight", *patch, scale=(3 * tiny.patch**2) ** -0.5)
    add(f"{vision}embeddings.patch_embedding.bias", v, scale=0.1)
    add(f"{vision}embeddings.position_embedding.weight", (tiny.size // tiny.patch) ** 2, v)
    for i in range(tiny.vision_layers):
        layer = f"{vision}encoder.layers.{i}."
        norm(f"{layer}layer_norm1", v, bias=True)
        norm(f"{layer}layer_norm2", v, bias=True)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{layer}self_attn.{part}", v, v)
        linear(f"{layer}mlp.fc1", mlp, v)
        linear(f"{layer}mlp.fc2", v, mlp)
    norm(f"{vision}post_layernorm", v, bias=True)
    d, columns = tiny.width, v * tiny.factor**2
    add("model.connector.modality_projection.proj.weight", d, columns)
    add("model.text_model.embed_tokens.weight", vocab, d, scale=5 * d**-0.5 if tiny.tied else 1)
    kv = tiny.kv_heads * d // tiny.heads
    for i in range(tiny.layers):
        layer = f"model.text_model.layers.{i}."
        norm(f"{layer}input_layernorm", d, bias=False)
        norm(f"{layer}post_attention_layernorm", d, bias=False)
        for part, rows in (("q_proj", d), ("k_proj", kv), ("v_proj", kv), ("o_proj", d)):
            add(f"{layer}self_attn.{part}.weight", rows, d)
        for part, shape in (
            ("gate_proj", (tiny.mlp, d)),
            ("up_proj", (tiny.mlp, d)),
            ("down_proj", (d, tiny.mlp)),
        ):
            add(f"{layer}mlp.{part}.weight", *shape)
    norm("model.text_model.norm", d, bias=False)
    if not tiny.tied:
        add("lm_head.weight", vocab, d, scale=5 * d**-0.5)
    return made
