"""A client that nobody here wrote: simonw/llm, set up as docs/server.md says."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import edgevlm
from tests.serving import serving
from tests.snippets import DOCUMENTED, ROOT, blocks

if find_spec("llm") is None:
    pytest.skip("pip install llm to ask the server with it", allow_module_level=True)

SHAPES = Path(__file__).parent.parent / "examples" / "shapes.png"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """llm's folder, which names a running server."""
    folder = tmp_path_factory.mktemp("llm")
    with serving({"pico": lambda: edgevlm.load(threads=1)}) as served:
        (block,) = (b for b in blocks(ROOT / "docs" / "server.md") if b.language == "yaml")
        text = block.text.replace(DOCUMENTED, served.base)
        (folder / "extra-openai-models.yaml").write_text(text, encoding="utf-8")
        yield folder


def test_llm_asks_about_an_attachment(home: Path) -> None:
    command = [sys.executable, "-m", "llm", "-m", "edge", "answer en what shape is red?"]
    found = subprocess.run(
        [*command, "-a", str(SHAPES)],
        env={**os.environ, "LLM_USER_PATH": str(home)},
        capture_output=True,
        text=True,
    )
    assert (found.stdout.strip(), found.returncode) == ("circle", 0), found.stderr
