"""Questions of users: control tokens that are typed stay text, and no text ends the process."""

from __future__ import annotations

import random
from pathlib import Path

import edgevlm
from edgevlm.bundle import open_bundle
from edgevlm.errors import ContextOverflow, PromptError
from edgevlm.export import export_bundle
from edgevlm.gguf_file import opened
from edgevlm.models import built_in
from tests.checkpoints.deepseek_vl import write_deepseek_vl
from tests.checkpoints.paligemma import write_paligemma
from tests.checkpoints.smolvlm import write_smolvlm
from workshop.fuzz.mutate import damaged
from workshop.fuzz.outcomes import Wrong

_LONG = 1 << 20
_CONTROL = 3  # llama.cpp's type of such tokens in a GGUF.
_PARTS = (
    *(
        "<image>",
        "<bos>",
        "<eos>",
        "</s>",
        "<|im_end|>",
        "<|im_start|>user\n",
        "<end_of_utterance>",
    ),
    *(
        "{image}",
        "{prompt}",
        "{id:2}",
        "\n",
        "\r\n",
        "  ",
        "\t",
        "\u2581",
        "\uffff",
        "\ufffd",
        "a",
        "7",
    ),
    *(
        "\u0301",
        "\u200d",
        "\N{SNOWMAN}",
        "\U0001f600",
        "\u0e33",
        "한",
        "中文",
        "ﷺ",
        "\ud800",
        "\0",
        "\x7f",
    ),
    *(
        "don't",
        "I'M",
        "123456",
        "\xa0",
        "\u2028",
        "\u202e",
        "<loc0001>",
        "<seg001>",
        "<0x0A>",
        "[UNUSED]",
    ),
    *("<｜begin▁of▁sentence｜>", "<unused0>", "<|endoftext|>", "<fake_token_around_image>", "ＡＢ"),
)


class Fuzzed:
    """Four models with the tokenizers of SentencePiece and of three kinds of byte pairs."""

    def __init__(self, folder: Path) -> None:
        folders = [built_in()]
        for write in (write_smolvlm, write_deepseek_vl, write_paligemma):
            at = folder / f"bundle-{write.__name__}"
            if not at.exists():
                checkpoint = write(folder / write.__name__)
                export_bundle(checkpoint, at, quant="f32", vision_precision="fp32", verify=False)
            folders.append(at)
        self._models = [edgevlm.load(at, cache=False) for at in folders]
        self._controls = [_controls(at) for at in folders]

    def case(self, rng: random.Random) -> bytes:
        """See Target; the first byte says which model."""
        which = rng.randrange(len(self._models))
        parts = (*_PARTS, *map(str, self._controls[which].values()))
        kind = rng.random()
        if kind < 0.05:
            one = rng.choice(parts)
            text = one * (_LONG // len(one))
        elif kind < 0.2:
            text = "".join(rng.choice(parts) * rng.choice((1, 1, 2, 100, 5000)) for _ in range(5))
        elif kind < 0.3:
            text = "".join(chr(rng.randrange(0x110000)) for _ in range(rng.choice((1, 20, 3000))))
        else:
            text = "".join(rng.choice(parts) for _ in range(rng.randrange(1, 12)))
        data = text.encode("utf-8", "surrogatepass")
        return bytes([which]) + (damaged(data, rng) if rng.random() < 0.1 else data)

    def check(self, data: bytes) -> None:
        """See Target."""
        which = data[0] % len(self._models)
        vlm, text = self._models[which], data[1:].decode("utf-8", "surrogateescape")
        try:
            text.encode()
        except UnicodeEncodeError:
            vlm.ask(text, max_tokens=2)
            raise Wrong("invalid UTF-8 was read") from None
        decoder = vlm.engines.decoder
        assert decoder
        if len(text) < 10_000:
            ids = decoder.tokenize(text)
            if found := {*ids} & {*self._controls[which]}:
                raise Wrong(f"typed text became control tokens {sorted(found)}")
            # Without what a begin puts before it, and with bytes that no token spells.
            back = b"".join(map(decoder.piece, ids)).decode(errors="replace")
            if which == 1 and back != text:
                raise Wrong(f"{text!r} became {back!r}")
        try:
            vlm.ask(text, max_tokens=2)
        except ContextOverflow:
            if len(text) < 100:
                raise Wrong(f"a short text overflows the context: {text!r}") from None
            raise PromptError("too long") from None


def _controls(folder: Path) -> dict[int, str]:
    """Control tokens of a model by id, as its GGUF has them."""
    with opened(open_bundle(folder).input) as file:
        kinds, texts = (
            file.integers("tokenizer.ggml.token_type"),
            file.texts("tokenizer.ggml.tokens"),
        )
    assert kinds is not None
    return {i: texts[i] for i, kind in enumerate(kinds) if kind == _CONTROL}
