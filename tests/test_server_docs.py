"""docs/server.md: its programs run, and it knows every option."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import edgevlm
from edgevlm.cli.serve import serve
from tests.serving import Served, serving

ROOT = Path(__file__).parent.parent
DOCUMENTED = "http://127.0.0.1:8000"
ANSWER = "a red circle, a blue square, a yellow triangle and a green star"


def text() -> str:
    return (ROOT / "docs" / "server.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The examples of the page in a language."""
    return re.findall(rf"```{language}\n(.*?)```", text(), re.DOTALL)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving({"pico": lambda: edgevlm.load(threads=1)}) as found:
        yield found


@pytest.fixture
def photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copyfile(ROOT / "examples" / "shapes.png", tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)


def test_the_python_program_runs(
    served: Served, photo: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = blocks("python")
    assert DOCUMENTED in block
    program = block.replace(DOCUMENTED, served.base)
    names: dict[str, object] = {}
    exec(compile(program, "server.md", "exec"), names)
    assert capsys.readouterr().out == f"{ANSWER}\n{ANSWER}"
    names["client"].close()  # type: ignore[attr-defined]


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on this machine")
def test_the_line_for_curl_runs(served: Served, photo: None) -> None:
    (block,) = (b for b in blocks("sh") if "curl" in b)
    assert DOCUMENTED in block
    script = block.replace(DOCUMENTED, served.base)
    env = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
    found = subprocess.run(["sh", "-c", script], capture_output=True, text=True, env=env)
    assert f'"content": "{ANSWER}"' in found.stdout, found.stderr


def test_every_option_is_there() -> None:
    table = text().partition("## Options\n")[2].partition("\n## ")[0]
    for option in serve.params:
        for name in option.opts:
            assert not name.startswith("--") or f"`{name}" in table, name
