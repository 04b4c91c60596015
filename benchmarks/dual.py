"""Pictures and texts a second of a dual encoder, beside others that run the same checkpoint.

`python -m edgevlm.benchmarks.dual ENGINE FOLDER` measures one engine in a process of its own, reads
a JSON object from stdin and writes one to stdout; `compare` has the engines take turns.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgevlm.benchmarks.latency.sections import Section
from edgevlm.cleanup import temporary_folder
from edgevlm.errors import BenchError
from edgevlm.image import RGB
from edgevlm.machine import physical_cores

OURS = "edgevlm"
# The packages that each peer needs. The second is torch's export of the same model in onnxruntime,
# which photo managers run.
PEERS: Mapping[str, tuple[str, ...]] = {
    "transformers fp32": ("torch", "transformers"),
    "ONNX fp32, one by one": ("torch", "transformers"),
}
BATCHES = (1, 4, 16)
_TEXT = "a photo of a red bicycle leaning against a wall"
_SECONDS = 1.5
_KINDS = ("pictures", "texts")

Array = npt.NDArray[Any]


@dataclass
class Speed:
    """An engine's speeds, one of each round: `pictures` and `texts` a second by batch, `load_ms`
    until the first row of a picture is there; `failed` says why there are none.
    """

    engine: str
    pictures: dict[int, list[float]] = field(default_factory=dict)
    texts: dict[int, list[float]] = field(default_factory=dict)
    load_ms: list[float] = field(default_factory=list)
    row: list[float] = field(default_factory=list)
    failed: str = ""

    def best(self, kind: str) -> float:
        """The median of the batch that is the fastest, 0 where nothing was measured."""
        found: dict[int, list[float]] = getattr(self, kind)
        return max((statistics.median(v) for v in found.values()), default=0.0)


def compare(
    bundle: Path,
    *,
    checkpoint: Path | None = None,
    peers: bool = False,
    rounds: int = 3,
    device: str = "auto",
    threads: int | None = None,
    batches: Sequence[int] = BATCHES,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Speed]:
    """Measures a bundle and, with `peers`, those that are installed on the checkpoint that it was
    made from; every engine once a round, each time in a process of its own.
    """
    asked = {"device": device, "threads": threads, "batches": list(batches)}
    folders = {OURS: bundle}
    if peers:
        if checkpoint is None:
            raise BenchError("peers read no bundle; name the checkpoint (--checkpoint)")
        folders |= dict.fromkeys(PEERS, checkpoint)
    found = {engine: Speed(engine) for engine in folders}
    for engine, needs in PEERS.items():
        lacking = [name for name in needs if importlib.util.find_spec(name) is None]
        if engine in found and lacking:
            found[engine].failed = f"{lacking[0]} is not installed"
    for i in range(rounds):
        for engine, folder in folders.items():
            if not found[engine].failed:
                progress(f"{engine}: round {i + 1} of {rounds}")
                _add(found[engine], _measured(engine, folder, asked))
    return list(found.values())


def section(found: Sequence[Speed]) -> Section:
    """A table of speeds: medians of the rounds, by batch."""
    head = ("engine", "batch", "pictures/s", "texts/s", "first row", "cosine")
    notes = [
        f"Medians of {len(found[0].load_ms)} rounds; pictures are in memory, as pixels. First row: "
        "loading and one picture. Cosine: of a picture's row to ours.",
        *(f"{speed.engine}: {speed.failed}" for speed in found if speed.failed),
    ]
    rows = tuple(row for speed in found for row in _rows(speed, found[0]))
    columns = tuple(range(len(head)))
    return Section("Embeddings", head=head, rows=rows, narrow=columns, notes=tuple(notes))


def _rows(speed: Speed, ours: Speed) -> Iterator[tuple[str, ...]]:
    """A line for each batch; what belongs to the engine stands in its first."""
    for i, batch in enumerate(speed.pictures):
        rates = [f"{statistics.median(getattr(speed, kind)[batch]):.1f}" for kind in _KINDS]
        first = f"{statistics.median(speed.load_ms) / 1e3:.2f} s"
        own = (first, f"{np.dot(speed.row, ours.row):.4f}") if i == 0 else ("", "")
        yield (speed.engine if i == 0 else "", str(batch), *rates, *own)


def _add(speed: Speed, event: Mapping[str, Any]) -> None:
    speed.failed = event.get("failed", "")
    if speed.failed:
        return
    for kind in _KINDS:
        for batch, value in event[kind].items():
            getattr(speed, kind).setdefault(int(batch), []).append(value)
    speed.load_ms.append(event["load_ms"])
    speed.row = event["row"]


def _measured(engine: str, folder: Path, asked: Mapping[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "edgevlm.benchmarks.dual", engine, str(folder)]
    done = subprocess.run(
        command, input=json.dumps(asked), capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        return {"failed": last}
    event: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return event


@dataclass(frozen=True)
class LoadedPeer:
    """An engine that is loaded: RGB -> pixels [3, size, size], pixels [n, ...] -> rows, texts ->
    rows.
    """

    pixels: Callable[[RGB], Array]
    pictures: Callable[[Array], Array]
    texts: Callable[[list[str]], Array]


def measure(engine: str, folder: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """One engine's speeds here and now: preprocessing is not in them, tokenizing is."""
    from edgevlm.export.parity.images import scene

    start = time.perf_counter()
    runner = _OPEN[engine](folder, asked)
    pixels = runner.pixels(scene())[None].astype(np.float32)
    row = runner.pictures(pixels)[0]
    load_ms = (time.perf_counter() - start) * 1e3
    batches: list[int] = asked["batches"]
    words = [f"{_TEXT} {i}" for i in range(max(batches))]
    return {
        "pictures": {
            n: n * _rate(partial(runner.pictures, np.repeat(pixels, n, axis=0))) for n in batches
        },
        "texts": {n: n * _rate(partial(runner.texts, words[:n])) for n in batches},
        "load_ms": load_ms,
        "row": (row / np.linalg.norm(row)).tolist(),
    }


def _rate(call: Callable[[], object]) -> float:
    """Calls a second, of the median one, after one that warms up."""
    call()
    times: list[float] = []
    end = time.perf_counter() + _SECONDS
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1 / statistics.median(times)


def _edgevlm(folder: str, asked: Mapping[str, Any]) -> LoadedPeer:
    import edgevlm

    model = edgevlm.load_dual(folder, device=asked["device"], threads=asked["threads"])
    return LoadedPeer(model.pixels, model.embed_pixels, model.embed_text)


def _transformers(folder: str, asked: Mapping[str, Any]) -> LoadedPeer:
    import torch
    import transformers

    hf: Any = transformers
    if asked["threads"]:
        torch.set_num_threads(asked["threads"])
    model = hf.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    images = hf.AutoImageProcessor.from_pretrained(folder, use_fast=False)
    padding = "max_length" if model.config.model_type == "siglip" else True
    length = model.config.text_config.max_position_embeddings

    def texts(given: list[str]) -> Array:
        ids = tokenizer(
            given, padding=padding, truncation=True, max_length=length, return_tensors="pt"
        )["input_ids"]
        with torch.inference_mode():
            rows: Array = model.get_text_features(ids).numpy()
        return rows

    def pictures(pixels: Array) -> Array:
        with torch.inference_mode():
            rows: Array = model.get_image_features(torch.from_numpy(pixels)).numpy()
        return rows

    return LoadedPeer(
        lambda rgb: images(rgb, return_tensors="np")["pixel_values"][0], pictures, texts
    )


def _onnx(folder: str, asked: Mapping[str, Any]) -> LoadedPeer:
    """Both towers as torch exports them, in float32, for one picture or text."""
    import torch
    import transformers

    from edgevlm.runtimes.vision.ort import Ort
    from edgevlm.runtimes.vision.providers import CPU, Offer

    hf: Any = transformers
    plain = _transformers(folder, asked)
    model = hf.AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    length = model.config.text_config.max_position_embeddings
    side = model.config.vision_config.image_size
    threads = asked["threads"] or physical_cores()

    def ids(text: str) -> Any:
        return tokenizer(
            text, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )["input_ids"]

    with temporary_folder() as work:

        def session(name: str, tower: Callable[..., Any], example: Any) -> Any:
            module: Any = torch.nn.Module()
            module.model, module.forward = model.eval(), tower
            path = work / f"{name}.onnx"
            with torch.inference_mode(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # this exporter is deprecated, and widely used
                torch.onnx.export(module, (example,), str(path), dynamo=False, input_names=["x"])
            return Ort().session(path, Offer(CPU, ""), threads, False, work)

        vision = session("vision", model.get_image_features, torch.zeros(1, 3, side, side))
        text = session("text", model.get_text_features, ids(_TEXT))

    def one_by_one(tower: Any, items: Iterable[Array]) -> Array:
        return np.concatenate([tower.run(None, {"x": item})[0] for item in items])

    return LoadedPeer(
        plain.pixels,
        lambda pixels: one_by_one(vision, (item[None] for item in pixels)),
        lambda texts: one_by_one(text, (ids(each).numpy() for each in texts)),
    )


_OPEN: Mapping[str, Callable[[str, Mapping[str, Any]], LoadedPeer]] = {
    OURS: _edgevlm,
    "transformers fp32": _transformers,
    "ONNX fp32, one by one": _onnx,
}


def main() -> None:
    """Measures; what libraries print goes to stderr."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    engine, folder = sys.argv[1:]
    found = measure(engine, folder, json.load(sys.stdin))
    print(json.dumps(found), file=out, flush=True)


if __name__ == "__main__":
    main()
