"""llama.cpp's back ends as a table, and how many of a decoder's layers a device has room for.

Only data and pure functions: `ggml.py` asks llama.cpp what it offers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from edgevlm.errors import EngineError, EngineMissing
from edgevlm.runtimes.devices import base
from edgevlm.types import Placement

_MIB = 1 << 20
# Left free on a device: its driver's own needs and the pictures' encoder.
_SPARE_BYTES = 256 * _MIB
# Positions that the KV cache is planned for; a longer request may not fit a small device.
_PLANNED_POSITIONS = 4096


@dataclass(frozen=True)
class Backend:
    """One back end: the user's word, its kind, ggml's name, the switch that builds it, systems."""

    word: str
    kind: str
    registry: str
    switch: str
    systems: tuple[str, ...]

    @property
    def install(self) -> str:
        """The line that builds llama.cpp with it."""
        return (
            f"CMAKE_ARGS=-D{self.switch}=on pip install --force-reinstall --no-deps "
            "--no-cache-dir llama-cpp-python"
        )


# ggml's names are those of ggml/include/ggml-*.h and each back end's *_reg_get_name; the order is
# the preference of `auto` and `gpu`: a vendor's own back end before the portable ones.
BACKENDS = (
    Backend("cuda", "gpu", "CUDA", "GGML_CUDA", ("linux", "win32")),
    Backend("metal", "gpu", "MTL", "GGML_METAL", ("darwin",)),
    Backend("rocm", "gpu", "ROCm", "GGML_HIP", ("linux", "win32")),
    Backend("sycl", "gpu", "SYCL", "GGML_SYCL", ("linux", "win32")),
    Backend("vulkan", "gpu", "Vulkan", "GGML_VULKAN", ("linux", "win32", "darwin")),
    Backend("opencl", "gpu", "OpenCL", "GGML_OPENCL", ("linux", "win32")),
    Backend("hexagon", "npu", "HTP", "GGML_HEXAGON", ("linux", "win32")),
)
WORDS = tuple(b.word for b in BACKENDS)


@dataclass(frozen=True)
class LlamaDevice:
    """A device that this build of llama.cpp offers; `handle` is ggml's own, memory in bytes."""

    name: str
    description: str
    backend: Backend
    free_bytes: int
    total_bytes: int
    handle: int


@dataclass(frozen=True)
class LayerBytes:
    """Memory that a decoder needs on a device, in bytes.

    layers: the weights of each layer. output: those of the last projection and norm. position: the
    KV cache of one position in one layer. work: the largest intermediate results of one batch.
    """

    layers: tuple[int, ...]
    output: int
    position: int
    work: int

    def offloaded(self, n: int, positions: int) -> int:
        """Bytes for `n` layers as llama.cpp counts them: the output first, then from the last."""
        if n == 0:
            return 0
        last = self.layers[len(self.layers) - (n - 1) :]
        return self.output + sum(last) + len(last) * self.position * positions + self.work


@dataclass(frozen=True)
class Offload:
    """A decoder's placement: `layers` of it on `device`, None for the CPU."""

    device: LlamaDevice | None = None
    layers: int = 0


ON_THE_CPU = Offload()


def backend(registry: str, kind: str = "gpu") -> Backend:
    """The table's row of ggml's name; a back end it does not know gets a plain one."""
    found = next((b for b in BACKENDS if b.registry == registry), None)
    return found or Backend(registry.lower(), kind, registry, f"GGML_{registry.upper()}", ())


def candidates(word: str, devices: Sequence[LlamaDevice]) -> list[LlamaDevice]:
    """The devices that a word allows, the best first: by the table, then by free memory.

    Raises EngineMissing, with the line that installs it, where there is none; `auto` may have none.
    """
    if word == "cpu":
        return []
    if word == "auto":
        found = [d for d in devices if d.backend in BACKENDS]
    elif word in ("gpu", "npu"):
        found = [d for d in devices if d.backend.kind == word]
    else:
        name, _, kind = word.partition(":")
        found = [d for d in devices if d.backend.word == name and kind in ("", d.backend.kind)]
    if not found and word != "auto":
        raise EngineMissing(
            f"device {word!r} cannot run the decoder: this build of llama.cpp offers "
            f"{', '.join(d.name for d in devices) or 'the CPU alone'}",
            install_line(word),
        )
    rank = {b: i for i, b in enumerate(BACKENDS)}
    return sorted(found, key=lambda d: (rank.get(d.backend, len(rank)), -d.free_bytes))


def install_line(word: str) -> str:
    """The line that installs a back end on this system."""
    wanted = [b for b in BACKENDS if word in (b.kind, b.word) or base(word) == b.word]
    lines = [b.install for b in wanted if sys.platform in b.systems]
    if not lines:
        return f"{word} does not exist on this system; choose another"
    return lines[0] + (", or another line of `edgevlm doctor`" if len(lines) > 1 else "")


def layers_that_fit(needs: LayerBytes, free_bytes: int, context_length: int) -> int:
    """Number of a decoder's layers that fit a device, the output counted as one; 0 to all + 1."""
    positions = min(context_length, _PLANNED_POSITIONS)
    room = free_bytes - _SPARE_BYTES
    fitting = (
        n for n in range(len(needs.layers) + 1, 0, -1) if needs.offloaded(n, positions) <= room
    )
    return next(fitting, 0)


def offload(device: LlamaDevice, needs: LayerBytes, context_length: int) -> Offload:
    """Puts as many layers on a device as fit; raises EngineError where none does."""
    layers = layers_that_fit(needs, device.free_bytes, context_length)
    if layers:
        return Offload(device, layers)
    one = needs.offloaded(1, min(context_length, _PLANNED_POSITIONS)) + _SPARE_BYTES
    raise EngineError(
        f"{device.name} has {device.free_bytes // _MIB} MiB free and the decoder needs "
        f"{one // _MIB} MiB for its first layer"
    )


def refused(word: str, notes: Sequence[str]) -> EngineError:
    """The error for a device that was named and cannot run the decoder."""
    return EngineError(
        f"device {word!r} cannot run the decoder: {'; '.join(notes)}; "
        "choose another --decoder-device, or auto"
    )


def placement(word: str, where: Offload, n_layers: int, notes: Sequence[str]) -> Placement:
    """The `Placement` of a decoder of `n_layers` layers, the output counted as one."""
    device = where.device
    return Placement(
        asked=word,
        device=device.backend.word if device else "cpu",
        engine=device.name if device else "llama.cpp",
        hardware=device.description if device else "",
        placed=where.layers,
        total=n_layers if device else 0,
        unit="layers",
        notes=tuple(notes),
    )
