"""The first rules: settings that follow what was measured, as one table.

Every rule says when it holds, what it sets and what was measured (the numbers stand in
docs/measurements.md). The caller's own setting wins over any of them, and what `edgevlm tune`
measured on this machine (`tuned.py`) comes before them.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from edgevlm.machine import physical_cores
from edgevlm.types import FlashAttention, Repacking

Goal = Literal["chat", "caption", "both"]
GOALS: tuple[Goal, ...] = ("chat", "caption", "both")


@dataclass(frozen=True)
class EngineSettings:
    """Settings that decide how soon an answer comes, and of its words nothing but rounding.

    vision_threads, prefill_threads, decode_threads: see RunSettings, as repacking and
    flash_attention. batch: rows of a causal block that the decoder reads at once. spinning: whether
    onnxruntime's workers wait busily. vision: precisions of the encoder on the CPU, best first, ()
    for the bundle's main one.
    """

    vision_threads: int
    prefill_threads: int
    decode_threads: int
    repacking: Repacking
    spinning: bool
    vision: tuple[str, ...]
    batch: int = 512
    flash_attention: FlashAttention = "auto"


@dataclass(frozen=True)
class Facts:
    """Facts that rules may depend on.

    cores: physical cores that this process may keep busy. decoder: the decoder's precision, such as
    "q4_k_m". goal: what should be fast: a long answer or many ("chat"), a first short one
    ("caption"), "both". short_answers: whether the model answers in a few words, as PaliGemma does.
    """

    cores: int
    decoder: str = ""
    x86: bool = True
    goal: Goal = "both"
    short_answers: bool = False

    @property
    def short(self) -> bool:
        """True if an answer is over before re-ordering the weights has paid."""
        return self.goal == "caption" or (self.goal == "both" and self.short_answers)


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
        "K-quants on x86, short answers",
        lambda f: f.x86 and "_k" in f.decoder and f.short,
        lambda _: "off",
        "PaliGemma-3B q4_k_m, AVX-512 VNNI: prefill 85 tok/s against 59; AVX2: 47 against 42; "
        "loads in half the time, 0.9 GiB less",
    ),
    Rule(
        "repacking",
        "K-quants on x86",
        lambda f: f.x86 and "_k" in f.decoder,
        lambda _: "decode",
        "MobilePALO-1.7B q4_k_m: prefill 1.05 to 1.4 times as fast as re-ordered, decode "
        "1.1 to 1.2 times as fast as in the file's order",
    ),
    Rule(
        "repacking",
        "elsewhere",
        lambda _: True,
        lambda _: "on",
        "llama.cpp's default; AVX-512 VNNI, q4_0 and iq4_nl: prefill 1.5 to 1.7 times as fast",
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


def decide(setting: str, facts: Facts) -> Any:
    """The value of the first rule for a setting that holds."""
    return rule(setting, facts).value(facts)


def rule(setting: str, facts: Facts) -> Rule:
    """The first rule for a setting that holds."""
    return next(r for r in RULES if r.setting == setting and r.holds(facts))


def settings(facts: Facts) -> EngineSettings:
    """The settings that the rules choose."""
    threads = decide("threads", facts)
    return EngineSettings(
        vision_threads=threads,
        prefill_threads=threads,
        decode_threads=threads,
        repacking=decide("repacking", facts),
        spinning=decide("spinning", facts),
        vision=decide("vision", facts),
    )


def this_machine(decoder: str = "", *, goal: Goal = "both", short_answers: bool = False) -> Facts:
    """The facts of this machine for a decoder of that precision."""
    x86 = platform.machine().lower() in ("x86_64", "amd64", "i686", "x86")
    return Facts(physical_cores(), decoder, x86, goal, short_answers)
