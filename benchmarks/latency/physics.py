"""Limits of this machine: memory bandwidth and arithmetic, measured with numpy.

`python -m edgevlm.benchmarks.latency.physics` prints both, in a process whose environment has set
the threads of numpy's BLAS before numpy was imported.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence

import numpy as np

from edgevlm.benchmarks.latency.report import Physics
from edgevlm.errors import BenchError
from edgevlm.export import child

_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
# A matrix of 256 MiB is beyond every cache; a product of 1536 rows is beyond every overhead.
_READ_ROWS = 8192
_PRODUCT_ROWS = 1536
_SECONDS = 1.0

# Multiply-adds of one instruction on 8-bit values over one on float32 of the same width, by the
# flag of the processor; the first that is there counts. AMX: a tile product of 16 x 16 x 64 in 16
# cycles against two 16-wide FMAs. VPDPBUSD and SDOT: four for one. SMMLA: eight for one. Without
# them x86 takes three instructions (VPMADDUBSW, VPMADDWD, VPADDD) for 32 products against 8.
_INT8 = (
    ("amx_int8", "AMX", 32.0),
    ("avx512_vnni", "AVX-512 VNNI", 4.0),
    ("avx_vnni", "AVX-VNNI", 4.0),
    ("i8mm", "I8MM", 8.0),
    ("asimddp", "SDOT", 4.0),
    ("avx2", "AVX2", 4 / 3),
)


def measure_physics(threads: int, flags: Sequence[str]) -> Physics:
    """Measures for about two seconds, with that many threads. Raises BenchError."""
    env = child.environment() | dict.fromkeys(_THREADS, str(threads))
    done = child.run(child.command(__name__), env=env)
    if done.returncode:
        raise BenchError(
            f"the machine's peaks could not be measured ({done.stderr.strip()[-200:]})"
        )
    peaks = json.loads(done.stdout)
    name, ratio = int8_instructions(flags)
    return Physics(threads, peaks["bytes_per_s"], peaks["float32_ops_per_s"], ratio, name)


def int8_instructions(flags: Sequence[str]) -> tuple[str, float]:
    """The fastest 8-bit instructions of a processor and their ratio to float32's."""
    for flag, name, ratio in _INT8:
        if flag in flags:
            return name, ratio
    return "none known", 1.0


def _best_s(call: Callable[[], object]) -> float:
    """Shortest time of a call, over about a second and at least three calls."""
    best, times, start = float("inf"), 0, time.perf_counter()
    while times < 3 or time.perf_counter() - start < _SECONDS:
        before = time.perf_counter()
        call()
        best, times = min(best, time.perf_counter() - before), times + 1
    return best


def _main() -> None:
    matrix = np.ones((_READ_ROWS, _READ_ROWS), np.float32)
    vector = np.ones(_READ_ROWS, np.float32)
    read_s = _best_s(lambda: matrix @ vector)
    n = _PRODUCT_ROWS
    square = np.ascontiguousarray(matrix[:n, :n])
    product_s = _best_s(lambda: square @ square)
    peaks = {"bytes_per_s": matrix.nbytes / read_s, "float32_ops_per_s": 2 * n**3 / product_s}
    print(json.dumps(peaks))


if __name__ == "__main__":
    _main()
