"""What transformers itself makes of a checkpoint's files: its picture processor, its tokenizer.

Shares nothing with the exporter's reading of the same files, which is compared with it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers

from edgevlm.export.vision import quiet

# transformers leaves its classes without types.
_hf: Any = transformers


def has_processor(folder: Path) -> bool:
    """Whether a folder says how pictures are read."""
    nested = _json(folder / "processor_config.json").get("image_processor")
    return (folder / "preprocessor_config.json").is_file() or bool(nested)


def picture_processor(folder: Path, kind: str = "AutoImageProcessor") -> Any:
    """The folder's picture processor of a class, by default the one that its file names.

    The slow one, whose pixels a bundle promises: torchvision's differ by a level of 255.
    """
    more = {"use_fast": False} if kind.startswith("Auto") else {}
    return getattr(_hf, kind).from_pretrained(folder, **more)


def tokenizer(folder: Path, kind: str = "AutoTokenizer", **options: Any) -> Any:
    """The folder's tokenizer, also where transformers 5 saved it.

    That writes a list where 4 expects names (`extra_special_tokens`), and a class of its own for
    what 4 calls PreTrainedTokenizerFast.
    """
    config = _json(folder / "tokenizer_config.json")
    if isinstance(extra := config.get("extra_special_tokens"), list):
        options |= {"extra_special_tokens": {}, "additional_special_tokens": extra}
    if kind.startswith("Auto") and config.get("tokenizer_class") == "TokenizersBackend":
        kind = "PreTrainedTokenizerFast"
    return getattr(_hf, kind).from_pretrained(folder, **options)


def token_ids(tokenizer: Any, texts: list[str], plain: bool) -> list[list[int]]:
    """See references.Source."""
    how = {"add_special_tokens": False, "split_special_tokens": plain}
    with quiet():
        return [tokenizer(text, **how)["input_ids"] for text in texts]


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return found
