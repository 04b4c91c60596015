"""The Python of docs/answers.md runs, in its order."""

import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copyfile(ROOT / "examples" / "shapes.png", tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "answers.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 4
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "answers.md", "exec"), scope)
    said = capsys.readouterr().out
    assert "circle 45 48" in said and said.endswith("a green starsquare\n")
