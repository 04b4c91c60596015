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
from collections.abc import Mapping
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
    done = child.run(child.command(__name__, "tokenize", gguf), input=json.dumps(texts))
    if done.returncode:
        raise ExportError(f"{gguf.name}: llama.cpp cannot read it ({_reason(done.stderr)})")
    ids: list[list[int]] = json.loads(done.stdout)
    return ids


def _reason(log: str) -> str:
    lines = [line.strip() for line in log.splitlines()]
    said = [line for line in lines if "error" in line.lower() or "failed" in line.lower()]
    return (said or [line for line in lines if line] or ["no reason given"])[-1]


def _quantize(source: str, target: str, ftype: str, matrix: str = "") -> int:
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = int(ftype)
    # The intermediate file is bf16 where the checkpoint is: no precision is lost twice.
    params.allow_requantize = False
    params.nthread = usable_cpus()
    if matrix:
        with np.load(matrix) as found:
            kept = {name: np.ascontiguousarray(found[name], np.float32) for name in found.files}
        # An entry without a name ends the list.
        entries = (llama_cpp.llama_model_imatrix_data * (len(kept) + 1))()
        for entry, (name, values) in zip(entries, kept.items(), strict=False):
            entry.name, entry.size = name.encode(), len(values)
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = entries
    code = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))
    return int(code)


def _tokenize(gguf: str) -> int:
    import llama_cpp

    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(gguf.encode(), params)
    if not model:
        return 1
    vocab = llama_cpp.llama_model_get_vocab(model)
    assert vocab
    results = []
    for text in json.load(sys.stdin):
        data = text.encode()
        buffer = (llama_cpp.llama_token * (len(data) + 8))()
        n = llama_cpp.llama_tokenize(vocab, data, len(data), buffer, len(buffer), False, False)
        results.append(list(buffer[:n]))
    json.dump(results, sys.stdout)
    return 0


def _main() -> int:
    name, *paths = sys.argv[1:]
    return _quantize(*paths) if name == "quantize" else _tokenize(*paths)


if __name__ == "__main__":
    sys.exit(_main())
