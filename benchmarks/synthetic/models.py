"""Which models can be made: a name, and what a family is told of the published checkpoint.

To add one, add its entry here; its family says the rest. A part of a new kind needs its graph in
towers.py or connectors.py, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgevlm.benchmarks.published import CLIP, MOBILEPALO, PALIGEMMA, TINY_LLAVA
from edgevlm.family import TOWER, Source

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


_MOBILELLAMA_3B = {
    "hidden_size": 2560, "intermediate_size": 6912, "num_attention_heads": 32,
    "num_hidden_layers": 32,
}  # fmt: skip
_VICUNA_7B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
    "num_hidden_layers": 32, "max_position_embeddings": 4096,
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
    "llava-1.5-7b": _llava("llava_llama", "mlp2x_gelu", **_VICUNA_7B),
}
