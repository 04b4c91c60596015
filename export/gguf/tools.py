"""llama.cpp's own tools, each run in a child process.

A child keeps its messages off this process's stdout, can be stopped in the middle of a long call,
and takes nothing down with it if llama.cpp aborts. `python -m edgevlm.export.gguf.tools` is the
child.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgevlm.cleanup import process, temporary_folder
from edgevlm.errors import ExportError
from edgevlm.export import child
from edgevlm.machine import usable_cpus
from edgevlm.progress import Stage

_POLL_S = 0.05
# What a file that did not fit leaves of a disk at most.
_NO_ROOM_BYTES = 1 << 20

Matrix = Mapping[str, NDArray[np.float32]]


def quantize(
    source: Path, target: Path, ftype: int, stage: Stage, matrix: Matrix | None = None
) -> None:
    """Writes `target`, a GGUF of llama.cpp's file type `ftype`, from an unquantized `source`.

    `matrix` holds the importance of each column by the tensor's name. The stage follows the bytes
    written. Raises ExportError, or OSError where the disk is full.
    """
    with temporary_folder() as scratch, (scratch / "log").open("w+b") as log:
        weights = scratch / "matrix.npz"
        if matrix:
            np.savez(weights, **matrix)  # type: ignore[arg-type]
        more = [weights] if matrix else []
        command = child.command(__name__, "quantize", source, target, str(ftype), *more)
        files = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        with process(command, env=child.environment(), **files) as quantizer:
            while quantizer.poll() is None:
                time.sleep(_POLL_S)
                if target.exists():
                    stage.reach(target.stat().st_size)
        if quantizer.returncode and shutil.disk_usage(target.parent).free < _NO_ROOM_BYTES:
            # llama.cpp says "iostream error".
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if quantizer.returncode:
            log.seek(0)
            reason = _reason(log.read().decode(errors="replace"))
            raise ExportError(f"{source.name}: llama.cpp cannot quantize it ({reason})")
        stage.finish()


def tokenize(gguf: Path, texts: list[str]) -> list[list[int]]:
    """Token ids that llama.cpp gives each text, special tokens neither parsed nor added."""
    ids: list[list[int]] = json.loads(_child("tokenize", gguf, json.dumps(texts)))
    return ids


def _child(name: str, gguf: Path, given: str) -> str:
    done = child.run(child.command(__name__, name, gguf), input=given)
    if done.returncode:
        raise ExportError(f"{gguf.name}: llama.cpp cannot read it ({_reason(done.stderr)})")
    return done.stdout


def pieces(gguf: Path) -> list[str | None]:
    """The text of every token; None where its bytes are no whole characters."""
    texts: list[str | None] = json.loads(_child("pieces", gguf, ""))
    return texts


def usage(gguf: Path, texts: Mapping[str, float]) -> NDArray[np.float64]:
    """Occurrences of each token in texts that occur so often, float64 [n_vocab]."""
    counts = _child("usage", gguf, json.dumps([[*texts], [*texts.values()]]))
    return np.array(json.loads(counts), np.float64)


def _reason(log: str) -> str:
    lines = [line.strip() for line in log.splitlines()]
    said = [line for line in lines if "error" in line.lower() or "failed" in line.lower()]
    return (said or [line for line in lines if line] or ["no reason given"])[-1]


def _quantize(source: str, target: str, ftype: str, matrix: str = "") -> int:
    from edgevlm.export.gguf.bindings import llama

    params = llama.llama_model_quantize_default_params()
    params.ftype = int(ftype)
    # The intermediate file is bf16 where the checkpoint is: no precision is lost twice.
    params.allow_requantize = False
    params.nthread = usable_cpus()
    if matrix:
        with np.load(matrix) as found:
            kept = {name: np.ascontiguousarray(found[name], np.float32) for name in found.files}
        # An entry without a name ends the list.
        entries = (llama.llama_model_imatrix_data * (len(kept) + 1))()
        for entry, (name, values) in zip(entries, kept.items(), strict=False):
            entry.name, entry.size = name.encode(), len(values)
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = entries
    code = llama.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))
    return int(code)


class _Vocabulary:
    """The vocabulary of a GGUF file, in a child process."""

    def __init__(self, gguf: str) -> None:
        from edgevlm.export.gguf.bindings import llama

        params = llama.llama_model_default_params()
        params.vocab_only = True
        model = llama.llama_model_load_from_file(gguf.encode(), params)
        if not model:
            sys.exit(1)
        vocab = llama.llama_model_get_vocab(model)
        assert vocab
        self._llama, self._model, self._vocab = llama, model, vocab
        self._room = (llama.llama_token * 0)()

    def ids(self, text: str) -> list[int]:
        data = text.encode()
        if len(self._room) < len(data) + 8:
            self._room = (self._llama.llama_token * (2 * len(data) + 64))()
        room = self._room
        n = self._llama.llama_tokenize(self._vocab, data, len(data), room, len(room), False, False)
        ids: list[int] = room[:n]
        return ids

    def __len__(self) -> int:
        return int(self._llama.llama_vocab_n_tokens(self._vocab))

    def piece(self, token: int) -> str | None:
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = self._llama.llama_token_to_piece(self._vocab, token, buffer, size, 0, True)
            if n >= 0:
                break
            size = -n
        try:
            return buffer.raw[:n].decode()
        except UnicodeDecodeError:
            return None


def _tokenize(gguf: str) -> int:
    vocabulary = _Vocabulary(gguf)
    _say([vocabulary.ids(text) for text in json.load(sys.stdin)])
    return 0


def _pieces(gguf: str) -> int:
    vocabulary = _Vocabulary(gguf)
    _say([vocabulary.piece(token) for token in range(len(vocabulary))])
    return 0


def _usage(gguf: str) -> int:
    vocabulary = _Vocabulary(gguf)
    counts = [0.0] * len(vocabulary)
    for text, often in zip(*json.load(sys.stdin), strict=True):
        for token in vocabulary.ids(text):
            counts[token] += often
    _say(counts)
    return 0


def _say(answer: object) -> None:
    # json.dump makes the same text an item at a time, in Python: ten times slower.
    sys.stdout.write(json.dumps(answer))


_PROGRAMS: Mapping[str, Callable[..., int]] = {
    "quantize": _quantize,
    "tokenize": _tokenize,
    "pieces": _pieces,
    "usage": _usage,
}


if __name__ == "__main__":
    name, *paths = sys.argv[1:]
    sys.exit(_PROGRAMS[name](*paths))
