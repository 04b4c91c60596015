"""Builds the site of the documentation, by Zensical: `python -m docs.site`, or `make docs`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "docs"
ZENSICAL = [sys.executable, "-m", "zensical", "build", "--strict"]
# Links to other files; `name.md#anchor` and `name.md "title"` are of name.md.
_LINK = re.compile(r"\]\(([^)#:\s]+)[^):]*\)")
_TOP = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")


def build(folder: Path) -> Path:
    """Builds the site in a folder, which is emptied first; its own folder there.

    Raises subprocess.CalledProcessError where a link leads nowhere, FileNotFoundError where that is
    a file that is not a page.
    """
    shutil.rmtree(folder, ignore_errors=True)
    for path in _linked([ROOT / name for name in _TOP] + sorted((ROOT / "docs").rglob("*.md"))):
        copy = folder / "pages" / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    shutil.copy(ROOT / "docs" / "zensical.toml", folder)
    # The docstrings are those of this checkout, and so is docs/doctests.py.
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(ZENSICAL, cwd=folder, env=environment, check=True)
    return folder / "site"


def _linked(pages: list[Path]) -> Iterator[Path]:
    """The pages, and all that they and what they link to link to, each once."""
    todo, seen = list(pages), set[Path]()
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        yield path
        if path.suffix == ".md":
            links = _LINK.findall(path.read_text(encoding="utf-8"))
            todo += [(path.parent / link).resolve() for link in links]


def main() -> int:
    """Builds the site and says where it is; the exit code."""
    try:
        site = build(BUILD)
    except subprocess.CalledProcessError as e:
        return e.returncode
    print(f"{site / 'index.html'}; with its search: python -m http.server -d {site}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
