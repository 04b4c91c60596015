"""The fuzzer: what it makes, what it reports, and its table in the docs."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from edgevlm.errors import (
    EdgeVLMError,
)
from workshop.fuzz import targets
from workshop.fuzz.__main__ import main
from workshop.fuzz.loop import replay
from workshop.fuzz.mutate import changed, damaged
from workshop.fuzz.report import table


def test_mutations_are_repeatable_and_change_something() -> None:
    seeds = range(200)
    data, value = bytes(range(256)), {"a": [1, {"b": "c"}], "d": 2.5}
    first = [damaged(data, random.Random(i)) for i in seeds]
    assert first == [damaged(data, random.Random(i)) for i in seeds]
    assert sum(each == data for each in first) < 20
    assert sum(changed(value, random.Random(i)) == value for i in seeds) < 40
    assert value == {"a": [1, {"b": "c"}], "d": 2.5}


@pytest.mark.parametrize("name", ["safetensors", "schemas", "grammars", "pictures"])
def test_targets_make_inputs_that_are_refused_or_answered(tmp_path: Path, name: str) -> None:
    target = targets.make(name, tmp_path)
    for i in range(12):
        try:
            target.check(target.case(random.Random(i)))
        except EdgeVLMError as e:
            assert len(str(e).splitlines()) == 1


DYING = """
import os, random
class Fuzzed:
    def __init__(self, folder): pass
    def case(self, rng): return b"x"
    def check(self, data):
        if data == b"dies": os.abort()
        if data == b"raises": raise KeyError("k")
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals that say how a process died")
def test_a_process_that_dies_is_an_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dying.py").write_text(DYING, encoding="utf-8")
    (tmp_path / "sitecustomize.py").write_text(
        f"import workshop.fuzz.targets as t; t.__path__.append({str(tmp_path)!r})", encoding="utf-8"
    )
    root = Path(__file__).parent.parent
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), str(root))))
    assert replay("dying", b"dies").kind == "abort"
    assert "SIGABRT" in replay("dying", b"dies").text
    assert replay("dying", b"raises").text == "KeyError: \"'k'\""
    assert replay("dying", b"well").kind == "answer"


def test_unknown_targets_are_named() -> None:
    done = CliRunner().invoke(main, ["nothing"])
    assert done.exit_code == 2 and "unknown target 'nothing'" in done.output
    assert subprocess.run([sys.executable, "-c", "import workshop.fuzz"]).returncode == 0


def test_the_table_in_the_docs_is_the_reports() -> None:
    docs = Path(__file__).parent.parent / "docs"
    made = table(docs / "fuzzing.jsonl")
    assert made in (docs / "fuzzing.md").read_text(encoding="utf-8")
    assert {row.split()[1] for row in made.splitlines()[2:]} == {*targets.names()}
