"""A checkpoint's picture processor and tokenizer, as transformers itself reads the files.

Shares nothing with the exporter's reading of the same files, which is compared with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

from edgevlm.errors import ExportError
from edgevlm.export.parity.quiet import quiet

# transformers leaves its classes without types.
_hf: Any = transformers


def has_processor(folder: Path) -> bool:
    """True if a folder states its picture processor."""
    nested = _json(folder / "processor_config.json").get("image_processor")
    return (folder / "preprocessor_config.json").is_file() or bool(nested)


def processor_settings(folder: Path) -> dict[str, Any]:
    """Settings in a folder's processor_config.json, none where it is not there."""
    return _json(folder / "processor_config.json")


def picture_settings(folder: Path) -> dict[str, Any]:
    """Settings of a folder's picture processor, in whichever file."""
    stated: dict[str, Any] = processor_settings(folder).get("image_processor") or {}
    return _json(folder / "preprocessor_config.json") or stated


def chat_template(folder: Path) -> str | None:
    """The chat template of a folder's processor, None where it states none."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    stated = _json(folder / "chat_template.json") or processor_settings(folder)
    return stated.get("chat_template")


def picture_processor(folder: Path, kind: str = "AutoImageProcessor") -> Any:
    """The folder's picture processor of a class, by default the one that its file names.

    The slow one, whose pixels a bundle promises: torchvision's differ by a level of 255.
    """
    more = {"use_fast": False} if kind.startswith("Auto") else {}
    return getattr(_hf, kind).from_pretrained(folder, **more)


def tokenizer(folder: Path, kind: str = "AutoTokenizer", **options: Any) -> Any:
    """The folder's tokenizer, also where transformers 5 saved it.

    That writes a list where 4 expects names (`extra_special_tokens`), those elsewhere, and a class
    of its own for what 4 calls PreTrainedTokenizerFast.
    """
    config = _json(folder / "tokenizer_config.json")
    if isinstance(extra := config.get("extra_special_tokens"), list):
        named = config.get("model_specific_special_tokens", {})
        options |= {"extra_special_tokens": named, "additional_special_tokens": extra}
    if kind.startswith("Auto") and config.get("tokenizer_class") == "TokenizersBackend":
        kind = "PreTrainedTokenizerFast"
    return getattr(_hf, kind).from_pretrained(folder, **options)


def model(kind: str, folder: Path, config: Any, **more: Any) -> Any:
    """The folder's model of a class, in float32 with eager attention.

    Raises ExportError where the class has other tensors than the folder.
    """
    stated = _json(folder / "config.json")
    if not str(stated.get("transformers_version", "4.")).startswith(("2.", "3.", "4.")):
        _set_tables(config, folder, stated)
    made, info = getattr(_hf, kind).from_pretrained(
        folder,
        config=config,
        attn_implementation="eager",
        dtype=torch.float32,
        output_loading_info=True,
        **more,
    )
    odd = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if odd:
        raise ExportError(
            f"{folder}: transformers reads another set of tensors ({odd[0]}); export without "
            "verification and report the checkpoint"
        )
    return made.eval()


def _set_tables(config: Any, folder: Path, stated: dict[str, Any]) -> None:
    """Ties the tables of a decoder where transformers 5 does: where its `stated` config says so and
    the folder has one alone. 4 reads that of the whole model as a decoder's.
    """
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            names.update(opened.keys())
    text, key = config.get_text_config(decoder=True), "tie_word_embeddings"
    tied = text.tie_word_embeddings or config.tie_word_embeddings or stated.get(key, False)
    tied = tied and not any(name.endswith("lm_head.weight") for name in names)
    text.tie_word_embeddings = config.tie_word_embeddings = tied


def set_rotary(text: Any) -> None:
    """Puts the rotary positions of a decoder's config where transformers 4 looks for them; 5 writes
    them elsewhere.
    """
    rope = getattr(text, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    text.rope_theta = rope.get("rope_theta", text.rope_theta)
    if rope.get("rope_type", "default") != "default" or "mrope_section" in rope:
        text.rope_scaling = rope


def token_ids(tokenizer: Any, texts: list[str], plain: bool) -> list[list[int]]:
    """See references.SourceModel."""
    how = {"add_special_tokens": False}
    if tokenizer.is_fast:
        how["split_special_tokens"] = plain
    with quiet(), _plain(tokenizer) if plain and not tokenizer.is_fast else nullcontext():
        if not (tokenizer.is_fast and texts):
            return [tokenizer(text, **how)["input_ids"] for text in texts]
        ids: list[list[int]] = tokenizer(texts, **how)["input_ids"]  # in half the time
        return ids


@contextmanager
def _plain(tokenizer: Any) -> Iterator[None]:
    """A slow tokenizer that takes only tokens which are not special out of a text.

    Its own `split_special_tokens` takes out none at all.
    """
    found = tokenizer.tokens_trie, tokenizer._added_tokens_encoder
    special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    kept = {text: i for text, i in found[1].items() if text not in special}
    tokenizer.tokens_trie, tokenizer._added_tokens_encoder = type(found[0])(list(kept)), kept
    try:
        yield
    finally:
        tokenizer.tokens_trie, tokenizer._added_tokens_encoder = found


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return found
