"""A chat template as its original writes it, in one text -> the items of a prompt spec.

Every item of a prompt is tokenized by itself, without anything put before it. So a text is cut
where its tokens that stand for a whole text are, and gets the spaces that the original's tokenizer
adds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from edgevlm.family import Config, Tokenizer

IMAGE = "<image>"
# The caller's system message.
SYSTEM = "{system}"
# What stands for the begin and end tokens in a template: their texts are the checkpoint's to say.
BOS, EOS = "{bos}", "{eos}"
_TOKEN = re.compile(r"<\|\w+\|>")
_ID = re.compile(r"\{id:(\d+)\}")

# Where a tokenizer puts a space: nowhere, before every text between two of its tokens, at the start
# of all it is given, or there unless a token comes first.
Spaces = Literal["none", "every", "start", "first"]


@dataclass(frozen=True)
class Template:
    """A conversation as its original writes it.

    `before` stands before the picture (or the words, where there is none), `after` between the
    words and the answer, `again` between an answer and the words that follow it. `answered` is
    `after` before an answer that is given, where it is another there. `system` is `before` with
    SYSTEM where the words of a system message stand, empty where the original writes none.
    """

    before: str
    after: str
    again: str
    answered: str = ""
    system: str = ""


_SYSTEM = (
    "A chat between a curious {0} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {0}'s questions. "
)
SEEING = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)
_SYS = "<<SYS>>\n{}\n<</SYS>>\n\n"
_HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
_USER_3, _ANSWER_3 = _HEADER.format("user"), "<|eot_id|>" + _HEADER.format("assistant")
BEGIN_3 = "<|begin_of_text|>"
_WORDS_3 = _HEADER.format("system") + "{}<|eot_id|>" + _USER_3
_PHI3_USER, _PHI3_ANSWER = "<|user|>\n", "<|end|>\n<|assistant|>\n"
_PHI3_SYSTEM = f"<|system|>\n{{}}<|end|>\n{_PHI3_USER}"
_CHATML_SYSTEM = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n"
_DIRECT_SYSTEM = "<|im_start|>system\n{}<|im_end|><|im_start|>user\n"


def _vicuna(before: str) -> Template:
    return Template(f"{before}USER: ", " ASSISTANT:", f"{EOS}USER: ", system=f"{SYSTEM} USER: ")


# As llava/conversation.py has them: LLaVA-pp's of llava_llama3 and phi3_instruct, LLaVA-NeXT's of
# llava_llama_3, which next_llama3 is in transformers' layout, as next_mistral is mistral_instruct
# there. What is called after a decoder alone is that decoder's own form, as checkpoints in
# transformers' layout use it. "onevision" is the chat
# template that is published with LLaVA-OneVision in transformers' layout, "chatml" the one that its
# convert_llava_onevision_weights_to_hf.py writes.
TEMPLATES = {
    "vicuna_v1": _vicuna(_SYSTEM.format("user")),
    "llava_v1": _vicuna(_SYSTEM.format("human")),
    "llava_llama_2": Template(
        "[INST] " + _SYS.format(SEEING),
        " [/INST]",
        f" {EOS}{BOS}[INST] ",
        system="[INST] " + _SYS.format(SYSTEM),
    ),
    "mistral_instruct": Template(
        "[INST] ", " [/INST]", f" {EOS}[INST] ", system="[INST] " + _SYS.format(SYSTEM)
    ),
    "next_mistral": Template(
        "[INST] ", " [/INST]", f" {EOS}[INST] ", system=_SYS.format(SYSTEM) + "[INST] "
    ),
    "hf": _vicuna(""),
    "plain": Template("", "", EOS),
    "llava_llama3": Template(
        BEGIN_3 + _WORDS_3.format(_SYSTEM.format("user").rstrip()),
        _ANSWER_3,
        "<|eot_id|>" + _USER_3,
        system=BEGIN_3 + _WORDS_3.format(SYSTEM),
    ),
    "llama3": Template(_USER_3, _ANSWER_3, "<|eot_id|>" + _USER_3, system=_WORDS_3.format(SYSTEM)),
    "phi3_instruct": Template(
        _PHI3_SYSTEM.format("You are a helpful AI assistant."),
        _PHI3_ANSWER,
        f"<|end|>\n{_PHI3_USER}",
        system=_PHI3_SYSTEM.format(SYSTEM),
    ),
    "llava_llama_3": Template(
        BEGIN_3 + _WORDS_3.format(SEEING),
        _ANSWER_3,
        "<|eot_id|>" + _USER_3,
        system=BEGIN_3 + _WORDS_3.format(SYSTEM),
    ),
    "next_llama3": Template(
        _WORDS_3.format(SEEING),
        _ANSWER_3,
        "<|eot_id|>" + _USER_3,
        system=_WORDS_3.format(SYSTEM),
    ),
    "chatml_direct": Template(
        _DIRECT_SYSTEM.format("Answer the questions."),
        "<|im_end|><|im_start|>assistant\n",
        "<|im_end|><|im_start|>user\n",
        system=_DIRECT_SYSTEM.format(SYSTEM),
    ),
    "onevision": Template(
        "<|im_start|>user ",
        "<|im_end|><|im_start|>assistant\n",
        "<|im_end|><|im_start|>user ",
        "<|im_end|><|im_start|>assistant \n",
        system=f"<|im_start|>system \n{SYSTEM}<|im_end|><|im_start|>user ",
    ),
    "chatml": Template(
        "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>\n<|im_start|>user\n",
        system=_CHATML_SYSTEM.format(SYSTEM),
    ),
    "qwen_1_5": Template(
        _CHATML_SYSTEM.format("You are a helpful assistant."),
        "<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>\n<|im_start|>user\n",
        system=_CHATML_SYSTEM.format(SYSTEM),
    ),
    "phi3": Template(
        _PHI3_USER,
        _PHI3_ANSWER,
        f"<|end|>\n{_PHI3_USER}",
        system=_PHI3_SYSTEM.format(SYSTEM),
    ),
}


# Where transformers' processors look for a chat template, the first one that is there.
_CHATS = ("chat_template.jinja", "chat_template.json", "processor_config.json")


def chat_template(files: Mapping[str, Config], *more: str) -> tuple[str, str] | None:
    """transformers' chat template in a checkpoint's JSON files, `more` after its processor's own:
    the file and the text, None where there is none.
    """
    for name in (*_CHATS, *more):
        if isinstance(text := files.get(name, {}).get("chat_template"), str):
            return name, text
    return None


@dataclass(frozen=True)
class Cutter:
    """Cuts texts into a prompt's items. `eos` is the id that EOS stands for."""

    tokenizer: Tokenizer
    spaces: Spaces
    eos: int

    def cut(self, text: str, *, goes_on: bool = False) -> tuple[str, ...]:
        """The items of a text that the original tokenizes in one go.

        With `goes_on` it continues what was tokenized before. Raises ValueError for a token that
        the tokenizer lacks.
        """
        if text and not goes_on and self._begins_with_space(text):
            text = " " + text
        found: list[str] = []
        for i, (item, spaced) in enumerate(self._items(text)):
            space = " " if spaced and self.spaces == "every" and not (goes_on and i == 0) else ""
            found.append(space + item)
        return tuple(found)

    def _begins_with_space(self, text: str) -> bool:
        """True if the tokenizer puts a space before the whole text."""
        if self.spaces not in ("start", "first"):
            return False
        added = self.tokenizer.added
        token = next((t for t in (*added, IMAGE) if text.startswith(t)), None)
        if token is None:
            return True
        # transformers' slow tokenizers keep it before a token that is not special to them.
        return self.spaces == "start" and token in added and not added[token].special

    def end(self, template: Template) -> int:
        """The token that ends an answer: the first one behind it."""
        ids = (_ID.fullmatch(item) for item in self.cut(template.again, goes_on=True))
        return next(int(found[1]) for found in ids if found)

    def _items(self, text: str) -> Iterator[tuple[str, bool]]:
        """(item, whether it is text) in order, without what tokens swallow."""
        names = sorted([*self.tokenizer.added, IMAGE, BOS, EOS], key=len, reverse=True)
        rstrip = False
        for item in re.split(f"({'|'.join(map(re.escape, names))})", text):
            if item == IMAGE:
                yield "{image}", False
            elif item == BOS:
                yield BOS, False
            elif item == EOS:
                yield f"{{id:{self.eos}}}", False
            elif token := self.tokenizer.added.get(item):
                yield f"{{id:{token.id}}}", False
            elif item := item.lstrip() if rstrip else item:
                if lacking := _TOKEN.search(item):
                    raise ValueError(f"the template needs {lacking[0]}, which the tokenizer lacks")
                yield item, True
            token = self.tokenizer.added.get(item)
            if token and token.odd:
                raise ValueError(
                    f"the template has the token {item!r} with {token.odd}; only rstrip is known"
                )
            rstrip = token is not None and token.rstrip
