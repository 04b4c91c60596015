"""Latency reports: statistics, what a round measures, how reports end, read back and compare."""

import dataclasses
import json
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgevlm import VLM
from edgevlm.benchmarks.latency import runner, stats
from edgevlm.benchmarks.latency.gather import Configuration, configurations
from edgevlm.benchmarks.latency.measure import RoundTask, measure, overhead_ms
from edgevlm.benchmarks.latency.memory import MemoryMarks
from edgevlm.benchmarks.latency.physics import int8_instructions
from edgevlm.benchmarks.latency.report import (
    QUANTITIES,
    STAGES,
    Physics,
    Report,
    read_report,
    to_json,
)
from edgevlm.benchmarks.latency.sensors import Sensors, power_mode
from edgevlm.bundle import open_bundle
from edgevlm.errors import BenchError
from edgevlm.export import child
from edgevlm.models import built_in
from edgevlm.runtimes import fakes

FACTS = {"threads": 2, "repack": True, "llama_cpp": ["AVX2"], "overhead_ms": 1e-4, "provider": "p"}


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.fromarray(np.full((60, 80, 3), 200, np.uint8)).save(path)
    return path


def machine_files(root: Path, energy_uj: int | None = None, status: str = "Discharging") -> Path:
    """A sysfs of a machine with temperature and frequency, and energy where given."""
    files = {
        "class/thermal/thermal_zone0/temp": 41_000,
        "class/hwmon/hwmon1/temp1_input": 52_500,
        "devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": 2_400_000,
        "devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": 1_200_000,
        "devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave",
        "class/power_supply/AC/online": 0,
        "class/power_supply/BAT0/status": status,
        "class/power_supply/BAT0/power_now": 7_300_000,
    }
    if energy_uj is not None:
        files |= {
            "class/powercap/intel-rapl:0/energy_uj": energy_uj,
            "class/powercap/intel-rapl:0/max_energy_range_uj": 10_000_000,
            "class/powercap/intel-rapl:0:0/energy_uj": 1,
            "class/powercap/intel-rapl:0:0/max_energy_range_uj": 10_000_000,
        }
    for name, value in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{value}\n", encoding="utf-8")
    return root


def job(picture: Path, **changes: Any) -> RoundTask:
    given = RoundTask(str(picture.parent), str(picture), "auto", None, None, 8, 3, 60.0)
    return dataclasses.replace(given, **changes)


def events_of(job: RoundTask, sensors: Sensors) -> list[dict[str, Any]]:
    """A round on fake engines, as the worker's lines."""

    def open_model(loaded: Callable[[str], None] | None) -> VLM:
        if loaded:
            loaded("vision")
            loaded("decoder")
        return fakes.vlm("ab")  # shorter than any answer of a measurement

    found: list[dict[str, Any]] = [{"facts": FACTS}]
    measure(job, open_model, MemoryMarks(), sensors, lambda e: found.append(dataclasses.asdict(e)))
    return [*json.loads(json.dumps(found)), {"done": True}]


def fake_round(sensors_root: Path) -> runner.Round:
    def run(job: RoundTask) -> runner.Events:
        yield from events_of(job, Sensors(sensors_root))

    return run


def no_physics(threads: int, flags: Sequence[str]) -> Physics:
    return Physics(threads, 1e10, 1e11, 4.0, "VNNI")


def plan(picture: Path, *names: str, **options: Any) -> runner.BenchPlan:
    bundle = open_bundle(built_in())
    configurations = tuple(Configuration(n, bundle, picture) for n in names or ("pico",))
    return runner.BenchPlan(configurations, **{"tokens": 8, "pairs": 3} | options)


def report_of(plan: runner.BenchPlan, root: Path, run: runner.Round | None = None) -> Report:
    run = run or fake_round(root)
    return runner.run_plan(plan, "edgevlm bench", run_round=run, with_physics=no_physics)


def test_statistics_of_known_samples() -> None:
    m = stats.metric("ms", "lower", [1, 2, 3, 4, 100])
    assert (m.median, m.min, m.max, m.samples) == (3, 1, 100, (1, 2, 3, 4, 100))
    assert m.std == pytest.approx(np.std([1, 2, 3, 4, 100], ddof=1))
    assert m.p90 == pytest.approx(61.6) and m.p99 == pytest.approx(96.16)
    assert m.noise == pytest.approx(1.57 * 2 / 5**0.5)  # one outlier does not widen it
    assert m.noise and m.spread == pytest.approx(m.noise / 3)


def test_two_samples_say_nothing_of_their_noise() -> None:
    m = stats.metric("ms", "lower", [1.0, 9.0])
    assert m.noise is None and m.spread is None
    assert stats.metric("ms", "lower", [5.0]).std == 0


def test_a_round_measures_every_quantity_it_can(picture: Path, tmp_path: Path) -> None:
    root = machine_files(tmp_path / "sys", energy_uj=5)
    result = report_of(plan(picture, runs=2), root).results[0]
    # What stands between a fake and the rest is whether a load was cold.
    assert set(result.metrics) | set(result.unavailable) == set(QUANTITIES)
    assert set(result.unavailable) <= {"load_cold_ms"}
    assert result.rounds == 2
    assert len(result.metrics["first_token_warm_ms"].samples) == 6
    assert len(result.metrics["first_token_cold_ms"].samples) == 2
    assert len(result.metrics["inter_token_ms"].samples) == 6 * 7
    assert result.metrics["temperature_c"].median == 52.5
    assert result.metrics["frequency_mhz"].median == 1800
    work = result.workload
    assert (work.image_tokens, work.cached_tokens, work.generated) == (4, 4, 8)
    assert work.text_tokens == 1 + len("caption en\n")
    assert (work.image_size, work.long_context) == ((80, 60), 512 - 8)


def test_the_first_token_is_the_sum_of_its_stages(picture: Path, tmp_path: Path) -> None:
    samples = [e["samples"] for e in events_of(job(picture), Sensors(tmp_path)) if "samples" in e]
    for pair in (s for s in samples if "first_token_warm_ms" in s):
        parts = sum(pair[name][0] for name in STAGES)
        assert parts <= pair["first_token_warm_ms"][0] <= pair["end_to_end_ms"][0]


def test_the_end_token_does_not_shorten_an_answer(picture: Path, tmp_path: Path) -> None:
    facts: dict[str, Any] = {}
    for event in events_of(job(picture, tokens=20), Sensors(tmp_path)):
        facts |= event.get("facts", {})
    assert facts["generated"] == 20


def test_an_answer_that_does_not_fit_is_refused(picture: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="leaves room for .* of 600 tokens"):
        events_of(job(picture, tokens=600), Sensors(tmp_path))


def test_a_machine_without_sensors_says_so(picture: Path, tmp_path: Path) -> None:
    result = report_of(plan(picture, runs=1), tmp_path / "none").results[0]
    assert "powercap" in result.unavailable["energy_j"]
    assert "sensor" in result.unavailable["temperature_c"]
    assert "cpufreq" in result.unavailable["frequency_mhz"]
    assert power_mode(tmp_path / "none") == ()


def test_energy_counters_wrap_around(tmp_path: Path) -> None:
    root = machine_files(tmp_path, energy_uj=9_000_000)
    sensors = Sensors(root)
    before = sensors.read()
    machine_files(tmp_path, energy_uj=500_000)
    assert sensors.joules(before, sensors.read()) == pytest.approx(1.5)


def test_without_counters_a_battery_gives_the_energy_of_the_whole_machine(
    picture: Path, tmp_path: Path
) -> None:
    root = machine_files(tmp_path / "sys")
    sensors = Sensors(root)
    before = sensors.read()
    (root / "class/power_supply/BAT0/power_now").write_text("8300000", encoding="utf-8")
    after = dataclasses.replace(sensors.read(), at=before.at + 2)
    assert sensors.joules(before, after) == pytest.approx((7.3 + 8.3) / 2 * 2)
    result = report_of(plan(picture, runs=1), root).results[0]
    assert result.settings.energy == "battery, the whole machine"
    assert result.metrics["energy_j"].median > 0


def test_a_battery_may_tell_current_and_voltage_instead_of_power(tmp_path: Path) -> None:
    root = machine_files(tmp_path)
    battery = root / "class/power_supply/BAT0"
    (battery / "power_now").unlink()
    (battery / "current_now").write_text("-500000", encoding="utf-8")
    (battery / "voltage_now").write_text("12000000", encoding="utf-8")
    assert Sensors(root).read().battery_w == 6


def test_on_mains_a_battery_says_nothing(tmp_path: Path) -> None:
    sensors = Sensors(machine_files(tmp_path, status="Charging"))
    assert sensors.energy == "" and "battery" in sensors.unavailable()["energy_j"]
    assert sensors.joules(sensors.read(), sensors.read()) is None


def test_power_mode_names_governor_and_battery(tmp_path: Path) -> None:
    assert power_mode(machine_files(tmp_path)) == (
        "governor: powersave", "mains AC: off", "battery BAT0: Discharging, 7.3 W",
    )  # fmt: skip


def test_configurations_take_turns(picture: Path, tmp_path: Path) -> None:
    seen = []

    def run(job: RoundTask) -> runner.Events:
        seen.append(job.threads)
        yield from events_of(job, Sensors(tmp_path))

    two = plan(picture, "a", "b", runs=2)
    a, b = two.configurations
    two = dataclasses.replace(two, configurations=(a, dataclasses.replace(b, threads=7)))
    report = report_of(two, tmp_path, run)
    assert seen == [None, 7, None, 7]
    assert report.complete and report.notes == ()


def steady(
    n_rounds: list[RoundTask], value: Callable[[int], float] = lambda i: 100.0
) -> runner.Round:
    """Rounds of one pair each, with a given time to the first token."""

    def run(job: RoundTask) -> runner.Events:
        n_rounds.append(job)
        yield {"facts": FACTS | {"vision_positions": 4}}
        ms = value(len(n_rounds))
        samples = {"first_token_warm_ms": [ms], "decode_tokens_per_s": [50.0]}
        facts = {"prompt": "x", "image_tokens": 4, "text_tokens": 2, "cached_tokens": 4,
                 "generated": 8, "long_context": 99}  # fmt: skip
        yield {"samples": samples, "facts": facts}
        yield {"done": True}

    return run


def test_rounds_end_when_the_spread_is_small(picture: Path, tmp_path: Path) -> None:
    rounds: list[RoundTask] = []
    result = report_of(plan(picture), tmp_path, steady(rounds)).results[0]
    assert len(rounds) == 3 and result.settled


def test_rounds_end_when_the_budget_does(picture: Path, tmp_path: Path) -> None:
    rounds: list[RoundTask] = []
    noisy = steady(rounds, lambda i: 100.0 * i)
    result = report_of(plan(picture, budget_s=0.0), tmp_path, noisy).results[0]
    assert len(rounds) == 3 and not result.settled


def test_an_interrupted_run_leaves_a_partial_report(picture: Path, tmp_path: Path) -> None:
    rounds: list[RoundTask] = []

    def run(job: RoundTask) -> runner.Events:
        if len(rounds) == 1:
            raise KeyboardInterrupt
        yield from steady(rounds)(job)

    report = report_of(plan(picture, "a", "b"), tmp_path, run)
    assert not report.complete and "interrupted" in report.notes[0]
    assert [r.name for r in report.results] == ["a"]
    assert report.physics == () and report.results[0].limits == {}


def test_an_interrupt_before_anything_was_measured_is_an_error(
    picture: Path, tmp_path: Path
) -> None:
    def run(job: RoundTask) -> runner.Events:
        raise KeyboardInterrupt
        yield

    with pytest.raises(BenchError, match="interrupted"):
        report_of(plan(picture), tmp_path, run)


def test_one_failing_configuration_does_not_lose_the_others(picture: Path, tmp_path: Path) -> None:
    rounds: list[RoundTask] = []

    def run(job: RoundTask) -> runner.Events:
        if job.threads == 7:
            raise BenchError("no such engine")
        yield from steady(rounds)(job)

    two = plan(picture, "a", "b")
    a, b = two.configurations
    two = dataclasses.replace(two, configurations=(a, dataclasses.replace(b, threads=7)))
    report = report_of(two, tmp_path, run)
    assert report.notes == ("b: no such engine",) and not report.complete
    assert [r.name for r in report.results] == ["a"]


def test_a_report_reads_back_as_it_was(picture: Path, tmp_path: Path) -> None:
    report = report_of(plan(picture, runs=1), tmp_path)
    path = tmp_path / "report.json"
    path.write_text(to_json(report), encoding="utf-8")
    assert read_report(path) == report


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a report"),
        ("[]", "not a report"),
        ('{"version": 1, "colour": 1}', "unknown key 'colour'"),
        ('{"version": 99}', "version 99 is too new"),
    ],
)
def test_what_is_no_report_is_refused_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BenchError, match=message):
        read_report(path)
    with pytest.raises(BenchError, match="cannot be read"):
        read_report(tmp_path / "none.json")


def test_limits_use_the_decoders_own_tensors(picture: Path, tmp_path: Path) -> None:
    result = report_of(plan(picture), tmp_path, steady([])).results[0]
    decode = result.limits["decode"]
    size = open_bundle(built_in()).path("decoder").stat().st_size
    assert 0.9 * size < decode.bytes < 1.01 * size  # every matrix is read for every token
    assert decode.measured_ms == 20
    assert decode.percent == pytest.approx(100 * decode.bytes / 1e10 * 1e3 / 20)
    assert "prefill" not in result.limits  # it was not measured


def test_names_show_only_what_differs() -> None:
    bundle, a, b = open_bundle(built_in()), Path("x/a.png"), Path("b.png")
    names = [c.name for c in configurations([bundle], [a, b], ["cpu"], [1, 2])]
    assert names == [
        f"pico, {p}, {t}" for p in ("a.png", "b.png") for t in ("1 thread", "2 threads")
    ]
    assert [c.name for c in configurations([bundle], [a], ["cpu"], [None])] == ["pico"]
    parts = bundle.manifest.components
    half = {**parts, "decoder": dataclasses.replace(parts["decoder"], precision="f16")}
    other = dataclasses.replace(bundle.manifest, components=half)
    two = [bundle, dataclasses.replace(bundle, manifest=other)]
    first, second = (c.name for c in configurations(two, [a], ["cpu"], [None]))
    assert first.startswith("pico int8 + ") and second == "pico int8 + f16" and first != second
    twice = configurations([bundle, bundle], [a], ["cpu"], [None])
    assert twice[0].name == f"pico in {bundle.folder}"


def test_the_newest_instructions_set_the_8_bit_peak() -> None:
    assert int8_instructions(["avx2", "avx512_vnni"]) == ("AVX-512 VNNI", 4.0)
    assert int8_instructions([]) == ("none known", 1.0)


def test_the_stopwatch_costs_next_to_nothing() -> None:
    assert 0 <= overhead_ms(3, 100) < 1


def test_a_worker_that_dies_is_an_error_with_its_last_words(
    picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dying = [sys.executable, "-c", "raise SystemExit('out of memory')"]
    monkeypatch.setattr(child, "command", lambda module: dying)
    with pytest.raises(BenchError, match=r"ended early, status 1 \(out of memory\)"):
        list(runner.child_round(job(picture)))


def test_a_worker_refuses_a_bad_device_in_one_line(picture: Path) -> None:
    with pytest.raises(BenchError, match="unknown device 'tpu'"):
        list(runner.child_round(job(picture, folder=str(built_in()), device="tpu")))
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN  # only the child ignores it
