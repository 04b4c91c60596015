"""Which layers of a decoder run on which device: words, memory, fallbacks, errors, rules."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import pytest

from edgevlm.bundle import Bundle, open_bundle
from edgevlm.errors import EngineError, EngineMissing
from edgevlm.machine import physical_cores
from edgevlm.models import built_in
from edgevlm.runtimes import loading, rules
from edgevlm.runtimes.llama import ggml
from edgevlm.runtimes.llama.backends import (
    BACKENDS,
    ON_THE_CPU,
    LayerBytes,
    LlamaDevice,
    Offload,
    backend,
    candidates,
    layers_that_fit,
)
from edgevlm.runtimes.loading import open_decoder
from edgevlm.runtimes.rules import Goal
from edgevlm.specs import DecoderSpec
from edgevlm.types import Placement

GIB, MIB = 1 << 30, 1 << 20
# 18 layers of 60 MiB and an output of 500 MiB, as a quantized PaliGemma-3B has.
NEEDS = LayerBytes((60 * MIB,) * 18, 500 * MIB, position=1024, work=100 * MIB)
ALL = 19


def device(name: str, free: int, registry: str = "Vulkan") -> LlamaDevice:
    return LlamaDevice(name, f"{name} of a test", backend(registry), free, 8 * GIB, handle=1)


@pytest.fixture(scope="module")
def pico() -> Bundle:
    return open_bundle(built_in())


class FakeLlama:
    """LlamaDecoder that notes what it was asked for and takes the layers that `takes` allows."""

    asked: list[Offload]
    takes = 99
    fails: tuple[str, ...] = ()

    def __init__(
        self, path: Path, spec: DecoderSpec, *_: object, offload: Offload = ON_THE_CPU, **__: object
    ) -> None:
        self.asked.append(offload)
        if offload.device and offload.device.name in self.fails:
            raise EngineError(f"{offload.device.name} cannot load the decoder (out of memory)")
        self.layers = (min(offload.layers, self.takes), spec.n_layer + 1)

    def close(self) -> None:
        pass


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch) -> type[FakeLlama]:
    class Fresh(FakeLlama):
        asked = []

    monkeypatch.setattr(loading, "LlamaDecoder", Fresh)
    return Fresh


def opened(bundle: Bundle, word: str, devices: Sequence[LlamaDevice]) -> Placement:
    return open_decoder(bundle, word, devices, rules.settings(rules.this_machine()))[1]


@pytest.mark.parametrize(
    ("free", "layers"),
    [
        (8 * GIB, ALL),
        (1.2 * GIB, 6),  # 256 MiB spare, 600 of output and work, 64 for each of 5 layers
        (256 * MIB + 600 * MIB, 1),
        (256 * MIB + 599 * MIB, 0),
        (0, 0),
    ],
)
def test_layers_follow_the_free_memory(free: float, layers: int) -> None:
    assert layers_that_fit(NEEDS, int(free), 8192) == layers


def test_a_short_context_leaves_room_for_layers() -> None:
    free = int(1.2 * GIB)
    assert layers_that_fit(NEEDS, free, 256) > layers_that_fit(NEEDS, free, 8192)


def test_the_file_says_what_its_layers_need(pico: Bundle) -> None:
    spec = pico.manifest.decoder
    needs = ggml.layer_bytes(pico.path("decoder"), spec, exact=False)
    size = pico.path("decoder").stat().st_size
    assert len(needs.layers) == spec.n_layer and min(needs.layers) > 0
    # Gemma's output is its table of embeddings; the rest of the file is the tokenizer.
    assert 0.8 * size < sum(needs.layers) + needs.output < size
    exact = ggml.layer_bytes(pico.path("decoder"), spec, exact=True)
    assert exact.position == 2 * needs.position > 0


@pytest.mark.parametrize("word", [b.word for b in BACKENDS])
def test_every_back_end_answers_to_its_word_and_its_kind(word: str) -> None:
    row = next(b for b in BACKENDS if b.word == word)
    mine, other = device("mine", GIB, row.registry), device("other", GIB, "Unheard")
    assert candidates(word, [other, mine]) == [mine]
    assert mine in candidates(row.kind, [other, mine])
    assert candidates("auto", [other, mine]) == [mine]
    assert candidates("cpu", [mine]) == []


def test_a_vendors_back_end_then_the_roomiest_device() -> None:
    devices = [device("v", GIB), device("small", GIB, "CUDA"), device("large", 2 * GIB, "CUDA")]
    assert [d.name for d in candidates("gpu", devices)] == ["large", "small", "v"]
    assert [d.name for d in candidates("unheard", [device("x", GIB, "Unheard")])] == ["x"]


@pytest.mark.parametrize("word", ["gpu", "cuda", "vulkan"])
def test_a_back_end_that_is_not_built_in_is_an_error_with_its_line(pico: Bundle, word: str) -> None:
    with pytest.raises(EngineMissing, match="offers the CPU alone; CMAKE_ARGS=-DGGML_"):
        opened(pico, word, [])


def test_a_gpu_with_room_takes_the_whole_decoder(pico: Bundle, llama: type[FakeLlama]) -> None:
    for word in ("auto", "gpu", "vulkan"):
        placed = opened(pico, word, [device("Vulkan0", GIB)])
        assert (placed.device, placed.engine) == ("vulkan", "Vulkan0")
        assert placed.placed == placed.total == pico.manifest.decoder.n_layer + 1
    assert opened(pico, "cpu", [device("Vulkan0", GIB)]).device == "cpu"


def test_a_gpu_with_too_little_memory_takes_some_layers_and_says_so(
    pico: Bundle, llama: type[FakeLlama]
) -> None:
    needs = ggml.layer_bytes(pico.path("decoder"), pico.manifest.decoder, exact=False)
    free = 256 * MIB + needs.offloaded(2, pico.manifest.decoder.context_length)
    placed = opened(pico, "gpu", [device("Vulkan0", free)])
    n = pico.manifest.decoder.n_layer
    assert str(placed) == f"vulkan, 2 of {n + 1} layers, {n - 1} on the CPU"


def test_a_gpu_without_room_is_left_to_the_cpu_or_is_an_error(
    pico: Bundle, llama: type[FakeLlama]
) -> None:
    placed = opened(pico, "auto", [device("Vulkan0", 100 * MIB)])
    assert placed.device == "cpu"
    assert placed.notes[0].startswith("Vulkan0 has 100 MiB free and the decoder needs 2")
    with pytest.raises(EngineError, match="'gpu' cannot run the decoder: Vulkan0 has 100 MiB"):
        opened(pico, "gpu", [device("Vulkan0", 100 * MIB)])
    assert [o.layers for o in llama.asked] == [0]


def test_a_device_that_refuses_its_layers_leaves_them_to_the_next(
    pico: Bundle, llama: type[FakeLlama]
) -> None:
    llama.fails = ("CUDA0",)
    devices = [device("CUDA0", GIB, "CUDA"), device("Vulkan0", GIB)]
    placed = opened(pico, "gpu", devices)
    assert placed.device == "vulkan"
    assert placed.notes == ("CUDA0 cannot load the decoder (out of memory)",)
    llama.fails = ("CUDA0", "Vulkan0")
    assert opened(pico, "auto", devices).device == "cpu"
    with pytest.raises(EngineError, match="CUDA0 cannot.*; Vulkan0 cannot.*--decoder-device"):
        opened(pico, "gpu", devices)


def test_what_llama_cpp_says_counts_not_what_was_planned(
    pico: Bundle, llama: type[FakeLlama]
) -> None:
    llama.takes = 1
    assert opened(pico, "gpu", [device("Vulkan0", GIB)]).placed == 1
    llama.takes = 0
    with pytest.raises(EngineError, match="put no layer there"):
        opened(pico, "gpu", [device("Vulkan0", GIB)])


def test_a_decoder_in_f32_stays_on_the_cpu_unless_it_is_sent_elsewhere(
    pico: Bundle, llama: type[FakeLlama]
) -> None:
    parts = pico.manifest.components
    exact = {**parts, "decoder": dataclasses.replace(parts["decoder"], precision="f32")}
    bundle = dataclasses.replace(
        pico, manifest=dataclasses.replace(pico.manifest, components=exact)
    )
    placed = opened(bundle, "auto", [device("Vulkan0", GIB)])
    assert placed.device == "cpu" and "exact numbers" in placed.notes[0]
    assert opened(bundle, "gpu", [device("Vulkan0", GIB)]).device == "vulkan"


def test_a_decoder_with_norms_of_its_own_stays_on_the_cpu_unless_it_is_sent_elsewhere(
    pico: Bundle, llama: type[FakeLlama]
) -> None:
    spec = dataclasses.replace(pico.manifest.decoder, extra_norms=True)
    bundle = dataclasses.replace(pico, manifest=dataclasses.replace(pico.manifest, decoder=spec))
    placed = opened(bundle, "auto", [device("Vulkan0", GIB)])
    assert placed.device == "cpu" and "extra norms" in placed.notes[0]
    assert opened(bundle, "gpu", [device("Vulkan0", GIB)]).device == "vulkan"


def test_this_build_lists_its_devices() -> None:
    found = ggml.devices()
    assert all(d.name and 0 <= d.free_bytes <= d.total_bytes for d in found)
    assert bool(found) <= bool(llama_cpp.llama_supports_gpu_offload())


# Rules


@pytest.mark.parametrize(
    ("x86", "decoder", "goal", "short", "repacking"),
    [
        (True, "q4_k_m", "both", False, "decode"),
        (True, "q4_k_m", "both", True, "off"),
        (True, "q4_k_m", "caption", False, "off"),
        (True, "q4_k_m", "chat", True, "decode"),
        (True, "q4_0", "caption", True, "on"),
        (False, "q4_k_m", "caption", True, "on"),
    ],
)
def test_repacking_follows_the_processor_the_types_and_the_answers(
    x86: bool, decoder: str, goal: Goal, short: bool, repacking: str
) -> None:
    facts = rules.Facts(2, decoder, x86, goal, short)
    assert rules.decide("repacking", facts) == repacking


def test_threads_are_the_cores() -> None:
    assert rules.decide("threads", rules.this_machine()) == physical_cores() >= 1


def test_every_setting_has_a_rule_that_always_holds() -> None:
    for name in {r.setting for r in rules.RULES}:
        found = rules.rule(name, rules.Facts(1, "", x86=False))
        assert found.evidence and found.when
