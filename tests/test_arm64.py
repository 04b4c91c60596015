"""The faults that `make arm64` finds, and its words for them; nothing is emulated here."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from edgevlm.errors import EdgeVLMError
from workshop.arm64 import __main__ as command
from workshop.arm64 import space
from workshop.arm64.compare import Compared, Difference

MACHINE = {
    "back_end": "libggml-cpu-armv8.2_1.so",
    "python": "3.11.2",
    "versions": {"edgevlm": "0.1.0"},
}
SOUND = Compared(
    MACHINE,
    (95, 96, 100),
    (Difference("a-f32", "answer", 0.2, 0), Difference("a-q4_0", "features", 0.9, 0.8)),
    1,
)


def test_differences_within_bounds_pass_and_are_reported() -> None:
    SOUND.check()
    text = command._report({"cortex-a76": SOUND}, "9 passed in 5s", 10, 7.4)
    row = "| cortex-a76 | `libggml-cpu-armv8.2_1.so` | 1 of 1 | 0.20 (0.00; answer) |"
    row += " 0.90 (0.80; features) |"
    assert f"{row} 95 (96) of 100 |" in text
    assert "The core of the suite, on cortex-a76: 9 passed in 5s." in text
    head = next(line for line in text.splitlines() if line.startswith("| processor"))
    assert head.count("|") == row.count("|") + 1


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"same": 0}, "1 of 1 answered other tokens"),
        ({"pico": (90, 96, 100)}, "pico: 90 right answers of 100, here 96"),
        (
            {"differences": (*SOUND.differences, Difference("b-q4_0", "answer", 1.5, 1.2))},
            "b-q4_0: answer is 1.50 of its bound, here 1.20",
        ),
    ],
)
def test_what_is_beyond_its_bound_is_an_error(changed: dict[str, object], error: str) -> None:
    with pytest.raises(EdgeVLMError, match=error):
        dataclasses.replace(SOUND, **changed).check()  # type: ignore[arg-type]


def emulator(folder: Path, version: str) -> Path:
    path = folder / "qemu-aarch64-static"
    path.write_text(f"#!/bin/sh\necho 'qemu-aarch64 version {version}'\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def test_an_emulator_that_computes_wrongly_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    old = emulator(tmp_path, "7.2.17")
    assert space.version(old) == 7
    asked: list[Path] = []

    def fetch(folder: Path) -> None:
        asked.append(folder)
        (folder / "qemu/usr/bin").mkdir(parents=True)
        emulator(folder, "9.0.0").rename(folder / "qemu/usr/bin/qemu-aarch64")

    monkeypatch.setattr(space, "_fetch_emulator", fetch)
    with pytest.raises(EdgeVLMError, match="qemu 9 computes wrongly, 10 is needed"):
        space.emulator(tmp_path / "build")
    assert asked == [tmp_path / "build"]
    assert space.emulator(emulator(tmp_path, "10.0.13").parent).parent == tmp_path


def test_the_results_stand_between_their_marks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = command.ROOT / "docs" / "arm64.md"
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "arm64.md").write_bytes(page.read_bytes())
    monkeypatch.setattr(command, "ROOT", tmp_path)
    command._write("| new |\n")
    text = (tmp_path / "docs" / "arm64.md").read_text(encoding="utf-8")
    assert f"{command._BEGIN}| new |\n{command._END}" in text
    assert text.startswith(page.read_text(encoding="utf-8").partition(command._BEGIN)[0])
