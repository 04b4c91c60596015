"""Which models can be made: a name, and the config of the published checkpoint.

To add one, add its config here; its family says the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgevlm.benchmarks.published import PALIGEMMA

# Begins the name of every synthetic model, in its manifest and so in every report.
PREFIX = "synthetic-"

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "paligemma-3b-224": PALIGEMMA,
    "paligemma2-3b-224": PALIGEMMA
    | {
        "text_config": {
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "model_type": "gemma2",
            "num_attention_heads": 8,
            "num_hidden_layers": 26,
            "num_key_value_heads": 4,
            "vocab_size": 257216,
        },
        "projection_dim": 2304,
    },
}
