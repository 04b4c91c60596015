"""Peers and quality in a report: asked for once each, said when they failed or were interrupted."""

import dataclasses
from pathlib import Path

import pytest

from edgevlm.benchmarks.latency import extras
from edgevlm.benchmarks.latency.extras import Extras, with_extras
from edgevlm.benchmarks.latency.gather import Configuration
from edgevlm.benchmarks.latency.report import Beside, Quality, Report, to_json
from edgevlm.benchmarks.latency.runner import BenchPlan
from edgevlm.benchmarks.peers import run
from edgevlm.bundle import Bundle, open_bundle
from edgevlm.errors import BenchError
from edgevlm.models import built_in
from tests.test_bench_reports import beside, report, result
from workshop import reports

QUALITY = Quality("pico", 0.9, 0.8, 0.1, 0.7, {})


def measured(*names: str) -> tuple[Report, BenchPlan]:
    """A report and the plan that it is of: one bundle, one picture, several thread counts."""
    bundle = open_bundle(built_in())
    plan = BenchPlan(tuple(Configuration(name, bundle, Path("a.png")) for name in names), tokens=8)
    return report(*map(result, names)), plan


def extended(extras_wanted: Extras, *names: str) -> Report:
    made, plan = measured(*names)
    return with_extras(made, plan, extras_wanted, lambda _: None)


def test_peers_are_asked_once_for_each_bundle_and_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fake(comparison: run.Comparison, name: str, progress: object) -> Beside:
        asked.append((name, comparison.words, comparison.tokens, comparison.rounds))
        return beside()

    monkeypatch.setattr(run, "beside", fake)
    made = extended(Extras(peers=True), "1 thread", "2 threads")
    assert asked == [("1 thread", "caption en", 7, 3)]
    assert made.peers == (beside(),) and made.complete


def test_a_comparison_that_fails_is_a_note_and_loses_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fake(*_: object) -> None:
        raise BenchError("edgevlm itself cannot be compared")

    monkeypatch.setattr(run, "beside", fake)
    made = extended(Extras(peers=True), "pico")
    assert not made.complete and len(made.results) == 1
    assert made.notes == ("pico, beside other projects: edgevlm itself cannot be compared",)


def test_an_interrupted_comparison_makes_the_report_a_partial_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    partial = dataclasses.replace(beside(), complete=False)
    monkeypatch.setattr(run, "beside", lambda *_: partial)
    made = extended(Extras(peers=True), "pico")
    assert made.peers == (partial,) and not made.complete and "interrupted" in made.notes[0]


@pytest.mark.parametrize("wanted", [Extras(peers=True), Extras(reference=built_in())])
def test_an_interrupt_keeps_the_times(wanted: Extras, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "beside", fake)
    monkeypatch.setattr(extras, "_quality", fake)
    made = extended(wanted, "pico")
    assert not made.complete and "interrupted" in made.notes[0] and len(made.results) == 1


def test_quality_that_cannot_be_measured_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(*_: object) -> None:
        raise BenchError("two models")

    monkeypatch.setattr(extras, "_quality", fake)
    made = extended(Extras(reference=built_in()), "pico")
    assert made.notes == ("pico, quality: two models",) and not made.complete
    assert made.results[0].quality is None


def test_quality_is_measured_once_for_each_bundle(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def quality(reference: Bundle, bundle: Bundle) -> Quality:
        asked.append((reference, bundle))
        return QUALITY

    monkeypatch.setattr(extras, "_quality", quality)
    made = extended(Extras(reference=built_in()), "1 thread", "2 threads")
    pico = open_bundle(built_in())
    assert asked == [(pico, pico)]
    assert [r.quality for r in made.results] == [QUALITY, QUALITY]


def test_the_page_of_reports_shows_every_table_once(tmp_path: Path) -> None:
    made = report(result("pico", quality=QUALITY), peers=(beside(),))
    for name, one in (("pico", made), ("mobilepalo-1.7b", report(result("synthetic-mobilepalo")))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(to_json(one), encoding="utf-8")
    text = reports.page(tmp_path)
    assert text.count("## Summary") == 1 and "A|B <chip> (VNNI), 2 cores, 8 GiB" in text
    assert "| pico | 100 ms |" in text and "[pico](pico/report.md) |" in text
    assert "[mobilepalo-1.7b](mobilepalo-1.7b/report.md) |" in text
    assert text.count("## pico: beside other projects") == text.count("## Quality") == 1
    assert reports.page(tmp_path / "none").startswith("# Measured reports")
