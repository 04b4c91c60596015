"""onnxruntime's execution providers as a table, and which of them a word chooses.

Only data and pure functions: `ort.py` asks onnxruntime what it offers, `choose.py` tries the
choices in turn. onnxruntime's own selection policies (PREFER_NPU and so on) are not used: they do
not say what was passed over. The order of this table is the preference of `auto`, `gpu` and `npu`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from edgevlm.errors import EngineMissing
from edgevlm.runtimes.devices import base

Kind = Literal["cpu", "gpu", "npu"]
EVERYWHERE = ("linux", "darwin", "win32")


@dataclass(frozen=True)
class Provider:
    """One provider on one kind of device.

    word, kind: what the user says. name: onnxruntime's. install: the line that installs it. plugin:
    a module whose get_library_path() onnxruntime loads. systems: sys.platform where it exists.
    auto: whether `auto`, `gpu` and `npu` may take it; `auto` does only where it is faster than the
    CPU. precisions: of the vision encoder, the ones it runs best first. options: for the provider;
    device: those that choose the hardware, needless where onnxruntime's device API does. `{folder}`
    in a value is a folder for what is compiled, `{threads}` the number of threads. context:
    compiled graphs are kept as an ONNX file that holds the provider's own binary. plain_memory:
    onnxruntime's memory pattern must be off. threads: the provider has workers of its own,
    onnxruntime's would be idle.
    """

    word: str
    kind: Kind
    name: str
    install: str
    plugin: str = ""
    systems: tuple[str, ...] = EVERYWHERE
    auto: bool = True
    precisions: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    device: Mapping[str, str] = field(default_factory=dict)
    context: bool = False
    plain_memory: bool = False
    threads: bool = False


def _instead(package: str) -> str:
    """These wheels hold the module onnxruntime themselves; two of them overwrite each other."""
    return f"pip uninstall -y onnxruntime && pip install {package}"


_FLOATS_FIRST = ("fp16", "fp32", "qdq8")
_QUANTIZED_FIRST = ("qdq8", "fp16", "fp32")
_OPENVINO = {
    "word": "openvino",
    "name": "OpenVINOExecutionProvider",
    "install": "pip install onnxruntime-ep-openvino",
    "plugin": "onnxruntime_ep_openvino",
    "systems": ("linux", "win32"),
    # cache_dir: compiled blobs. Source: onnxruntime's page on this provider, "Summary of options".
    "options": {"cache_dir": "{folder}"},
}


def _coreml(kind: Kind, units: str) -> Provider:
    """Core ML on one kind of device; options from onnxruntime's page on it."""
    return Provider(
        "coreml",
        kind,
        "CoreMLExecutionProvider",
        "pip install onnxruntime",
        systems=("darwin",),
        precisions=_FLOATS_FIRST,
        # MLProgram knows more operators than NeuralNetwork and computes in the graph's precision.
        options={
            "ModelFormat": "MLProgram",
            "MLComputeUnits": units,
            "RequireStaticInputShapes": "1",
            "ModelCacheDirectory": "{folder}",
        },
    )


CPU = Provider("cpu", "cpu", "CPUExecutionProvider", "pip install onnxruntime")

# Pages named here are onnxruntime.ai/docs/execution-providers/NAME-ExecutionProvider.
PROVIDERS: tuple[Provider, ...] = (
    Provider(
        "cuda",
        "gpu",
        "CUDAExecutionProvider",
        _instead("onnxruntime-gpu"),
        systems=("linux", "win32"),
        precisions=_FLOATS_FIRST,
        # Page CUDA: the default arena doubles at each growth, which a decoder on the same GPU
        # cannot spare; EXHAUSTIVE search tries every convolution for one patch embedding; TF32
        # keeps 10 bits of a float32.
        options={
            "arena_extend_strategy": "kSameAsRequested",
            "cudnn_conv_algo_search": "HEURISTIC",
            "use_tf32": "0",
        },
    ),
    Provider(
        "tensorrt-rtx",
        "gpu",
        "NvTensorRTRTXExecutionProvider",
        "pip install onnxruntime-ep-nv-tensorrt-rtx",
        plugin="onnxruntime_ep_nv_tensorrt_rtx",
        systems=("linux", "win32"),
        precisions=_FLOATS_FIRST,
        # Page TensorRTRTX: kernels compiled at the first run are kept in this folder.
        options={"nv_runtime_cache_path": "{folder}"},
    ),
    Provider(
        "tensorrt",
        "gpu",
        "TensorrtExecutionProvider",
        _instead("onnxruntime-gpu tensorrt"),
        systems=("linux", "win32"),
        # It builds its engine for minutes at the first start.
        auto=False,
        precisions=_FLOATS_FIRST,
        # Page TensorRT: engine and timing caches; half precision is what the bundle's file says.
        options={
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": "{folder}",
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": "{folder}",
        },
    ),
    Provider(
        "migraphx",
        "gpu",
        "MIGraphXExecutionProvider",
        _instead("onnxruntime-migraphx"),
        systems=("linux",),
        precisions=_FLOATS_FIRST,
        # Page MIGraphX.
        options={"migraphx_model_cache_dir": "{folder}"},
    ),
    _coreml("gpu", "CPUAndGPU"),
    _coreml("npu", "CPUAndNeuralEngine"),
    Provider(
        "qnn",
        "npu",
        "QNNExecutionProvider",
        "pip install onnxruntime-qnn",
        plugin="onnxruntime_qnn",
        systems=("linux", "win32"),
        precisions=_QUANTIZED_FIRST,
        # Page QNN: the HTP back end is the NPU; burst for single requests; 3 optimizes the graph
        # longest, which the context cache pays back.
        options={
            "htp_performance_mode": "burst",
            "htp_graph_finalization_optimization_mode": "3",
            "enable_htp_fp16_precision": "1",
        },
        device={"backend_type": "htp"},
        context=True,
    ),
    Provider(**_OPENVINO, kind="npu", precisions=_QUANTIZED_FIRST, device={"device_type": "NPU"}),  # type: ignore[arg-type]
    Provider(
        "vitisai",
        "npu",
        "VitisAIExecutionProvider",
        "install AMD's Ryzen AI Software, which brings its own onnxruntime",
        systems=("linux", "win32"),
        precisions=_QUANTIZED_FIRST,
        # Page Vitis-AI: cache_dir/cache_key is where the compiled model is kept.
        options={"cache_dir": "{folder}", "cache_key": "compiled"},
    ),
    Provider(**_OPENVINO, kind="gpu", precisions=_FLOATS_FIRST, device={"device_type": "GPU"}),  # type: ignore[arg-type]
    Provider(
        "directml",
        "gpu",
        "DmlExecutionProvider",
        _instead("onnxruntime-directml"),
        systems=("win32",),
        precisions=_FLOATS_FIRST,
        # Page DirectML: it supports neither memory patterns nor parallel execution.
        plain_memory=True,
    ),
    Provider(
        "webgpu",
        "gpu",
        "WebGpuExecutionProvider",
        "pip install onnxruntime-ep-webgpu",
        plugin="onnxruntime_ep_webgpu",
        precisions=_FLOATS_FIRST,
    ),
    Provider(
        **_OPENVINO,  # type: ignore[arg-type]
        kind="cpu",
        # It loads for seconds and was not faster than onnxruntime's own CPU (docs/devices.md).
        auto=False,
        precisions=("qdq8", "fp32", "fp16"),
        device={"device_type": "CPU", "num_of_threads": "{threads}"},
        threads=True,
    ),
    Provider(
        "xnnpack",
        "cpu",
        "XnnpackExecutionProvider",
        "build onnxruntime from source with --use_xnnpack",
        auto=False,
        precisions=("fp32", "fp16"),
        # Page XNNPACK: a pool of its own; onnxruntime's is to have one thread that does not spin.
        options={"intra_op_num_threads": "{threads}"},
        threads=True,
    ),
    CPU,
)
WORDS = tuple(dict.fromkeys(p.word for p in PROVIDERS))

# onnxruntime lists these beside the others; they compute nothing on this machine.
_REMOTE = ("AzureExecutionProvider", "JsExecutionProvider", "WebNNExecutionProvider")


@dataclass(frozen=True)
class Offer:
    """A provider that is installed here.

    version: of the provider, or of the onnxruntime that it is built into. hardware: the device's
    name, "" where only the provider knows. handle: onnxruntime's own object for a device of its
    device API, None for a provider that is chosen by name.
    """

    provider: Provider
    version: str
    hardware: str = ""
    handle: Any = None

    @property
    def word(self) -> str:
        """`provider`, or `provider:kind` where the table has several kinds of it."""
        return label(self.provider)


def label(provider: Provider) -> str:
    """`provider`, or `provider:kind` where the table has several kinds of it."""
    several = sum(p.word == provider.word for p in PROVIDERS) > 1
    return f"{provider.word}:{provider.kind}" if several else provider.word


def rows(name: str, kind: str | None = None) -> list[Provider]:
    """The table's rows of onnxruntime's name; a provider it does not know gets a plain one."""
    if name in _REMOTE:
        return []
    known = [p for p in PROVIDERS if p.name == name]
    if not known:
        word = name.removesuffix("ExecutionProvider").lower()
        known = [Provider(word, kind or "gpu", name, "", auto=False)]  # type: ignore[arg-type]
    return [p for p in known if kind in (None, p.kind)]


def candidates(word: str, offers: Sequence[Offer]) -> list[Offer]:
    """The offers that a word allows, the best first; `auto` ends with the CPU.

    Raises EngineMissing, with the line that installs it, where there is none.
    """
    if word == "auto":
        return [o for o in offers if o.provider.auto]
    if word == "cpu":
        return [o for o in offers if o.provider is CPU]
    if word in ("gpu", "npu"):
        found = [o for o in offers if o.provider.kind == word and o.provider.auto]
    else:
        found = [o for o in offers if word in (o.provider.word, o.word)]
    if not found:
        raise EngineMissing(
            f"device {word!r} cannot run the vision encoder: no provider of onnxruntime for it "
            f"is installed (there are: {', '.join(o.word for o in offers)})",
            install_line(word),
        )
    return found


def install_line(word: str) -> str:
    """The line that installs a device's package on this system."""
    wanted = [
        p
        for p in PROVIDERS
        if (word in (p.kind, p.word, label(p))) and sys.platform in p.systems and p is not CPU
    ]
    lines = list(dict.fromkeys(p.install for p in wanted if p.auto or base(word) == p.word))
    if not lines:
        return f"{word} does not exist on this system; choose another"
    others = ", or another line of `edgevlm doctor`" if len(lines) > 1 else ""
    return lines[0] + others


def missing(offers: Iterable[Offer]) -> list[Provider]:
    """The table's rows for this system that nothing installed offers."""
    there = {(o.provider.word, o.provider.kind) for o in offers}
    return [p for p in PROVIDERS if sys.platform in p.systems and (p.word, p.kind) not in there]


def pick(preferred: Sequence[str], there: Sequence[str]) -> str:
    """The first preferred precision that is there, else the bundle's main one, the first."""
    return next((p for p in preferred if p in there), there[0])
