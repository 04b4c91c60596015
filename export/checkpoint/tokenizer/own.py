"""A checkpoint's own tokenizer.json in its bundle, for a model whose way to cut texts llama.cpp may
not have.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

from edgevlm.bundle import DECODER_TOKENIZER
from edgevlm.errors import SourceError
from edgevlm.export.checkpoint.source import FAST, Checkpoint
from edgevlm.export.checkpoint.tokenizer.side_files import control_texts
from edgevlm.export.checkpoint.tokenizer.texts import around


def write_own(checkpoint: Checkpoint, folder: Path) -> Path:
    """Writes the tokenizer into a bundle's folder, all tokens of control marked as such, so that no
    text becomes one; raises SourceError for one that puts tokens around every text.
    """
    from tokenizers import Tokenizer

    path = checkpoint.folder / FAST
    data = copy.deepcopy(dict(checkpoint.configs[FAST]))
    control = control_texts(checkpoint)
    for token in data.get("added_tokens", ()):
        token["special"] = token["special"] or token["content"] in control
    text = json.dumps(data, ensure_ascii=False)
    try:
        begin, end = around(Tokenizer.from_str(text))
    except Exception as e:  # the package raises Exception itself
        raise SourceError(f"{path}: is not a tokenizer ({e}); download it again") from None
    if begin or end:
        raise SourceError(f"{path}: puts the tokens {[*begin, *end]} around texts; name another")
    target = folder / DECODER_TOKENIZER
    target.write_text(text, encoding="utf-8")
    return target
