"""The command line: answers on stdout, one line for every error; on engines without weights."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import edgevlm
from edgevlm import VLM, cli
from edgevlm.runtimes import fakes

BOXES = "<loc0000><loc0000><loc0512><loc0512> circle ; <loc0512><loc0512><loc1023><loc1023> star"


class Terminal:
    """Runs the command line in this process, with a fake model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys
        self.loaded: list[tuple[Any, ...]] = []
        self.says("a red circle")

    def says(self, *answers: str | bytes, **model: Any) -> None:
        def load(*args: object, **options: object) -> VLM:
            self.loaded.append((*args, options))
            return fakes.vlm(answers, **model)

        self._monkeypatch.setattr(edgevlm, "load", load)

    def __call__(self, *arguments: object, stdin: bytes = b"") -> tuple[str | int | None, str, str]:
        text = io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
        self._monkeypatch.setattr(sys, "stdin", text)
        self._monkeypatch.setattr(sys, "argv", ["edgevlm", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = self._capsys.readouterr()
        return ended.value.code, out, err


@pytest.fixture
def edge(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    monkeypatch.delenv("EDGEVLM_MODEL", raising=False)
    return Terminal(monkeypatch, capsys)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.fromarray(np.full((60, 80, 3), 200, np.uint8)).save(path)
    return path


def test_json_has_log_probabilities_where_they_are_asked_for(edge: Terminal) -> None:
    _, out, _ = edge("ask", "x", "--json", "--logprobs", "2")
    found = json.loads(out)
    assert [token["token_id"] for token in found["logprobs"]] == found["token_ids"]
    assert bytes(token["data"][0] for token in found["logprobs"]).decode() == found["text"]
    assert all(len(token["top"]) == 2 for token in found["logprobs"])
    assert "logprobs" not in json.loads(edge("ask", "x", "--json")[1])
    code, _, err = edge("ask", "x", "--logprobs", "2")
    assert code == 2 and err.startswith("edgevlm: --logprobs goes with --json")


def test_ask_prints_the_answer_and_nothing_else(edge: Terminal, picture: Path) -> None:
    code, out, err = edge("ask", "caption en", "-i", picture, "-m", "some-model")
    assert (code, out, err) == (0, "a red circle\n", "")
    assert edge.loaded[0][0] == "some-model"


def test_the_built_in_model_introduces_itself_once(
    edge: Terminal, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out, err = edge("ask", "caption en", "-i", picture)
    assert out == "a red circle\n"
    assert err.count("built-in") == 1 and "drawn scenes" in err and "edgevlm pull" in err
    monkeypatch.setenv("EDGEVLM_MODEL", "mine")
    assert edge("ask", "caption en", "-i", picture)[2] == ""
    assert edge.loaded[-1][0] == "mine"


def test_json_ends_with_one_object(edge: Terminal, picture: Path) -> None:
    code, out, _ = edge("ask", "caption en", "-i", picture, "--json")
    reply = json.loads(out.splitlines()[-1])
    assert code == 0
    assert reply["text"] == "a red circle"
    assert len(reply["token_ids"]) == reply["tokens"]["generated"] == 12
    assert reply["finish_reason"] == "stop"
    assert set(reply["tokens"]) == {"image", "text", "cached", "generated", "kept", "tiles"}
    assert reply["timings"]["first_token_ms"] > 0
    assert "boxes" not in reply


def test_options_reach_the_answer(edge: Terminal, picture: Path) -> None:
    out = edge("ask", "x", "-i", picture, "--max-tokens", 3)[1]
    assert out == "a r\n"
    assert edge("ask", "x", "-i", picture, "--stop", "ci", "--stop", "zz")[1] == "a red \n"
    edge("ask", "x", "--threads", 2, "--device", "npu", "--decoder-device", "gpu")
    given = {name: value for name, value in edge.loaded[-1][1].items() if value is not None}
    del given["progress"]
    assert given == {
        "image": [],
        "device": "npu",
        "decoder_device": "gpu",
        "threads": 2,
        "goal": "caption",
        "cache": True,
    }
    edge("ask", "x", "--no-cache")
    assert edge.loaded[-1][1]["cache"] is False


def test_stats_list_every_stage_on_stderr(edge: Terminal, picture: Path) -> None:
    _, out, err = edge("ask", "x", "-i", picture, "--stats")
    assert out == "a red circle\n"
    for stage in ("load", "image decode", "preprocess", "vision", "projector", "prefill",
                  "first token", "decode", "image 4, text 3, cached 0", "peak memory",
                  "vision on cpu", "decoder on cpu"):  # fmt: skip
        assert stage in err


def test_a_picture_from_stdin(edge: Terminal, picture: Path) -> None:
    code, out, _ = edge("ask", "x", "-i", "-", stdin=picture.read_bytes())
    assert (code, out) == (0, "a red circle\n")
    assert edge("ask", "x", "-i", "-") == (
        1,
        "",
        "edgevlm: stdin: is empty; pipe a picture into the command\n",
    )


def test_tasks_use_the_models_own_prompts(edge: Terminal, picture: Path) -> None:
    text = {t: json.loads(edge(*t.split(), "-i", picture, "--json")[1])["tokens"]["text"]
            for t in ("caption -l de", "ocr")}  # fmt: skip
    assert text == {"caption -l de": 1 + len("caption de\n"), "ocr": 1 + len("ocr\n")}


def test_detect_lists_and_draws_boxes(edge: Terminal, picture: Path, tmp_path: Path) -> None:
    edge.says(BOXES)
    out_file = tmp_path / "boxes.png"
    code, out, _ = edge("detect", "circle", "star", "-i", picture, "-o", out_file)
    assert (code, out) == (0, "circle\t0 0 40 30\nstar\t40 30 80 60\n")
    drawn = np.array(Image.open(out_file))
    assert drawn.shape == (60, 80, 3) and (drawn != 200).any()
    reply = json.loads(edge("detect", "circle", "-i", picture, "--json")[1])
    assert reply["text"] == BOXES
    assert reply["boxes"][0] == {
        "x0": 0, "y0": 0, "x1": pytest.approx(40.04, abs=0.01),
        "y1": pytest.approx(30.03, abs=0.01), "label": "circle", "segment": [],
        "normalized": [0, 0, pytest.approx(0.5005, abs=1e-4), pytest.approx(0.5005, abs=1e-4)],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("size", "name", "limit"),
    [
        ((16400, 4), "boxes.webp", "16400 x 4 pixels"),
        ((4, 16400), "boxes.webp", "4 x 16400 pixels"),
        ((70000, 2), "boxes.gif", "70000 x 2 pixels"),
        ((70000, 2), "boxes.sgi", "70000 x 2 pixels"),
    ],
)
def test_sides_that_a_format_has_no_room_for_are_refused_before_the_model_is_loaded(
    edge: Terminal, tmp_path: Path, size: tuple[int, int], name: str, limit: str
) -> None:
    Image.new("RGB", size).save(tmp_path / "long.png")
    out = tmp_path / name
    code, _, err = edge("detect", "x", "-i", tmp_path / "long.png", "-o", out)
    assert code == 2 and err.count("\n") == 1 and limit in err and "use .png" in err
    assert edge.loaded == [] and not out.exists()
    edge.says("")
    assert edge("detect", "x", "-i", tmp_path / "long.png", "-o", tmp_path / "b.png")[0] == 0
    with Image.open(tmp_path / "b.png") as drawn:
        assert drawn.size == size


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_picture_that_the_disk_does_not_take(
    edge: Terminal, picture: Path, tmp_path: Path
) -> None:
    (tmp_path / "boxes.png").symlink_to("/dev/full")
    edge.says(BOXES)
    code, out, err = edge("detect", "x", "-m", "mine", "-i", picture, "-o", tmp_path / "boxes.png")
    assert (code, out.count("\n")) == (1, 2)  # What was found is said all the same.
    assert err == f"edgevlm: {tmp_path}/boxes.png: cannot be written (No space left on device)\n"


def test_detect_nothing(edge: Terminal, picture: Path) -> None:
    edge.says("")
    code, out, err = edge("detect", "cat", "-i", picture)
    assert (code, out) == (0, "") and "Nothing was found." in err
    assert json.loads(edge("detect", "cat", "-i", picture, "--json")[1])["boxes"] == []


def test_chat(edge: Terminal, picture: Path, tmp_path: Path) -> None:
    other = tmp_path / "two words.png"
    other.write_bytes(picture.read_bytes())
    edge.says("one", "two", "three", "four")
    typed = ["hi", f"/image {picture}", "what?", "/stats", f"/image '{other}'", "and?", "",
             "/clear", "/image", "now?", "/help", "/fly", "/image nowhere.png", "/exit",
             "never"]  # fmt: skip
    code, out, err = edge("chat", "--stats", stdin="\n".join(typed).encode())
    assert (code, out) == (0, "one\ntwo\nthree\nfour\n")
    assert "image 0, text 4, cached 0" in err  # no picture yet
    assert "image 4, text 7, cached 0" in err
    assert "image 4, text 6, cached 4" in err  # another file, the same pixels
    assert "image 0, text 6, cached 0" in err  # cleared
    assert "/image PATH|URL" in err
    assert "/fly: no such command" in err
    assert "nowhere.png: no such file" in err


def test_a_chat_says_once_that_its_context_is_full(edge: Terminal) -> None:
    edge.says("abc", context_length=100, conversational=True)
    code, out, err = edge("chat", stdin=b"and what is left of it?\n" * 12)
    assert (code, out) == (0, "abc\n" * 12)
    assert err.count("its oldest questions are left out; /clear") == 1


def test_clear_keeps_the_picture(edge: Terminal, picture: Path) -> None:
    edge.says("abc", conversational=True)
    _, _, err = edge("chat", "-i", picture, "--stats", stdin=b"one?\n/clear\ntwo?\n")
    assert err.count("image 4, text 6, cached") == 2


def test_chat_stats_before_any_answer(edge: Terminal) -> None:
    code, _, err = edge("chat", stdin=b"/stats\n")
    assert code == 0 and "nothing was asked" in err


def test_ctrl_c_in_a_chat_stops_the_answer_only(
    edge: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(fakes.FakeDecoder):
        def step(self, token: int) -> None:
            if self._past - self._start == 2 and len(self.prefills) == 1:
                raise KeyboardInterrupt
            super().step(token)

    monkeypatch.setattr(fakes, "FakeDecoder", Interrupted)
    edge.says("abcdef", "second")
    code, out, err = edge("chat", stdin=b"first?\nsecond?\n")
    assert (code, out) == (0, "abcsecond\n") and "(stopped)" in err


@pytest.mark.parametrize(
    "command", [("ask", "x"), ("caption",), ("ocr",), ("detect", "x"), ("ask", "x", "--json")]
)
def test_an_answer_that_is_cut_says_so(
    edge: Terminal, picture: Path, command: tuple[str, ...]
) -> None:
    given = (*command, "-m", "mine", "-i", picture)
    assert edge(*given, "--max-tokens", 5)[2].splitlines()[-1] == (
        "Cut at 5 tokens; --max-tokens raises the limit."
    )
    assert "Cut" not in edge(*given)[2]
    assert "Cut" not in edge(*given, "--stop", "red")[2]


def test_a_full_context_is_not_cured_by_more_tokens(
    edge: Terminal, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edgevlm, "load", lambda *_, **__: fakes.vlm("a" * 50, context_length=16))
    assert edge("ask", "x", "-i", picture, "-m", "mine")[1:] == (
        "aaaaaaaaa\n",
        "Cut at 9 tokens: the context of 16 is full.\n",
    )


def test_a_cut_answer_in_a_chat(edge: Terminal) -> None:
    edge.says("first answer", "two")
    _, out, err = edge("chat", "--max-tokens", 5, stdin=b"one?\ntwo?\n")
    assert out == "first\ntwo\n" and err.count("Cut at 5 tokens; --max-tokens") == 1


def test_a_page_of_text_may_be_longer_than_other_answers(
    edge: Terminal, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = "word " * 300
    monkeypatch.setattr(edgevlm, "load", lambda *_, **__: fakes.vlm(page, context_length=8192))
    code, out, err = edge("ocr", "-i", picture, "-m", "mine")
    assert len(out) == 1025 and "Cut at 1024 tokens" in err
    assert edge("ocr", "-i", picture, "-m", "mine", "--max-tokens", 3)[1] == "wor\n"
    assert len(edge("ask", "ocr", "-i", picture, "-m", "mine")[1]) == 257


def test_a_bug_shows_its_traceback(edge: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise AttributeError("ours")

    monkeypatch.setattr(edgevlm, "load", broken)
    monkeypatch.setattr(sys, "argv", ["edgevlm", "ask", "x"])
    with pytest.raises(AttributeError, match="ours"):
        cli.main()


def test_what_the_system_refuses_is_one_line(
    edge: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "/some/file")

    monkeypatch.setattr(edgevlm, "load", refused)
    assert edge("ask", "x", "-m", "mine") == (1, "", "edgevlm: /some/file: Permission denied\n")


def test_ctrl_c_in_ask_ends_with_130(edge: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edgevlm, "load", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    assert edge("ask", "x")[0] == 130


BAD = {
    "no command": (["fly"], 2, "No such command 'fly'"),
    "no prompt": (["ask"], 2, "Missing argument 'PROMPT'"),
    "unknown option": (["ask", "x", "--fast"], 2, "No such option"),
    "no number": (["ask", "x", "--max-tokens", "many"], 2, "'many' is not a valid integer"),
    "zero tokens": (["ask", "x", "--max-tokens", "0"], 1, "max_tokens must be at least 1"),
    "temperature": (["ask", "x", "--temperature", "-1"], 1, "temperature must be 0 or more"),
    "top-p": (["ask", "x", "--top-p", "2"], 1, "top_p must be"),
    "seed": (["ask", "x", "--seed", "-5"], 1, "seed must be"),
    "no file": (["ask", "x", "-i", "none.png"], 1, "none.png: no such file"),
    "folder": (["chat", "-i", "."], 1, "is a folder"),
    "unreachable": (["ask", "x", "-i", "http://127.0.0.1:9/a.png"], 1, "cannot be downloaded"),
    "three pictures": (["ask", "x", *["-i", "{picture}"] * 3], 1, "this model takes 2"),
    "stdin twice": (["ask", "x", "-i", "-", "-i", "-"], 2, "one picture only"),
    "long prompt": (["ask", "y" * 600], 1, "shorten the prompt"),
    "detect without picture": (["detect", "cat"], 2, "name a picture with -i"),
    "detect two pictures": (["detect", "cat", *["-i", "{picture}"] * 2], 2, "one picture"),
    "detect nothing": (["detect", "-i", "{picture}"], 2, "Missing argument"),
    "draw to unknown": (["detect", "c", "-i", "{picture}", "-o", "b.xyz"], 2, "use .png"),
    "draw to nowhere": (["detect", "c", "-i", "{picture}", "-o", "no/b.png"], 2, "does not exist"),
    "draw in no colours": (["detect", "c", "-i", "{picture}", "-o", "b.blp"], 2, "use .png"),
    "draw in black": (["detect", "c", "-i", "{picture}", "-o", "b.xbm"], 2, "use .png"),
    "draw to a format that is read only": (
        ["detect", "c", "-i", "{picture}", "-o", "b.psd"],
        2,
        "use .png",
    ),
    "show no model": (["models", "show", ""], 1, "the model's name is empty"),
    "export no source": (["export", "", "out"], 1, "the source's name is empty"),
    "export to no name": (["export", ".", ""], 2, "it is empty; name a folder"),
    "requantize to no name": (["requantize", "pico", ""], 2, "it is empty; name a folder"),
    "verify nothing": (["models", "verify", "none"], 1, "no such bundle folder"),
    "show a folder": (["models", "show", "."], 1, "not a bundle"),
    "export nothing": (["export", "no-such-folder", "out"], 1, "no-such-folder"),
    "export quant": (["export", ".", "out", "--quant", "q1"], 2, "'q1' is not one of"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gives_one_line(
    case: str, edge: Terminal, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, code, message = BAD[case]
    ended, out, err = edge(*(str(picture) if a == "{picture}" else a for a in arguments))
    assert (ended, out) == (code, "")
    lines = [line for line in err.splitlines() if "built-in" not in line]
    assert len(lines) == 1 and lines[0].startswith("edgevlm: ") and message in lines[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["picture.png"]


def test_doctor_shows_what_is_here_what_is_missing_and_what_is_used(
    edge: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = edge("doctor", "-m", "mine")
    assert code == 0 and edge.loaded[-1][0] == "mine"
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    for title in ("Vision encoder", "Decoder", "Settings where you choose none", "mine uses"):
        assert title in lines
    assert "CPUExecutionProvider" in out and "llama-cpp-python" in out
    # Nobody has every vendor's hardware: something is missing, and its line stands there.
    assert "pip install onnxruntime" in out and "CMAKE_ARGS=-DGGML_" in out
    assert [" ".join(line.split()) for line in lines[-3:-1]] == ["vision cpu", "decoder cpu"]
    assert "edgevlm tune" in lines[-1]


def test_stats_say_why_a_device_was_passed_over(
    edge: Terminal, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = fakes.vlm("a red circle")
    notes = ("cuda: no driver",)
    vision = edgevlm.Placement("auto", "webgpu", "W", placed=3, total=4, unit="nodes", notes=notes)
    vlm.devices = edgevlm.Devices(vision, vlm.devices.decoder)
    monkeypatch.setattr(edgevlm, "load", lambda *_, **__: vlm)
    err = edge("ask", "x", "-i", picture, "--stats")[2]
    assert "vision on webgpu, 3 of 4 nodes, 1 on the CPU\n  skipped cuda: no driver\n" in err
