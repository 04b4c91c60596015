"""Saved chats: a changed one is refused, or the conversation goes on."""

from __future__ import annotations

import io
import json
import random
import zipfile
from pathlib import Path

import numpy as np

import edgevlm
from edgevlm.errors import ChatFileError
from edgevlm.runtimes import fakes
from edgevlm.runtimes.session import VLM
from workshop.fuzz.mutate import changed, damaged, dumped
from workshop.fuzz.samples import PICTURE

_MEMBER = "chat.json"
_NAMES = (
    *("../chat.json", "/chat.json", "pictures/2", "chat.json/", "a\\b", "x" * 300, "pictures/1"),
    "videos/1/2",
)
_BOMB_BYTES = 200 << 20


class Fuzzed:
    """Chats with pico about a picture, and with a fake about a video."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "chat"
        pico = edgevlm.load(cache=False)
        shown = fakes.vlm("it moves", films=True, conversational=True, later_pictures=True)
        film = edgevlm.Video([np.asarray(PICTURE.convert("RGB"))] * 3, (0.0, 0.5, 1.0), 1.5, 2.0)
        self._seeds: list[bytes] = []
        self._models: list[VLM] = [pico, shown]
        for vlm, image in ((pico, PICTURE), (shown, film)):
            with edgevlm.Chat(vlm, image) as chat:
                for question in ("caption en", "ocr"):
                    chat.ask(question, max_tokens=3)
                chat.save(self._path)
            self._seeds.append(self._path.read_bytes())

    def case(self, rng: random.Random) -> bytes:
        """See Target."""
        seed = rng.choice(self._seeds)
        if rng.random() < 0.3:
            return damaged(seed, rng)
        out = io.BytesIO()
        with (
            zipfile.ZipFile(io.BytesIO(seed)) as archive,
            zipfile.ZipFile(out, "w") as packed,
        ):
            chosen = rng.choice((_MEMBER, _MEMBER, *archive.namelist()))
            for name in archive.namelist():
                data = archive.read(name)
                if name == chosen:
                    data = self._other(name, data, rng)
                name = rng.choice(_NAMES) if rng.random() < 0.05 else name
                method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
                packed.writestr(zipfile.ZipInfo(name), data, method)
        return damaged(out.getvalue(), rng) if rng.random() < 0.1 else out.getvalue()

    @staticmethod
    def _other(name: str, data: bytes, rng: random.Random) -> bytes:
        if rng.random() < 0.01:
            return bytes(_BOMB_BYTES)
        if name != _MEMBER:
            return damaged(data, rng)
        return dumped(changed(json.loads(data), rng), rng)

    def check(self, data: bytes) -> None:
        """See Target."""
        self._path.write_bytes(data)
        pico, shown = self._models
        try:
            self._go_on(shown)
        except ChatFileError:
            self._go_on(pico)

    def _go_on(self, vlm: VLM) -> None:
        with edgevlm.Chat(vlm) as chat:
            chat.load(self._path)
            chat.ask("caption en", max_tokens=2)
            chat.save(self._path)
            chat.load(self._path)
