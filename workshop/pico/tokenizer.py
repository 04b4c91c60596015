"""pico's vocabulary: a SentencePiece BPE model with Gemma's conventions, whole words of the
domain as pieces.
"""

from __future__ import annotations

import io
import json
from functools import lru_cache
from pathlib import Path
from random import Random

import sentencepiece

from edgevlm.benchmarks.scenes import phrasings
from edgevlm.benchmarks.scenes.kinds import COLOURS, KINDS, NUMBER_WORDS, WORDS, article, plural

PAD, EOS, BOS, UNK = 0, 1, 2, 3
N_PIECES = 2559  # of the SentencePiece model; <image> comes after them
IMAGE_TOKEN = "<image>"
IMAGE_ID = N_PIECES
N_VOCAB = N_PIECES + 1
N_LOC, N_SEG = 1024, 128


def special_pieces() -> list[str]:
    """The pieces that are never split: newline, places, segments."""
    return [
        "\n",
        *(f"<loc{k:04d}>" for k in range(N_LOC)),
        *(f"<seg{k:03d}>" for k in range(N_SEG)),
    ]


def train_tokenizer(path: Path) -> None:
    """Trains the vocabulary on sentences of the domain and writes ``tokenizer.model``."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_corpus()),
        model_writer=model,
        model_type="bpe",
        vocab_size=N_PIECES,
        byte_fallback=True,
        character_coverage=1.0,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        split_digits=True,
        pad_id=PAD,
        eos_id=EOS,
        bos_id=BOS,
        unk_id=UNK,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        user_defined_symbols=special_pieces(),
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


def _corpus() -> list[str]:
    """Every phrasing many times, every word of the domain with and without a space before it,
    every letter.
    """
    rng = Random(0)
    names = [
        *KINDS,
        *COLOURS,
        *NUMBER_WORDS,
        *(plural(k) for k in KINDS),
        "yes",
        "no",
        "word",
        "some",
    ]
    forms = [
        *phrasings.COLOUR_FORMS,
        *phrasings.SHAPE_FORMS,
        *phrasings.WHAT_FORMS,
        *phrasings.COUNT_FORMS,
        *phrasings.EXISTS_FORMS,
        *phrasings.EXISTS_MANY_FORMS,
        *phrasings.POSITION_FORMS,
        *phrasings.OCR_FORMS,
    ]
    lines = []
    for form in forms:
        for side in (word for words in phrasings.SIDES.values() for word in words):
            for spelling in ("colour", "color"):
                text = form.format(colour=spelling, side=side, x=rng.choice(names), thing="object")
                capital = text[0].upper() + text[1:]
                lines += [f"answer en {text}?", f"answer en {capital}?", capital]
    for name in names:
        lines += [name, f" {name}"] * 60 + [
            f"detect {name} ; {name}",
            f"is there {article(name)} {name}?",
        ] * 30
    for word in (
        "caption en",
        "cap en",
        "describe en",
        "ocr",
        "detect",
        "answer en",
        ", ",
        " and",
        " a word",
    ):
        lines += [word] * 400
    for word in (
        "animal",
        "fruit",
        "vehicle",
        "shape",
        "object",
        "things",
        "text",
        "picture",
        "image",
        "photo",
    ):
        lines += [word, f" {word}", f" the {word}"] * 60
    lines += [*WORDS, *(f" {word}" for word in WORDS)]
    lines += ["".join(chr(code) for code in range(33, 127))] * 20
    return lines


class Tokenizer:
    """Text to ids as transformers' GemmaTokenizer does it, without needing transformers."""

    def __init__(self, path: Path) -> None:
        self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.newline = self.model.piece_to_id("\n")
        self.first_loc = self.model.piece_to_id("<loc0000>")

    def prompt_ids(self, prompt: str) -> list[int]:
        """``<bos>`` + prompt + newline, what follows the image tokens."""
        return [BOS, *_encode(self, prompt), self.newline]

    def answer_ids(self, answer: str, task: str) -> list[int]:
        """The answer and ``<eos>``; a word that was read is spelt letter by letter."""
        if task == "ocr":
            return [*(self.model.piece_to_id(letter) for letter in answer), EOS]
        return [*_encode(self, answer), EOS]

    def word_id(self, word: str, space: str = " ") -> int:
        """The piece of a noun, colour or number of the domain, each of which is one piece."""
        (piece,) = self.model.encode(space + word)
        return int(piece)

    def text(self, ids: list[int]) -> str:
        """Ids back to text; the end token and padding are dropped."""
        return str(self.model.decode([i for i in ids if i not in (PAD, EOS, BOS) and i < N_PIECES]))


@lru_cache(maxsize=50_000)
def _encode(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.model.encode(text))


def tokenizer_config() -> str:
    """``tokenizer_config.json`` as transformers' GemmaTokenizer reads it."""
    specials = {PAD: "<pad>", EOS: "<eos>", BOS: "<bos>", UNK: "<unk>", IMAGE_ID: IMAGE_TOKEN}
    added = {
        str(index): {
            "content": piece,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for index, piece in specials.items()
    }
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": [IMAGE_TOKEN],
        "bos_token": "<bos>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<eos>",
        "model_max_length": 512,
        "pad_token": "<pad>",
        "processor_class": "PaliGemmaProcessor",
        "sp_model_kwargs": {},
        "spaces_between_special_tokens": False,
        "tokenizer_class": "GemmaTokenizer",
        "unk_token": "<unk>",
        "use_default_system_prompt": False,
    }
    return json.dumps(config, indent=2)
