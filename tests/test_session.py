"""What an answer is made of, on engines without weights."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from edgevlm.boxes import parse_percent
from edgevlm.errors import ContextOverflow, ImageError, PromptError
from edgevlm.runtimes import fakes
from edgevlm.runtimes.session import VLM
from edgevlm.runtimes.text import TextStream
from edgevlm.sampling import SamplingOptions

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
        {"top_k": 2**31},
        {"temperature": 10**400},
        {"repetition_penalty": 10**400},
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
