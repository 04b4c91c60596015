"""Texts on which the tokenizers of a model and of its bundle must agree."""

from __future__ import annotations

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
)


def corpus() -> list[str]:
    """The texts: prompts of every task, scripts, emoji, runs of whitespace, locations, markup."""
    spaces = ["a" + " " * n + "b" for n in range(1, 41)]
    newlines = ["\n" * n for n in (2, 3, 31, 32, 40)]
    return [*_TEXTS, *spaces, *newlines, " " * 33]
