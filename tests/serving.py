"""A server of fakes or of pico on a port of this machine, in a thread of the test's process."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edgevlm.manifest import write_manifest
from edgevlm.models import built_in
from edgevlm.photos import PhotoIndex
from edgevlm.runtimes import fakes
from edgevlm.runtimes.dual import DualEncoder
from edgevlm.runtimes.engines import Block
from edgevlm.runtimes.session import VLM
from edgevlm.server.access import Access
from edgevlm.server.app import Server, make_server
from edgevlm.server.limits import Limits
from edgevlm.server.listening import Runner, listen, url
from edgevlm.server.photos import Photos
from edgevlm.server.pool import AnyModel, Pool

# Enough for every model of a test.
PLENTY = 1 << 40
ANYBODY = Access()
USUAL = Limits()


@dataclass
class Served:
    """A running server: its address, and what runs in it."""

    base: str
    server: Server
    pool: Pool
    runner: Runner

    @property
    def api(self) -> str:
        return f"{self.base}/v1"


def pool_of(
    models: Mapping[str, Callable[[], AnyModel]], budget: int = PLENTY, idle_s: float | None = None
) -> Pool:
    """A pool of models by name, whose folders are all pico's."""
    folder = built_in()
    # One folder for all, each by a path that the loader can tell from the others.
    paths = {name: folder / f"../{folder.name}" for name in models}
    by_path = {id(path): name for name, path in paths.items()}
    return Pool(
        lambda: paths, lambda path: models[by_path[id(path)]](), budget=budget, idle_s=idle_s
    )


@contextmanager
def serving(
    models: Mapping[str, Callable[[], AnyModel]] | Pool,
    access: Access = ANYBODY,
    limits: Limits = USUAL,
    grace_s: float = 0.2,
    photos: Photos | None = None,
) -> Iterator[Served]:
    """Runs a server until the end of the block."""
    pool = models if isinstance(models, Pool) else pool_of(models)
    server = make_server(pool, access, limits, photos)
    runner = Runner(server, grace_s)
    with listen("127.0.0.1", 0) as made:
        thread = threading.Thread(target=runner.run, args=([made],))
        thread.start()
        try:
            yield Served(url(made), server, pool, runner)
        finally:
            runner.should_exit = True
            thread.join()


def dual_pool(root: Path, model: DualEncoder, answering: bool = False) -> Pool:
    """A pool of a fake "clip", whose manifest lies in `root`, beside a fake "vlm" where something
    is to answer.
    """
    (root / "clip").mkdir(parents=True)
    write_manifest(root / "clip", model.manifest)
    paths = {"clip": root / "clip", **({"vlm": built_in()} if answering else {})}
    pool = Pool(lambda: paths, lambda _: fakes.vlm("yes"), budget=PLENTY, idle_s=None)
    pool.add("clip", model)
    return pool


def album(
    root: Path, folder: Path, limits: Limits = USUAL, answering: bool = False
) -> tuple[Pool, Photos]:
    """The same, and the pictures of a folder, whose index lies in `root`, too."""
    model = fakes.dual()
    pool = dual_pool(root, model, answering)
    return pool, Photos(PhotoIndex(folder, model, path=root / "index.sqlite"), "clip", limits)


def solid(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (40, 30)) -> Path:
    """A picture of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


class Gate(fakes.FakeDecoder):
    """A decoder that waits at every step while its gate is closed; `entered` says that it has read
    a prompt, `steps` counts.
    """

    def __init__(self, answers: Sequence[str | bytes]) -> None:
        super().__init__(answers)
        self.open = threading.Event()
        self.entered = threading.Event()
        self.steps = 0

    def prefill(self, blocks: Sequence[Block], **options: Any) -> int:
        self.entered.set()
        return super().prefill(blocks, **options)

    def step(self, token: int) -> None:
        self.open.wait()
        self.steps += 1
        super().step(token)


def gated(answer: str = "a picture") -> tuple[VLM, Gate]:
    """A fake model and its gate, which is closed."""
    vlm = fakes.vlm(answer)
    gate = Gate([answer])
    vlm.engines = type(vlm.engines)(vlm.manifest, vlm.engines.family, vlm.engines.encoder, gate)
    return vlm, gate


def png(width: int = 8, height: int = 6, value: int = 200) -> bytes:
    """A picture of one grey."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def data_url(data: bytes) -> str:
    """The data URL of a picture's file."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def question(text: str, *pictures: bytes) -> dict[str, Any]:
    """A user's message with pictures before its text."""
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": data_url(data)}} for data in pictures
    ]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
