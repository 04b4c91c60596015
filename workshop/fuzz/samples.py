"""Inputs that nothing is wrong with, which targets change."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from PIL import Image

from edgevlm.manifest import MANIFEST

PICTURE = Image.fromarray(np.indices((24, 32, 3)).sum(0).astype(np.uint8) * 3)


def replaced(folder: Path, name: str, data: bytes) -> None:
    """Puts a component's file into a bundle, and its size and hash into the manifest."""
    (folder / name).write_bytes(data)
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    for component in manifest["components"].values():
        for entry in component["files"]:
            if entry["file"] == name:
                entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
