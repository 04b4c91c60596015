"""Results as programs handle them: pickled, and shown."""

import asyncio
import base64
import dataclasses
import inspect
import io
import multiprocessing
import operator
import pickle
import re
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import edgevlm
from edgevlm import VLM, errors, types
from edgevlm.bundle import open_bundle
from edgevlm.errors import BundleCorrupt, ContextOverflow, EdgeVLMError
from edgevlm.models import built_in
from edgevlm.runtimes import fakes
from edgevlm.sampling import Sampling
from edgevlm.types import Box, Piece, Reply, TokenLogprob

SHAPES = Path(__file__).parent.parent / "examples" / "shapes.png"
RED = np.full((10, 20, 3), (255, 0, 0), np.uint8)
BOX = "<loc0000><loc0000><loc0512><loc0512> circle"


def test_results_can_be_pickled() -> None:
    vlm = fakes.vlm(BOX)
    answer = vlm.stream("detect circle", RED, logprobs=2, choices=[BOX])
    pieces = list(answer)
    reply = answer.reply
    assert reply.boxes and reply.logprobs and reply.parsed == BOX
    label, point = types.LabelScore("a dog", 0.9, 0.3), types.Point(1, 2, "a dog")
    results = [reply, pieces, vlm.devices, vlm.settings, reply.timings, reply.tokens, label, point]
    for result in results:
        assert pickle.loads(pickle.dumps(result)) == result
    # Nothing else that is a result was forgotten.
    kinds = {type(r) for r in (*results, pieces[0], reply.boxes[0], reply.logprobs[0])}
    kinds |= {types.Placement, types.Progress, types.Constraint}
    public = {c for _, c in inspect.getmembers(types, dataclasses.is_dataclass)}
    assert public <= kinds | {Piece, Box, Reply}
    others = [vlm, vlm.manifest, types.Progress("vision", 1, 2), Sampling(temperature=1.0)]
    for result in (reply, *pieces, *results[2:], *others):
        assert len(repr(result)) < 300 and "\n" not in repr(result)


def described(source: Any) -> tuple[Reply, list[Piece], edgevlm.Devices]:
    """Results of a process of its own, for the one that asked."""
    with edgevlm.load() as vlm:
        reply = vlm.ask("detect circle", source, logprobs=2)
        return reply, list(vlm.stream("caption en", source)), vlm.devices


def test_results_go_from_process_to_process() -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        reply, pieces, devices = pool.submit(described, str(SHAPES)).result(100)
        (box,) = pool.submit(operator.attrgetter("boxes"), reply).result(100)
    assert box.label == "circle" and reply.logprobs and reply.size == (480, 360)
    assert "".join(piece.text for piece in pieces).startswith("a red circle")
    assert (devices.decoder.device, reply.picture) == ("cpu", str(SHAPES))
    assert "<img" in reply._repr_html_()


def sources() -> dict[str, Callable[[], Any]]:
    """The same picture in every form that a program may have it in."""
    data = SHAPES.read_bytes()
    rgb = np.asarray(Image.open(SHAPES).convert("RGB"))
    return {
        "text": lambda: str(SHAPES),
        "path": lambda: SHAPES,
        "bytes": lambda: data,
        "bytearray": lambda: bytearray(data),
        "memoryview": lambda: memoryview(data),
        "file": lambda: io.BytesIO(data),
        "PIL": lambda: Image.open(SHAPES).convert("RGB"),
        "array": lambda: rgb,
        "data URL": lambda: f"data:image/png;base64,{base64.b64encode(data).decode()}",
        "file URL": lambda: SHAPES.as_uri(),
    }


FOUND: dict[str, Callable[[VLM, Any], Reply]] = {
    "ask": lambda vlm, image: vlm.ask("detect circle", image),
    "list": lambda vlm, image: vlm.ask("detect circle", [image]),
    "message": lambda vlm, image: vlm.ask([message(image)]),
    "stream": lambda vlm, image: vlm.stream("detect circle", image).finish(),
    "chat": lambda vlm, image: vlm.chat(image).ask("detect circle"),
    "aask": lambda vlm, image: asyncio.run(vlm.aask("detect circle", image)),
    "astream": lambda vlm, image: asyncio.run(vlm.astream("detect circle", image).finish()),
    "achat": lambda vlm, image: asyncio.run(vlm.chat(image).aask("detect circle")),
}


def message(image: Any) -> edgevlm.Message:
    parts = [{"type": "text", "text": "detect circle"}, {"type": "image", "image": image}]
    return {"role": "user", "content": parts}  # type: ignore[typeddict-item]


@pytest.mark.parametrize("form", sources())
def test_a_picture_may_have_any_form_at_every_entry(form: str) -> None:
    source, vlm = sources()[form], fakes.vlm(BOX)
    rows, boxes = vlm.image_embeddings(SHAPES), vlm.ask("detect circle", SHAPES).boxes
    assert boxes and not np.array_equal(rows, vlm.image_embeddings(RED))
    for name, ask in FOUND.items():
        reply = ask(vlm, source())
        assert (reply.boxes, reply.size, reply.tokens.cached) == (boxes, (480, 360), 4), name
        assert pickle.loads(pickle.dumps(reply)).boxes == boxes
    assert np.array_equal(vlm.image_embeddings(source()), rows)
    assert vlm.detect("circle", source()) == vlm.segment("circle", source()) == list(boxes)
    assert vlm.score("detect circle", ["a"], source()).shape == (1,)
    assert vlm.caption(source()).size == vlm.ocr(source()).size == (480, 360)


@pytest.mark.parametrize("form", ["file", "memoryview", "array"])
def test_a_picture_at_the_load_may_have_any_form(form: str) -> None:
    image = sources()[form]()
    with edgevlm.load(image=image) as vlm:
        assert vlm.ask("answer en what shape is red?", image).text == "circle"


def test_a_picture_of_a_server_at_every_entry() -> None:
    data, vlm = SHAPES.read_bytes(), fakes.vlm(BOX)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/shapes.png"
            for name, ask in FOUND.items():
                assert ask(vlm, url).boxes[0].label == "circle", name
            assert np.array_equal(vlm.image_embeddings(url), vlm.image_embeddings(SHAPES))
            assert "<img" not in vlm.ask("detect circle", url)._repr_html_()
        finally:
            server.shutdown()


def test_a_model_says_why_it_is_not_pickled() -> None:
    vlm = fakes.vlm()
    for held in (vlm, vlm.chat()):
        with pytest.raises(TypeError, match="load it in each process"):
            pickle.dumps(held)


def test_errors_can_be_pickled() -> None:
    overflow = pickle.loads(pickle.dumps(ContextOverflow(64, 9, 1, 32)))
    assert isinstance(overflow, ContextOverflow) and overflow.context == 32
    assert str(overflow) == str(ContextOverflow(64, 9, 1, 32))
    corrupt = pickle.loads(pickle.dumps(BundleCorrupt(Path("a"), "is empty")))
    assert corrupt.file == Path("a") and str(corrupt).startswith("a: is empty")
    for _, kind in inspect.getmembers(errors, inspect.isclass):
        if issubclass(kind, EdgeVLMError):
            error = kind.__new__(kind, "message")
            assert type(pickle.loads(pickle.dumps(error))) is kind


def test_reprs_say_what_it_is() -> None:
    vlm = fakes.vlm("a red circle on a white ground, and nothing else")
    assert repr(vlm) == "<VLM fake: vision on cpu, decoder on cpu>"
    with vlm.chat(RED) as chat:
        assert repr(chat) == "<Chat with fake: 1 pictures, 0 questions>"
        answer = chat.stream("x")
        assert repr(answer) == "<Answer '', open, 0 tokens>"
        answer.finish()
        assert (
            repr(answer) == "<Answer 'a red circle on a white ground, and noth…', stop, 48 tokens>"
        )
        assert repr(chat).endswith("1 questions>")
    vlm.close()
    assert repr(vlm) == "<VLM fake: closed>"


def test_reprs_are_short_whatever_they_hold() -> None:
    mask = np.zeros((1000, 1000), bool)
    box = Box(1.234, 2, 3, 4.9, "a " * 100, tuple(range(16)), mask)
    assert repr(box) == f"<Box {'a ' * 20 + '…'!r} 1 2 3 5, with its mask>"
    reply = fakes.vlm(BOX).ask("x", RED, logprobs=20, choices=[BOX])
    assert (
        repr(reply)
        == "<Reply '<loc0000><loc0000><loc0512><loc0512> cir…', stop, 43 tokens, 1 boxes>"
    )
    assert len(repr(reply.logprobs[0])) < 100 and len(repr(reply.constraint)) < 100
    bundle = open_bundle(built_in())
    assert repr(bundle) == f"<Bundle pico in {bundle.folder}>"
    assert repr(bundle.manifest).startswith("<Manifest of pico, ")


def test_a_notebook_shows_a_box_and_its_mask() -> None:
    mask = np.zeros((20, 40), bool)
    mask[5:, :10] = True
    shown = Box(0, 5, 10, 20, "<cat>", mask=mask)._repr_html_()
    assert shown.startswith("<pre>&lt;Box") and "<cat>" not in shown
    (data,) = re.findall(r'<img alt="mask" src="data:image/png;base64,([^"]*)">', shown)
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert np.array_equal(drawn == 255, mask)
    assert "<img" not in Box(0, 5, 10, 20, "cat")._repr_html_()


def test_a_notebook_shows_answers_and_chats_as_far_as_they_have_come() -> None:
    vlm = fakes.vlm([BOX, "<i>"])
    with vlm.chat(RED) as chat:
        assert chat._repr_html_().count("<img") == 1
        answer = chat.stream("<u>?")
        next(answer)
        assert "&lt;" in answer._repr_html_() and "<img" not in answer._repr_html_()
        answer.finish()
        chat.ask("and?")
        shown = chat._repr_html_()
    assert shown.count("<img") == 2 and "<b>&lt;u&gt;?</b>" in shown
    assert "<i>" not in shown and "&lt;i&gt;" in shown


def test_a_notebook_shades_tokens_that_the_model_was_not_sure_of() -> None:
    def token(data: bytes, logprob: float, *top: TokenLogprob) -> TokenLogprob:
        return TokenLogprob(1, data.decode(errors="replace"), data, logprob, top)

    star = "\u2605".encode()
    other = token(b'"<', -2.0)
    tokens = (token(b"a<", 0.0, other), token(star[:1], -1.0), token(star[1:], 0.0), token(star, 0))
    shown = Reply("a<\u2605", (1, 2, 3), "stop", logprobs=tokens)._repr_html_()
    spans = re.findall(r'<span style="([^"]*)" title="([^"]*)">([^<]*)</span>', shown)
    assert [text for *_, text in spans] == ["a&lt;", "\u2605", "\u2605"]
    assert spans[0][0].endswith(", 0.00)") and spans[1][0].endswith(", 0.63)")
    assert spans[0][1] == "1.00; &#x27;&quot;&lt;&#x27; 0.14" and spans[1][1] == "0.37"
    cut = Reply("", (1,), "length", logprobs=(token(star[:1], 0.0),))
    assert "\ufffd</span>" in cut._repr_html_()


def test_a_notebook_shows_the_words_as_text_and_the_boxes_in_the_picture(tmp_path: Path) -> None:
    words = f"{BOX}<script>alert('&')</script> ; <loc0512><loc0512><loc1023><loc1023> \"star"
    Image.fromarray(np.full((90, 120, 3), 200, np.uint8)).save(tmp_path / "in.png")
    reply = fakes.vlm(words).ask("detect circle", tmp_path / "in.png")
    shown = reply._repr_html_()
    assert "<script" not in shown and "&lt;script&gt;alert(&#x27;&amp;&#x27;)" in shown
    (alt, data) = re.findall(r'<img alt="([^"]*)" src="data:image/png;base64,([^"]*)">', shown)[0]
    assert alt.startswith("circle") and "<" not in alt
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert drawn.shape == (90, 120, 3) and (drawn != 200).any()
    (tmp_path / "in.png").unlink()
    assert "<img" not in reply._repr_html_()
    assert fakes.vlm("<b>").ask("x")._repr_html_().count("<") == 2
