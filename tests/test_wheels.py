"""Wheels with a back end for each generation of processors: what loads it, how they are built."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgevlm.errors import EdgeVLMError, EngineMissing
from edgevlm.runtimes.llama import ggml
from workshop import wheels


class Registry:
    """ggml's registry, without a back end before `loads` of them are loaded from a folder."""

    folder = Path("site-packages", "llama_cpp", "lib")

    def __init__(self, there: int, loads: int) -> None:
        self._n, self._loads = there, loads
        self.asked: list[bytes] = []

    def ggml_backend_reg_count(self) -> int:
        return self._n

    def ggml_backend_load_all_from_path(self, folder: bytes) -> None:
        self.asked.append(folder)
        self._n = self._loads


def test_back_ends_come_from_the_wheels_own_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(0, 1)
    monkeypatch.setattr(ggml, "_registry", registry)
    for _ in range(2):
        ggml.start()
    assert registry.asked == [str(Registry.folder).encode()]


def test_back_ends_that_are_built_in_are_not_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(1, 0)
    monkeypatch.setattr(ggml, "_registry", registry)
    ggml.start()
    assert registry.asked == []


def test_a_processor_that_no_back_end_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml, "_registry", Registry(0, 0))
    with pytest.raises(EngineMissing, match="lib: none of llama.cpp's back ends runs.*; pip inst"):
        ggml.start()


LISTS = """\
if (GGML_SYSTEM_ARCH STREQUAL "x86")
        ggml_add_cpu_backend_variant(x64)
        ggml_add_cpu_backend_variant(sse42              SSE42)
            ggml_add_cpu_backend_variant(armv9.2_1    DOTPROD SVE SME)
endif()
"""


def test_generations_that_are_left_out(tmp_path: Path) -> None:
    lists = tmp_path / "CMakeLists.txt"
    lists.write_text(LISTS, encoding="utf-8")
    wheels._drop(lists, ["sse42", "armv9.2_1"])
    assert lists.read_text(encoding="utf-8").split("\n")[1:3] == [
        "        ggml_add_cpu_backend_variant(x64)",
        "endif()",
    ]
    with pytest.raises(EdgeVLMError, match="has no sse42; look at this release anew"):
        wheels._drop(lists, ["sse42"])


def test_a_missing_tool_is_named_with_the_line_that_installs_it() -> None:
    with pytest.raises(EdgeVLMError, match="missing: no-such-tool; apt-get install it"):
        wheels.require("sh", "no-such-tool", install="apt-get install it")


def test_a_program_that_fails_names_its_log(tmp_path: Path) -> None:
    log = tmp_path / "new" / "log"
    with pytest.raises(EdgeVLMError, match=r"sh failed \(3\); see .*log"):
        wheels.run(["sh", "-c", "echo why >&2; exit 3"], log)
    assert log.read_text(encoding="utf-8") == "why\n"
