"""Models that can be made: a name, and what a family is told of the published checkpoint.

To add one, add its entry here; its family says the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgevlm.benchmarks.synthetic.configs.deepseek_vl import (
    DEEPSEEK_VL,
    DEEPSEEK_VL_PICTURES,
    DEEPSEEK_VL_TOKENS,
)
from edgevlm.benchmarks.synthetic.configs.fastvlm import FASTVLM, FASTVLM_TOKENS, FASTVLM_TOWER
from edgevlm.benchmarks.synthetic.configs.gemma3 import (
    GEMMA3,
    GEMMA3_CHAT,
    GEMMA3_PICTURES,
    GEMMA3_TOKENS,
)
from edgevlm.benchmarks.synthetic.configs.internvl import (
    INTERNLM2_TOKENS,
    INTERNVL,
    INTERNVL_TOKENS,
)
from edgevlm.benchmarks.synthetic.configs.llava import CLIP, LLAVA_NEXT, MOBILEPALO, TINY_LLAVA
from edgevlm.benchmarks.synthetic.configs.llava_onevision import (
    LLAVA_ONEVISION,
    LLAVA_ONEVISION_OWN,
    LLAVA_ONEVISION_PICTURES,
    LLAVA_ONEVISION_TOKENS,
)
from edgevlm.benchmarks.synthetic.configs.moondream2 import MOONDREAM2, MOONDREAM2_TOKENS
from edgevlm.benchmarks.synthetic.configs.paligemma import PALIGEMMA
from edgevlm.benchmarks.synthetic.configs.phi3_v import PHI3_V, PHI3_V_PICTURES, PHI3_V_TOKENS
from edgevlm.benchmarks.synthetic.configs.qwen2_vl import (
    QWEN2_5_VL,
    QWEN2_VL,
    QWEN2_VL_PICTURES,
    QWEN2_VL_TOKENS,
)
from edgevlm.benchmarks.synthetic.configs.smolvlm import SMOLVLM, SMOLVLM_PICTURES, SMOLVLM_TOKENS
from edgevlm.family import TOWER, AddedToken, Source, Tokenizer
from edgevlm.processors import PREPROCESSOR

# Begins the name of every synthetic model, in its manifest and so in every report.
PREFIX = "synthetic-"


def _paligemma(size: int, **text: Any) -> Source:
    """PaliGemma at a picture size; `text` is its decoder's config where it is not version 1's."""
    config: dict[str, Any] = PALIGEMMA | {
        "vision_config": PALIGEMMA["vision_config"] | {"image_size": size}
    }
    if text:
        config |= {
            "text_config": {"model_type": "gemma2", "vocab_size": 257216, **text},
            "projection_dim": text["hidden_size"],
        }
    return Source({"config.json": config})


_GEMMA2_2B = {
    "hidden_size": 2304, "intermediate_size": 9216, "num_attention_heads": 8,
    "num_hidden_layers": 26, "num_key_value_heads": 4,
}  # fmt: skip
_GEMMA2_9B = {
    "hidden_size": 3584, "intermediate_size": 14336, "num_attention_heads": 16,
    "num_hidden_layers": 42, "num_key_value_heads": 8,
}  # fmt: skip


def _llava(model_type: str, projector: str, **text: Any) -> Source:
    """LLaVA's own layout with OpenAI's large CLIP; `text` is what differs from MobileLLaMA-1.4B."""
    config = MOBILEPALO | {"model_type": model_type, "mm_projector_type": projector} | text
    return Source({"config.json": config, f"{TOWER}config.json": CLIP})


def _next(model_type: str, **text: Any) -> Source:
    """LLaVA-NeXT in LLaVA's own layout, as `_llava`."""
    pinpoints = LLAVA_NEXT["image_grid_pinpoints"]
    tiles = {
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": pinpoints,
        "mm_patch_merge_type": "spatial_unpad",
    }
    return _llava(model_type, "mlp2x_gelu", **tiles, **text)


_MOBILELLAMA_3B = {
    "hidden_size": 2560, "intermediate_size": 6912, "num_attention_heads": 32,
    "num_hidden_layers": 32,
}  # fmt: skip
_VICUNA_7B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
    "num_hidden_layers": 32, "max_position_embeddings": 4096,
}  # fmt: skip
# Phi-2's config.json, and those tensors of the other files whose shapes say how large the rest is:
# EVA ViT-g, BLIP-2's Q-Former, what stage 4 trained.
_PHI2 = {
    "hidden_act": "gelu_new",
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "model_type": "phi",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "partial_rotary_factor": 0.4,
    "vocab_size": 51200,
}
_QFORMER = "blip2/Qformer.bert.encoder.layer."
_STAGE = "stage/llama_model.base_model.model.model.layers.0."
_TINYGPTV = {
    "eva/patch_embed.proj.weight": (1408, 3, 14, 14),
    "eva/pos_embed": (1, 257, 1408),
    "eva/blocks.0.mlp.fc1.weight": (6144, 1408),
    "eva/blocks.38.mlp.fc1.weight": (6144, 1408),
    "blip2/query_tokens": (1, 32, 768),
    f"{_QFORMER}0.crossattention.self.key.weight": (768, 1408),
    f"{_QFORMER}0.intermediate_query.dense.weight": (3072, 768),
    f"{_QFORMER}11.intermediate_query.dense.weight": (3072, 768),
    "stage/llama_proj.weight": (4096, 768),
    f"{_STAGE}self_attn.q_layernorm.weight": (80,),
    f"{_STAGE}self_attn.k_layernorm.weight": (80,),
    f"{_STAGE}post_layernorm.weight": (2560,),
}
_TINYGPTV_STAGE_4 = Source(
    {"config.json": _PHI2},
    _TINYGPTV,
    settings={"stage": "4"},
    origins={"eva": "eva_vit_g.pth", "blip2": "blip2.pth", "stage": "stage4.pth"},
)


def _deepseek_vl() -> Source:
    """DeepSeek-VL 1.3B, with those tensors of its tower whose shapes say how large it is."""
    tower = "vision_model.vision_tower."
    shapes = {
        f"{tower}patch_embed.proj.weight": (1024, 3, 16, 16),
        f"{tower}blocks.0.mlp.fc1.weight": (4096, 1024),
        f"{tower}blocks.23.mlp.fc1.weight": (4096, 1024),
    }
    added = {text: AddedToken(i, special=True) for text, i in DEEPSEEK_VL_TOKENS.items()}
    return Source(
        {"config.json": DEEPSEEK_VL, PREPROCESSOR: DEEPSEEK_VL_PICTURES},
        shapes,
        tokenizer=Tokenizer(bytes=True, added=added),
    )


def _gemma3(**text: Any) -> Source:
    """Gemma 3; `text` is what differs from the decoder of the 4B."""
    config = GEMMA3 | {"text_config": GEMMA3["text_config"] | text}
    added = {text: AddedToken(i, special=True) for text, i in GEMMA3_TOKENS.items()}
    files = {
        "config.json": config,
        PREPROCESSOR: GEMMA3_PICTURES,
        "chat_template.json": GEMMA3_CHAT,
    }
    return Source(files, tokenizer=Tokenizer(added=added))


_GEMMA3_12B = {
    "hidden_size": 3840, "intermediate_size": 15360, "num_attention_heads": 16,
    "num_hidden_layers": 48, "num_key_value_heads": 8,
}  # fmt: skip


def _moondream2() -> Source:
    added = {text: AddedToken(i, special=True) for text, i in MOONDREAM2_TOKENS.items()}
    return Source({"config.json": MOONDREAM2}, tokenizer=Tokenizer(bytes=True, added=added))


def _smolvlm(**text: Any) -> Source:
    """SmolVLM; `text` is what differs from the decoder of 256M."""
    config = SMOLVLM | {"text_config": SMOLVLM["text_config"] | text}
    added = {text: AddedToken(i, special=True) for text, i in SMOLVLM_TOKENS.items()}
    return Source(
        {"config.json": config, PREPROCESSOR: SMOLVLM_PICTURES},
        tokenizer=Tokenizer(bytes=True, add_bos=False, added=added),
    )


def _internvl(**llm: Any) -> Source:
    """InternVL in the original layout; `llm` is what differs from the decoder of 3-1B."""
    config = INTERNVL | {"llm_config": INTERNVL["llm_config"] | llm}
    own = llm.get("model_type") == "internlm2"
    tokens = INTERNLM2_TOKENS if own else INTERNVL_TOKENS
    added = {text: AddedToken(i, special=True) for text, i in tokens.items()}
    return Source(
        {"config.json": config}, tokenizer=Tokenizer(bytes=not own, add_bos=own, added=added)
    )


_QWEN2_5_1_5B = {
    "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12,
    "num_hidden_layers": 28, "num_key_value_heads": 2,
}  # fmt: skip
_QWEN2_5_3B = {
    "hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16,
    "num_hidden_layers": 36, "num_key_value_heads": 2,
}  # fmt: skip
_INTERNLM2_1_8B = {
    "architectures": ["InternLM2ForCausalLM"], "bias": False, "hidden_size": 2048,
    "intermediate_size": 8192, "model_type": "internlm2", "num_attention_heads": 16,
    "num_hidden_layers": 24, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "vocab_size": 92553,
}  # fmt: skip


def _onevision() -> Source:
    """LLaVA-OneVision-0.5B in transformers' layout."""
    added = {text: AddedToken(i, special=True) for text, i in LLAVA_ONEVISION_TOKENS.items()}
    return Source(
        {"config.json": LLAVA_ONEVISION, PREPROCESSOR: LLAVA_ONEVISION_PICTURES},
        tokenizer=Tokenizer(bytes=True, add_bos=False, added=added),
    )


def _onevision_own(**text: Any) -> Source:
    """LLaVA-OneVision in LLaVA-NeXT's own layout; `text` is its decoder."""
    config = LLAVA_ONEVISION_OWN | text
    tower = LLAVA_ONEVISION["vision_config"] | {"num_hidden_layers": 27}
    files = {"config.json": config, f"{TOWER}config.json": tower}
    return Source(files, tokenizer=_onevision().tokenizer)


_QWEN2_7B = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
    "num_hidden_layers": 28, "num_key_value_heads": 4, "max_window_layers": 28,
    "tie_word_embeddings": False, "vocab_size": 152064,
}  # fmt: skip


def _fastvlm(**text: Any) -> Source:
    """FastVLM in Apple's layout; `text` is what differs from the decoder of 0.5B."""
    added = {text: AddedToken(i, special=True) for text, i in FASTVLM_TOKENS.items()}
    return Source(
        {"config.json": FASTVLM | text},
        FASTVLM_TOWER,
        tokenizer=Tokenizer(bytes=True, add_bos=False, added=added),
    )


def _qwen2_vl(**config: Any) -> Source:
    """Qwen2-VL; `config` is what differs from 2B, whose rows the vision tower is told of, too."""
    vision = {**QWEN2_VL["vision_config"], **config.get("vision_config", {})}
    key = "out_hidden_size" if "out_hidden_size" in vision else "hidden_size"
    vision[key] = config.get("hidden_size", QWEN2_VL["hidden_size"])
    added = {text: AddedToken(i, special=True) for text, i in QWEN2_VL_TOKENS.items()}
    return Source(
        {
            "config.json": QWEN2_VL | config | {"vision_config": vision},
            PREPROCESSOR: QWEN2_VL_PICTURES,
        },
        tokenizer=Tokenizer(bytes=True, add_bos=False, added=added),
    )


def _phi3_v(num_crops: int) -> Source:
    """Phi-3-Vision with so many tiles of a picture."""
    added = {
        text: AddedToken(i, special=True, rstrip=text not in ("<|endoftext|>", "<|image|>"))
        for text, i in PHI3_V_TOKENS.items()
    }
    files = {"config.json": PHI3_V, PREPROCESSOR: PHI3_V_PICTURES | {"num_crops": num_crops}}
    return Source(files, tokenizer=Tokenizer(added=added, prepends="every", slow=False))


_SMOLLM2_360M = {
    "hidden_size": 960, "intermediate_size": 2560, "num_attention_heads": 15,
    "num_hidden_layers": 32, "num_key_value_heads": 5,
}  # fmt: skip

MODELS: Mapping[str, Source] = {
    "paligemma-3b-224": _paligemma(224),
    "paligemma-3b-448": _paligemma(448),
    "paligemma-3b-896": _paligemma(896),
    "paligemma2-3b-224": _paligemma(224, **_GEMMA2_2B),
    "paligemma2-3b-448": _paligemma(448, **_GEMMA2_2B),
    "paligemma2-10b-224": _paligemma(224, **_GEMMA2_9B),
    "mobilepalo-1.7b": _llava("palo", "ldpnet"),
    "mobilevlm-v2-1.7b": _llava("mobilevlm", "ldpnetv2"),
    "mobilevlm-v2-3b": _llava("mobilevlm", "ldpnetv2", **_MOBILELLAMA_3B),
    "tiny-llava-v1": Source({"config.json": TINY_LLAVA}),
    "tinygptv-stage4": _TINYGPTV_STAGE_4,
    "deepseek-vl-1.3b": _deepseek_vl(),
    "fastvlm-0.5b": _fastvlm(),
    "fastvlm-1.5b": _fastvlm(**_QWEN2_5_1_5B),
    "fastvlm-7b": _fastvlm(**_QWEN2_7B),
    "gemma-3-4b": _gemma3(),
    "gemma-3-12b": _gemma3(**_GEMMA3_12B),
    "internvl2.5-2b": _internvl(**_INTERNLM2_1_8B),
    "internvl2.5-4b": _internvl(**_QWEN2_5_3B),
    "internvl3-1b": _internvl(),
    "internvl3-2b": _internvl(**_QWEN2_5_1_5B),
    "moondream2": _moondream2(),
    "phi-3-vision": _phi3_v(16),
    "phi-3.5-vision": _phi3_v(4),
    "qwen2-vl-2b": _qwen2_vl(),
    "qwen2-vl-7b": _qwen2_vl(**_QWEN2_7B),
    "qwen2.5-vl-3b": _qwen2_vl(**QWEN2_5_VL),
    "qwen2.5-vl-7b": _qwen2_vl(**QWEN2_5_VL | _QWEN2_7B),
    "smolvlm-256m": _smolvlm(),
    "smolvlm-500m": _smolvlm(**_SMOLLM2_360M),
    "llava-next-mistral-7b": Source({"config.json": LLAVA_NEXT}),
    "llava-next-vicuna-7b": _next("llava_llama", **_VICUNA_7B),
    "llava-onevision-0.5b": _onevision(),
    "llava-onevision-7b": _onevision_own(**_QWEN2_7B),
    "llava-1.5-7b": _llava("llava_llama", "mlp2x_gelu", **_VICUNA_7B),
}
