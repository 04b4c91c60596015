"""Documentation that something checks."""

import ast
import re
import runpy
import shutil
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import click
import pytest

import edgevlm
from docs.site import ZENSICAL, build
from edgevlm import errors
from edgevlm.cli import cli
from edgevlm.cli.serve import serve

ROOT = Path(__file__).parent.parent
CODE = ("edgevlm", "export", "runtimes", "benchmarks", "workshop")
# A text that opens so says what a thing is about and not what it is.
QUESTION = re.compile(r"(Of|What|Whatever|Which|Who|Whose|How|Where|Whether|Why|When)\b")


def test_generated_pages_are_in_step() -> None:
    for page, made in runpy.run_path(str(ROOT / "docs" / "generate.py"))["PAGES"].items():
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        assert text == made(), f"docs/{page}: run `make docs`"


def test_help_texts_name_the_thing_that_an_option_sets() -> None:
    for option in _options(cli):
        assert option.help and not QUESTION.match(option.help), option.name


def test_docstrings_open_with_a_noun_or_a_verb_phrase() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{name}"
        for path, name, text in _docstrings()
        if QUESTION.match(text)
    ]
    assert not wrong


def _docstrings() -> Iterator[tuple[Path, str, str]]:
    """(file, name, text) of every docstring."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in _sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, documented) and (text := ast.get_docstring(node)):
                yield path, getattr(node, "name", "the module"), text


def _options(command: click.Command) -> Iterator[click.Option]:
    yield from (p for p in command.params if isinstance(p, click.Option))
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            child = command.get_command(click.Context(command), name)
            assert child is not None
            yield from _options(child)


def test_words_that_nobody_says() -> None:
    """docs/design.md lists them, in backticks in the last column of its table of words."""
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    table = page.partition("\n## Words\n")[2].partition("\n## ")[0]
    cells = [line.split(" | ")[-1] for line in table.splitlines() if line.startswith("|")]
    phrases = [phrase for cell in cells for phrase in re.findall("`([^`]+)`", cell)]
    assert "is no number" in phrases and len(phrases) > 20
    outlawed = re.compile(rf"\b({'|'.join(map(re.escape, phrases))})\b", re.IGNORECASE)
    texts = [(path, path.read_text(encoding="utf-8").replace(table, "")) for path in _pages()]
    wrong = [
        f"{path.relative_to(ROOT)}: {found[0]}"
        for path, text in [*_strings(), *texts]
        if (found := outlawed.search(" ".join(text.split())))
    ]
    assert not wrong


def _strings() -> Iterator[tuple[Path, str]]:
    """(file, text) of every string in the code: docstrings, help texts, messages."""
    for path in _sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield path, node.value


def _sources() -> Iterator[Path]:
    """Every Python file once: links are not followed."""
    yield from (p for folder in CODE for p in sorted((ROOT / folder).rglob("*.py")))


def _pages() -> list[Path]:
    return [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


def test_links_in_the_documentation_lead_somewhere() -> None:
    for page in _pages():
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} -> {target}"


def test_the_two_commands_of_the_readme_are_a_line_each() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    first, second = (
        i for i, line in enumerate(lines) if line.startswith(("python3 -m venv", "make "))
    )
    assert "pip install . && .venv/bin/edgevlm ask" in lines[first]
    assert lines[second] == "make setup test"
    for i in (first, second):
        assert (lines[i - 1], lines[i + 1]) == ("```sh", "```")


def test_the_servers_page_knows_every_option() -> None:
    page = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")
    table = page.partition("## Options\n")[2].partition("\n## ")[0]
    for option in serve.params:
        for name in option.opts:
            assert not name.startswith("--") or f"`{name}" in table, name


def test_the_reference_has_every_public_name() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"^::: edgevlm\.(\w+)$", page, re.MULTILINE))
    rest = {n for n in edgevlm.__all__ if not hasattr(errors, n)} - shown - {"__version__"}
    assert not rest and "::: edgevlm.errors\n" in page


def test_the_site_has_every_page() -> None:
    named = (ROOT / "docs" / "zensical.toml").read_text(encoding="utf-8")
    pages = [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "decisions").glob("*.md")]
    for page in pages:
        assert f'"{page.relative_to(ROOT).as_posix()}"' in named


@pytest.mark.skipif(not find_spec("zensical"), reason="edgevlm[docs] is not installed")
def test_the_site_is_built_and_fetches_nothing(tmp_path: Path) -> None:
    site = build(tmp_path / "build")
    texts = {p: p.read_text(encoding="utf-8") for p in site.rglob("*.html")}
    assert (site / "index.html") in texts and len(texts) > 40
    for path, text in texts.items():
        loaded = re.findall(r'<(?:script|img|iframe|source)\b[^>]*\ssrc="([^"]+)"', text)
        loaded += re.findall(
            r'<link\b[^>]*rel="(?:stylesheet|icon|pre\w+)"[^>]*href="([^"]+)"', text
        )
        for address in loaded:
            assert not re.match(r"(\w+:)?//", address), f"{path.name}: {address}"
        # The theme fetches a library for each of these.
        assert not re.search(r'class="[^"]*\b(mermaid|glightbox|pyodide)\b', text), path.name
    reference = texts[site / "docs" / "api.html"]
    assert 'id="edgevlm.VLM.image_embeddings"' in reference and "<blockquote>" not in reference
    styles = [p.read_text(encoding="utf-8") for p in site.rglob("*.css")]
    assert styles and not any(re.search(r"url\(\s*['\"]?(https?:)?//", text) for text in styles)


@pytest.mark.skipif(not find_spec("zensical"), reason="edgevlm[docs] is not installed")
@pytest.mark.parametrize("link", ["docs/nowhere.md", "docs/answers.md#nowhere"])
def test_a_broken_link_ends_the_build(tmp_path: Path, link: str) -> None:
    shutil.copy(ROOT / "docs" / "zensical.toml", tmp_path)
    (tmp_path / "pages" / "docs").mkdir(parents=True)
    (tmp_path / "pages" / "README.md").write_text(f"# Title\n\n[x]({link})\n", encoding="utf-8")
    (tmp_path / "pages" / "docs" / "answers.md").write_text("# Answers\n", encoding="utf-8")
    ended = subprocess.run(ZENSICAL, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 1 and "does not exist" in ended.stderr + ended.stdout
