"""What a tokenizer's side files say beyond its vocabulary: whole tokens, roles, the begin token.

Knows tokenizer_config.json, added_tokens.json and the last part of tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from edgevlm.export.byte_pairs import is_byte_level
from edgevlm.export.source import Checkpoint, read_json
from edgevlm.family import AddedToken, Config, Tokenizer

CONFIG = "tokenizer_config.json"
# What the tokens of a role are called where tokenizer_config.json does not say.
ROLES = {
    "bos": ("<bos>", "<s>", "<|begin_of_text|>", "<|endoftext|>"),
    "eos": ("<eos>", "</s>", "<|end_of_text|>", "<|endoftext|>"),
    "unk": ("<unk>",),
    "pad": ("<pad>",),
}


@dataclass(frozen=True)
class Entry:
    """A token that a side file names. `eats` says that it swallows the space behind it."""

    id: int
    text: str
    special: bool
    eats: bool


def entries(checkpoint: Checkpoint) -> Iterator[Entry]:
    """All tokens that the side files name; one may come more than once."""
    folder = checkpoint.folder
    if (folder / "tokenizer.json").is_file():
        for entry in read_json(folder / "tokenizer.json").get("added_tokens", []):
            yield _entry(entry["id"], entry)
    for i, entry in _config(checkpoint).get("added_tokens_decoder", {}).items():
        yield _entry(int(i), entry)
    if (folder / "added_tokens.json").is_file():
        for text, i in read_json(folder / "added_tokens.json").items():
            yield Entry(i, text, False, False)


def _entry(i: int, entry: Config) -> Entry:
    return Entry(i, entry["content"], entry.get("special", False), entry.get("rstrip", False))


def role_texts(checkpoint: Checkpoint, role: str) -> tuple[str, ...]:
    """What the token of a role may be called: as stated, or else as usual."""
    stated = _content(_config(checkpoint).get(f"{role}_token"))
    return (stated,) if stated else ROLES[role]


def special_texts(checkpoint: Checkpoint) -> set[str]:
    """Texts that transformers treats as special whatever the vocabulary says."""
    more = _config(checkpoint).get("additional_special_tokens") or ()
    texts = {text for role in ROLES for text in role_texts(checkpoint, role)}
    return texts | {text for text in map(_content, more) if text}


def describe(checkpoint: Checkpoint) -> Tokenizer:
    """What a family may know of the tokenizer."""
    folder, special = checkpoint.folder, special_texts(checkpoint)
    added: dict[str, AddedToken] = {}
    for e in entries(checkpoint):
        eats = e.eats or (e.text in added and added[e.text].eats)
        added[e.text] = AddedToken(e.id, eats, e.text in special)
    in_bytes = is_byte_level(folder)
    if not in_bytes:
        begins = bool(_config(checkpoint).get("add_bos_token", True))
    else:
        path = folder / "tokenizer.json"
        begins = path.is_file() and _begins(read_json(path).get("post_processor"))
    return Tokenizer(in_bytes, (folder / "tokenizer.model").is_file(), begins, added)


def _begins(processor: Any) -> bool:
    """Whether a post-processor of tokenizer.json puts a token before a text."""
    steps = (processor or {}).get("processors", [processor or {}])
    templates = [step["single"] for step in steps if step.get("type") == "TemplateProcessing"]
    return any("SpecialToken" in template[0] for template in templates)


def _config(checkpoint: Checkpoint) -> Config:
    return checkpoint.configs.get(CONFIG, {})


def _content(token: Any) -> str | None:
    """The text of a token that is stated plainly or as an object."""
    return token.get("content") if isinstance(token, dict) else token
