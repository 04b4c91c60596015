"""Modules of a package without the package's own imports."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec, module_from_spec
from typing import Any


def submodule(name: str) -> Any:
    """Imports `PACKAGE.MODULE` without running PACKAGE's `__init__`, where that has not run yet.

    llama_cpp's brings chat formats and a template engine along, gguf's a tokenizer and readers of
    YAML: together a fifth of a second of every start. Whoever imports PACKAGE later gets all of it,
    modules of its own included. Raises ImportError.
    """
    package = name.partition(".")[0]
    spec = None if package in sys.modules else find_spec(package)
    if spec is None:
        return importlib.import_module(name)
    sys.modules[package] = module_from_spec(spec)
    try:
        return importlib.import_module(name)
    finally:
        # A module that stayed would not become an attribute of the package once that is imported.
        for loaded in [n for n in sys.modules if n.partition(".")[0] == package]:
            del sys.modules[loaded]
