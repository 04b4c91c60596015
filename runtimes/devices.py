"""The words by which devices are asked for, the same for encoder and decoder.

`auto` takes the best that is there, `cpu`, `gpu` and `npu` name a kind; any other word is a
provider of onnxruntime or a back end of llama.cpp, and `provider:kind` one of a provider's devices.
A word names what must run: what was named and cannot run is an error, only `auto` falls back.
"""

from __future__ import annotations

from collections.abc import Collection

from edgevlm.errors import EngineMissing

KINDS = ("auto", "cpu", "gpu", "npu")


def split(
    device: str,
    vision: str | None,
    decoder: str | None,
    *,
    vision_words: Collection[str],
    decoder_words: Collection[str],
) -> tuple[str, str]:
    """The words for the encoder and for the decoder, which override `device`.

    `device` is for both. A word that only one engine knows (openvino, metal) is for that one and
    leaves the other at auto; so does `npu`, which few decoders run on. `vision_words` and
    `decoder_words` are the engines' own words. Raises EngineMissing for a word nobody knows.
    """
    _check(device, {*vision_words, *decoder_words})
    _check(vision or "auto", vision_words)
    _check(decoder or "auto", decoder_words)
    for_both = base(device) in KINDS and device != "npu"
    return (
        vision or (device if device in KINDS or base(device) in vision_words else "auto"),
        decoder or (device if for_both or base(device) in decoder_words else "auto"),
    )


def base(word: str) -> str:
    """The provider of `provider:kind`."""
    return word.partition(":")[0]


def _check(word: str, known: Collection[str]) -> None:
    provider, _, kind = word.partition(":")
    if word not in KINDS and (provider not in known or kind not in ("", *KINDS[1:])):
        raise EngineMissing(
            f"unknown device {word!r}",
            f"choose {', '.join((*KINDS, *sorted({*known} - {*KINDS})))}",
        )
