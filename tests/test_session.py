"""What an answer is made of, on engines without weights."""

import dataclasses
import gc
import weakref
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from edgevlm.boxes import parse_percent
from edgevlm.errors import ContextOverflow, ImageError, PromptError
from edgevlm.image import RGB, ImageSource, Picture, read_picture
from edgevlm.runtimes import bitmaps, fakes
from edgevlm.runtimes.messages import ImagePart, Message, TextPart
from edgevlm.runtimes.session import VLM
from edgevlm.runtimes.text import TextStream
from edgevlm.sampling import SamplingOptions
from edgevlm.types import Reply

RED = np.full((10, 20, 3), (255, 0, 0), np.uint8)
BLUE = np.full((10, 20, 3), (0, 0, 255), np.uint8)


def prefills(vlm: VLM) -> list[NDArray[np.float32]]:
    """The rows of every prompt that the decoder of a fake has read."""
    assert isinstance(vlm.engines.decoder, fakes.FakeDecoder)
    return vlm.engines.decoder.prefills


def n_encoded(vlm: VLM) -> int:
    """The number of pictures that the encoder of a fake has seen."""
    assert isinstance(vlm.engines.encoder, fakes.FakeEncoder)
    return vlm.engines.encoder.calls


def test_ask_returns_the_text_and_counts_its_tokens() -> None:
    reply = fakes.vlm("a red circle").ask("caption en", image=RED)
    assert str(reply) == reply.text == "a red circle"
    assert reply.finish_reason == "stop"
    assert len(reply.token_ids) == reply.tokens.generated == 12
    # Four rows of the picture, then <bos> and one token for each byte of "caption en\n".
    assert (reply.tokens.image, reply.tokens.text, reply.tokens.cached) == (4, 12, 0)


def test_pieces_join_to_the_reply() -> None:
    answer = fakes.vlm("crème brûlée 🍮").stream("caption en", image=RED)
    pieces = list(answer)
    assert "".join(p.text for p in pieces) == answer.reply.text == "crème brûlée 🍮"
    assert sum((p.token_ids for p in pieces), ()) == answer.reply.token_ids
    assert all("�" not in p.text for p in pieces)
    assert [p.elapsed_ms for p in pieces] == sorted(p.elapsed_ms for p in pieces)


def test_bytes_that_are_no_text_become_one_replacement_at_the_end() -> None:
    assert fakes.vlm(b"ok \xf0\x9f").ask("x").text == "ok �"


def test_stages_are_timed() -> None:
    reply = fakes.vlm("abc").ask("caption en", image=RED)
    t = reply.timings
    assert min(t.image_decode_ms, t.preprocess_ms, t.vision_ms, t.projector_ms, t.prefill_ms) > 0
    assert 0 < t.first_token_ms < t.total_ms
    assert reply.decode_tokens_per_s > 0
    assert reply.prefill_tokens_per_s > 0


def test_rows_follow_the_template() -> None:
    vlm = fakes.vlm()
    vlm.ask("hi", image=RED)
    (rows,) = prefills(vlm)
    assert rows[:4].tolist() == [[1, -1, -1, 0]] * 4  # red, as pixels in -1..1
    assert rows[4:, 0].tolist() == [vlm.engines.decoder.bos, *vlm.engines.decoder.tokenize("hi\n")]


def test_user_text_never_becomes_a_picture() -> None:
    vlm = fakes.vlm()
    reply = vlm.ask("{image} {bos} {prompt} <image>", image=RED)
    assert (reply.tokens.image, reply.tokens.text) == (
        4,
        1 + len("{image} {bos} {prompt} <image>\n"),
    )


def test_the_same_picture_is_encoded_once() -> None:
    vlm = fakes.vlm()
    first = vlm.ask("a", image=RED)
    second = vlm.ask("b", image=RED.copy())
    assert (first.tokens.cached, second.tokens.cached) == (0, 4)
    assert second.timings.vision_ms == 0
    vlm.ask("c", image=BLUE)
    assert n_encoded(vlm) == 2


def test_several_pictures_where_the_model_takes_them() -> None:
    vlm = fakes.vlm(max_pictures=2)
    assert vlm.ask("x", image=[RED, BLUE]).tokens.image == 8
    with pytest.raises(PromptError, match="3 pictures.*takes 2"):
        vlm.ask("x", image=[RED, RED, RED])


def test_text_alone() -> None:
    reply = fakes.vlm("yes").ask("is it?")
    assert (reply.text, reply.tokens.image, reply.timings.vision_ms) == ("yes", 0, 0)


def test_max_tokens_ends_the_answer() -> None:
    reply = fakes.vlm("abcdef").ask("x", max_tokens=3)
    assert (reply.text, reply.finish_reason, reply.tokens.generated) == ("abc", "length", 3)


def test_the_context_bounds_the_answer() -> None:
    reply = fakes.vlm("a" * 100, context_length=20).ask("1234567", max_tokens=1000)
    assert (reply.finish_reason, reply.tokens.generated) == ("length", 20 - 1 - 8)


def test_a_prompt_larger_than_the_context_is_refused() -> None:
    with pytest.raises(ContextOverflow, match="needs 24 tokens .*image 4, text 19, answer 1.* 20"):
        fakes.vlm(context_length=20).ask("x" * 17, image=RED)


@pytest.mark.parametrize(
    ("stop", "text"), [("lo", "hel"), (["zz", "o w"], "hell"), ("world!", "hello world")]
)
def test_stop_strings_end_the_answer_and_are_not_part_of_it(
    stop: str | list[str], text: str
) -> None:
    answer = fakes.vlm("hello world").stream("x", stop=stop)
    streamed = "".join(p.text for p in answer)
    assert streamed == answer.reply.text == text
    assert answer.reply.finish_reason == "stop"


def test_text_that_may_begin_a_stop_string_is_held_back() -> None:
    stream = TextStream(["STOP"])
    assert [stream.push(b) for b in (b"a", b"S", b"T", b"x", b"STO")] == ["a", "", "", "STx", ""]
    assert stream.push(b"", end=True) == "STO"
    assert not stream.stopped


@pytest.mark.parametrize(
    "said",
    [
        "a red circle",
        "  a red\n circle \n###Human: and now?",
        " Assistant: Assistant:\n yes ",
        "Assis",
        " Assist ant: b",
        "Assistant:",
        "A###",
        " \n ",
        "été  \u2003",
    ],
)
def test_a_role_and_blanks_around_an_answer_are_never_shown(said: str) -> None:
    fake = fakes.vlm(said)
    spec = dataclasses.replace(
        fake.manifest.answer, stop_strings=("###",), strip=True, role="Assistant:"
    )
    manifest = dataclasses.replace(fake.manifest, answer=spec)
    vlm = VLM(manifest, fake.engines.family, fake.engines.encoder, fake.engines.decoder)
    answer = vlm.stream("x")
    shown = ""
    for piece in answer:
        shown += piece.text
        assert shown == answer.reply.text == shown.lstrip()
    # How TinyGPT-V's own code reads an answer.
    assert shown == said.split("###")[0].split("Assistant:")[-1].strip()


def test_cancel_ends_the_answer_at_the_next_token() -> None:
    vlm = fakes.vlm("abcdef")
    answer = vlm.stream("x")
    next(answer)
    vlm.cancel()
    assert list(answer) == []
    assert (answer.reply.text, answer.reply.finish_reason) == ("a", "cancelled")
    assert vlm.ask("x").finish_reason == "stop"


def test_an_interrupt_between_pieces_leaves_the_model_usable() -> None:
    vlm = fakes.vlm("abcdef")
    with pytest.raises(KeyboardInterrupt):
        for _ in vlm.stream("x"):
            raise KeyboardInterrupt
    assert vlm.ask("x").text == "abcdef"


def test_an_overtaken_answer_says_so() -> None:
    vlm = fakes.vlm("abcdef")
    answer = vlm.stream("x")
    next(answer)
    vlm.ask("y")
    with pytest.raises(PromptError, match="asked something else"):
        next(answer)


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


def test_detect_gives_boxes_in_pixels() -> None:
    loc = "<loc0000><loc0512><loc1023><loc1023> cat ; <loc0100><loc0100><loc0200><loc0200> dog"
    vlm = fakes.vlm(loc)
    cat, dog = vlm.detect(["cat", "dog"], image=Image.new("RGB", (200, 100)))
    assert (cat.label, dog.label) == ("cat", "dog")
    assert (cat.x0, cat.y0, cat.x1, cat.y1) == pytest.approx((200 * 512 / 1023, 0, 200, 100))
    (rows,) = prefills(vlm)
    assert rows[5:, 0].tolist() == vlm.engines.decoder.tokenize("detect cat ; dog\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{<10><20><30><40>}", [(20, 10, 60, 20, "")]),
        ("a <p> red ball </p> {<0><0><100><100>} here", [(0, 0, 200, 50, "red ball")]),
        (
            "<p>dog</p> {<1><2><3><4>}<delim>{<5><6><7><8>}, <p>cat</p>{<9><9><9><9>}",
            [(2, 1, 6, 2, "dog"), (10, 3, 14, 4, "dog"), (18, 4.5, 18, 4.5, "cat")],
        ),
        # The phrase is of the list, whatever is wrong with its first box.
        ("<p>dog</p> {<1><2><3>} <delim> {<1><2><3><4>}", [(2, 1, 6, 2, "dog")]),
        ("<p>dog</p> is {<1><2><3><4>}", [(2, 1, 6, 2, "")]),
        ("{<1><2><3><101>} {<30><0><20><9>} {<0><9><9><8>} {<-1><0><1><1>}", []),
        ("{<1><2><3><4> {<1><2><3><4><5>} <1><2><3><4> {<٣><2><3><4>}", []),
        ("{<" + "9" * 9999 + "><2><3><4>} <p>x</p> {} {", []),
        ("", []),
    ],
)
def test_boxes_in_hundredths_become_pixels(
    text: str, expected: list[tuple[float, float, float, float, str]]
) -> None:
    found = parse_percent(text, 200, 50)
    assert [b.label for b in found] == [label for *_, label in expected]
    corners = [corner for *box, _ in expected for corner in box]
    assert [c for b in found for c in (b.x0, b.y0, b.x1, b.y1)] == pytest.approx(corners)


def test_an_unknown_task_names_the_known_ones() -> None:
    with pytest.raises(PromptError, match="no task 'fly'; it has caption, detect, ocr"):
        fakes.vlm().task("fly")


def test_score_sums_log_probabilities_over_the_tokens() -> None:
    vlm = fakes.vlm("ab")
    hit = 10 - np.log(np.exp(10) + 257)
    miss = hit - 10
    scores = vlm.score("x", ["ab", "a", "ba", "z"], image=RED)
    assert scores.dtype == np.float64
    assert scores == pytest.approx([2 * hit, hit, 2 * miss, miss])
    assert vlm.score("x", ["ab"], with_end=True) == pytest.approx([3 * hit])
    with pytest.raises(PromptError, match="continuation is empty"):
        vlm.score("x", ["a", ""])


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"seed": -1},
        {"stop": ""},
    ],
)
def test_options_out_of_range_name_themselves(options: SamplingOptions) -> None:
    with pytest.raises(PromptError, match=next(iter(options))):
        fakes.vlm().ask("x", **options)


def test_an_unknown_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="tempreature"):
        fakes.vlm().ask("x", tempreature=1)  # type: ignore[call-arg]


@pytest.mark.parametrize("prompt", ["a\0b", "a\ud800b"])
def test_text_that_no_tokenizer_takes_is_refused(prompt: str) -> None:
    with pytest.raises(PromptError, match="the prompt contains"):
        fakes.vlm().ask(prompt)


def test_errors_come_before_anything_is_computed() -> None:
    vlm = fakes.vlm()
    with pytest.raises(ImageError):
        vlm.stream("x", image="no such picture.png")
    assert n_encoded(vlm) == 0


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
    """What the decoder of a fake read last: a picture's rows as #, tokens as their text."""
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


def test_a_picture_that_cannot_be_planned_is_refused_before_anything_is_computed() -> None:
    vlm = fakes.vlm()
    image = dataclasses.replace(vlm.manifest.image, fit="pad")
    manifest = dataclasses.replace(vlm.manifest, image=image)
    padding = VLM(manifest, vlm.engines.family, vlm.engines.encoder, vlm.engines.decoder)
    with pytest.raises(ImageError, match="too long and narrow"):
        padding.stream("x", np.zeros((30_000, 1, 3), np.uint8))


def test_a_bundle_without_a_decoder_embeds_and_says_that_it_cannot_answer() -> None:
    whole = fakes.vlm()
    vlm = VLM(whole.manifest, whole.engines.family, whole.engines.encoder, None)
    assert np.array_equal(vlm.image_embeddings(RED), whole.image_embeddings(RED))
    calls: list[Callable[[], object]] = [
        lambda: vlm.ask("x"),
        lambda: vlm.chat(RED).ask("x"),
        lambda: vlm.score("x", ["y"]),
    ]
    for call in calls:
        with pytest.raises(PromptError, match="no decoder: it can embed pictures, not answer"):
            call()
    vlm.cancel()
    vlm.forget()
    vlm.close()
