"""Tiny random checkpoints of Gemma 3's shape, in the layouts of the published ones."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.checkpoints.paligemma import Tensors, vision_tensors, write_weights
from tests.checkpoints.vocabulary import (
    LOCATIONS,
    SEGMENTS,
    SPECIALS,
    model_proto,
    sentencepiece_model,
    write_json,
)

TURN, TURN_END = "<start_of_turn>", "<end_of_turn>"
BEGIN, END, SOFT = "<start_of_image>", "<end_of_image>", "<image_soft_token>"
# Unlike Gemma's the tab is a piece beside its byte, and runs of tabs are such as well.
_TABS = tuple("\t" * n for n in range(1, 5))
_PIECES = (*_TABS, "[multimodal]", TURN, TURN_END, BEGIN, END)
# As chat_template.json of gemma-3-4b-it has it.
CHAT_TEMPLATE = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\n'}}
{%- endif -%}
"""
# (vision, projector, language model) prefixes of transformers up to 4.51, from 4.52 and of 5.
LAYOUTS = {
    "old": ("vision_tower.vision_model.", "multi_modal_projector.", "language_model.model."),
    "new": (
        "model.vision_tower.vision_model.",
        "model.multi_modal_projector.",
        "model.language_model.",
    ),
    "5": ("model.vision_tower.", "model.multi_modal_projector.", "model.language_model."),
}


@dataclass(frozen=True)
class Tiny:
    """Sizes and layout of a tiny checkpoint: six layers, the last of which sees everything.

    `chat` is its chat template, None for none, in `chat_file`; `config`, `text_config`,
    `vision_config` and `processor` override keys of the JSON files.
    """

    layout: str = "old"
    shards: int = 1
    dtype: str = "float32"
    seed: int = 0
    tokenizer: str = "model"
    chat: str | None = CHAT_TEMPLATE
    chat_file: str = "chat_template.json"
    size: int = 64
    patch: int = 8
    tokens: int = 16
    window: int = 24
    factor: float | None = 8.0
    vision_width: int = 64
    vision_layers: int = 2
    vision_heads: int = 4
    vision_mlp: int = 140
    width: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    query_scalar: int = 64
    mlp: int = 512
    spare_rows: int = 63
    config: Mapping[str, Any] = field(default_factory=dict)
    text_config: Mapping[str, Any] = field(default_factory=dict)
    vision_config: Mapping[str, Any] = field(default_factory=dict)
    processor: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_vocab(self) -> int:
        """Rows of the table: the pieces, the token of image embeddings, and rows of no token."""
        return ids()[SOFT] + 1 + self.spare_rows


def write_gemma3(folder: Path, **options: Any) -> Path:
    """Writes a checkpoint folder; the options are Tiny's fields. Returns the folder."""
    tiny = Tiny(**options)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", _config(tiny))
    write_json(folder / "preprocessor_config.json", _pictures(tiny))
    write_json(
        folder / "processor_config.json",
        {"image_seq_length": tiny.tokens, "processor_class": "Gemma3Processor"},
    )
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, ids()[TURN_END]]},
    )
    _write_tokenizer(folder, tiny.tokenizer)
    if tiny.chat is not None and tiny.chat_file.endswith(".jinja"):
        (folder / tiny.chat_file).write_text(tiny.chat, encoding="utf-8")
    elif tiny.chat is not None:
        write_json(folder / tiny.chat_file, {"chat_template": tiny.chat})
    write_weights(folder, _tensors(tiny), tiny.dtype, tiny.shards)
    return folder


def _config(tiny: Tiny) -> dict[str, Any]:
    """config.json with the keys that the published files have, and those that only tiny ones need:
    every published one has heads of 256 or 128.
    """
    text: dict[str, Any] = {
        "head_dim": tiny.head_dim,
        "hidden_size": tiny.width,
        "intermediate_size": tiny.mlp,
        "max_position_embeddings": 8192,
        "model_type": "gemma3_text",
        "num_attention_heads": tiny.heads,
        "num_hidden_layers": tiny.layers,
        "num_key_value_heads": tiny.kv_heads,
        "query_pre_attn_scalar": tiny.query_scalar,
        "sliding_window": tiny.window,
        "vocab_size": tiny.n_vocab,
    }
    rope = {"factor": tiny.factor, "rope_type": "linear"} if tiny.factor else None
    if tiny.layout == "5":
        whole = {"rope_theta": 1e6, **(rope or {"rope_type": "default"})}
        local = {"rope_theta": 10000.0, "rope_type": "default"}
        text["rope_parameters"] = {"full_attention": whole, "sliding_attention": local}
    elif rope:
        text["rope_scaling"] = rope
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": ids()[BEGIN],
        "eoi_token_index": ids()[END],
        "eos_token_id": [1, ids()[TURN_END]],
        "image_token_index": ids()[SOFT],
        "initializer_range": 0.02,
        "mm_tokens_per_image": tiny.tokens,
        "model_type": "gemma3",
        "text_config": text | dict(tiny.text_config),
        "torch_dtype": tiny.dtype,
        "transformers_version": "4.50.0.dev0",
        "vision_config": {
            "hidden_size": tiny.vision_width,
            "image_size": tiny.size,
            "intermediate_size": tiny.vision_mlp,
            "model_type": "siglip_vision_model",
            "num_attention_heads": tiny.vision_heads,
            "num_hidden_layers": tiny.vision_layers,
            "patch_size": tiny.patch,
            "vision_use_head": False,
            **tiny.vision_config,
        },
        **tiny.config,
    }


def _pictures(tiny: Tiny) -> dict[str, Any]:
    return {
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_pan_and_scan": None,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "Gemma3ImageProcessor",
        "image_seq_length": tiny.tokens,
        "image_std": [0.5, 0.5, 0.5],
        "pan_and_scan_max_num_crops": None,
        "pan_and_scan_min_crop_size": None,
        "pan_and_scan_min_ratio_to_activate": None,
        "processor_class": "Gemma3Processor",
        "resample": 2,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": tiny.size, "width": tiny.size},
        **tiny.processor,
    }


@functools.cache
def _pieces() -> bytes:
    """A tokenizer.model as PaliGemma's, but for the tokens of turns and pictures."""
    model = model_proto(sentencepiece_model())
    kept = [p for p in model.pieces if p.piece not in {*LOCATIONS, *SEGMENTS, *_TABS}]
    pieces = [(p.piece, p.score, p.type) for p in kept]
    user_defined = 4
    pieces += [(text, 0.0, user_defined) for text in _PIECES]
    del model.pieces[:]
    for piece, score, kind in pieces:
        model.pieces.add(piece=piece, score=score, type=kind)
    model.trainer_spec.vocab_size = len(pieces)
    model.trainer_spec.user_defined_symbols.extend(_PIECES)
    return bytes(model.SerializeToString())


@functools.cache
def ids() -> Mapping[str, int]:
    """The ids of the tokens of turns and pictures."""
    n = len(model_proto(_pieces()).pieces)
    return {**{text: n - len(_PIECES) + i for i, text in enumerate(_PIECES)}, SOFT: n}


@functools.cache
def _tokenizer_json() -> str:
    """The same tokenizer as transformers' conversion writes it."""
    from transformers.models.gemma import GemmaTokenizerFast

    with tempfile.TemporaryDirectory() as folder:
        _write_tokenizer(Path(folder), "model")
        GemmaTokenizerFast.from_pretrained(folder).save_pretrained(folder)
        return (Path(folder) / "tokenizer.json").read_text(encoding="utf-8")


def _write_tokenizer(folder: Path, kind: str) -> None:
    if kind in ("model", "both"):
        (folder / "tokenizer.model").write_bytes(_pieces())
    if kind in ("json", "both"):
        (folder / "tokenizer.json").write_text(_tokenizer_json(), encoding="utf-8")
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {i: (text, True) for i, text in enumerate(SPECIALS)}
    typed = {*_TABS, "[multimodal]"}
    added |= {i: (text, text not in typed) for text, i in ids().items()}
    named = {"boi_token": BEGIN, "eoi_token": END, "image_token": SOFT}
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "added_tokens_decoder": {
                str(i): {"content": text, **plain, "special": special}
                for i, (text, special) in added.items()
            },
            **named,
            "bos_token": "<bos>",
            "clean_up_tokenization_spaces": False,
            "eos_token": "<eos>",
            "extra_special_tokens": named,
            "model_max_length": 1000000000000000019884624838656,
            "pad_token": "<pad>",
            "processor_class": "Gemma3Processor",
            "sp_model_kwargs": None,
            "spaces_between_special_tokens": False,
            "tokenizer_class": "GemmaTokenizer",
            "unk_token": "<unk>",
            "use_default_system_prompt": False,
        },
    )
    write_json(folder / "added_tokens.json", {SOFT: ids()[SOFT]})


def _tensors(tiny: Tiny) -> Tensors:
    """Random weights by source name, scaled so that logits have a deviation of about 5."""
    rng = np.random.default_rng(tiny.seed)
    vision, projector, decoder = LAYOUTS[tiny.layout]

    def normal(*shape: int, std: float) -> NDArray[np.float32]:
        return (rng.standard_normal(shape, np.float32) * np.float32(std)).astype(np.float32)

    out = {vision + name: values for name, values in vision_tensors(tiny, normal).items()}
    # Image embeddings as large as token embeddings are after Gemma's sqrt(width).
    std = 0.3 * tiny.width**0.5 * tiny.vision_width**-0.5
    weight = normal(tiny.vision_width, tiny.width, std=std)
    out[f"{projector}mm_input_projection_weight"] = weight
    out[f"{projector}mm_soft_emb_norm.weight"] = normal(tiny.vision_width, std=0.2)
    d, m, h = tiny.width, tiny.mlp, tiny.head_dim
    out[f"{decoder}embed_tokens.weight"] = normal(tiny.n_vocab, d, std=0.3)
    for i in range(tiny.layers):
        layer = f"{decoder}layers.{i}."
        for name, rows, columns, gain in (
            ("self_attn.q_proj", tiny.heads * h, d, 1.0),
            ("self_attn.k_proj", tiny.kv_heads * h, d, 1.0),
            ("self_attn.v_proj", tiny.kv_heads * h, d, 3.0),
            ("self_attn.o_proj", d, tiny.heads * h, 6.0),
            ("mlp.gate_proj", m, d, 1.5),
            ("mlp.up_proj", m, d, 1.5),
            ("mlp.down_proj", d, m, 3.0),
        ):
            out[f"{layer}{name}.weight"] = normal(rows, columns, std=gain * columns**-0.5)
        for name, width, more in (
            ("input_layernorm", d, 0.0),
            # Without a gain the normed branches would vanish beside the token's own row.
            ("post_attention_layernorm", d, 4.0),
            ("pre_feedforward_layernorm", d, 0.0),
            ("post_feedforward_layernorm", d, 2.0),
            # Scores that tell positions apart.
            ("self_attn.q_norm", h, 0.5),
            ("self_attn.k_norm", h, 0.5),
        ):
            out[f"{layer}{name}.weight"] = normal(width, std=0.2) + np.float32(more)
    # Random signs (the norm scales by 1 + weight): the output table is the input table, and with a
    # positive scale every answer would repeat its last token.
    out[f"{decoder}norm.weight"] = normal(d, std=0.2) - 2 * (normal(d, std=1.0) > 0)
    return out
