"""decoder.gguf of a bundle: a changed one is refused, or the model answers; llama.cpp never ends
the process on it.
"""

from __future__ import annotations

import copy
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import edgevlm
from edgevlm.export import export_bundle
from edgevlm.models import built_in
from tests.checkpoints.paligemma import write_paligemma
from tests.checkpoints.smolvlm import write_smolvlm
from workshop.fuzz.gguf_layout import ARRAY, NUMBERS, STRING, Entry, Layout, Reader
from workshop.fuzz.mutate import damaged
from workshop.fuzz.samples import PICTURE, replaced

_FILE = "decoder.gguf"
_WHOLE = (0, 1, 2, 3, 7, 31, 32, 64, 255, 511, 513, 2**16, 2**31 - 1, 2**31, 2**32 - 1, -1)
_DECIMAL = (0.0, -1.0, 1e-30, 1e30, float("inf"), float("nan"))
_TEXTS = (
    b"",
    b"x",
    b"\xff\xfe",
    b"llama",
    b"gpt2",
    b"none",
    b"bert",
    b"phi2",
    b"qwen2",
    b"a" * 5000,
)
_KEYS: tuple[tuple[str, int], ...] = (
    *(("general.alignment", 4), ("general.alignment", 8), ("split.count", 2), ("split.no", 2)),
    *(("tokenizer.ggml.bos_token_id", 4), ("tokenizer.ggml.eos_token_id", 4)),
    *(("tokenizer.ggml.add_bos_token", 7), ("tokenizer.ggml.precompiled_charsmap", 8)),
    *(("{}.expert_count", 4), ("{}.expert_used_count", 4), ("{}.attention.key_length", 4)),
    *(("{}.attention.value_length", 4), ("{}.rope.dimension_count", 4), ("{}.vocab_size", 4)),
    *(("{}.rope.scaling.type", 8), ("{}.attention.sliding_window", 4), ("{}.pooling_type", 4)),
    *(("{}.attention.causal", 7), ("{}.nextn_predict_layers", 4), ("{}.expert_group_count", 4)),
    *(("{}.attention.sliding_window_pattern", 4), ("general.architecture", 8)),
)


class Fuzzed:
    """Bundles of three architectures and two kinds of tokenizers with another decoder."""

    def __init__(self, folder: Path) -> None:
        self._folders = [folder / "pico", folder / "smolvlm", folder / "paligemma"]
        makers: tuple[Callable[[Path], object], ...] = (
            lambda at: shutil.copytree(built_in(), at),
            lambda at: _exported(write_smolvlm(folder / "smol"), at),
            lambda at: _exported(write_paligemma(folder / "pali", version=2), at),
        )
        for at, maker in zip(self._folders, makers, strict=True):
            if not at.exists():
                maker(at)
                shutil.copy(at / _FILE, folder / f"{at.name}.gguf")
        self._files = [(folder / f"{at.name}.gguf").read_bytes() for at in self._folders]

    def case(self, rng: random.Random) -> bytes:
        """See Target; the first byte says which bundle."""
        which = rng.randrange(len(self._files))
        data = self._files[which]
        if rng.random() < 0.3:
            return bytes([which]) + damaged(data, rng, rng.choice((64, 2000, len(data))))
        layout = copy.deepcopy(Reader(data).layout)
        for _ in range(rng.choice((1, 1, 2, 3))):
            rng.choice((_number, _number, _entry, _entry, _array, _tensor, _head))(layout, rng)
        return bytes([which]) + layout.packed()

    def check(self, data: bytes) -> None:
        """See Target."""
        folder = self._folders[data[0] % len(self._folders)]
        replaced(folder, _FILE, data[1:])
        with edgevlm.load(folder, cache=False) as vlm:
            vlm.ask("caption en <image> \N{SNOWMAN}", PICTURE, max_tokens=2)


def _exported(checkpoint: Path, at: Path) -> None:
    export_bundle(checkpoint, at, quant="f32", vision_precision="fp32", verify=False)


def _number(layout: Layout, rng: random.Random) -> None:
    """Changes a number or text of the metadata."""
    entry = rng.choice([e for e in layout.entries if e.type != ARRAY])
    if entry.type == STRING:
        entry.value = damaged(entry.value, rng) if rng.random() < 0.3 else rng.choice(_TEXTS)
    elif entry.type in (6, 12):
        entry.value = rng.choice(_DECIMAL)
    else:
        entry.value = rng.choice((*_WHOLE, entry.value + 1, entry.value - 1, entry.value * 2))


def _entry(layout: Layout, rng: random.Random) -> None:
    """Leaves out a key, has it twice, gives it another type, or adds one that llama.cpp knows."""
    at = rng.randrange(len(layout.entries))
    kind = rng.randrange(4)
    if kind == 0:
        del layout.entries[at]
    elif kind == 1:
        layout.entries.insert(at, copy.deepcopy(layout.entries[at]))
    elif kind == 2:
        other = rng.choice((*NUMBERS, STRING, 13, 99))
        layout.entries[at] = Entry(layout.entries[at].key, other, b"1" if other == STRING else 1)
    else:
        name, type = rng.choice(_KEYS)
        arch = next(e.value for e in layout.entries if e.type == STRING)
        key = name.format(arch.decode(errors="replace")).encode()
        layout.entries = [e for e in layout.entries if e.key != key]
        value = rng.choice(_TEXTS) if type == STRING else rng.choice(_WHOLE)
        layout.entries.append(Entry(key, type, value))
    if rng.random() < 0.9:
        layout.n_entries = len(layout.entries)


def _array(layout: Layout, rng: random.Random) -> None:
    """Changes an array: its items, their number, or what the file says of either."""
    entry = rng.choice([e for e in layout.entries if e.type == ARRAY])
    kind = rng.randrange(6)
    if kind == 0:
        entry.value = entry.value[: rng.randrange(len(entry.value) + 1)]
    elif kind == 1:
        entry.value = [*entry.value, *entry.value[: rng.choice((1, 100))]]
    elif kind == 2:
        entry.count = rng.choice((0, 1, 2**20, 2**32, 2**61, 2**64 - 1))
        return
    elif kind == 3:
        entry.item = rng.choice((*NUMBERS, STRING, ARRAY, 50))
    elif entry.value:
        for _ in range(rng.choice((1, 5, 300))):
            text = entry.item == STRING
            one = (
                rng.choice(_TEXTS) if text else rng.choice(_WHOLE if entry.item != 6 else _DECIMAL)
            )
            at = rng.randrange(len(entry.value))
            entry.value[at] = one if kind == 4 else entry.value[rng.randrange(len(entry.value))]
    entry.count = len(entry.value)


def _tensor(layout: Layout, rng: random.Random) -> None:
    """Changes a tensor's name, shape, type or offset, leaves it out or has it twice."""
    at = rng.randrange(len(layout.tensors))
    info = layout.tensors[at]
    kind = rng.randrange(7)
    if kind == 0:
        other = rng.choice(layout.tensors).name
        info.name = rng.choice((b"", b"x", b"blk.9999.attn_q.weight", b"n" * 80, b"\xff", other))
    elif kind == 1:
        i = rng.randrange(len(info.dimensions))
        info.dimensions[i] = rng.choice((0, 1, info.dimensions[i] + 1, 2**31, 2**62, -1))
    elif kind == 2:
        info.dimensions = rng.choice(([], info.dimensions[::-1], [*info.dimensions, 1, 1, 1, 1]))
    elif kind == 3:
        info.type = rng.choice((*range(42), 2**31, 2**32 - 1))
    elif kind == 4:
        info.offset = rng.choice((0, 1, info.offset + 32, 2**40, 2**63, 2**64 - 32))
    elif kind == 5:
        del layout.tensors[at]
    else:
        layout.tensors.insert(at, copy.deepcopy(info))
    if rng.random() < 0.9:
        layout.n_tensors = len(layout.tensors)


def _head(layout: Layout, rng: random.Random) -> None:
    """Changes the head, or cuts the data."""
    kind = rng.randrange(4)
    if kind == 0:
        layout.version = rng.choice((0, 1, 2, 4, 0x03000000))
    elif kind == 1:
        layout.n_tensors = rng.choice((0, 1, 2**31, 2**60, 2**64 - 1))
    elif kind == 2:
        layout.n_entries = rng.choice((0, 1, 2**31, 2**60, 2**64 - 1))
    else:
        layout.data = layout.data[: rng.randrange(len(layout.data))]
