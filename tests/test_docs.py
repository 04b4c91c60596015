"""Documentation that something checks."""

import ast
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import click

from edgevlm.cli import cli

ROOT = Path(__file__).parent.parent
CODE = ("edgevlm", "export", "runtimes", "benchmarks", "workshop")
# A text that opens so says what a thing is about and not what it is.
QUESTION = re.compile(r"(Of|What|Whatever|Which|Who|Whose|How|Where|Whether|Why|When)\b")


def test_the_command_reference_is_in_step() -> None:
    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    assert generate["TARGET"].read_text(encoding="utf-8") == generate["reference"](), (
        "run `make docs`"
    )


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


def test_python_in_the_readme_compiles() -> None:
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")
