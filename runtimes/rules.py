"""The first rules: settings that follow what was measured, as one table.

Every rule says when it holds, what it sets and what was measured (the numbers stand in
docs/performance.md). The caller's own setting wins over any of them; a tuner that measures on the
machine itself puts rules of its own before these.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from edgevlm.machine import physical_cores


@dataclass(frozen=True)
class Facts:
    """Facts that rules may depend on.

    cores: physical cores that this process may keep busy. features: llama.cpp's words for what the
    processor can do, such as "AVX2". decoder: the decoder's precision, such as "q4_k_m".
    """

    cores: int
    features: frozenset[str]
    decoder: str = ""
    x86: bool = True


@dataclass(frozen=True)
class Rule:
    """One setting, when it holds (for the reader and for the machine), its value, the evidence."""

    setting: str
    when: str
    holds: Callable[[Facts], bool]
    value: Callable[[Facts], Any]
    evidence: str


# The first rule that holds decides.
RULES = (
    Rule(
        "repacking",
        "K-quants on AVX-512 VNNI",
        lambda f: "AVX512_VNNI" in f.features and "_k" in f.decoder,
        lambda _: False,
        "PaliGemma-3B q4_k_m: prefill 85 tok/s against 59, decode 6.4 against 6.3, 0.9 GiB less",
    ),
    Rule(
        "repacking",
        "elsewhere",
        lambda _: True,
        lambda _: True,
        "AVX2, q4_k_m: decode 1.1 to 1.2 times as fast, prefill 0.87 times; "
        "AVX-512 VNNI, q4_0 and iq4_nl: prefill 1.5 to 1.7 times as fast",
    ),
    Rule(
        "threads",
        "everywhere",
        lambda _: True,
        lambda f: f.cores,
        "hyper-threads share the units that multiply matrices",
    ),
    Rule(
        "spinning",
        "everywhere: llama.cpp works between two pictures",
        lambda _: True,
        lambda _: False,
        "onnxruntime's spinning workers made the decoder up to 4 times slower",
    ),
    Rule(
        "vision",
        "x86, on the CPU",
        lambda f: f.x86,
        lambda _: ("int8", "qdq8"),
        "SigLIP-So400m: int8 0.37 s against 1.17 s in fp32 on AVX-512 VNNI; faster on AVX2, too",
    ),
    Rule(
        "vision",
        "elsewhere, on the CPU",
        lambda _: True,
        lambda _: (),
        "not measured: the bundle's main precision",
    ),
)


def decide(setting: str, facts: Facts, rules: Sequence[Rule] = RULES) -> Any:
    """The value of the first rule for a setting that holds."""
    return rule(setting, facts, rules).value(facts)


def rule(setting: str, facts: Facts, rules: Sequence[Rule] = RULES) -> Rule:
    """The first rule for a setting that holds."""
    return next(r for r in rules if r.setting == setting and r.holds(facts))


def this_machine(features: Sequence[str], decoder: str = "") -> Facts:
    """The facts of this machine; `features` are llama.cpp's words."""
    x86 = platform.machine().lower() in ("x86_64", "amd64", "i686", "x86")
    return Facts(physical_cores(), frozenset(features), decoder, x86)
