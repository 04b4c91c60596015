"""Captions by several workers: `pip install "ray[data]"`, then many_ray.py FOLDER N_WORKERS."""

import json
import sys
from typing import Any

import ray.data

import edgevlm
from edgevlm.image.listing import listed


class Captions:
    def __init__(self) -> None:
        self.vlm = edgevlm.load(threads=1)  # once for each worker

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"file": batch["item"], "text": [self.vlm.caption(f).text for f in batch["item"]]}


def main(folder: str, n_workers: str = "2") -> None:
    files = ray.data.from_items([str(p.resolve()) for p in listed(folder, recursive=True) or ()])
    pool = ray.data.ActorPoolStrategy(size=int(n_workers))
    for row in files.map_batches(Captions, batch_size=8, compute=pool).iter_rows():
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
