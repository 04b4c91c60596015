"""Results as programs handle them: pickled, and shown."""

import base64
import dataclasses
import inspect
import io
import pickle
import re
from pathlib import Path

import numpy as np
from PIL import Image

from edgevlm import errors, types
from edgevlm.errors import BundleCorrupt, ContextOverflow, EdgeVLMError
from edgevlm.runtimes import fakes
from edgevlm.types import Box, Piece, Reply

RED = np.full((10, 20, 3), (255, 0, 0), np.uint8)
BOX = "<loc0000><loc0000><loc0512><loc0512> circle"


def test_results_can_be_pickled() -> None:
    vlm = fakes.vlm(BOX)
    answer = vlm.stream("detect circle", RED, logprobs=2, choices=[BOX])
    pieces = list(answer)
    reply = answer.reply
    assert reply.boxes and reply.logprobs and reply.parsed == BOX
    results = [reply, pieces, vlm.devices, vlm.settings, reply.timings, reply.tokens]
    for result in results:
        assert pickle.loads(pickle.dumps(result)) == result
    # Nothing else that is a result was forgotten.
    kinds = {type(r) for r in (*results, pieces[0], reply.boxes[0], reply.logprobs[0])}
    kinds |= {types.Placement, types.Progress, types.Constraint}
    public = {c for _, c in inspect.getmembers(types, dataclasses.is_dataclass)}
    assert public <= kinds | {Piece, Box, Reply}


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
