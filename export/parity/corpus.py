"""Texts on which the tokenizers of a model and of its bundle must agree."""

from __future__ import annotations

from collections.abc import Iterable

_TEXTS = (
    "",
    "\n",
    " ",
    "caption en\n",
    "answer en Where is the cow standing?\n",
    "detect red circle ; blue square\n",
    "  two leading spaces",
    "trailing space ",
    "tab\there\t\tand\t\t\t there",
    "line\r\nbreak\r\n\r\n",
    "a \n b\n\n\nc",
    "MiXeD CaSe 1234567890 3.14159 1,000,000",
    "Füße, çà et là: déjà vu — naïve façade œuvre",
    "zażółć gęślą jaźń, příliš žluťoučký kůň",
    "что на картинке?",
    "图片里有什么？红色的圆形",
    "画像には何がありますか？",
    "이 사진에는 무엇이 있나요?",
    "ما هو لون الدائرة؟",
    "מה יש בתמונה?",
    "यह क्या है?",
    "ภาพนี้คืออะไร",
    "e\u0301 vs \u00e9, \ufb01 ligature, \u2126 \u00bd \u00a0nbsp\u2003em\u200bzero",
    "\U0001f600\U0001f680 \U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466",
    "\U0001f1ea\U0001f1fa \U0001f44d\U0001f3fd \u2764\ufe0f",
    "<table><tr><td>1</td></tr></table> <b>bold</b><em>x</em> <h1>T</h1> < b > <br/> <unused0>",
    "def f(x):\n    return {\"a\": [1, 2], 'b': x ** 2}  # comment\n",
    "https://example.org/a?b=c&d=%20#e",
    "<loc>",
    "<loc12>",
    "<loc00012>",
    "<seg>",
    "loc0001",
    "<|x|>",
    "[INST] hi [/INST]",
    "<0x41>",
    "Pneumonoultramicroscopicsilicovolcanoconiosis Donaudampfschifffahrtsgesellschaftskapitän",
    "x" * 500,
    "<loc0012><loc0345><loc0678><loc1023> cat ; <loc0000>dog<seg000><seg127>",
    "a<loc0001>b <seg001> c<loc0099> ",
    "\u0001\u0002\u001f\u007f",
    # SentencePiece's own sign, typed.
    "\u2581",
    "\u2581\u2581the \u2581cat\u2581\u2581\u2581sat \u2581 on",
    "a\u2581 b\n\u2581c \u2581\u2581",
    "<0x0A><0xE2><0x96><0x81> <0xZZ>",
    "only\rcarriage\r\rreturns \r\n \n\r",
    " \n \t\n  \r\n\t \n",
    "can't I'LL we'Ve they're 'tis \u2019s rock'n'roll",
    "\u00bd \u00b2 \u2460 \u0661\u0662\u0663 \u2163 12345678 0x1F 1e-5",
    "\ufeffbyte order, \ufffd, \uffff, \u00ad soft, \u2028 line, \u2029 paragraph, \u0085 next",
    "\u200e\u200f\u202a\u202c\u2066\u2069 \u2060 \u180e \u1680 \u3000 \u2009",
    "\u1100\u1161\u11a8 vs \uac01, a\u0300\u0301\u0302, \u0915\u094d\u0937, \u0e01\u0e33",
    "\U0001d518\U0001d7d9 \U0001f3f4\U000e0067\U000e0062\U000e007f \u261d\U0001f3ff",
    "_snake_case __init__ camelCase kebab-case a.b.c $x #y @z %d {0} \\n ~/ ... --- ***",
)
# What is often in photographs: labels of a dual encoder.
LABELS = (
    "dog",
    "cat",
    "bird on a branch",
    "red car",
    "two children on a beach",
    "birthday cake with candles",
    "mountain at sunset",
    "city street at night",
    "bowl of soup",
    "handwritten letter",
    "screenshot of a web page",
    "old woman with a hat",
    "wedding",
    "snow",
    "bicycle leaning against a wall",
    "football match",
)
_AROUND = "a{0}b {0} c  {0}  d {0}{0} {0}s,{0}.\n{0}\n\t{0}\t\r\n{0}\r\n\u2581{0}\u2581e"


def around(tokens: Iterable[str]) -> list[str]:
    """Texts with a token each, between letters, spaces and signs; and with what is nearly one."""
    texts = []
    for token in tokens:
        spaces = token.replace(" ", "\u2581"), token.replace("\u2581", " ")
        nearly = (token[1:], token[:-1], token.upper(), *spaces)
        texts += [_AROUND.format(token), " ".join(f"a {part} b" for part in nearly)]
    return texts


def corpus() -> list[str]:
    """The texts: prompts of every task, scripts, emoji, runs of whitespace, locations, markup."""
    spaces = ["a" + " " * n + "b" for n in range(1, 41)]
    newlines = ["\n" * n for n in (2, 3, 31, 32, 40)]
    return [*_TEXTS, *spaces, *newlines, " " * 33]
