"""llama.cpp's C API, as llama_cpp binds it; imported by the child processes of `tools` alone."""

from __future__ import annotations

from edgevlm.submodules import submodule

llama = submodule("llama_cpp.llama_cpp")
