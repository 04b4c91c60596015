"""Snippets of the documentation run, on pico; what cannot is checked, and says why."""

from __future__ import annotations

import configparser
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import pytest
from PIL import Image

import edgevlm
from edgevlm import catalogue
from edgevlm.cli import cli, main
from edgevlm.errors import EngineMissing
from edgevlm.export import export_bundle
from edgevlm.hub.repository import RemoteFile, Repository
from edgevlm.manifest import read_manifest, write_manifest
from edgevlm.models import built_in
from edgevlm.server.pool import AnyModel
from tests import snippets
from tests.checkpoints.dual import write_siglip
from tests.checkpoints.moondream2 import write_moondream2
from tests.serving import Served, serving
from tests.snippets import DOCUMENTED, ROOT, Block

EXAMPLES = ROOT / "examples"
# Commands of ours that are parsed alone, and the reason.
NOT_RUN = {
    "serve": "runs until it is ended",
    "bench": "measures for a minute or more",
    "tune": "measures for a minute or more",
    "export": "needs a checkpoint",
    "requantize": "needs a bundle that is not built in",
    "push": "uploads",
}
# The commit of a repository whose catalogue entry names none.
COMMIT = "0" * 40
# The model that pages embed with.
EMBEDS = "siglip2-base-224"
# Devices that a page may name and this machine lack; a command or a block that does may fail so.
DEVICE = re.compile(r"device(=\"| )(?!cpu|auto)")


@pytest.fixture(scope="module")
def dual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that embeds."""
    folder = tmp_path_factory.mktemp("dual")
    source = write_siglip(folder / "checkpoint")
    return export_bundle(source, folder / "bundle", vision_precision="int8", verify=False).folder


@pytest.fixture(scope="module")
def pointing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that points."""
    folder = tmp_path_factory.mktemp("pointing")
    source = write_moondream2(folder / "checkpoint")
    return export_bundle(source, folder / "bundle", vision_precision="int8", verify=False).folder


@pytest.fixture(scope="module")
def served(dual: Path) -> Iterator[Served]:
    models: dict[str, Callable[[], AnyModel]] = {
        "pico": lambda: edgevlm.load(threads=1),
        EMBEDS: lambda: edgevlm.load_dual(dual),
    }
    with serving(models) as found:
        yield found


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory, dual: Path, pointing: Path) -> Path:
    """A folder with the files that pages name, "desk", and one with pico under the names of all
    models that answer, other bundles under those of models that embed or point, "home".
    """
    stock = tmp_path_factory.mktemp("stock")
    desk, home = stock / "desk", stock / "home"
    desk.mkdir()
    (desk / "examples").symlink_to(EXAMPLES)
    shapes = Image.open(EXAMPLES / "shapes.png").convert("RGB")
    for pictures in (desk, desk / "photos", desk / "Photos"):
        pictures.mkdir(exist_ok=True)
        for name in ("photo.png", "photo.jpg", "receipt.jpg", "a.png", "b.jpg"):
            shapes.save(pictures / name, quality=95)
    for entry in catalogue.entries().values():
        if "embed" in entry.tasks and entry.name != EMBEDS:
            continue  # with one alone, commands need not be told
        folder = home / "models" / entry.name
        bundle = dual if "embed" in entry.tasks else built_in()
        bundle = pointing if "point" in entry.tasks else bundle
        shutil.copytree(bundle, folder, copy_function=os.symlink)
        origin = f"{entry.repo}@{entry.revision or COMMIT}"
        manifest = replace(read_manifest(folder), origin=origin)
        (folder / "edgevlm.json").unlink()
        write_manifest(folder, manifest)
    return stock


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stock: Path) -> Path:
    """A copy of `stock`'s desk as the working directory and home, one of its home as edgevlm's."""
    desk = shutil.copytree(stock / "desk", tmp_path / "desk", symlinks=True)
    home = shutil.copytree(stock / "home", tmp_path / "home", symlinks=True)
    monkeypatch.chdir(desk)
    monkeypatch.setenv("HOME", str(desk))
    monkeypatch.setenv("EDGEVLM_HOME", str(home))
    monkeypatch.delenv("EDGEVLM_MODEL", raising=False)
    monkeypatch.setattr("edgevlm.pulling.look_up", found_on_the_hub)
    return desk


def found_on_the_hub(repo: str, *_: object) -> Repository:
    """A repository whose files are those of its catalogue entry."""
    (entry,) = (entry for entry in catalogue.entries().values() if entry.repo == repo)
    return Repository(entry.repo, entry.revision or COMMIT, (RemoteFile("model.safetensors", 1),))


class Page:
    """Runs the blocks of a page in order."""

    def __init__(self, served: Served, capsys: pytest.CaptureFixture[str],
                 monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
        self._base = served.base
        self._capsys, self._monkeypatch = capsys, monkeypatch
        self._scope: dict[str, Any] = {"__name__": "snippet"}

    def run(self, block: Block, expected: str | None) -> None:
        """Runs or checks a block; `expected` is what a python block prints, if the page says so."""
        text = block.text.replace(DOCUMENTED, self._base)
        if block.title:
            Path(block.title).write_text(text, encoding="utf-8")
        if block.language == "python":
            self._python(text, expected)
        elif block.language == "json":
            json.loads(text)
        elif text != block.text and block.language == "sh":
            self._asks_the_server(text)
        elif block.language in ("sh", "console"):
            for command, printed in snippets.commands(block):
                self._command(command, printed)

    def _python(self, text: str, expected: str | None) -> None:
        try:
            exec(compile(text, "snippet", "exec", dont_inherit=True), self._scope)
        except EngineMissing:
            assert DEVICE.search(text)
        printed = self._capsys.readouterr().out
        assert expected is None or printed.rstrip() == expected.rstrip()

    def _asks_the_server(self, script: str) -> None:
        if shutil.which("curl") is None:
            pytest.skip("no curl on this machine")
        env = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
        ended = subprocess.run(["sh", "-c", script], capture_output=True, text=True, env=env)
        assert '"content": "a red circle' in ended.stdout, ended.stderr

    def _command(self, command: str, printed: str | None) -> None:
        command, _, pipe = command.partition(" | ")
        command, _, target = command.partition(" > ")
        assert not pipe or shlex.split(pipe)[0] == "jq"
        words = snippets.words(command)
        while re.match(r"[A-Z_]+=", words[0]):
            words = words[1:]
        kind = KINDS.get(words[0])
        assert kind, f"nobody knows how to check {command!r}"
        out = kind(self, words)
        if target:
            Path(target.strip()).write_text(out, encoding="utf-8")
        assert printed is None or out.rstrip() == printed.rstrip()

    def ours(self, words: list[str]) -> str:
        """edgevlm: runs, but for what cannot."""
        snippets.check_options(words)
        if words[1] in NOT_RUN or snippets.has_placeholder(words):
            return ""
        self._monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
        self._monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = self._capsys.readouterr()
        failed = ended.value.code not in (0, None)
        assert not failed or (DEVICE.search(" ".join(words)) and "device" in err), err
        return out

    def python(self, words: list[str]) -> str:
        """python: a module of the workshop that is there, or a file of the page, which runs."""
        if words[1] == "-m":
            assert words[2] in ("venv", "pip") or importlib.util.find_spec(words[2])
            return ""
        env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        ended = subprocess.run(
            [sys.executable, *words[1:]], capture_output=True, text=True, env=env, timeout=100
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    def pip(self, words: list[str]) -> str:
        """pip: extras of ours are there."""
        config = configparser.ConfigParser()
        config.read(ROOT / "setup.cfg")
        for extra in re.findall(r"edgevlm\[(.*?)\]", " ".join(words)):
            assert extra in config["options.extras_require"]
        return ""

    def make(self, words: list[str]) -> str:
        """make: its targets are there."""
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
        assert set(words[1:]) <= set(targets)
        return ""

    def export(self, words: list[str]) -> str:
        """A variable of ours, for the rest of the page."""
        name, _, value = words[1].partition("=")
        code = (path.read_text(encoding="utf-8") for path in ROOT.glob("edgevlm/*.py"))
        assert name.startswith("EDGEVLM_") and any(name in text for text in code)
        self._monkeypatch.setenv(name, value)
        return ""

    def uvicorn(self, words: list[str]) -> str:
        """uvicorn: the application is in a file of the page."""
        module, _, name = words[1].partition(":")
        assert f"\n{name} = " in Path(f"{module}.py").read_text(encoding="utf-8")
        return ""

    def file(self, words: list[str]) -> str:
        """A file of the checkout, or one that another command of the page makes."""
        assert (ROOT / words[0]).exists() or words == [".", "activate"]
        return ""

    def others(self, words: list[str]) -> str:
        """A program of somebody else's."""
        return ""


KINDS: dict[str, Callable[[Page, list[str]], str]] = {
    "edgevlm": Page.ours,
    "python": Page.python,
    "python3": Page.python,
    "pip": Page.pip,
    "make": Page.make,
    "export": Page.export,
    "uvicorn": Page.uvicorn,
    ".": Page.file,
    ".ci/run": Page.file,
    "jupyter": Page.others,
}


@pytest.mark.parametrize("page", snippets.pages(), ids=lambda page: page.name)
def test_the_snippets_of_a_page(
    page: Path,
    desk: Path,
    served: Served,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runner = Page(served, capsys, monkeypatch)
    for block, after in pairwise([*snippets.blocks(page), None]):
        assert block is not None
        whole = page.read_text(encoding="utf-8")
        follows = after and f"{block.text}```\n\n```text\n{after.text}" in whole
        runner.run(block, after.text if after and follows else None)


@pytest.mark.parametrize("page", snippets.pages(), ids=lambda page: page.name)
def test_every_snippet_says_its_language(page: Path) -> None:
    assert {block.language for block in snippets.blocks(page)} <= snippets.LANGUAGES
    rest = snippets.outside(page)
    assert "```" not in rest
    # Indented text is a block, too, of a language that nobody can tell.
    assert not re.search(r"^\n {4}(edgevlm|python|pip|import|make)\b", rest, re.M)


@pytest.mark.parametrize("page", snippets.pages(), ids=lambda page: page.name)
def test_commands_in_the_text_have_the_options_that_they_name(page: Path) -> None:
    for words in snippets.inline(page):
        snippets.check_options(words)


def test_what_is_not_run_is_a_command_with_a_reason() -> None:
    assert all(NOT_RUN.values())
    assert set(NOT_RUN) < set(cli.list_commands(click.Context(cli)))


@pytest.mark.parametrize(
    "command", ["edgevlm fly", "edgevlm ask x --fast", "edgevlm export A B --target moon"]
)
def test_an_option_that_is_not_there_is_found(command: str) -> None:
    with pytest.raises(AssertionError):
        snippets.check_options(snippets.words(command))
