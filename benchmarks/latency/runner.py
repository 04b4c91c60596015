"""Rounds of all configurations in turn, each in a process of its own, until the numbers hold still.

A round of A, a round of B, a round of A, ...: a machine that warms up or another program that
starts meets all of them alike.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from edgevlm import cleanup
from edgevlm.benchmarks.latency.cost import Cost, cost
from edgevlm.benchmarks.latency.gather import Configuration, Gathered
from edgevlm.benchmarks.latency.machine import software, this_machine
from edgevlm.benchmarks.latency.measure import RoundTask
from edgevlm.benchmarks.latency.physics import measure_physics
from edgevlm.benchmarks.latency.report import VERSION, Physics, Report, Result
from edgevlm.errors import BenchError
from edgevlm.export import child
from edgevlm.types import Progress

INTERRUPTED = "interrupted: not everything was measured"
_FEWEST_ROUNDS = 3
_MOST_ROUNDS = 10


@dataclass(frozen=True)
class BenchPlan:
    """Configurations to measure, and for how long.

    prompt: None for each model's own. tokens: length of every answer. runs: number of rounds; None
    repeats until the spread is below `target_spread` or `budget_s` seconds a configuration are
    over. A round has at most `pairs` pairs of answers and begins none after `round_s` seconds.
    """

    configurations: tuple[Configuration, ...]
    prompt: str | None = None
    tokens: int = 32
    runs: int | None = None
    pairs: int = 10
    round_s: float = 10.0
    budget_s: float = 60.0
    target_spread: float = 0.02


Events = Generator[Mapping[str, Any], None, None]
Round = Callable[[RoundTask], Events]


def run_plan(
    plan: BenchPlan,
    command: str,
    progress: Callable[[Progress], None] = lambda _: None,
    run_round: Round | None = None,
    with_physics: Callable[[int, Sequence[str]], Physics] = measure_physics,
) -> Report:
    """Measures everything. Ctrl-C ends it with what there is: a report that says so.

    Raises BenchError if nothing could be measured.
    """
    created = datetime.now().astimezone().isoformat(timespec="seconds")
    machine, gathered = this_machine(), [Gathered(c) for c in plan.configurations]
    notes: list[str] = []
    physics: dict[int, Physics] = {}
    try:
        _rounds(plan, gathered, progress, run_round or child_round)
        for threads in {g.facts["threads"] for g in gathered if "threads" in g.facts}:
            physics[threads] = with_physics(threads, machine.flags)
    except KeyboardInterrupt:
        notes.append(INTERRUPTED)
    notes += [f"{g.configuration.name}: {g.failed}" for g in gathered if g.failed]
    results = tuple(_results(plan, gathered, physics))
    if not results:
        raise BenchError("; ".join(notes) or "there was nothing to measure; name a model")
    return Report(
        version=VERSION,
        created=created,
        command=command,
        complete=not notes,
        notes=tuple(notes),
        target_spread=plan.target_spread,
        overhead_ms=max(g.facts["overhead_ms"] for g in gathered if "overhead_ms" in g.facts),
        machine=machine,
        software=software(),
        physics=tuple(physics[threads] for threads in sorted(physics)),
        results=results,
    )


def _rounds(
    plan: BenchPlan, gathered: list[Gathered], progress: Callable[[Progress], None], run: Round
) -> None:
    open_ones = list(gathered)
    while open_ones:
        for one in open_ones:
            progress(Progress(one.configuration.name, one.rounds, _most(plan), "rounds"))
            _one_round(plan, one, run)
        open_ones = [one for one in open_ones if not _done(plan, one)]


def _most(plan: BenchPlan) -> int:
    return plan.runs or _MOST_ROUNDS


def _done(plan: BenchPlan, one: Gathered) -> bool:
    if one.failed or one.rounds >= _most(plan):
        return True
    if plan.runs or one.rounds < _FEWEST_ROUNDS:
        return False
    return one.settled(plan.target_spread) or one.seconds >= plan.budget_s


def _one_round(plan: BenchPlan, one: Gathered, run: Round) -> None:
    configuration = one.configuration
    task = RoundTask(
        folder=str(configuration.bundle.folder.absolute()),
        image=str(configuration.image.absolute()),
        device=configuration.device,
        threads=configuration.threads,
        prompt=plan.prompt,
        tokens=plan.tokens,
        pairs=plan.pairs,
        seconds=plan.round_s,
    )
    start = time.perf_counter()
    try:
        with closing(run(task)) as events:
            for event in events:
                one.add(event)
        one.rounds += 1
    except BenchError as error:
        one.failed = str(error)
    one.seconds += time.perf_counter() - start


def _results(
    plan: BenchPlan, gathered: list[Gathered], physics: Mapping[int, Physics]
) -> Iterator[Result]:
    # Reading the tensor table takes seconds where the vocabulary is large.
    costs: dict[Path, Cost] = {}
    for one in gathered:
        if one.measured:
            bundle = one.configuration.bundle
            needs = costs.get(bundle.folder) or cost(bundle)
            costs[bundle.folder] = needs
            limits = physics.get(one.facts["threads"])
            yield one.result(needs, limits, plan.target_spread)


def child_round(task: RoundTask) -> Events:
    """Runs a round in a child process and yields its events; raises BenchError if it fails.

    The child is ended when the caller stops listening.
    """
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
        cleanup.process(
            child.command("edgevlm.benchmarks.latency.worker"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
            env=child.environment(),
        ) as process,
    ):
        assert process.stdin and process.stdout
        # A child that died at once is told of below, by its status and last words.
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(asdict(task)))
            process.stdin.close()
        done = False
        for line in process.stdout:
            event = json.loads(line)
            if "error" in event:
                raise BenchError(event["error"])
            done = done or "done" in event
            yield event
        status = process.wait()
        if not done:
            errors.seek(0)
            last = (errors.read().strip().splitlines() or ["no message"])[-1]
            raise BenchError(f"its process ended early, status {status} ({last})")
