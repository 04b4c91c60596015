"""onnxruntime's sessions and devices; the only module of the runtime that imports it.

Everything goes through `Ort.module`, so that a stand-in can answer in its place.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnxruntime

from edgevlm.errors import BundleCorrupt, OutOfMemory
from edgevlm.runtimes.memory import was_refused
from edgevlm.runtimes.vision.providers import CPU, PROVIDERS, Offer, Provider, rows

# A library registered under a name with this end may offer virtual devices (onnxruntime 1.24).
_VIRTUAL = ".virtual"


class Unfit(Exception):
    """A provider cannot run this graph here; the message is the reason."""


@dataclass(frozen=True)
class Counts:
    """Number of a graph's nodes that a provider runs, and of all of them."""

    placed: int
    total: int

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.placed + other.placed, self.total + other.total)


class Ort:
    """onnxruntime, or a module that answers like it."""

    def __init__(self, module: Any = onnxruntime) -> None:
        self.module = module

    @property
    def version(self) -> str:
        """onnxruntime's version."""
        return str(self.module.__version__)

    def offers(self, virtual: bool = False) -> list[Offer]:
        """Installed providers and their devices, in the order of the table of providers.

        `virtual` adds devices that are not here: plugins make them up to compile for them.
        """
        self._load_plugins(_VIRTUAL if virtual else "")
        devices = [d for d in self._devices() if virtual or not d.device.metadata.get("is_virtual")]
        found = []
        for device in devices:
            kind = str(getattr(device.device.type, "name", device.device.type)).lower()
            version = device.ep_metadata.get("version", self.version)
            name = _hardware(device.device)
            provider = device.ep_name.removesuffix(_VIRTUAL)
            found += [Offer(p, version, name, device) for p in rows(provider, kind)]
        named = {device.ep_name for device in self._devices()}
        for name in self.module.get_available_providers():
            if name not in named:
                found += [Offer(p, self.version) for p in rows(name) if self._there(p)]
        order = {id(p): i for i, p in enumerate(PROVIDERS)}
        last = len(order) - 1  # Before the CPU.
        return sorted(found, key=lambda o: order.get(id(o.provider), last - 0.5))

    def _devices(self) -> Sequence[Any]:
        """The device API's devices; none before onnxruntime 1.22, which brought it."""
        get = getattr(self.module, "get_ep_devices", None)
        return get() if get else ()

    def _there(self, provider: Provider) -> bool:
        """True if a provider that is chosen by name has its device, where one can know."""
        if provider.word != "openvino":
            return True
        devices: list[str] = self.module.capi._pybind_state.get_available_openvino_device_ids()
        return any(d.startswith(provider.device["device_type"]) for d in devices)

    def _load_plugins(self, suffix: str) -> None:
        """Loads the providers that are packages of their own, each once in a process."""
        register = getattr(self.module, "register_execution_provider_library", None)
        if register is None:
            return
        for name, plugin in {p.name: p.plugin for p in PROVIDERS if p.plugin}.items():
            if (self.module, name + suffix) in _loaded or find_spec(plugin) is None:
                continue
            try:
                path = importlib.import_module(plugin).get_library_path()
                # The provider's own name: some libraries call their devices by the one given.
                register(name + suffix, str(path))
            except Exception as e:
                _broken[name] = first_line(e)
            _loaded.add((self.module, name + suffix))

    def run_options(self) -> Any:
        """Options of one run, which another thread may end."""
        options = self.module.RunOptions()
        # A fatal message of a cancelled run would go to stderr.
        options.log_severity_level = 4
        return options

    def session(
        self,
        graph: Path,
        offer: Offer,
        threads: int,
        spin: bool,
        folder: Path,
        *,
        prepack: bool = True,
    ) -> Any:
        """A session of one graph on one provider; `folder` keeps what the provider compiles.
        Without `prepack` the weights stay in the file's order.

        Raises BundleCorrupt if the CPU cannot load the graph, OutOfMemory where there is none for
        it, Unfit if another provider cannot.
        """
        provider = offer.provider
        options = self._options(provider, threads, spin)
        if not prepack:
            options.add_session_config_entry("session.disable_prepacking", "1")
        if provider is CPU:
            try:
                # A second try, which would be the same, is announced on stdout.
                return self.module.InferenceSession(
                    str(graph), options, providers=[CPU.name], enable_fallback=False
                )
            except Exception as e:
                reason = first_line(e)
            if was_refused(reason):
                raise OutOfMemory(str(graph))
            raise BundleCorrupt(graph, f"onnxruntime cannot load it ({reason})")
        if not hasattr(self.module.InferenceSession, "get_provider_graph_assignment_info"):
            raise Unfit(f"onnxruntime {self.version} cannot say what runs where; install 1.24")
        compiled = folder / f"{graph.stem}.ctx.onnx"
        if provider.context and compiled.exists():
            graph = compiled
        elif provider.context:
            options.add_session_config_entry("ep.context_enable", "1")
            options.add_session_config_entry("ep.context_file_path", str(compiled))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            session = self._open(graph, options, offer, {"folder": folder, "threads": threads})
        except Exception as e:
            # What was compiled by another version may be of no use; it is made again next time.
            with contextlib.suppress(OSError):
                compiled.unlink()
            raise Unfit(first_line(e)) from None
        if provider.name not in session.get_providers():
            raise Unfit("onnxruntime cannot start it here; its driver or libraries are missing")
        return session

    def _options(self, provider: Provider, threads: int, spin: bool) -> Any:
        options = self.module.SessionOptions()
        options.intra_op_num_threads = 1 if provider.threads else threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
        if provider is not CPU:
            # One picture at a time, so every shape is known and compilers can plan for it.
            options.add_free_dimension_override_by_name("n", 1)
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        options.enable_mem_pattern = not provider.plain_memory
        return options

    def _open(self, graph: Path, options: Any, offer: Offer, values: dict[str, Any]) -> Any:
        given = {k: v.format(**values) for k, v in offer.provider.options.items()}
        if offer.handle is not None:
            options.add_provider_for_devices([offer.handle], given)
            return self.module.InferenceSession(str(graph), options)
        given |= {k: v.format(**values) for k, v in offer.provider.device.items()}
        # A provider that cannot start says so on stderr, through a logger of the whole process.
        self.module.set_default_logger_severity(4)
        # Without enable_fallback=0 onnxruntime prints and goes on with the CPU.
        return self.module.InferenceSession(
            str(graph),
            options,
            providers=[(offer.provider.name, given), CPU.name],
            enable_fallback=0,
        )


def counts(session: Any, provider: Provider) -> Counts:
    """Counts the nodes of a session's graph that run on a provider."""
    placed = total = 0
    for part in session.get_provider_graph_assignment_info():
        n = len(part.get_nodes())
        total += n
        placed += n if part.ep_name == provider.name else 0
    return Counts(placed, total)


def broken_plugins() -> dict[str, str]:
    """Provider -> why its installed library cannot be loaded."""
    return dict(_broken)


def first_line(error: Exception) -> str:
    """The first line of an engine's message."""
    return (str(error) or type(error).__name__).splitlines()[0]


def _hardware(device: Any) -> str:
    """A device's name, as far as onnxruntime knows it."""
    return str(device.metadata.get("Description") or device.vendor or "")


_loaded: set[tuple[Any, str]] = set()
_broken: dict[str, str] = {}
