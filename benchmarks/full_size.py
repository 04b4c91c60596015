"""The full-size proof: a random PaliGemma-3B-224 is written, exported, and asked about a picture.

    python -m edgevlm.benchmarks.full_size /path/with/20GB

The checkpoint has the published layout, names, shapes and number types (bfloat16 shards) and
random weights, so that the numbers are those of the real model and the answers are noise. Export
and answer run in child processes, whose wall time and peak resident memory are printed as a
Markdown table.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import click
import numpy as np

from edgevlm.benchmarks.checkpoints import encode, header, preprocessor
from edgevlm.benchmarks.vocabulary import write_json
from edgevlm.family import by_name

PIECES = 257152
ROWS = 257216
CONFIG: dict[str, Any] = {
    "architectures": ["PaliGemmaForConditionalGeneration"],
    "bos_token_id": 2,
    "eos_token_id": 1,
    "hidden_size": 2048,
    "image_token_index": PIECES,
    "model_type": "paligemma",
    "pad_token_id": 0,
    "projection_dim": 2048,
    "text_config": {
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "model_type": "gemma",
        "num_attention_heads": 8,
        "num_hidden_layers": 18,
        "num_image_tokens": 256,
        "num_key_value_heads": 1,
        "torch_dtype": "bfloat16",
        "vocab_size": ROWS,
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.0.dev0",
    "vision_config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "num_image_tokens": 256,
        "patch_size": 14,
        "projection_dim": 2048,
        "vision_use_head": False,
    },
    "vocab_size": ROWS,
}
SHARD_BYTES = 4_000_000_000
_BLOCK = 1 << 22

Shapes = dict[str, tuple[int, ...]]


def shapes() -> Shapes:
    """Published tensor names -> shapes, from what the exporter expects of this config."""
    from edgevlm.export.parts import KINDS

    model = by_name("paligemma", "full_size").describe({"config.json": CONFIG})
    prefixes = {
        "vision_tower.vision_model.": model.vision,
        "multi_modal_projector.": model.projector,
        "language_model.model.": model.text,
    }
    return {
        prefix + name: shape
        for prefix, config in prefixes.items()
        for name, shape in KINDS[config["kind"]](config).items()
    }


def write_checkpoint(folder: Path) -> None:
    """Writes the checkpoint, a few megabytes in memory at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", CONFIG)
    write_json(folder / "preprocessor_config.json", preprocessor(224, 256))
    write_json(folder / "generation_config.json", {"bos_token_id": 2, "eos_token_id": 1})
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "GemmaTokenizer"})
    (folder / "tokenizer.model").write_bytes(_tokenizer())
    shards = list(_shards(shapes()))
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / name, shard, np.random.default_rng(i))
        weight_map |= dict.fromkeys(shard, name)
    total = sum(_bytes(s) for shard in shards for s in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def _bytes(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape)) * 2


def _shards(tensors: Shapes) -> Iterator[Shapes]:
    shard: Shapes = {}
    for name, shape in tensors.items():
        if shard and sum(map(_bytes, shard.values())) + _bytes(shape) > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = shape
    yield shard


def _write_shard(path: Path, tensors: Shapes, rng: np.random.Generator) -> None:
    with path.open("wb") as f:
        f.write(header(tensors, "bfloat16"))
        for name, shape in tensors.items():
            _write_values(f, name, shape, rng)


def _write_values(
    f: IO[bytes], name: str, shape: tuple[int, ...], rng: np.random.Generator
) -> None:
    """Random values of the size that keeps activations of a deep net near one."""
    mean, std = 0.0, 0.02
    if len(shape) > 1:
        std = int(np.prod(shape[1:])) ** -0.5
    elif "vision" in name and "norm" in name and name.endswith("weight"):
        mean = 1.0
    left = int(np.prod(shape))
    while left:
        count = min(left, _BLOCK)
        values = rng.standard_normal(count, np.float32) * np.float32(std) + np.float32(mean)
        f.write(encode(values, "bfloat16"))
        left -= count


def _tokenizer() -> bytes:
    """A SentencePiece model with PaliGemma's number of pieces; the real one is not ours to ship."""
    from sentencepiece import sentencepiece_model_pb2

    pb2: Any = sentencepiece_model_pb2
    model = pb2.ModelProto()
    model.trainer_spec.model_type = 2
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.vocab_size = PIECES
    for i, name in enumerate(("pad_id", "eos_id", "bos_id", "unk_id")):
        setattr(model.trainer_spec, name, i)
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    kinds = {"<pad>": 3, "<eos>": 3, "<bos>": 3, "<unk>": 2}
    pieces = [(text, 0.0, kind) for text, kind in kinds.items()]
    pieces += [(f"<0x{i:02X}>", 0.0, 6) for i in range(256)]
    letters = ["\u2581", "\n", *map(chr, range(33, 127))]
    tail = [*(f"<loc{i:04}>" for i in range(1024)), *(f"<seg{i:03}>" for i in range(128))]
    words = _words(PIECES - len(pieces) - len(letters) - len(tail))
    pieces += [(t, -float(i), 1) for i, t in enumerate([*words, *letters])]
    pieces += [(t, 0.0, 4) for t in tail]
    for text, score, kind in pieces:
        model.pieces.add(piece=text, score=score, type=kind)
    return bytes(model.SerializeToString())


def _words(count: int) -> list[str]:
    """Pieces that merging can reach: every one is an earlier one and a letter."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words: list[str] = []
    stems = letters
    while len(words) < count:
        stems = [stem + letter for stem in stems for letter in letters]
        words += stems
    return words[:count]


@dataclass(frozen=True)
class Measured:
    """A child process: seconds of wall time, peak resident bytes of it and its own children."""

    seconds: float
    peak_bytes: int
    stdout: str


# Runs a module and reports the peak memory of the process and of each process it waited for.
_CHILD = """
import resource, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
finally:
    peaks = [resource.getrusage(w).ru_maxrss
             for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print("peak", max(peaks) * 1024, file=sys.stderr)
"""


def measure(arguments: list[str]) -> Measured:
    """Runs `python -m edgevlm ARGUMENTS`; raises click's error if it fails."""
    path = os.pathsep.join(p for p in sys.path if p)
    start = time.perf_counter()
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, "edgevlm", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        check=False,
    )
    seconds = time.perf_counter() - start
    if child.returncode:
        raise click.ClickException(f"edgevlm {arguments[0]} failed:\n{child.stderr[-2000:]}")
    peak = int(child.stderr.rsplit("peak ", 1)[1].split()[0])
    return Measured(seconds, peak, child.stdout)


def _picture(path: Path) -> None:
    from PIL import Image

    from edgevlm.export.images import scene

    Image.fromarray(scene()).save(path)


def _size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.iterdir())


def _row(what: str, measured: Measured, size: int, goal: str) -> str:
    gb = (f"{n / 1e9:.2f} GB" for n in (measured.peak_bytes, size))
    return f"| {what} | {measured.seconds:.0f} s | {' | '.join(gb)} | {goal} |"


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--quant", default="q4_k_m", show_default=True)
@click.option("--vision-precision", default="int8", show_default=True)
@click.option("--verify/--no-verify", default=False, help="Compare with transformers (12 GB).")
def main(folder: Path, quant: str, vision_precision: str, verify: bool) -> None:
    """Writes, exports and asks a random PaliGemma-3B-224 in FOLDER; prints a Markdown table."""
    checkpoint, bundle, picture = folder / "checkpoint", folder / "bundle", folder / "picture.png"
    if not (checkpoint / "model.safetensors.index.json").exists():
        write_checkpoint(checkpoint)
    _picture(picture)
    how = ["--quant", quant, "--vision-precision", vision_precision]
    check = "--verify" if verify else "--no-verify"
    exported = measure(["export", str(checkpoint), str(bundle), *how, check])
    question = ["answer en what is in the picture?", "-i", str(picture), "-m", str(bundle)]
    answered = measure(["ask", *question, "--max-tokens", "16", "--json"])
    timings = json.loads(answered.stdout.strip().splitlines()[-1])["timings"]
    click.echo(f"{platform.machine()}, {os.cpu_count()} cores, {quant} + {vision_precision}\n")
    click.echo("| step | wall time | peak memory | model read | goal |\n|---|---|---|---|---|")
    click.echo(_row("export", exported, _size(checkpoint), "peak < 8 GB"))
    click.echo(_row("ask, 16 tokens", answered, _size(bundle), "peak < 3 GB"))
    click.echo(f"\nTimings of the answer: {json.dumps(timings)}")


if __name__ == "__main__":
    main()
