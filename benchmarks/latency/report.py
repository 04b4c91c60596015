"""The schema of a latency report, version 2: what is written as JSON and read back strictly.

A report says which machine, which software, which settings, and for every configuration each
quantity with all of its samples. What could not be measured stands in `unavailable` with the
reason. docs/benchmarks.md explains every name.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgevlm import schema
from edgevlm.benchmarks.latency.stats import Better, Metric
from edgevlm.errors import BenchError

VERSION = 2


@dataclass(frozen=True)
class Quantity:
    """A metric's unit, the direction that is better, and one line for readers."""

    unit: str
    better: Better
    text: str


# Every metric there can be, in the order of reports. "Warm" and "cached" follow the first answer.
QUANTITIES: Mapping[str, Quantity] = {
    "load_cold_ms": Quantity("ms", "lower", "load, files read from storage"),
    "load_warm_ms": Quantity("ms", "lower", "load, files in memory"),
    "first_token_cold_ms": Quantity("ms", "lower", "first token, fresh process"),
    "first_token_warm_ms": Quantity("ms", "lower", "first token, new picture"),
    "first_token_cached_ms": Quantity("ms", "lower", "first token, same picture again"),
    "image_decode_ms": Quantity("ms", "lower", "picture file to pixels"),
    "preprocess_ms": Quantity("ms", "lower", "resize, normalise, fingerprint"),
    "vision_ms": Quantity("ms", "lower", "vision encoder"),
    "projector_ms": Quantity("ms", "lower", "projector"),
    "prefill_ms": Quantity("ms", "lower", "prefill of picture and text"),
    "prefill_tokens_per_s": Quantity("tok/s", "higher", "prefill rate"),
    "inter_token_ms": Quantity("ms", "lower", "between two tokens"),
    "decode_tokens_per_s": Quantity("tok/s", "higher", "decode rate within an answer"),
    "decode_empty_tokens_per_s": Quantity("tok/s", "higher", "decode rate at empty context"),
    "decode_long_tokens_per_s": Quantity("tok/s", "higher", "decode rate at long context"),
    "end_to_end_ms": Quantity("ms", "lower", "whole answer, new picture"),
    "cpu_ms": Quantity("ms", "lower", "processor time of that answer"),
    "energy_j": Quantity("J", "lower", "energy of that answer"),
    "peak_rss_bytes": Quantity("B", "lower", "peak resident memory"),
    "memory_base_bytes": Quantity("B", "lower", "Python and libraries"),
    "memory_vision_bytes": Quantity("B", "lower", "vision, projector, picture"),
    "memory_decoder_bytes": Quantity("B", "lower", "decoder and its context"),
    "temperature_c": Quantity("\u00b0C", "lower", "hottest sensor after an answer"),
    "frequency_mhz": Quantity("MHz", "higher", "mean core frequency after an answer"),
}


@dataclass(frozen=True)
class Machine:
    """The machine of a report. `power` says what is known of governor, mains and battery;
    `load_average` is the number of other runnable processes just before (None: not readable).
    """

    cpu: str
    architecture: str
    flags: tuple[str, ...]
    physical_cores: int
    usable_cores: int
    memory_bytes: int
    system: str
    power: tuple[str, ...]
    load_average: float | None


@dataclass(frozen=True)
class Physics:
    """Rates that numpy reached here with `threads` threads, as limits to hold the stages against.

    `int8_ratio` is how many times more 8-bit than float32 multiply-adds the processor's
    instructions allow, by `int8_instructions`.
    """

    threads: int
    bytes_per_s: float
    float32_ops_per_s: float
    int8_ratio: float
    int8_instructions: str

    @property
    def int8_ops_per_s(self) -> float:
        """The 8-bit arithmetic peak: the measured float32 one times the instructions' ratio."""
        return self.float32_ops_per_s * self.int8_ratio


@dataclass(frozen=True)
class MeasuredComponent:
    """A component of the bundle: precision, bytes on disk, SHA-256 of its files by name."""

    precision: str
    bytes: int
    sha256: Mapping[str, str]


@dataclass(frozen=True)
class MeasuredModel:
    """The bundle that was measured; `synthetic` ones have random weights, of the real sizes."""

    name: str
    synthetic: bool
    family: str
    license: str
    bytes: int
    components: Mapping[str, MeasuredComponent]


@dataclass(frozen=True)
class Workload:
    """The question: picture (name, SHA-256 of the file, size in pixels), prompt, token counts.

    `generated` tokens are drawn greedily and the end token is not obeyed, so that every answer of
    a configuration does the same work. `long_context` is the depth of the long-context rate.
    """

    image: str
    image_sha256: str
    image_size: tuple[int, int]
    prompt: str
    image_tokens: int
    text_tokens: int
    cached_tokens: int
    generated: int
    long_context: int


@dataclass(frozen=True)
class Settings:
    """Settings of a run: device asked for, provider that really ran the encoder and the precision
    of its file, threads, llama.cpp's repacking (True or False in older reports) and features, what
    really ran the decoder, the type of its cache, the sensor of the energy ("" for what is not
    known).
    """

    device: str
    provider: str
    threads: int
    repack: Literal["off", "on", "decode", True, False]
    llama_cpp: tuple[str, ...]
    energy: str = ""
    decoder: str = ""
    vision_precision: str = ""
    kv: str = ""


@dataclass(frozen=True)
class Limit:
    """A stage against this machine: operations and bytes it needs at least, the time that takes at
    the measured peaks, and that time as a percentage of the measured one.
    """

    ops: float
    bytes: float
    ops_per_s: float
    floor_ms: float
    measured_ms: float

    @property
    def percent(self) -> float:
        """Share of the limit that is reached; 100 is as fast as the physics allow."""
        return 100 * self.floor_ms / self.measured_ms if self.measured_ms else 0.0


@dataclass(frozen=True)
class Quality:
    """Changes of a bundle's answers by its precisions, beside those of `reference`.

    Cosines are means over rows, `logit_kl` is the mean divergence of the next token's distribution
    in nats, `top1_agreement` the share of positions with the same likeliest token. `accuracy` is
    the share of right answers by task, for models that know drawn scenes.
    """

    reference: str
    features_cosine: float
    embeddings_cosine: float
    logit_kl: float
    top1_agreement: float
    accuracy: Mapping[str, float]


@dataclass(frozen=True)
class PeerResult:
    """One project beside edgevlm; `error` says why it did not answer, "" if it did, and `state` in
    two words: "not installed" (`installed` is False), "not asked" for want of a checkpoint, "not
    supported" where the project itself has no such model, else "failed". Older reports have no
    state.

    `metrics` are those of edgevlm.benchmarks.peers.METRICS that it can tell, and peak_rss_bytes;
    `positions` is the length of its prompt, `how` its precisions and settings.
    """

    title: str
    version: str
    how: str
    error: str
    installed: bool
    positions: int
    metrics: Mapping[str, Metric]
    state: str = ""


@dataclass(frozen=True)
class Beside:
    """edgevlm, which comes first, and its peers in turns on one configuration; `complete` unless it
    was interrupted.
    """

    configuration: str
    threads: int
    generated: int
    complete: bool
    results: tuple[PeerResult, ...]


@dataclass(frozen=True)
class Result:
    """One configuration. `rounds` processes were measured; `settled` says whether the spread of
    first token and decode came below `Report.target_spread`.
    """

    name: str
    model: MeasuredModel
    workload: Workload
    settings: Settings
    rounds: int
    settled: bool
    metrics: Mapping[str, Metric]
    unavailable: Mapping[str, str]
    limits: Mapping[str, Limit]
    quality: Quality | None = None

    def median(self, name: str) -> float | None:
        """The median of a metric, None where it is not available."""
        return self.metrics[name].median if name in self.metrics else None


@dataclass(frozen=True)
class Report:
    """A whole report. `notes` say what is missing of it and why; a complete one has none.

    `overhead_ms` is what the stopwatch itself reads for an empty stage. `physics` has one entry for
    each number of threads that ran.
    """

    version: int
    created: str
    command: str
    complete: bool
    notes: tuple[str, ...]
    target_spread: float
    overhead_ms: float
    machine: Machine
    software: Mapping[str, str]
    physics: tuple[Physics, ...]
    results: tuple[Result, ...]
    peers: tuple[Beside, ...] = ()

    def shortest_stage(self) -> tuple[str, float] | None:
        """Name and median (ms) of the shortest stage that any result reports."""
        found = [
            (r.metrics[name].median, name)
            for r in self.results
            for name in STAGES
            if name in r.metrics and r.metrics[name].median > 0
        ]
        return (min(found)[1], min(found)[0]) if found else None


# The parts of the time to the first token, in order.
STAGES = ("image_decode_ms", "preprocess_ms", "vision_ms", "projector_ms", "prefill_ms")


def to_json(report: Report) -> str:
    """The report as JSON text; floats with all their digits."""
    return json.dumps(dataclasses.asdict(report), indent=1, ensure_ascii=False) + "\n"


def read_report(path: Path) -> Report:
    """Reads a report back. Raises BenchError if it is none, or of another version."""
    try:
        data: Any = schema.parsed(path.read_text(encoding="utf-8"))
        version = data.get("version") if isinstance(data, dict) else None
        if isinstance(version, int) and version > VERSION:
            raise BenchError(f"{path}: report version {version} is too new; upgrade edgevlm")
        return schema.read(Report, data)
    except OSError as e:
        raise BenchError(f"{path}: cannot be read ({e.strerror or e})") from None
    except ValueError as e:
        raise BenchError(
            f"{path}: is not a report of `edgevlm bench` ({e}); name its JSON file"
        ) from None
