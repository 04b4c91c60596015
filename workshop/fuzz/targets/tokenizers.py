"""JSON files and tokenizers of checkpoints: each is read, or the checkpoint is refused before
anything is written.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

from edgevlm.export import pipeline
from edgevlm.export.options import ReadOptions
from tests.checkpoints.deepseek_vl import write_deepseek_vl
from tests.checkpoints.paligemma import write_paligemma
from tests.checkpoints.smolvlm import write_smolvlm
from workshop.fuzz.mutate import changed, damaged, dumped

_FILES = {
    "paligemma": ("tokenizer.model", "tokenizer_config.json", "config.json"),
    "smolvlm": (
        "tokenizer.json",
        "tokenizer_config.json",
        "preprocessor_config.json",
        "config.json",
    ),
    "pairs": ("vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json"),
    "deepseek": ("tokenizer.json", "config.json", "special_tokens_map.json"),
}


class Fuzzed:
    """Four tiny checkpoints, one file of which is changed."""

    def __init__(self, folder: Path) -> None:
        self._folders = {name: folder / name for name in _FILES}
        if not self._folders["deepseek"].exists():
            write_paligemma(self._folders["paligemma"])
            write_smolvlm(self._folders["smolvlm"])
            _pairs(shutil.copytree(self._folders["smolvlm"], self._folders["pairs"]))
            write_deepseek_vl(self._folders["deepseek"])
            for each in self._folders.values():
                shutil.copytree(each, folder / "kept" / each.name)
        self._kept = folder / "kept"
        self._files = sorted(
            (name, file)
            for name, files in _FILES.items()
            for file in files
            if (self._kept / name / file).is_file()
        )

    def case(self, rng: random.Random) -> bytes:
        """See Target; the first byte says which file of which checkpoint."""
        which = rng.randrange(len(self._files))
        name, file = self._files[which]
        data = (self._kept / name / file).read_bytes()
        if not file.endswith(".json") or rng.random() < 0.1:
            return bytes([which]) + damaged(data, rng)
        return bytes([which]) + dumped(changed(json.loads(data), rng), rng)

    def check(self, data: bytes) -> None:
        """See Target."""
        name, file = self._files[data[0] % len(self._files)]
        path = self._folders[name] / file
        try:
            path.write_bytes(data[1:])
            pipeline.read(self._folders[name], ReadOptions())
        finally:
            shutil.copy(self._kept / name / file, path)


def _pairs(folder: Path) -> None:
    """Gives a checkpoint the older files of its tokenizer."""
    path = folder / "tokenizer.json"
    model = json.loads(path.read_text(encoding="utf-8"))["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = (m if isinstance(m, str) else " ".join(m) for m in model["merges"])
    (folder / "merges.txt").write_text("\n".join(merges), encoding="utf-8")
    path.unlink()
