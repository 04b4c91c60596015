"""Published files that lie beside the checkout on some machines."""

from pathlib import Path

import pytest

_TOKENIZERS = Path(__file__).parents[2] / "shared/data/tokenizers"
GPT2 = _TOKENIZERS / "gpt2"
LLAMA = _TOKENIZERS / "llama.model"
needed = pytest.mark.skipif(
    not (GPT2.is_dir() and LLAMA.is_file()),
    reason="facts of published tokenizers need GPT-2's and LLaMA's files in ../shared/data",
)
