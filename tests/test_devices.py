"""Which device runs the picture's half: words, fallbacks, errors, options, first use."""

import dataclasses
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgevlm
from edgevlm.bundle import Bundle, open_bundle
from edgevlm.errors import EngineError, EngineMissing
from edgevlm.models import built_in
from edgevlm.runtimes import devices
from edgevlm.runtimes.vision import first_use, providers
from edgevlm.runtimes.vision.choose import Wish, open_encoder
from edgevlm.runtimes.vision.encoder import OrtEncoder
from edgevlm.runtimes.vision.ort import Ort, broken_plugins
from edgevlm.runtimes.vision.providers import PROVIDERS, Offer, candidates, label
from edgevlm.self_check import picture
from edgevlm.types import Placement
from tests.devices import Behaviour, Device, FakeOnnxruntime, Float

CUDA, QNN, DML = "CUDAExecutionProvider", "QNNExecutionProvider", "DmlExecutionProvider"
OPENVINO, WEBGPU = "OpenVINOExecutionProvider", "WebGpuExecutionProvider"
EVERYTHING = [Offer(p, "1") for p in PROVIDERS]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEVLM_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture(autouse=True)
def speeds(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Milliseconds for a picture by provider; the CPU takes 10, all others 1."""
    found = {"CPUExecutionProvider": 10.0}
    monkeypatch.setattr(first_use, "encode_ms", lambda e, size: found.get(e.provider, 1.0))
    return found


@pytest.fixture(scope="module")
def pico() -> Bundle:
    """The built-in bundle as older formats have it: providers are compared with the CPU."""
    bundle = open_bundle(built_in())
    return dataclasses.replace(
        bundle, manifest=dataclasses.replace(bundle.manifest, self_check=None)
    )


def place(
    bundle: Bundle, fake: FakeOnnxruntime, word: str, **wish: Any
) -> tuple[OrtEncoder, Placement]:
    return open_encoder(bundle, Wish(word, 1, **wish), Ort(fake))


# Words


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("auto", None, None), ("auto", "auto")),
        (("cpu", None, None), ("cpu", "cpu")),
        (("gpu", None, None), ("gpu", "gpu")),
        (("npu", None, None), ("npu", "auto")),
        (("cuda", None, None), ("cuda", "cuda")),
        (("openvino", None, None), ("openvino", "auto")),
        (("openvino:npu", None, None), ("openvino:npu", "auto")),
        (("vulkan", None, None), ("auto", "vulkan")),
        (("auto", "npu", "gpu"), ("npu", "gpu")),
        (("cuda", "cpu", None), ("cpu", "cuda")),
        (("npu", None, "npu"), ("npu", "npu")),
    ],
)
def test_one_word_serves_both_halves(
    given: tuple[str, str | None, str | None], expected: tuple[str, str]
) -> None:
    found = devices.split(
        *given, vision_words={"cuda", "openvino"}, decoder_words={"cuda", "vulkan"}
    )
    assert found == expected


@pytest.mark.parametrize(
    "given",
    [
        ("tpu", None, None),
        ("auto", "vulkan", None),
        ("auto", None, "openvino"),
        ("openvino:tpu", None, None),
        ("auto:gpu", None, None),
        ("", None, None),
    ],
)
def test_words_nobody_knows_are_refused_with_those_that_are(
    given: tuple[str, str | None, str | None],
) -> None:
    with pytest.raises(EngineMissing, match="unknown device .*; choose auto, cpu, gpu, npu, cuda"):
        devices.split(*given, vision_words={"cuda", "openvino"}, decoder_words={"cuda", "vulkan"})


def test_every_provider_answers_to_its_word_and_its_kind() -> None:
    for provider in PROVIDERS:
        for word in (provider.word, label(provider)):
            assert provider in [o.provider for o in candidates(word, EVERYTHING)]
        assert [o.word for o in candidates(label(provider), EVERYTHING)] == [label(provider)]
    for kind in ("cpu", "gpu", "npu"):
        found = [o.provider for o in candidates(kind, EVERYTHING)]
        assert found == [p for p in PROVIDERS if p.kind == kind and p.auto]


def test_auto_prefers_what_is_faster_and_ends_with_the_cpu() -> None:
    words = [o.word for o in candidates("auto", EVERYTHING)]
    assert words[0] == "cuda" and words[-1] == "cpu"
    # Minutes of compilation, or slower than the CPU's own provider.
    assert not {"tensorrt", "openvino:cpu", "xnnpack"} & set(words)


def test_what_is_not_installed_is_an_error_with_the_line_that_installs_it(pico: Bundle) -> None:
    for word in ("gpu", "npu", "cuda", "webgpu"):
        with pytest.raises(EngineMissing, match=f"{word}.*there are: cpu.*pip "):
            place(pico, FakeOnnxruntime(), word)
    with pytest.raises(EngineMissing, match="does not exist on this system"):
        candidates("coreml" if sys.platform != "darwin" else "directml", [])


# Placing


def test_the_cpu_is_the_default_and_nothing_is_compared(pico: Bundle) -> None:
    fake = FakeOnnxruntime()
    encoder, placed = place(pico, fake, "auto")
    assert (placed.device, placed.precision, placed.cosine) == ("cpu", "int8", None)
    assert fake.names == ["CPUExecutionProvider"] * 2
    assert str(placed) == "cpu"
    assert encoder.provider == "CPUExecutionProvider"


def test_a_sound_provider_is_used_and_its_nodes_are_counted(pico: Bundle) -> None:
    fake = FakeOnnxruntime({CUDA: Behaviour(share=0.9)})
    encoder, placed = place(pico, fake, "auto")
    assert (placed.asked, placed.device, placed.engine) == ("auto", "cuda", CUDA)
    assert (placed.placed, placed.total) == (180, 200)
    assert str(placed) == "cuda, 180 of 200 nodes, 20 on the CPU, cosine 1.0000"
    assert encoder.features(picture(112)).shape == (1, 64, 320)
    assert encoder.features(np.zeros((2, 3, 112, 112), np.float32)).shape == (2, 64, 320)


@pytest.mark.parametrize(
    ("does", "reason"),
    [
        (Behaviour(fails="no driver\nat line 3"), "cuda: no driver$"),
        (Behaviour(starts=False), "cuda: onnxruntime cannot start it here"),
        (Behaviour(share=0), "cuda: it runs none of the graphs' 200 nodes"),
        (Behaviour(numbers=lambda x: x[..., ::-1].copy()), "cuda: its features differ from the"),
        (Behaviour(numbers=lambda x: x * np.nan), "cuda: its features differ.*cosine -1.0000"),
    ],
)
def test_auto_falls_back_and_says_why_and_a_named_device_is_an_error(
    pico: Bundle, does: Behaviour, reason: str
) -> None:
    fake = FakeOnnxruntime({CUDA: does})
    _, placed = place(pico, fake, "auto")
    assert placed.device == "cpu"
    (note,) = placed.notes
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(note)
    for word in ("cuda", "gpu"):
        with pytest.raises(
            EngineError, match=f"'{word}' cannot run the vision encoder: {reason[:9]}"
        ):
            place(pico, fake, word)


def test_auto_takes_the_next_provider_before_the_cpu(pico: Bundle) -> None:
    fake = FakeOnnxruntime({CUDA: Behaviour(fails="no driver"), WEBGPU: Behaviour()})
    _, placed = place(pico, fake, "auto")
    assert (placed.device, placed.notes) == ("webgpu", ("cuda: no driver",))
    assert place(pico, fake, "gpu")[1].device == "webgpu"


def test_auto_leaves_a_provider_that_is_slower_than_the_cpu(
    pico: Bundle, speeds: dict[str, float]
) -> None:
    speeds[CUDA] = 25.0
    fake = FakeOnnxruntime({CUDA: Behaviour(share=0.25)})
    _, placed = place(pico, fake, "auto")
    assert placed.device == "cpu"
    assert placed.notes == ("cuda: it encodes a picture in 25 ms, the CPU in 10 ms",)
    assert str(place(pico, fake, "cuda")[1]).startswith("cuda, 50 of 200 nodes, 150 on the CPU")


def test_the_cpu_is_timed_at_the_precision_it_runs_best(
    pico: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    vision = pico.manifest.components["vision"]
    other = {"fp16": dataclasses.replace(vision, precision="fp16")}
    both = dataclasses.replace(
        pico, manifest=dataclasses.replace(pico.manifest, alternatives=other)
    )
    fake = FakeOnnxruntime({CUDA: Behaviour()})
    place(both, fake, "cuda", cpu_precisions=("int8",))
    # Beside CUDA's: one of the same precision for the features, one of int8 for the time.
    assert fake.names.count("CPUExecutionProvider") == 4


def test_an_onnxruntime_that_cannot_say_what_runs_where_stays_on_the_cpu(pico: Bundle) -> None:
    class Old(FakeOnnxruntime):
        InferenceSession = types.SimpleNamespace

        def get_available_providers(self) -> list[str]:
            return [CUDA]

    with pytest.raises(EngineError, match="onnxruntime 1.32.0 cannot say.*install 1.24"):
        place(pico, Old(), "cuda")


# First use


def test_the_first_use_is_remembered(pico: Bundle, home: Path) -> None:
    fake = FakeOnnxruntime({CUDA: Behaviour()})
    place(pico, fake, "cuda")
    assert fake.names.count("CPUExecutionProvider") == 2
    (kept,) = (home / "cache" / "devices" / "first-use").iterdir()
    assert json.loads(kept.read_text(encoding="utf-8"))["cosine"] == pytest.approx(1)
    _, placed = place(pico, fake, "cuda")
    assert placed.cosine == pytest.approx(1)
    assert fake.names.count("CPUExecutionProvider") == 2


def test_a_wrong_provider_is_not_even_opened_again(pico: Bundle) -> None:
    fake = FakeOnnxruntime({CUDA: Behaviour(numbers=lambda x: -x)})
    with pytest.raises(EngineError, match=r"cosine -1\.0000, at least 0\.99"):
        place(pico, fake, "cuda")
    n = len(fake.opened)
    with pytest.raises(EngineError, match="differ from the CPU's"):
        place(pico, fake, "cuda")
    assert len(fake.opened) == n


@pytest.mark.parametrize("change", ["version", "description"])
def test_another_version_or_device_is_a_first_use_again(pico: Bundle, change: str) -> None:
    device = Device(CUDA, "gpu")
    fake = FakeOnnxruntime({CUDA: Behaviour(numbers=lambda x: -x)}, [device])
    with pytest.raises(EngineError):
        place(pico, fake, "cuda")
    fake.providers[CUDA] = Behaviour()
    another: dict[str, Any] = {change: "another"}
    fake.devices = [dataclasses.replace(device, **another)]
    assert place(pico, fake, "cuda")[1].cosine == pytest.approx(1)


@pytest.mark.fault("Caches", "a damaged note of a device's first use", "measured anew")
def test_a_damaged_memory_is_made_anew(pico: Bundle, home: Path) -> None:
    fake = FakeOnnxruntime({CUDA: Behaviour()})
    place(pico, fake, "cuda")
    (kept,) = (home / "cache" / "devices" / "first-use").iterdir()
    kept.write_text("{}", encoding="utf-8")
    assert place(pico, fake, "cuda")[1].cosine == pytest.approx(1)
    assert "cosine" in kept.read_text(encoding="utf-8")


@pytest.mark.fault("Home", "nowhere to keep what devices compile", "works, compiled anew each time")
@pytest.mark.parametrize("provider", [OPENVINO, QNN])
def test_a_home_that_keeps_nothing_costs_the_second_start_alone(
    pico: Bundle, home: Path, monkeypatch: pytest.MonkeyPatch, provider: str
) -> None:
    (home / "file").write_text("no folder", encoding="utf-8")
    monkeypatch.setenv("EDGEVLM_HOME", str(home / "file"))
    fake = FakeOnnxruntime({provider: Behaviour()}, [Device(provider, "npu")])
    for _ in range(2):
        assert place(pico, fake, "npu")[1].cosine == pytest.approx(1)
    npu = [o for o in fake.opened if o.provider == provider]
    if provider == OPENVINO:
        assert all(os.path.isdir(folder) for o in npu for folder in o.options.values())
    assert fake.names.count("CPUExecutionProvider") == 4  # Compared each time.
    fake.providers[provider] = Behaviour(fails="no such device")
    with pytest.raises(EngineError, match="no such device"):
        place(pico, fake, "npu")


def test_one_wrong_row_is_found(pico: Bundle) -> None:
    def one_row(x: Float) -> Float:
        return np.concatenate([x[:, :-1], -x[:, -1:]], 1)

    with pytest.raises(EngineError, match=r"cosine 0\.7"):
        place(pico, FakeOnnxruntime({CUDA: Behaviour(numbers=one_row)}), "cuda")


# Options


def test_options_of_a_provider_chosen_by_name(pico: Bundle, home: Path) -> None:
    fake = FakeOnnxruntime({CUDA: Behaviour()})
    place(pico, fake, "cuda", spin=False)
    vision, projector = fake.opened[:2]
    assert (vision.graph.name, projector.graph.name) == ("vision.onnx", "projector.onnx")
    assert vision.options == {
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
        "use_tf32": "0",
    }
    assert vision.dimensions == {"n": 1}
    assert vision.entries["session.intra_op.allow_spinning"] == "0"
    assert vision.entries["session.record_ep_graph_assignment_info"] == "1"
    assert vision.mem_pattern


def test_options_of_a_provider_chosen_by_device(pico: Bundle, home: Path) -> None:
    fake = FakeOnnxruntime({OPENVINO: Behaviour()}, [Device(OPENVINO, "npu")])
    assert place(pico, fake, "npu")[1].device == "openvino:npu"
    (folder,) = fake.opened[0].options.values()
    # The device API says which device it is; OpenVINO refuses to be told again.
    assert set(fake.opened[0].options) == {"cache_dir"}
    assert folder.startswith(str(home / "cache" / "devices" / "compiled"))
    with pytest.raises(EngineMissing):
        place(pico, fake, "gpu")


def test_a_named_openvino_is_told_its_device(pico: Bundle) -> None:
    fake = FakeOnnxruntime({OPENVINO: Behaviour()}, openvino_devices=["CPU"])
    assert place(pico, fake, "openvino")[1].device == "openvino:cpu"
    assert fake.opened[0].options["device_type"] == "CPU"
    assert fake.opened[0].threads == 1
    assert place(pico, fake, "auto")[1].device == "cpu"


def test_directml_needs_its_memory_pattern_off(pico: Bundle) -> None:
    fake = FakeOnnxruntime({DML: Behaviour()})
    place(pico, fake, "directml")
    assert not fake.opened[0].mem_pattern


def test_compiled_graphs_are_read_the_second_time(pico: Bundle) -> None:
    fake = FakeOnnxruntime({QNN: Behaviour()}, [Device(QNN, "npu")])
    for _ in range(2):
        place(pico, fake, "qnn")
    npu = [o for o in fake.opened if o.provider == QNN]
    assert [o.graph.name for o in npu] == [
        "vision.onnx", "projector.onnx", "vision.ctx.onnx", "projector.ctx.onnx"
    ]  # fmt: skip
    assert [o.entries.get("ep.context_enable") for o in npu] == ["1", "1", None, None]
    fake.providers[QNN] = Behaviour(fails="made by another version")
    with pytest.raises(EngineError, match="another version"):
        place(pico, fake, "qnn")
    assert not npu[2].graph.exists()


def test_every_option_is_filled_in() -> None:
    values = {"folder": "F", "threads": 2}
    for provider in PROVIDERS:
        for value in (*provider.options.values(), *provider.device.values()):
            assert "{" not in value.format(**values)


def test_the_precision_is_the_one_that_the_provider_runs_best(pico: Bundle, tmp_path: Path) -> None:
    # The same graph under other names: only the choice is of interest.
    vision = pico.manifest.components["vision"]
    names = {p: dataclasses.replace(vision, precision=p) for p in ("fp16", "qdq8", "fp32")}
    several = dataclasses.replace(
        pico, manifest=dataclasses.replace(pico.manifest, alternatives=names)
    )
    fake = FakeOnnxruntime({CUDA: Behaviour()}, [Device(QNN, "npu")])
    assert place(several, fake, "cuda")[1].precision == "fp16"
    assert place(several, fake, "npu")[1].precision == "qdq8"
    assert place(several, fake, "cpu")[1].precision == "int8"
    assert place(several, fake, "cpu", cpu_precisions=("fp32",))[1].precision == "fp32"
    assert place(pico, fake, "npu")[1].precision == "int8"


# Plugins


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("onnxruntime_ep_webgpu")
    module.get_library_path = lambda: "/plugins/webgpu.so"
    module.__spec__ = types.SimpleNamespace(name=module.__name__)
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_plugin_providers_are_loaded_once_under_their_own_name(pico: Bundle, plugin: None) -> None:
    device = Device(WEBGPU, "gpu", version="0.4.0", description="Radeon 780M")
    fake = FakeOnnxruntime({WEBGPU: Behaviour()}, plugins={"/plugins/webgpu.so": device})
    _, placed = place(pico, fake, "gpu")
    assert (placed.device, placed.hardware) == ("webgpu", "Radeon 780M")
    assert fake.libraries == {WEBGPU: "/plugins/webgpu.so"}
    fake.libraries[WEBGPU] = "loaded"
    Ort(fake).offers()
    assert fake.libraries == {WEBGPU: "loaded"}


def test_a_plugin_that_does_not_load_is_told_by_doctor_only(pico: Bundle, plugin: None) -> None:
    fake = FakeOnnxruntime()
    assert place(pico, fake, "auto")[1].device == "cpu"
    assert broken_plugins()[WEBGPU] == "/plugins/webgpu.so: cannot open shared object"


def test_virtual_devices_compute_nothing(pico: Bundle) -> None:
    device = Device(QNN, "npu", virtual=True)
    fake = FakeOnnxruntime({QNN: Behaviour()}, [device])
    assert [o.word for o in Ort(fake).offers()] == ["cpu"]
    assert [o.word for o in Ort(fake).offers(virtual=True)] == ["qnn", "cpu"]
    assert place(pico, fake, "auto")[1].device == "cpu"


def test_a_provider_that_the_table_does_not_know_can_be_named(pico: Bundle) -> None:
    fake = FakeOnnxruntime({"MLXExecutionProvider": Behaviour()})
    assert place(pico, fake, "mlx")[1].device == "mlx"
    assert place(pico, fake, "auto")[1].device == "cpu"


def test_one_kind_of_a_plugins_devices(pico: Bundle) -> None:
    found = [Device(OPENVINO, kind) for kind in ("cpu", "gpu", "npu")]
    fake = FakeOnnxruntime({OPENVINO: Behaviour()}, found)
    for kind in ("cpu", "gpu", "npu"):
        assert place(pico, fake, f"openvino:{kind}")[1].device == f"openvino:{kind}"
    assert place(pico, fake, "openvino")[1].device == "openvino:npu"


def test_a_loaded_model_says_where_it_runs() -> None:
    with edgevlm.load(device="cpu") as vlm:
        assert vlm.devices.vision.device == vlm.devices.decoder.device == "cpu"
        assert vlm.chat().devices is vlm.devices


def test_missing_lists_what_is_not_offered() -> None:
    assert not providers.missing(EVERYTHING)
    assert {p.word for p in providers.missing([])} >= {"webgpu", "cpu"}
