"""Files that torch.save wrote, their archive or their pickle changed: tensors are read, or the file
is refused, and nothing in it runs.
"""

from __future__ import annotations

import io
import os
import pickle
import random
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from edgevlm.errors import SourceError
from edgevlm.export.checkpoint.source import read_file
from workshop.fuzz.mutate import damaged
from workshop.fuzz.outcomes import Wrong

_MOST_BYTES = 1 << 20
_GLOBALS = (
    *(b"cos\nsystem\n", b"cbuiltins\neval\n", b"cbuiltins\ngetattr\n", b"ctorch\nload\n"),
    *(
        b"ctorch.hub\nload\n",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ccollections\nOrderedDict\n",
    ),
    *(b"ctorch\nFloatStorage\n", b"ctorch\nSize\n", b"ctorch.serialization\n_get_layout\n"),
    *(b"cnumpy.core.multiarray\n_reconstruct\n", b"c_codecs\nencode\n", b"ctorch\ndevice\n"),
)
_CALLS = (
    b"(S'touch RAN'\ntR",
    b"(tR",
    b"(K\1tR",
    b"}b",
    b"\x81",
    b"N\x85R",
    b"(K\xffI2147483647\ntR",
)


class _Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch RAN",)


class Fuzzed:
    """The reader of weight files in torch's format."""

    def __init__(self, folder: Path) -> None:
        os.chdir(folder)
        torch.manual_seed(0)
        tensors = {"a": torch.randn(3, 4), "b": torch.randn(5).half(), "c": torch.arange(4)}
        states: tuple[Any, ...] = (
            *(tensors, {"model": tensors, "config": {"lr": 0.1, "x": [1, (2, "y")]}}),
            *(OrderedDict(tensors), {**tensors, "run": _Runs()}, {**tensors, "t": tensors["a"].T}),
        )
        self._seeds = [_saved(state) for state in states]
        self._seeds += [
            pickle.dumps(_Runs()),
            _saved(tensors, _use_new_zipfile_serialization=False),
        ]

    def case(self, rng: random.Random) -> bytes:
        """See Target."""
        seed = rng.choice(self._seeds)
        if not seed.startswith(b"PK") or rng.random() < 0.4:
            return damaged(seed, rng)
        return _packed(seed, rng)

    def check(self, data: bytes) -> None:
        """See Target."""
        path = Path("x.pth")
        path.write_bytes(data)
        try:
            for tensor in read_file(path).tensors.values():
                if tensor.dtype in ("F32", "F16", "BF16") and tensor.elements > _MOST_BYTES:
                    raise Wrong(f"a tensor of {tensor.elements} values in {len(data)} bytes")
                if tensor.dtype in ("F32", "F16", "BF16"):
                    tensor.float32()
        except SourceError:
            raise
        finally:
            if Path("RAN").exists():
                Path("RAN").unlink()
                raise Wrong("the file ran a command")


def _saved(state: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    return buffer.getvalue()


def _packed(seed: bytes, rng: random.Random) -> bytes:
    """The archive again, one of its files changed, with the hash that belongs to it."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(seed)) as archive, zipfile.ZipFile(out, "w") as packed:
        names = archive.namelist()
        chosen = rng.choice((rng.choice(names), next(n for n in names if n.endswith("data.pkl"))))
        for name in names:
            data = archive.read(name)
            if name == chosen:
                data = _pickle(data, rng) if name.endswith(".pkl") else damaged(data, rng)
            info = zipfile.ZipInfo(name if rng.random() < 0.98 else f"../{name}")
            # torch puts every record at a multiple of 64 bytes.
            begin = packed.fp.tell() + 30 + len(name) + 4  # type: ignore[union-attr]
            padding = -begin % 64
            info.extra = b"FB" + padding.to_bytes(2, "little") + bytes(padding)
            packed.writestr(info, data)
    return out.getvalue()


def _pickle(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.4:
        at = rng.randrange(2, len(data))
        return data[:at] + rng.choice(_GLOBALS) + rng.choice(_CALLS) + data[at:]
    return damaged(data, rng)
