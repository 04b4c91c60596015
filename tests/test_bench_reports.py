"""What is made of a latency report: files, plots, comparisons, and the command."""

import csv
import dataclasses
import io
import json
import re
import sys
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from edgevlm import cli
from edgevlm.benchmarks.latency import runner, stats
from edgevlm.benchmarks.latency.compare import compare, verdict
from edgevlm.benchmarks.latency.files import default_picture, write_files
from edgevlm.benchmarks.latency.page import to_html
from edgevlm.benchmarks.latency.report import (
    QUANTITIES,
    VERSION,
    Beside,
    Limit,
    Machine,
    MeasuredComponent,
    MeasuredModel,
    PeerResult,
    Physics,
    Quality,
    Report,
    Result,
    Settings,
    Workload,
    read_report,
    to_json,
)
from edgevlm.benchmarks.latency.sections import amount, warnings
from edgevlm.benchmarks.latency.tables import to_csv, to_markdown
from edgevlm.errors import BenchError
from edgevlm.image import read_image

MACHINE = Machine("A|B <chip>", "x86_64", ("avx2",), 2, 2, 8 << 30, "Linux", (), 0.1)
PHYSICS = Physics(2, 1e10, 1e11, 4.0, "VNNI")
Ran = tuple[str | int | None, str, str]
Edge = Callable[..., Ran]


def result(name: str = "pico", factor: float = 1.0, **changes: Any) -> Result:
    """A result whose every metric has five samples about `factor` times 100."""
    samples = [factor * v for v in (99, 100, 100, 100, 101)]
    metrics = {n: stats.metric(q.unit, q.better, samples) for n, q in QUANTITIES.items()}
    del metrics["energy_j"]
    given = Result(
        name=name,
        model=MeasuredModel("pico", False, "paligemma", "apache-2.0", 7 << 20,
                    {"vision": MeasuredComponent("int8", 5, {"v.onnx": "ab"})}),
        workload=Workload("a.png", "c0de", (80, 60), "caption en", 64, 4, 64, 32, 480),
        settings=Settings("auto", "CPUExecutionProvider", 2, True, ("AVX2",)),
        rounds=5,
        settled=True,
        metrics=metrics,
        unavailable={"energy_j": "no counter"},
        limits={"vision": Limit(1e9, 1e6, 4e11, 2.5, 100.0),
                "decode": Limit(1e6, 1e8, 4e11, 10.0, 20.0)},
    )  # fmt: skip
    return dataclasses.replace(given, **changes)


def report(*results: Result, **changes: Any) -> Report:
    given = Report(
        version=VERSION, created="2026-01-01T00:00:00+00:00", command="edgevlm bench",
        complete=True, notes=(), target_spread=0.02, overhead_ms=0.001, machine=MACHINE,
        software={"edgevlm": "0.1.0"}, physics=(PHYSICS,), results=results or (result(),),
    )  # fmt: skip
    return dataclasses.replace(given, **changes)


def with_metric(name: str, samples: Sequence[float], better: stats.Better = "lower") -> Result:
    base = result()
    return dataclasses.replace(
        base, metrics={**base.metrics, name: stats.metric("ms", better, samples)}
    )


@pytest.mark.parametrize(
    ("a", "b", "better", "expected"),
    [
        ([100] * 5, [110] * 5, "lower", "worse"),
        ([100] * 5, [90] * 5, "lower", "better"),
        ([100] * 5, [110] * 5, "higher", "better"),
        ([100] * 5, [104] * 5, "lower", "within noise"),  # below the threshold
        ([80, 90, 100, 110, 120], [90, 100, 110, 120, 130], "lower", "within noise"),
        ([100, 100], [200, 200], "lower", "too few samples"),
    ],
)
def test_verdicts_know_threshold_and_noise(
    a: list[float], b: list[float], better: stats.Better, expected: str
) -> None:
    x, y = (stats.metric("ms", better, s) for s in (a, b))
    assert verdict(x, y, 0.05) == expected


def test_more_samples_of_the_same_noise_find_a_smaller_difference() -> None:
    spread = [80, 90, 100, 110, 120]
    few, many = (stats.metric("ms", "lower", spread * n) for n in (1, 40))
    slower = [stats.metric("ms", "lower", [v + 8 for v in spread] * n) for n in (1, 40)]
    assert verdict(few, slower[0], 0.05) == "within noise"
    assert verdict(many, slower[1], 0.05) == "worse"


def test_configurations_are_matched_by_name() -> None:
    a = report(result("x"), result("y"))
    b = report(result("y", 2.0), result("z"))
    assert {d.configuration for d in compare(a, b, threshold=0.05)} == {"y"}
    with pytest.raises(BenchError, match="share no configuration"):
        compare(a, report(result("z"), result("w")), threshold=0.05)


def test_sensors_are_shown_but_not_judged() -> None:
    names = {d.metric for d in compare(report(), report(result(factor=9)), threshold=0.05)}
    assert "first_token_warm_ms" in names and "temperature_c" not in names


def test_other_machines_and_other_work_need_force() -> None:
    other = report(machine=dataclasses.replace(MACHINE, cpu="C", memory_bytes=16 << 30))
    with pytest.raises(BenchError, match=r"cpu A\|B <chip> and C; memory 8.0 and 16.0 GiB"):
        compare(report(), other, threshold=0.05)
    longer = result(workload=dataclasses.replace(result().workload, generated=64))
    with pytest.raises(BenchError, match="generated 32 and 64"):
        compare(report(), report(longer), threshold=0.05)
    assert compare(report(), other, threshold=0.05, force=True)
    assert compare(report(), report(longer), threshold=0.05, force=True)


def test_csv_has_every_sample() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(report()))))
    assert len(rows) == len(QUANTITIES) - 1
    row = next(r for r in rows if r["metric"] == "first_token_warm_ms")
    assert (row["unit"], row["median"], row["count"]) == ("ms", "100.0", "5")
    assert [float(s) for s in row["samples"].split()] == [99, 100, 100, 100, 101]


def test_markdown_names_machine_limits_and_what_is_missing() -> None:
    text = to_markdown(report(complete=False, notes=("interrupted",)))
    assert "(partial)" in text and "> interrupted" in text
    assert "A&#124;B <chip>" in text  # a bar in a cell would break the table
    assert "Not available: energy of that answer: no counter." in text
    assert "| vision | 1 G | 0.954 MiB | arithmetic | 2.50 ms | 100 ms | 2 % |" in text
    assert "1.00 \u00b5s a stage, 0.00% of the shortest" in text
    for line in text.splitlines():
        assert not line.startswith("|") or line.endswith("|")


class Balanced(HTMLParser):
    """Fails on a tag that is closed in the wrong order; collects what would need the network."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.seen: list[str] = []
        self.links: list[str | None] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.links += [v for k, v in attributes if k in ("src", "href")]
        if tag != "meta":
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


def test_the_page_is_whole_and_needs_no_network() -> None:
    text = to_html(report(result("a <b>"), result("c", 2.0)))
    page = Balanced()
    page.feed(text)
    assert page.stack == [] and page.links == []
    assert page.seen.count("svg") == 5  # first token, decode, distribution, memory, roofline
    assert "script" not in page.seen and "url(" not in text and "@import" not in text
    assert "a &lt;b&gt;" in text and "a <b>" not in text
    assert "prefers-color-scheme: dark" in text


def test_a_page_of_a_partial_report_leaves_out_what_it_lacks() -> None:
    few = result(metrics={"load_warm_ms": result().metrics["load_warm_ms"]}, limits={})
    page = Balanced()
    page.feed(to_html(report(few, physics=())))
    assert page.stack == [] and "svg" not in page.seen
    assert "nan" not in to_markdown(report(few, physics=()))


@pytest.mark.parametrize("value", [0.0, 1e-9, 1e9])
def test_plots_survive_extreme_numbers(value: float) -> None:
    samples = result(metrics={n: stats.metric(q.unit, q.better, [value] * 3)
                              for n, q in QUANTITIES.items()})  # fmt: skip
    assert not re.search(r'="(nan|inf|-inf)', to_html(report(samples)))


def test_a_busy_machine_and_an_unsettled_spread_are_said() -> None:
    busy = report(result(settled=False), machine=dataclasses.replace(MACHINE, load_average=1.5))
    text = " ".join(warnings(busy))
    assert "load average 1.5 on 2 cores" in text and "spread of pico stayed above 2%" in text
    assert warnings(report()) == []


def beside() -> Beside:
    """edgevlm, a project that takes twice as long with a longer prompt, and one that cannot."""

    def peer(title: str, ms: float, positions: int = 70, error: str = "") -> PeerResult:
        names = ("first_token_ms", "token_ms") if not error else ()
        metrics = {n: stats.metric("ms", "lower", [ms] * 3) for n in names}
        return PeerResult(title, "1.0", "q4_k_m", error, True, positions, metrics)

    results = (peer("edgevlm", 50.0), peer("llama.cpp", 100.0, 72), peer("x", 0, error="no siglip"))
    return Beside("pico", 2, 33, True, results)


def test_peers_stand_in_one_table_with_their_ratio_and_the_reason(tmp_path: Path) -> None:
    made = report(peers=(beside(),))
    text = to_markdown(made)
    assert "| edgevlm 1.0 | - | - | 50.0 ms | 50.0 ms | - | 1.00 | 1.00 | q4_k_m |" in text
    assert "| llama.cpp 1.0 | - | - | 100 ms | 100 ms | - | 2.00 | 2.00 | q4_k_m, 72 pos" in text
    assert "| x | - | - | no answer |" in text and "* x: no siglip." in text
    page = to_html(made)
    assert page.count("<svg") == 6 and "no siglip" in page
    assert read_report(write_files(made, tmp_path)[0]) == made


def test_quality_stands_beside_speed(tmp_path: Path) -> None:
    quality = Quality("pico-f32", 0.999, 0.9975, 0.0123, 0.985, {"colour": 0.99, "count": 1.0})
    made = report(result(quality=quality), result("other", quality=dataclasses.replace(
        quality, accuracy={}, logit_kl=0.0)))  # fmt: skip
    text = to_markdown(made)
    assert "| pico | 1.0e-03 | 2.5e-03 | 0.012 | 98.5% | 99.0% | 100.0% |" in text
    assert "| other | 1.0e-03 | 2.5e-03 | 0 | 98.5% | - | - |" in text
    assert "Beside pico-f32" in text
    assert read_report(write_files(made, tmp_path)[0]) == made


def test_reports_of_version_1_are_still_read(tmp_path: Path) -> None:
    data = json.loads(to_json(report()))
    data |= {"version": 1}
    del data["peers"]
    for old in data["results"]:
        del old["quality"], old["settings"]["energy"]
    path = tmp_path / "old.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    assert read_report(path) == report(version=1)


def test_a_synthetic_model_is_called_so() -> None:
    made_up = dataclasses.replace(result().model, synthetic=True)
    assert "synthetic, random weights" in to_html(report(result(model=made_up)))


def test_amounts_have_three_digits() -> None:
    shown = [amount(v, "ms") for v in (0.1234, 1.234, 12.34, 1234.5)]
    assert shown == ["0.123 ms", "1.23 ms", "12.3 ms", "1,234 ms"]
    assert (amount(3 << 20, "B"), amount(3 << 30, "B")) == ("3.00 MiB", "3.00 GiB")


def test_four_files_are_written(tmp_path: Path) -> None:
    files = write_files(report(), tmp_path)
    assert [f.name for f in files] == [f"report.{s}" for s in ("json", "csv", "md", "html")]
    assert read_report(files[0]) == report()


def test_the_default_picture_is_a_megapixel(tmp_path: Path) -> None:
    assert read_image(default_picture(tmp_path)).shape == (900, 1200, 3)


@pytest.fixture
def edge(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Edge:
    """Runs the command line in this process: arguments -> exit code, stdout, stderr."""

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["edgevlm", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    monkeypatch.delenv("EDGEVLM_MODEL", raising=False)
    return run


def saved(path: Path, made: Report) -> Path:
    path.write_text(to_json(made), encoding="utf-8")
    return path


def test_compare_ends_with_3_when_something_got_worse(edge: Edge, tmp_path: Path) -> None:
    a = saved(tmp_path / "a.json", report())
    b = saved(tmp_path / "b.json", report(with_metric("vision_ms", [120] * 5)))
    code, out, err = edge("bench", "compare", a, b)
    assert code == 3 and "0 better, 1 worse" in err
    assert re.search(r"vision encoder\s+100 ms\s+120 ms\s+\+20.0%\s+worse", out)
    assert edge("bench", "compare", b, a)[0] == 0  # better
    assert edge("bench", "compare", a, b, "--threshold", "25%")[0] == 0
    assert edge("bench", "compare", a, b, "--threshold", "0.1")[0] == 3


def test_bad_input_is_one_line(edge: Edge, tmp_path: Path) -> None:
    a = saved(tmp_path / "a.json", report())
    for arguments, code, message in (
        (("compare", a, a, "--threshold", "fast"), 2, "'fast' is not a number"),
        (("compare", a, tmp_path / "b.json"), 1, "b.json: cannot be read"),
        (("no-model",), 1, "no such bundle folder"),
        (("--synthetic", "gpt"), 1, "'gpt' cannot be synthesized; choose from paligemma-3b-224"),
        (("--synthetic", "paligemma-3b-224", "--quant", "q1"), 1, "choose from f32"),
        (("-i", "none.png"), 1, "none.png: no such file"),
        (("--out", a), 2, "is a file"),
        (("--runs", "0"), 2, "0 is not in the range"),
        (("--quality", "none"), 1, "no such bundle folder"),
        (("--peers", "--peer-python", "mtdm=python3"), 1, "unknown peer 'mtdm'; there are ours"),
        (("--peers", "--checkpoint", tmp_path / "none"), 2, "does not exist"),
        (("--checkpoint", tmp_path), 2, "belong to --peers"),
    ):
        ended, out, err = edge("bench", *arguments)
        assert (ended, out) == (code, "") and message in err
        assert len(err.splitlines()) == 1 and err.startswith("edgevlm: ")


def test_an_interrupted_bench_prints_what_it_has_and_ends_with_130(
    edge: Edge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = report(complete=False, notes=("interrupted: not everything was measured",))
    monkeypatch.setattr(runner, "run_plan", lambda *a: partial)
    code, out, err = edge("bench", "--out", tmp_path / "out")
    assert code == 130
    assert "Summary" in out and "Note: interrupted" in err
    assert not read_report(tmp_path / "out" / "report.json").complete


def test_bench_pico_from_end_to_end(edge: Edge, tmp_path: Path) -> None:
    out_dir = tmp_path / "out"
    code, out, _ = edge("bench", "--quick", "--runs", 1, "--tokens", 4, "--out", out_dir)
    assert code == 0 and "first token, new picture" in out
    made = read_report(out_dir / "report.json")
    assert made.complete and made.command.startswith("edgevlm bench --quick")
    (only,) = made.results
    assert only.settings.provider == "CPUExecutionProvider"
    assert (only.workload.image_tokens, only.workload.cached_tokens) == (64, 64)
    assert only.limits.keys() == {"vision", "projector", "prefill", "decode"}
    assert set(only.unavailable) <= {
        "load_cold_ms", "energy_j", "temperature_c", "frequency_mhz",
    }  # fmt: skip
    shortest = made.shortest_stage()
    assert shortest is not None and made.overhead_ms < 0.01 * shortest[1], shortest
