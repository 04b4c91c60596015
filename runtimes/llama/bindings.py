"""llama.cpp's C API, as llama_cpp binds it."""

from __future__ import annotations

from edgevlm.submodules import submodule

llama = submodule("llama_cpp.llama_cpp")
