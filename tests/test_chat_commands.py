"""A whole chat, word for word: every command, with the fakes and with the built-in model."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageGrab

import edgevlm
from edgevlm.cli.chat import lines, pictures
from edgevlm.cli.chat.commands import COMMANDS, help_text
from edgevlm.cli.chat.settings import OPTIONS, changed
from edgevlm.cli.chat.talk import Talk
from edgevlm.cli.common import Run
from edgevlm.cli.models import chat_text
from edgevlm.errors import ChatFileError, ImageError, PromptError
from edgevlm.runtimes import fakes
from edgevlm.runtimes.session import VLM
from edgevlm.sampling import SamplingOptions
from tests.chatting import piped

SHAPES = Path(__file__).parent.parent / "examples" / "shapes.png"
NEW = "fake: ask away; /help for commands."


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with three pictures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGEVLM_HOME", str(tmp_path / "home"))
    for i, name in enumerate(("a.png", "b b.png", "c.jpg")):
        Image.new("RGB", (80, 60), (40 * i, 90, 90)).save(tmp_path / name)
    return tmp_path


def fake(**options: bool) -> VLM:
    return fakes.vlm(["one", "two", "three", "four", "five"], conversational=True, **options)


def test_every_command_word_for_word(capsys: pytest.CaptureFixture[str]) -> None:
    typed = """\
/system Be brief.
what?
/image "b b.png"
and that?
/undo
and this?
/retry
/set temperature=0.5
/set seed 7
/retry
/set
/set temperature -1
/set top_k many
/set colour red
/save talk.chat
/clear
/stats
/load talk.chat
/stats
/undo
/undo
/undo
/system none
/system
/image none
/fly
/st
 /fly
"""
    out, err = piped(
        fake(system=True, later_pictures=True), typed.splitlines(), capsys, "-i", "a.png"
    )
    assert out == "one\ntwo\nthree\nfour\nfive\nfive\n"
    assert err == f"""\
{NEW}
Looking at a.png (80 x 60).
System message: Be brief.
Looking at b b.png (80 x 60) as well; a.png (80 x 60) stays in the conversation.
Took back: and that?
Without a temperature the answer is the same; /set temperature 0.7 draws others.
temperature 0.5
seed 7
max_tokens the model's, 256
temperature 0.5
top_k 0
top_p 1.0
min_p 0.0
repetition_penalty 1.0
seed 8
stop none
choices none
schema none
grammar none
temperature must be 0 or more
top_k must be a whole number, not many
colour: no such option; one of {", ".join(OPTIONS)}
Saved 2 questions to talk.chat; /load goes on with them.
Forgot the conversation; still looking at a.png (80 x 60), b b.png (80 x 60).
nothing was asked in this chat yet
Loaded 2 questions; looking at a.png (80 x 60), b b.png (80 x 60).
> and this?
five
The last answer came from a file; nothing was measured.
Took back: and this?
Took back: what?
nothing was asked in this chat yet
No system message but the template's own words, if it has any.
No system message but the template's own words, if it has any.
Looking at no picture.
/fly: no such command; /help lists them (With a space before it, it is a question.)
/st: no such command; did you mean /stats? (With a space before it, it is a question.)
""".splitlines()  # fmt: skip


def test_every_command_with_the_built_in_model(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(SHAPES, folder / "shapes.png")
    typed = """\
shapes.png
answer en what shape is red?
/set max-tokens 1
/retry
/set max_tokens none
/undo
\"\"\"answer en
what shape is blue?\"\"\"
/save it
/system be brief
/image a.png
/image
/load it
answer en what shape is green?
/clear
/exit
never
"""
    out, err = piped(None, typed.splitlines(), capsys)
    assert out.splitlines() == ["circle", "circle", "square", "star"]
    assert err == """\
pico: ask away; /help for commands.
Looking at shapes.png (480 x 360).
max_tokens 1
Without a temperature the answer is the same; /set temperature 0.7 draws others.
Cut at 1 tokens; --max-tokens raises the limit.
max_tokens the model's, 256
Took back: answer en what shape is red?
Saved 1 question to it; /load goes on with them.
pico: its prompt template has no system message (or the bundle is older than those; export it \
again); say it in the question
Looking at a.png (80 x 60).
Looking at no picture.
Loaded 1 question; looking at shapes.png (480 x 360).
> answer en
what shape is blue?
square
Forgot the conversation; still looking at shapes.png (480 x 360).
""".splitlines()  # fmt: skip


def test_a_picture_in_the_middle_of_a_conversation(capsys: pytest.CaptureFixture[str]) -> None:
    typed = ["what?", "/image c.jpg", "and that?"]
    vlm = fake()
    _, err = piped(vlm, typed, capsys, "-i", "a.png")
    assert err[-1] == (
        "Looking at c.jpg (80 x 60). fake takes pictures with the first question only: the "
        "conversation starts afresh."
    )
    decoder = vlm.engines.decoder
    assert isinstance(decoder, fakes.FakeDecoder)
    assert [len(rows) for rows in decoder.prefills] == [
        4 + 1 + len("what?\n"), 4 + 1 + len("and that?\n")
    ]  # fmt: skip
    _, err = piped(fakes.vlm(), typed, capsys, "-i", "a.png")
    assert err[-1] == "Looking at c.jpg (80 x 60)."
    _, err = piped(fake(), ["/image c.jpg", "/image a.png c.jpg a.png"], capsys, "-i", "a.png")
    assert err[-2:] == ["Looking at c.jpg (80 x 60).", "3 pictures at once; fake takes 2"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a.png", "Looking at a.png (80 x 60)."),
        ("'b b.png' a.png ", "Looking at b b.png (80 x 60), a.png (80 x 60)."),
        ("b\\ b.png", "Looking at b b.png (80 x 60)."),
        ("http://127.0.0.1:9/x.png", "http://127.0.0.1:9/x.png: cannot be downloaded"),
    ],
)
def test_a_line_that_is_a_pictures_name_is_looked_at(
    line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = piped(fake(), [line], capsys)
    assert out == "" and err[1].startswith(said)


@pytest.mark.parametrize(
    "line",
    ["a.png?", "is a.png red?", "nowhere.png", "home", "http://host/x.png what is it?", " /image",
     "/tmp/nowhere what is it?", '\"\"\"/image\"\"\"'],
)  # fmt: skip
def test_any_other_line_is_a_question(
    line: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "home").mkdir(exist_ok=True)
    out, err = piped(fake(), [line], capsys)
    assert (out, err) == ("one\n", [NEW])


def test_blocks_from_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    vlm = fake()
    out, err = piped(vlm, ['"""first', "  /second", '"""', '"""', "no end"], capsys)
    assert out == "one\n" and 'needs """ at its end; nothing was asked' in err[-1]
    decoder = vlm.engines.decoder
    assert isinstance(decoder, fakes.FakeDecoder)
    read = b"".join(decoder.piece(int(t)) for t in decoder.prefills[0][:, 0]).decode()
    assert read == "first\n  /second\n"


def test_the_help_is_made_of_the_table_at_any_width() -> None:
    for columns in (40, 80, 200):
        text = help_text(columns)
        assert all(len(line) < columns for line in text.splitlines())
        assert all(f"{command.name} {command.argument}".strip() in text for command in COMMANDS)


def completed(text: str) -> list[str]:
    return [text[: len(text) + c.start_position] + c.text for c in lines._completions(text)]


def test_completion(folder: Path) -> None:
    (folder / "pictures").mkdir()
    (folder / "notes.txt").write_text("x", encoding="utf-8")
    (folder / ".hidden.png").write_text("x", encoding="utf-8")
    assert completed("/") == [command.name for command in COMMANDS]
    assert completed("/s") == ["/system", "/set", "/save", "/stats"]
    assert completed("/image ") == [
        f"/image {name}"
        for name in ("clipboard", "none", "a.png", "b\\ b.png", "c.jpg", "pictures/")
    ]
    assert completed("/image b") == ["/image b\\ b.png"]
    assert completed("/image a.png b\\ ") == ["/image a.png b\\ b.png"]
    assert completed(f"/image {folder}/c") == [f"/image {folder}/c.jpg"]
    assert completed(f"{folder}/c") == [f"{folder}/c.jpg"]
    assert completed("/load n") == ["/load notes.txt"]
    assert completed("/set te") == ["/set temperature"]
    assert completed("/set temperature ") == completed("/system a") == completed("what is") == []
    assert completed("/image nowhere/") == []


def test_a_question_that_was_stopped_at_once_gives_way_to_the_next(
    capsys: pytest.CaptureFixture[str],
) -> None:
    vlm = fake()
    talk = Talk(vlm, Run(None, False, {}, {}), vlm.chat("a.png"), plain=True, previews=False)
    talk.chat.stream("stopped?").cancel()
    talk.turn("/retry")
    talk.chat.stream("stopped?").cancel()
    talk.turn("next?")
    assert [question for question, _ in talk.chat.turns] == ["stopped?", "next?"]
    assert capsys.readouterr().out == "one\ntwo\n"


def test_models_show_says_what_a_chat_can_be() -> None:
    assert chat_text(fakes.vlm().manifest) == "single questions"
    assert chat_text(fake().manifest) == "conversations, pictures with the first question"
    assert chat_text(fake(system=True, later_pictures=True).manifest) == (
        "conversations, pictures with any question, system message"
    )


def test_set_reads_values_as_the_options_do() -> None:
    options = SamplingOptions(top_k=3)
    assert changed(options, "stop", "'a b' c") == {"top_k": 3, "stop": ("a b", "c")}
    assert changed(options, "top_k", "none") == {}
    with pytest.raises(PromptError, match="seed must be from 0"):
        changed(options, "seed", "-1")


def test_set_holds_answers_to_a_form(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "n.json").write_text('{"type": "integer"}', encoding="utf-8")
    typed = """\
shapes.png
/set choices circle, 'a star'
/set schema nowhere.json
/set schema n.json
answer en what shape is red?
/set choices none
/set schema n.json
"""
    shutil.copy(SHAPES, folder / "shapes.png")
    out, err = piped(None, typed.splitlines(), capsys)
    assert out == "circle\n"
    assert err[2:] == [
        "choices circle ''\"'\"'a star'\"'\"''",
        "nowhere.json: cannot be read (No such file or directory)",
        "choices and schema cannot be had at once; choose one".replace(
            "choices and schema", "schema and choices"
        ),
        "choices none",
        "schema {'type': 'integer'}",
    ]


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (None, "holds no picture; copy one first"),
        (NotImplementedError("wl-paste or xclip"), "cannot be read here; install wl-clipboard"),
        (ChildProcessError("no display"), "cannot be read .no display"),
    ],
)
def test_a_clipboard_without_a_picture(
    found: object, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def grab() -> object:
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(ImageGrab, "grabclipboard", grab)
    with pytest.raises(ImageError, match=f"the clipboard: {said}"):
        pictures.from_clipboard()


def test_a_picture_from_the_clipboard(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    copied = Image.new("RGB", (7, 5))
    monkeypatch.setattr(ImageGrab, "grabclipboard", lambda: copied)
    _, err = piped(fake(), ["/image clipboard", "what?", "/save x", "/load x"], capsys)
    assert err[1] == "Looking at the clipboard (7 x 5)."
    monkeypatch.setattr(ImageGrab, "grabclipboard", lambda: [str(folder / "a.png")])
    _, err = piped(fake(), ["/image clipboard"], capsys)
    assert err[1] == f"Looking at {folder}/a.png (80 x 60)."


# Saved chats


def saved(folder: Path) -> Path:
    with fake(system=True, later_pictures=True).chat("a.png", system="Be brief.") as chat:
        chat.ask("what?")
        chat.add_image("c.jpg")
        chat.ask("and that?")
        chat.save(folder / "talk.chat")
    return folder / "talk.chat"


def test_a_saved_chat_goes_on_as_it_would_have(folder: Path) -> None:
    file = saved(folder)
    (folder / "a.png").unlink()
    vlm = fake(system=True, later_pictures=True)
    chat = vlm.chat()
    chat.load(file)
    assert [(q, a.reply.text) for q, a in chat.turns] == [("what?", "one"), ("and that?", "two")]
    assert (chat.system, chat.image, len(chat.pictures)) == ("Be brief.", ["a.png", "c.jpg"], 2)
    assert list(chat.turns[0][1]) == [] and chat.reply.finish_reason == "stop"
    chat.ask("now?")
    decoder = vlm.engines.decoder
    assert isinstance(decoder, fakes.FakeDecoder)
    assert len(decoder.prefills[0]) == len("Be brief.|what?\none" + "and that?\ntwo" + "now?\n") + 9
    chat.save(file)
    with zipfile.ZipFile(file) as archive:
        assert archive.namelist() == ["chat.json", "pictures/1", "pictures/2"]
        assert archive.read("pictures/2") == (folder / "c.jpg").read_bytes()


def test_a_picture_of_a_saved_chat_is_not_encoded_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EDGEVLM_CACHE_SIZE")
    with edgevlm.load() as vlm, vlm.chat(SHAPES) as chat:
        chat.ask("answer en what shape is red?")
        chat.save("shapes.chat")
    with edgevlm.load() as vlm, vlm.chat() as chat:
        chat.load("shapes.chat")
        reply = chat.ask("answer en what shape is blue?")
    assert (reply.text, reply.tokens.cached) == ("square", 64) and not reply.timings.vision_ms


def test_files_that_are_no_chat_of_this_model(folder: Path) -> None:
    file, chat = saved(folder), fake(system=True, later_pictures=True).chat()
    data = file.read_bytes()

    def refused(content: bytes) -> str:
        file.write_bytes(content)
        with pytest.raises(ChatFileError) as caught:
            chat.load(file)
        assert "\n" not in str(caught.value) and str(caught.value).startswith(str(file))
        assert chat.turns == []
        return caught.value.problem

    def edited(old: bytes, new: bytes, drop: str = "") -> bytes:
        with zipfile.ZipFile(file.with_name("edited"), "w") as out:
            file.write_bytes(data)
            with zipfile.ZipFile(file) as archive:
                for name in archive.namelist():
                    if name != drop:
                        out.writestr(name, archive.read(name).replace(old, new))
        return file.with_name("edited").read_bytes()

    assert "not a saved chat, or damaged" in refused(b"hello")
    assert "damaged" in refused(data[: len(data) // 2])
    assert "no such file" in str(pytest.raises(ChatFileError, chat.load, "nowhere.chat").value)
    assert "a chat with other; go on with it by `edgevlm chat -m other`" == refused(
        edited(b'"model": "fake"', b'"model": "other"')
    )
    assert "of other tokens" in refused(edited(b'"n_vocab": 258', b'"n_vocab": 9'))
    assert "newer than 2; upgrade" in refused(edited(b'"format": 1', b'"format": 3'))
    assert "unknown key 'turn'" in refused(edited(b'"turns"', b'"turn"'))
    assert "turns or pictures that it has not" in refused(edited(b'"first": 0', b'"first": 9'))
    assert "it has no pictures/1" in refused(edited(b"", b"", drop="pictures/1"))
    assert "its pictures/2 is damaged or truncated" in refused(edited(b"\xff\xd9", b""))
    assert "not a saved chat (it has no chat.json)" == refused(edited(b"", b"", drop="chat.json"))


def test_a_file_of_somebodys_moves_no_cursor(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with fakes.vlm("\x1b[2Jred\x07\nblue", conversational=True).chat() as chat:
        chat.ask("\x1b[A?")
        chat.save("talk.chat")
    _, err = piped(fake(), ["/load talk.chat"], capsys)
    assert err[-3:] == ["> \ufffd[A?", "\ufffd[2Jred\ufffd", "blue"]


def test_a_chat_is_saved_whole_or_not_at_all(folder: Path) -> None:
    chat = fake().chat("a.png")
    (folder / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ChatFileError, match="exists and is not a saved chat; choose another"):
        chat.save("mine.txt")
    with pytest.raises(ChatFileError, match="exists and is not a saved chat"):
        chat.save(folder)
    with pytest.raises(ChatFileError, match="cannot be written"):
        chat.save(folder / "mine.txt" / "x")
    assert (folder / "mine.txt").read_text(encoding="utf-8") == "mine"
    assert not [p for p in folder.iterdir() if p.name.startswith(".edgevlm")]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "LA"])
def test_a_picture_without_a_file_is_saved_as_it_was_read(mode: str, folder: Path) -> None:
    rng = np.random.default_rng(1)
    picture = Image.fromarray(rng.integers(0, 256, (9, 7, 4), np.uint8), "RGBA").convert(mode)
    vlm = fake()
    chat, again = vlm.chat(picture), vlm.chat()
    chat.save("x.chat")
    again.load("x.chat")
    (ours,), (theirs,) = chat.pictures, again.pictures
    assert np.array_equal(ours.rgb, theirs.rgb) and ours.indexed == theirs.indexed
    assert (ours.alpha is None) == (theirs.alpha is None)
    assert ours.alpha is None or np.array_equal(ours.alpha, theirs.alpha)  # type: ignore[arg-type]
