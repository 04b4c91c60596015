"""A stand-in for onnxruntime with providers of any kind, whose graphs the real CPU computes."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

Float = np.ndarray[Any, np.dtype[np.float32]]


@dataclass
class Behaviour:
    """What a fake provider does with a graph: its share of the nodes, its numbers, its failures."""

    share: float = 1.0
    numbers: Callable[[Float], Float] = lambda x: x
    fails: str = ""
    starts: bool = True


@dataclass(eq=False)
class Device:
    """One device of the device API."""

    ep_name: str
    kind: str
    version: str = "1.0"
    description: str = "a fake"
    virtual: bool = False

    @property
    def ep_metadata(self) -> dict[str, str]:
        return {"version": self.version}

    @property
    def device(self) -> Any:
        kind = types.SimpleNamespace(name=self.kind.upper())
        metadata = {"Description": self.description} | ({"is_virtual": "1"} if self.virtual else {})
        return types.SimpleNamespace(type=kind, vendor="", metadata=metadata)


@dataclass
class Opened:
    """One session as it was asked for."""

    graph: Path
    provider: str
    options: dict[str, str]
    entries: dict[str, str]
    dimensions: dict[str, int]
    threads: int
    mem_pattern: bool


@dataclass(eq=False)
class FakeOnnxruntime:
    """The module onnxruntime; `providers` maps its names to what they do."""

    providers: dict[str, Behaviour] = field(default_factory=dict)
    devices: list[Device] = field(default_factory=list)
    opened: list[Opened] = field(default_factory=list)
    libraries: dict[str, str] = field(default_factory=dict)
    plugins: dict[str, Device] = field(default_factory=dict)
    openvino_devices: list[str] = field(default_factory=list)
    __version__ = "1.32.0"
    RunOptions = onnxruntime.RunOptions

    @property
    def capi(self) -> Any:
        state = types.SimpleNamespace(
            get_available_openvino_device_ids=lambda: self.openvino_devices
        )
        return types.SimpleNamespace(_pybind_state=state)

    def get_available_providers(self) -> list[str]:
        built_in = [
            p for p in self.providers if p not in {d.ep_name for d in self.plugins.values()}
        ]
        return [*built_in, "AzureExecutionProvider", "CPUExecutionProvider"]

    def get_ep_devices(self) -> list[Device]:
        loaded = [d for path, d in self.plugins.items() if path in self.libraries.values()]
        return [*self.devices, *loaded]

    def register_execution_provider_library(self, name: str, path: str) -> None:
        if path not in self.plugins:
            raise RuntimeError(f"{path}: cannot open shared object\nmore")
        self.libraries[name] = path

    def set_default_logger_severity(self, severity: int) -> None:
        assert severity == 4

    def SessionOptions(self) -> Any:
        return _Options()

    @property
    def InferenceSession(self) -> Any:
        fake = self

        class Session(_Session):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(fake, *args, **kwargs)

        return Session

    @property
    def names(self) -> list[str]:
        """The providers of all sessions opened so far."""
        return [o.provider for o in self.opened]


class _Options:
    def __init__(self) -> None:
        self.entries: dict[str, str] = {}
        self.dimensions: dict[str, int] = {}
        self.device: tuple[str, dict[str, str]] | None = None
        self.enable_mem_pattern = True
        self.intra_op_num_threads = 0

    def add_session_config_entry(self, key: str, value: str) -> None:
        self.entries[key] = value

    def add_free_dimension_override_by_name(self, name: str, size: int) -> None:
        self.dimensions[name] = size

    def add_provider_for_devices(self, devices: list[Device], options: dict[str, str]) -> None:
        assert len({d.ep_name for d in devices}) == 1
        self.device = devices[0].ep_name, options


class _Session:
    def __init__(
        self,
        fake: FakeOnnxruntime,
        graph: str,
        options: _Options,
        providers: list[Any] | None = None,
        enable_fallback: int = 1,
    ) -> None:
        name, given = options.device or _named(providers)
        # A real one prints and goes on with the CPU unless it is told not to.
        assert name == "CPUExecutionProvider" or options.device or enable_fallback == 0
        fake.opened.append(
            Opened(
                Path(graph),
                name,
                given,
                options.entries,
                options.dimensions,
                options.intra_op_num_threads,
                options.enable_mem_pattern,
            )
        )
        self._does = fake.providers.get(name, Behaviour())
        self._name = name
        if self._does.fails:
            raise RuntimeError(self._does.fails)
        source = Path(graph)
        if context := options.entries.get("ep.context_file_path"):
            Path(context).write_text(str(source), encoding="utf-8")
        elif source.name.endswith(".ctx.onnx"):
            source = Path(source.read_text(encoding="utf-8"))
        self._real = _real(source)

    def run(self, names: Any, feed: Any, run: Any) -> list[Float]:
        (found,) = self._real.run(names, feed, run)
        return [self._does.numbers(found)]

    def get_providers(self) -> list[str]:
        return (
            [self._name, "CPUExecutionProvider"] if self._does.starts else ["CPUExecutionProvider"]
        )

    def get_provider_graph_assignment_info(self) -> list[Any]:
        here = int(self._does.share * 100)
        return [_part(self._name, here), _part("CPUExecutionProvider", 100 - here)]


@functools.cache
def _real(graph: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])


def _named(providers: list[Any] | None) -> tuple[str, dict[str, str]]:
    assert providers is not None
    first = providers[0]
    return (first, {}) if isinstance(first, str) else first


def _part(name: str, nodes: int) -> Any:
    return types.SimpleNamespace(ep_name=name, get_nodes=lambda: [object()] * nodes)
