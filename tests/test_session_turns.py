"""Chats and messages on fakes: what is told of earlier turns, and what is refused."""

import dataclasses
import gc
import weakref

import numpy as np
import pytest

from edgevlm.errors import ContextOverflow, ImageError, PromptError
from edgevlm.image import RGB, ImageSource, Picture, read_picture
from edgevlm.runtimes import bitmaps, fakes
from edgevlm.runtimes.messages import ImagePart, Message, TextPart
from edgevlm.runtimes.session import VLM
from edgevlm.sampling import SamplingOptions
from edgevlm.types import Reply
from tests.test_session import BLUE, RED, n_encoded, prefills


def test_chat_keeps_the_picture() -> None:
    with fakes.vlm(["one", "two"]).chat(image=RED) as chat:
        assert [chat.ask("a").text, chat.ask("b").text] == ["one", "two"]
        assert chat.reply.tokens.cached == 4
        assert [prompt for prompt, _ in chat.turns] == ["a", "b"]
        chat.clear()
        with pytest.raises(PromptError, match="nothing was asked"):
            _ = chat.reply


def test_a_chat_reads_its_picture_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []

    def noted(source: ImageSource) -> Picture:
        reads.append(source)
        return read_picture(source)

    monkeypatch.setattr(bitmaps, "read_picture", noted)
    vlm = fakes.vlm("yes", conversational=True)
    chat = vlm.chat(image=RED)
    for _ in range(3):
        chat.ask("is it red?")
    assert len(reads) == 1
    chat.image = BLUE
    next(chat.stream("is it red?"))
    chat.ask("is it?")
    assert len(reads) == 2
    assert n_encoded(vlm) == 2


def test_answers_of_a_chat_hold_no_pictures() -> None:
    chat = fakes.vlm("yes", conversational=True).chat()
    left = []
    for shade in range(3):
        chat.image = np.full((10, 20, 3), shade, np.uint8)
        left.append(weakref.ref(chat.pictures[0].rgb))
        if shade == 1:
            next(chat.stream("is it red?"))
        else:
            chat.ask("is it red?")
    gc.collect()
    assert [ref() is None for ref in left] == [True, True, False]


def test_a_picture_is_what_it_was_when_it_was_given() -> None:
    vlm = fakes.vlm()
    frame = RED.copy()
    answer, chat = vlm.stream("x", frame), vlm.chat(frame)
    frame[:] = 0
    answer.finish()
    chat.ask("x")
    assert all((rows[:4] == [1, -1, -1, 0]).all() for rows in prefills(vlm))


def test_a_bad_picture_is_refused_when_it_is_given() -> None:
    chat = fakes.vlm().chat(RED)
    with pytest.raises(ImageError, match="no such file"):
        chat.image = "nowhere.png"
    assert chat.image is RED
    with pytest.raises(ImageError, match="no such file"):
        fakes.vlm().chat("nowhere.png")


@pytest.mark.parametrize("picture", [None, RED], ids=["words", "picture"])
@pytest.mark.parametrize("max_tokens", [None, 5, 400])
def test_the_oldest_questions_make_room_for_the_next(
    picture: RGB | None, max_tokens: int | None
) -> None:
    vlm = fakes.vlm("abc", context_length=200, conversational=True)
    chat = vlm.chat(picture)
    options: SamplingOptions = {"max_tokens": max_tokens} if max_tokens else {}
    for i in range(30):
        reply = chat.ask(f"question {i}", **options)
        assert (reply.text, reply.finish_reason) == ("abc", "stop")
    assert len(chat.turns) == 30
    rows = prefills(vlm)[-1][4 if picture is not None else 0 :, 0]
    read = b"".join(vlm.engines.decoder.piece(int(t)) for t in rows).decode()
    kept = range(chat.left_out, 30)
    assert read == "abc".join(f"question {i}\n" for i in kept)
    # Once it was full, half of the context became free, and then not at every question again.
    lengths = [len(rows) for rows in prefills(vlm)]
    shrunk = [i for i in range(1, 30) if lengths[i] < lengths[i - 1]]
    assert 0 < len(shrunk) < 12
    assert all(lengths[i] <= 100 for i in shrunk)


def test_what_was_left_out_of_a_chat_is_counted_anew() -> None:
    chat = fakes.vlm("abc", context_length=60, conversational=True).chat()
    for _ in range(9):
        chat.ask("how many are there?")
    assert chat.left_out > 0
    chat.clear()
    assert chat.left_out == 0
    assert chat.ask("how many are there?").text == "abc"


def test_a_question_that_alone_is_too_long_is_still_refused() -> None:
    chat = fakes.vlm("abc", context_length=60, conversational=True).chat()
    chat.ask("short")
    with pytest.raises(ContextOverflow, match="text 102"):
        chat.ask("x" * 100)
    assert chat.left_out == 0
    assert chat.ask("and short again").text == "abc"


def user(*content: str | RGB) -> Message:
    """A message of the user's: texts, and pictures as arrays."""
    parts: list[TextPart | ImagePart] = [
        {"type": "text", "text": c} if isinstance(c, str) else {"type": "image", "image": c}
        for c in content
    ]
    return {"role": "user", "content": parts}


def assistant(content: str | list[TextPart | ImagePart] | Reply) -> Message:
    return {"role": "assistant", "content": content}


def read_by(vlm: VLM) -> str:
    """The last input of a fake's decoder: a picture's rows as #, tokens as their text."""
    piece = vlm.engines.decoder.piece
    return "".join("#" if r[3] == 0 else piece(int(r[0])).decode() for r in prefills(vlm)[-1])


def test_a_message_is_what_ask_says_in_short() -> None:
    vlm = fakes.vlm("yes")
    short = vlm.ask("is it red?", RED)
    for message in (user(RED, "is it red?"), user("is it ", RED, "red?")):
        long = vlm.ask([message])
        assert (long.text, long.token_ids) == (short.text, short.token_ids)
        assert long.tokens.prompt == short.tokens.prompt
        assert np.array_equal(prefills(vlm)[-2], prefills(vlm)[-1])
    assert vlm.ask([{"role": "user", "content": "hi"}]).tokens.image == 0


def test_messages_are_a_chat_written_out() -> None:
    vlm = fakes.vlm(["one", "two"], conversational=True)
    with vlm.chat(RED) as chat:
        first = chat.ask("a")
        chat.ask("b")
    said = [user(RED, "a"), assistant(first), user("b")]
    vlm.ask(said)
    assert np.array_equal(prefills(vlm)[-2], prefills(vlm)[-1])
    assert read_by(vlm) == "####a\noneb\n"
    # What somebody else has said, too.
    vlm.ask([user(RED, "a"), assistant("uno"), user("b")])
    assert read_by(vlm) == "####a\nunob\n"


def test_a_picture_in_a_later_turn_needs_a_place_in_the_template() -> None:
    vlm = fakes.vlm(conversational=True)
    talk = [user(RED, "a"), assistant("x"), user(BLUE, "b")]
    with pytest.raises(PromptError, match="question 2 comes with a picture.*first question only"):
        vlm.stream(talk)
    prompt = dataclasses.replace(vlm.manifest.prompt, turn=("{image}", "{prompt}\n"))
    manifest = dataclasses.replace(vlm.manifest, prompt=prompt)
    engines = vlm.engines
    able = VLM(manifest, engines.family, engines.encoder, engines.decoder)
    able.ask(talk)
    assert read_by(able) == "####a\nx####b\n"
    rows = prefills(able)[-1]
    assert rows[0].tolist() == [1, -1, -1, 0] and rows[-3].tolist() == [-1, -1, 1, 0]
    with pytest.raises(PromptError, match="3 pictures.*takes 2"):
        able.stream([*talk, assistant("y"), user(RED, "c")])


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "the last message must be the user's"),
        ([user("a"), assistant("b")], "the last message must be the user's"),
        ([{"role": "system", "content": "be brief"}, user("a")], "fake: its prompt template has"),
        ([user("a"), {"role": "system", "content": "b"}], "message 2 has the role 'system'"),
        (
            [{"role": "system", "content": [{"type": "image", "image": RED}]}, user("a")],
            "message 1 is the system's and cannot have a picture",
        ),
        ([user("a"), user("b")], "message 2 has the role 'user' where 'assistant'"),
        ([{"role": "user", "content": "a", "name": "me"}], r"message 1 must have the keys \['cont"),
        (["a"], "message 1 must have the keys .* not str"),
        ([user("a"), assistant([{"type": "image", "image": RED}]), user("b")], "message 2 is the"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "message 1 has a part of .* 'audio'"),
        ([{"role": "user", "content": [{"type": "text", "image": 1}]}], "must have the keys"),
        ([user("a\0b")], "NUL character"),
        ([user("a"), assistant("\ud800"), user("b")], "lone surrogate"),
    ],
)
def test_messages_that_are_no_conversation_are_refused_in_one_line(
    messages: list[Message], problem: str
) -> None:
    vlm = fakes.vlm(conversational=True)
    with pytest.raises(PromptError, match=problem) as caught:
        vlm.stream(messages)
    assert "\n" not in str(caught.value)
    assert prefills(vlm) == []


def test_a_system_message_by_itself_or_as_the_first() -> None:
    vlm = fakes.vlm(conversational=True, system=True)
    system: Message = {"role": "system", "content": [{"type": "text", "text": "be {prompt}"}]}
    vlm.ask([system, user("{system}")])
    vlm.ask("{system}", system="be {prompt}")
    chat = vlm.chat(system="be {prompt}")
    chat.ask("{system}")
    decoder = vlm.engines.decoder
    for rows in prefills(vlm):
        read = b"".join(decoder.piece(int(token)) for token in rows[:, 0])
        assert read.decode() == "be {prompt}|{system}\n"
    chat.system = None
    chat.ask("x")
    assert len(prefills(vlm)[-1]) < len("be {prompt}|{system}\n" * 2)
    with pytest.raises(PromptError, match="leave out `system`, or that message"):
        vlm.ask([system, user("a")], system="be brief")
    with pytest.raises(PromptError, match="the system message is empty"):
        vlm.chat(system=" ")
    with pytest.raises(PromptError, match="fake: its prompt template has no system message"):
        fakes.vlm().chat(system="be brief")


def test_a_model_without_conversations_says_so() -> None:
    with pytest.raises(PromptError, match="not trained on conversations; ask the last question"):
        fakes.vlm().stream([user("a"), assistant("b"), user("c")])
    with pytest.raises(PromptError, match="pictures stand in the messages"):
        fakes.vlm().stream([user("a")], RED)
