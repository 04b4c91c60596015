"""The child process of a target: `python -m workshop.fuzz.worker TARGET FOLDER SEED FIRST BYTES`.

Writes each input to FOLDER/input before it is tried, a finding to FOLDER/found-NUMBER as well, then
a line of JSON with its outcome. BYTES bound the memory that one input may ask for.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import gc
import json
import os
import random
import resource
import sys
from itertools import count
from pathlib import Path

import psutil

from workshop.fuzz import targets
from workshop.fuzz.outcomes import Outcome, of_error


def main(name: str, folder: Path, seed: str, first: int, room: int) -> None:
    """Tries one input after another until the process is ended, or the only one where FIRST is -1:
    that in FOLDER/input.
    """
    # Engines write to stdout and stderr; the parent reads a pipe of its own.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    log = os.open(folder / "log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable(log)
    os.environ["GGML_NO_BACKTRACE"] = "1"
    (folder / "work").mkdir(exist_ok=True)
    target, current = targets.make(name, folder / "work"), folder / "input"
    limit = psutil.Process().memory_info().vms + room
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for i in [first] if first < 0 else count(first):
        data = current.read_bytes() if first < 0 else target.case(random.Random(f"{seed}:{i}"))
        current.write_bytes(data)
        os.ftruncate(log, 0)
        print(json.dumps({"begins": i}), file=out)
        outcome = _tried(target, data)
        if not outcome.well:
            # The next input may be there before the parent has read of this one.
            (folder / f"found-{i}").write_bytes(data)
        print(json.dumps(dataclasses.asdict(outcome)), file=out)
        if i % 64 == 0:
            gc.collect()


def _tried(target: targets.Target, data: bytes) -> Outcome:
    try:
        target.check(data)
    except BaseException as e:
        return of_error(e)
    return Outcome("answer")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
