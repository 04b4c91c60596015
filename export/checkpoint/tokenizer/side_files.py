"""A tokenizer's side files: whole tokens, roles, the begin token.

Knows tokenizer_config.json, added_tokens.json and the last part of tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from edgevlm.export.checkpoint.source import FAST, Checkpoint, read_json
from edgevlm.export.checkpoint.tokenizer.byte_pairs import is_byte_level, normalization
from edgevlm.family import AddedToken, Config, Tokenizer

CONFIG = "tokenizer_config.json"
# The class of transformers 5 that does what tokenizer.json says and nothing else.
GENERIC = "TokenizersBackend"
# The class that adds a begin token as its config says, whatever tokenizer.json does.
LLAMA = "LlamaTokenizer"
# What the tokens of a role are called where tokenizer_config.json does not say.
ROLES = {
    "bos": ("<bos>", "<s>", "<|begin_of_text|>", "<|endoftext|>"),
    "eos": ("<eos>", "</s>", "<|end_of_text|>", "<|endoftext|>"),
    "unk": ("<unk>",),
    "pad": ("<pad>",),
}


# Attributes by which a token's surroundings decide whether it is one, or what it swallows.
ATTRIBUTES = ("single_word", "lstrip", "rstrip", "normalized")


@dataclass(frozen=True)
class Entry:
    """A token that side files name, with the `attributes` that any of them gives it."""

    id: int
    text: str
    special: bool
    attributes: frozenset[str] = frozenset()


def entries(checkpoint: Checkpoint) -> Mapping[int, Entry]:
    """All tokens that the side files name, by id."""
    found: dict[int, Entry] = {}
    for e in _entries(checkpoint):
        before = found.get(e.id, e)
        attributes = e.attributes | before.attributes
        found[e.id] = Entry(e.id, e.text, e.special or before.special, attributes)
    path = checkpoint.folder / "added_tokens.json"
    # It says no attributes: these are transformers' own where no other file has the token.
    for text, i in read_json(path).items() if path.is_file() else ():
        found.setdefault(i, Entry(i, text, False, frozenset({"normalized"})))
    return found


def _entries(checkpoint: Checkpoint) -> Iterator[Entry]:
    for entry in checkpoint.configs.get(FAST, {}).get("added_tokens", []):
        yield _entry(entry["id"], entry)
    for i, entry in _config(checkpoint).get("added_tokens_decoder", {}).items():
        yield _entry(int(i), entry)


def _entry(i: int, entry: Config) -> Entry:
    attributes = frozenset(name for name in ATTRIBUTES if entry.get(name))
    return Entry(i, entry["content"], entry.get("special", False), attributes)


def role_texts(checkpoint: Checkpoint, role: str) -> tuple[str, ...]:
    """Names that the token of a role may have: as stated, or else the usual ones."""
    stated = _content(_config(checkpoint).get(f"{role}_token"))
    return (stated,) if stated else ROLES[role]


def special_texts(checkpoint: Checkpoint) -> set[str]:
    """Texts that transformers treats as special whatever the vocabulary says."""
    config = _config(checkpoint)
    # transformers 5 calls a list or names of them so.
    more = [*(config.get("additional_special_tokens") or ())]
    for key in ("extra_special_tokens", "model_specific_special_tokens"):
        extra = config.get(key) or ()
        more += extra.values() if isinstance(extra, dict) else extra
    texts = {text for role in ROLES for text in role_texts(checkpoint, role)}
    return texts | {text for text in map(_content, more) if text}


def control_texts(checkpoint: Checkpoint) -> set[str]:
    """Texts of tokens that are special to transformers, which no user's text becomes here."""
    special = {e.text for e in entries(checkpoint).values() if e.special}
    return special | special_texts(checkpoint)


def describe(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer as families see it."""
    special, fast = special_texts(checkpoint), checkpoint.configs.get(FAST, {})
    added: dict[str, AddedToken] = {}
    for e in entries(checkpoint).values():
        odd = ", ".join(sorted(e.attributes & {"single_word", "lstrip"}))
        added[e.text] = AddedToken(e.id, "rstrip" in e.attributes, e.text in special, odd)
    in_bytes = is_byte_level(checkpoint)
    add_bos = _config(checkpoint).get("add_bos_token")
    kind = str(_config(checkpoint).get("tokenizer_class") or "")
    told = kind.removesuffix("Fast") == LLAMA
    if (in_bytes and not told) or (add_bos is None and kind == GENERIC):
        add_bos = _adds_bos(fast.get("post_processor"))
    slow = (checkpoint.folder / "tokenizer.model").is_file()
    form = normalization(checkpoint, kind) if in_bytes else ""
    return Tokenizer(in_bytes, slow, add_bos in (None, True), added, _prepends(fast), form)


def _prepends(fast: Config) -> Literal["every", "first"] | None:
    """Texts that a tokenizer.json puts a space before; None if neither every one nor the first."""
    normalizer, cut = fast.get("normalizer") or {}, fast.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    if any(step.get("type") == "Prepend" for step in steps):
        return "every"
    return "first" if cut.get("prepend_scheme") == "first" else None


def _adds_bos(processor: Any) -> bool:
    """True if a post-processor of tokenizer.json puts a token before a text."""
    steps = (processor or {}).get("processors", [processor or {}])
    templates = [step["single"] for step in steps if step.get("type") == "TemplateProcessing"]
    return any("SpecialToken" in template[0] for template in templates)


def _config(checkpoint: Checkpoint) -> Config:
    return checkpoint.configs.get(CONFIG, {})


def _content(token: Any) -> str | None:
    """The text of a token that is stated plainly or as an object."""
    return token.get("content") if isinstance(token, dict) else token
