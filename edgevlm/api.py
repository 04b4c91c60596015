"""load: a name or a folder in, a VLM out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgevlm.errors import PromptError
from edgevlm.models import resolve

if TYPE_CHECKING:
    import os

    from edgevlm.runtimes.session import VLM


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    device: str = "auto",
    threads: int | None = None,
    repack: bool | None = None,
) -> VLM:
    """Loads a model: a bundle folder, the name of an installed one, or None for the built-in pico.

    device: where the vision encoder runs, "auto" or "cpu". threads: None for the physical cores.
    repack: llama.cpp's weight re-ordering at load; None follows what was measured.
    Raises BundleError for a folder that is no sound bundle, EngineMissing for a device.
    """
    from edgevlm.runtimes.loading import Settings, load_bundle

    if threads is not None and threads < 1:
        raise PromptError("threads must be at least 1")
    return load_bundle(resolve(model), Settings(threads, device, repack))
