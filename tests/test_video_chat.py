"""Conversations about videos: each answer is that of a model that reads all of it anew, as the
original is told of it.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import edgevlm
from edgevlm import Message, Video
from edgevlm.errors import ChatFileError, ContextOverflow, PromptError
from edgevlm.export import export_bundle
from edgevlm.prompt import Image
from edgevlm.runtimes.messages import Part, parted
from edgevlm.runtimes.request import Request, input_blocks, prepare
from edgevlm.runtimes.session import VLM
from edgevlm.sampling import Sampling
from edgevlm.types import Reply
from tests.answers import greedy, sequence
from tests.checkpoints.qwen2_vl import write_qwen2_vl
from tests.checkpoints.smolvlm import write_smolvlm
from tests.test_qwen2_vl import Original as QwenOriginal
from tests.test_smolvlm import Original as SmolOriginal

pytestmark = pytest.mark.usefixtures("children_inside")

EDGE = 48
SAMPLING = {"fps": 2, "max_frames": 6, "video_size": {"longest_edge": EDGE}}
WRITERS: dict[str, Callable[[Path], Path]] = {
    "smolvlm2": lambda folder: write_smolvlm(
        folder, model_type="smolvlm", processor={"video_sampling": SAMPLING}
    ),
    "qwen2-vl": write_qwen2_vl,
    "qwen2.5-vl": lambda folder: write_qwen2_vl(
        folder, new=True, nested=True, tied=False, full_layers=(0, 2)
    ),
}
RNG = np.random.default_rng(11)
# Of sizes that neither model makes smaller.
A, B = RNG.integers(0, 256, (2, 5, 40, 48, 3), np.uint8)
STILL = RNG.integers(0, 256, (50, 90, 3), np.uint8)
FILM = Video([*A], (0.0, 0.5, 1.0, 1.5, 2.0), 2.5)
OTHER = Video([*B[:4]], (0.0, 1.0, 2.0, 3.0), 4.0)
QUESTIONS = ("what happens?", "and then?", "is it red?")


@dataclass
class Made:
    """A model, another that reads everything anew, and the checkpoint."""

    name: str
    source: Path
    vlm: VLM
    fresh: VLM

    @property
    def pairs(self) -> bool:
        return self.name != "smolvlm2"


@pytest.fixture(scope="module", params=WRITERS)
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Made]:
    folder = tmp_path_factory.mktemp("film")
    source = WRITERS[request.param](folder / "source")
    out = export_bundle(source, folder / "out", quant="f32", vision_precision="fp32").folder
    with edgevlm.load(out, cache=False) as vlm, edgevlm.load(out, cache=False) as fresh:
        yield Made(request.param, source, vlm, fresh)


def said(role: Any, *content: str | Video | NDArray[np.uint8]) -> Message:
    parts: list[Part] = []
    for one in content:
        if isinstance(one, str):
            parts.append({"type": "text", "text": one})
        elif isinstance(one, Video):
            parts.append({"type": "video", "video": one})
        else:
            parts.append({"type": "image", "image": one})
    return {"role": role, "content": parts}


class Compared:
    """A chat whose every answer is compared with that of a model that reads all of it anew."""

    def __init__(self, made: Made, video: Video) -> None:
        made.vlm.forget()
        self.chat, self._made = made.vlm.chat(video), made
        self.said: list[Message] = []

    def ask(self, question: str, *shown: Video | NDArray[np.uint8]) -> Reply:
        before = self.chat.reply if self.chat.begun else None
        reply = self.chat.ask(question, max_tokens=4)
        self.said.append(said("user", *shown, question))
        fresh = self._made.fresh
        fresh.forget()
        again = fresh.ask(self.said, max_tokens=4)
        assert again.tokens.kept == 0 and again.tokens.prompt == reply.tokens.prompt
        assert again.token_ids == reply.token_ids
        if before:
            assert before.tokens.image <= reply.tokens.kept < reply.tokens.prompt
        self.said.append({"role": "assistant", "content": reply})
        return reply


def test_a_conversation_reads_only_what_is_new_and_answers_as_a_fresh_one(made: Made) -> None:
    talk = Compared(made, FILM)
    replies = [talk.ask(q, *([] if i else [FILM])) for i, q in enumerate(QUESTIONS)]
    encoded = [r.timings.vision_ms for r in replies]
    assert encoded[0] and not any(encoded[1:])
    assert len(talk.chat.videos) == 1 and "0 pictures, 1 videos, 3 que" in repr(talk.chat)
    shown = talk.chat.image
    assert isinstance(shown, Video) and [*shown.times] == [*FILM.times]
    assert "<img" in talk.chat._repr_html_()


def test_pictures_and_videos_come_with_any_question(made: Made, tmp_path: Path) -> None:
    talk = Compared(made, FILM)
    chat = talk.chat
    talk.ask("one?", FILM)
    chat.add_image(STILL)
    talk.ask("two?", STILL)
    chat.add_image(OTHER)
    talk.ask("three?", OTHER)
    # Taken back with its video, and asked otherwise beside a picture.
    assert chat.undo() == "three?"
    del talk.said[-2:]
    chat.add_image(STILL)
    assert len(chat.pictures) == len(chat.videos) == 2
    talk.ask("four?", OTHER, STILL)
    before = chat.reply
    assert chat.retry(max_tokens=4).finish().token_ids == before.token_ids
    talk.ask("five?")
    chat.save(tmp_path / "saved")
    assert chat.undo() == "five?"
    del talk.said[-2:]
    resumed = made.vlm.chat()
    resumed.load(tmp_path / "saved")
    assert [q for q, _ in resumed.turns] == ["one?", "two?", "four?", "five?"]
    assert resumed.undo() == "five?"
    talk.chat = resumed
    reply = talk.ask("six?")
    # Nothing is encoded again: the frames are the same to the bit.
    assert not reply.timings.vision_ms and len(resumed.videos) == 2


def test_a_video_begins_anew_and_is_left_out_with_its_question(made: Made) -> None:
    talk = Compared(made, FILM)
    talk.ask("one?", FILM)
    talk.chat.image = OTHER
    assert not talk.chat.begun
    del talk.said[:]
    talk.ask("two?", OTHER)
    talk.chat.clear()
    del talk.said[:]
    talk.ask("three?", OTHER)
    context = made.vlm.manifest.decoder.context_length
    # A question that leaves no room for what was said before.
    word = len(made.vlm.engines.tokenize(" red" * 50)) / 50
    question = " red" * int(
        (context - made.vlm.chat(OTHER).ask("x", max_tokens=1).tokens.prompt) / word - 6
    )
    del talk.said[:]
    talk.ask(question, OTHER)
    assert talk.chat.left_out == 1 and len(talk.chat.videos) == 1


# Against the originals


def smol_text(turns: Sequence[tuple[Video | None, str]]) -> str:
    """A conversation as SmolVLM2's template and processor write it; answers have no video."""
    counts = {4: "four", 5: "five"}
    text = "<|im_start|>"
    for i, (film, words) in enumerate(turns):
        text += f"{('User', 'Assistant')[i % 2]}: "
        if film:
            frames = "".join(f"\nFrame from 00:0{int(t)}:<image>" for t in film.times)
            text += (
                f"You are provided the following series of {counts[len(film.times)]} frames from a "
                f"0:00:0{int(film.duration)} [H:MM:SS] video.\n{frames}\n\n"
            )
        text += f"{words}<end_of_utterance>\n"
    return text + "Assistant:"


CONVERSATION: list[tuple[Video | None, str]] = [
    (FILM, "what happens?"),
    (None, "a bar"),
    (None, "and then?"),
    (None, "it moves"),
    (OTHER, "and here?"),
]


def asked(vlm: VLM, turns: Sequence[tuple[Video | None, str]]) -> Request:
    messages = [
        said(("user", "assistant")[i % 2], *([film] if film else []), words)
        for i, (film, words) in enumerate(turns)
    ]
    _, exchanges, images = parted(messages, None)
    return prepare(vlm.engines, exchanges, images, Sampling(max_tokens=6))


def check_smolvlm(made: Made) -> None:
    original = SmolOriginal(made.source)
    inputs: Any = original.processor(
        text=smol_text(CONVERSATION),
        images=[*FILM.frames, *OTHER.frames],
        return_tensors="pt",
        images_kwargs={"do_image_splitting": False, "size": SAMPLING["video_size"]},
    )
    request = asked(made.vlm, CONVERSATION)
    ids = inputs["input_ids"][0].tolist()
    assert sequence(request, original.model.config.image_token_id) == ids
    shown = zip(request.pictures, request.specs, strict=True)
    pixels = np.concatenate([picture.cut(spec) for picture, spec in shown])
    np.testing.assert_array_equal(pixels, inputs["pixel_values"][0].numpy())
    ours, tokens = greedy(made.vlm, request, 6)
    theirs = original.logits(inputs, tokens)
    assert theirs[:-1].argmax(1).tolist() == tokens
    assert np.abs(ours - theirs).max() < 5e-3


class Patches:
    """Patches of pictures and videos as Qwen's own processors make them."""

    def __init__(self, original: QwenOriginal) -> None:
        self._pictures = original.processor.image_processor

    def of(self, frames: Sequence[NDArray[np.uint8]], most: int) -> tuple[Any, list[int]]:
        """Patches and their grid; a picture is a film of one frame."""
        p = self._pictures
        patches, grid = p._preprocess(
            list(frames),
            do_resize=True,
            size={"shortest_edge": p.min_pixels, "longest_edge": most},
            resample=p.resample,
            do_rescale=True,
            rescale_factor=p.rescale_factor,
            do_normalize=True,
            image_mean=p.image_mean,
            image_std=p.image_std,
            patch_size=p.patch_size,
            temporal_patch_size=p.temporal_patch_size,
            merge_size=p.merge_size,
            do_convert_rgb=True,
        )
        return patches, list(grid)

    def rows(self, grid: Sequence[int]) -> int:
        return int(np.prod(grid)) // int(self._pictures.merge_size) ** 2


def check_qwen(made: Made) -> None:
    """The same conversation with a picture before the second video."""
    import torch

    original = QwenOriginal(made.source)
    patches = Patches(original)
    shown: list[tuple[str, Any]] = [("video", FILM), ("image", STILL), ("video", OTHER)]
    made_of = [patches.of([what] if kind == "image" else what.frames, 6400) for kind, what in shown]
    pads = [f"<|vision_start|>{f'<|{k}_pad|>' * patches.rows(g)}<|vision_end|>"
            for (k, _), (_, g) in zip(shown, made_of, strict=True)]  # fmt: skip
    words = [words for _, words in CONVERSATION]
    text = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    for i, said_words in enumerate(words):
        before = {0: pads[0], 4: pads[1] + pads[2]}.get(i, "")
        role = ("user", "assistant")[i % 2]
        text += f"<|im_start|>{role}\n{before}{said_words}<|im_end|>\n"
    text += "<|im_start|>assistant\n"
    ids = original.processor.tokenizer(text, return_tensors="pt")["input_ids"]
    films = [made_of[0], made_of[2]]
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "pixel_values": torch.from_numpy(made_of[1][0]),
        "image_grid_thw": torch.tensor([made_of[1][1]]),
        "pixel_values_videos": torch.cat([torch.from_numpy(p) for p, _ in films]),
        "video_grid_thw": torch.tensor([grid for _, grid in films]),
    }
    if made.name == "qwen2.5-vl":
        # Frames every half second, and every second.
        inputs["second_per_grid_ts"] = torch.tensor([1.0, 2.0])
    messages = [
        said("user", FILM, words[0]),
        said("assistant", words[1]),
        said("user", words[2]),
        said("assistant", words[3]),
        said("user", STILL, OTHER, words[4]),
    ]
    _, exchanges, images = parted(messages, None)
    request = prepare(made.vlm.engines, exchanges, images, Sampling(max_tokens=6))
    config = original.model.config
    token = {0: config.video_token_id, 1: config.image_token_id, 2: config.video_token_id}
    spans = [range(3), range(3, 4), range(4, 6)]
    found: list[int] = []
    plans = [p.plan(s) for p, s in zip(request.pictures, request.specs, strict=True)]
    for segment in request.segments:
        if isinstance(segment, Image):
            which = next(i for i, span in enumerate(spans) if segment.index in span)
            found += [token[which]] * plans[segment.index].rows
        else:
            found += segment.ids
    assert found == ids[0].tolist()
    given = {k: v for k, v in inputs.items() if not k.startswith("pixel")}
    places = original.model.model.get_rope_index(**given)[0][:, 0].T.numpy()
    blocks = input_blocks(made.vlm.engines, replace(request, pictures=[*request.pictures]))
    ours = np.concatenate([block.positions for block in blocks])
    np.testing.assert_array_equal(ours[:, :3], places)
    logits, tokens = greedy(made.vlm, request, 6)
    original.model.model.rope_deltas = None
    with torch.inference_mode():
        out = original.model(
            **{**inputs, "input_ids": torch.cat([ids, torch.tensor([tokens]).long()], 1)}
        )
    theirs = out.logits[0, -len(tokens) - 1 :].numpy()
    assert theirs[:-1].argmax(1).tolist() == tokens
    assert theirs.std() > 3 and np.abs(logits - theirs).max() < 5e-3


def test_a_conversation_is_what_the_original_is_told(made: Made) -> None:
    if made.pairs:
        check_qwen(made)
    else:
        check_smolvlm(made)


# What is refused


def test_a_bundle_of_before_takes_a_video_with_the_first_question(made: Made) -> None:
    vlm, manifest = made.fresh, made.fresh.manifest
    video = manifest.prompt.video
    assert video
    before = replace(manifest, prompt=replace(manifest.prompt, video=replace(video, turn=())))
    engines = vlm.engines
    vlm.manifest, vlm.engines = before, replace(engines, manifest=before)
    try:
        chat = vlm.chat(FILM)
        first = chat.ask("x", max_tokens=2)
        assert chat.ask("y", max_tokens=2).tokens.image == first.tokens.image
        for wrong in (lambda: chat.add_image(OTHER), lambda: vlm.chat([FILM, STILL])):
            with pytest.raises(PromptError, match="export it again"):
                wrong()
        with pytest.raises(PromptError, match="export it again"):
            vlm.ask([said("user", "x"), said("assistant", "y"), said("user", FILM, "z")])
    finally:
        vlm.manifest, vlm.engines = manifest, engines


def test_what_is_no_video_in_a_message_is_refused(made: Made) -> None:
    message: Any = {"role": "user", "content": [{"type": "video", "video": "clip.mp4"}]}
    with pytest.raises(PromptError, match="VLM.read_video makes one"):
        made.vlm.ask([message])
    with pytest.raises(PromptError, match="assistant's and cannot have a picture or video"):
        made.vlm.ask([said("user", "x"), said("assistant", FILM), said("user", "y")])
    with pytest.raises(PromptError, match="a picture is wanted here"):
        made.vlm.image_embeddings(FILM)  # type: ignore[arg-type]  # as programs without types do
    with edgevlm.load() as pico:
        for ask in (lambda: pico.chat(FILM), lambda: pico.ask([said("user", FILM, "x")])):
            with pytest.raises(PromptError, match="pico: it was not trained on videos"):
                ask()


def test_too_many_frames_for_the_context_are_refused_with_a_number_that_fits(made: Made) -> None:
    manifest, engines, vlm = made.vlm.manifest, made.vlm.engines, made.vlm
    # Half a minute, two frames a second.
    n, context = 60, 700
    frames = [A[i % 5] for i in range(n)]
    video = manifest.prompt.video
    assert video
    roomy = replace(
        manifest,
        prompt=replace(manifest.prompt, video=replace(video, most=n)),
        decoder=replace(manifest.decoder, context_length=context),
    )
    vlm.manifest, vlm.engines = roomy, replace(engines, manifest=roomy)
    try:
        film = Video(frames, tuple(i / 2 for i in range(n)), n / 2, fps=2)
        with pytest.raises(ContextOverflow, match=r"--fps .*fps=") as raised:
            vlm.chat(film).ask("what?")
        fps = raised.value.fps
        assert fps and 0 < fps < 2
        fewer = int(fps * n / 2)
        fits = Video(frames[:fewer], tuple(i / fps for i in range(fewer)), n / 2, fps=fps)
        reply = vlm.chat(fits).ask("what?", max_tokens=1)
        # It leaves room for an answer, and little more.
        left = context - reply.tokens.prompt
        assert context // 4 <= left < context // 4 + 3 * reply.tokens.image / fewer + 40
    finally:
        vlm.manifest, vlm.engines = manifest, engines


# Saved conversations


@pytest.fixture
def saved(made: Made, tmp_path: Path) -> Path:
    with made.vlm.chat(FILM) as chat:
        chat.ask("x", max_tokens=2)
        chat.save(tmp_path / "saved")
    return tmp_path / "saved"


def test_frames_and_times_are_saved(made: Made, saved: Path) -> None:
    with zipfile.ZipFile(saved) as archive:
        text = json.loads(archive.read("chat.json"))
        names = set(archive.namelist())
    (picture,) = text["pictures"]
    assert text["format"] == 2 and picture["video"]["times"] == [*FILM.times]
    assert names == {"chat.json", *picture["video"]["frames"]} and len(names) == 6
    with made.vlm.chat() as chat:
        chat.load(saved)
        (video,) = chat.videos
        assert video.duration == 2.5 and video.fps is None
        np.testing.assert_array_equal(np.stack([*video.frames]), A)
    with made.vlm.chat(STILL) as chat:
        chat.ask("x", max_tokens=1)
        chat.save(saved)
        with zipfile.ZipFile(saved) as archive:
            text = json.loads(archive.read("chat.json"))
        # Older versions read it.
        assert text["format"] == 1 and [*text["pictures"][0]] == ["file", "source"]


def changed(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Writes a saved chat anew with another video."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    text = json.loads(members["chat.json"])
    change(text["pictures"][0])
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in {**members, "chat.json": json.dumps(text).encode()}.items():
            archive.writestr(name, data)


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a time too few": (lambda p: p["video"]["times"].pop(), "5 frames has 4 times"),
    "a time before its begin": (lambda p: p["video"].update(times=[-1.0] * 5), "seconds from"),
    "centuries": (lambda p: p["video"].update(duration=1e300), "seconds from"),
    "no fps": (lambda p: p["video"].update(fps=0.0), "fps is 0"),
    "no frames": (lambda p: p["video"].update(frames=[], times=[]), "0 frames"),
    "frames without end": (
        lambda p: p["video"].update(frames=p["video"]["frames"] * 999, times=[0.0] * 4995),
        "a video that this model is not shown",
    ),
    "a frame elsewhere": (lambda p: p["video"]["frames"].append("/etc/x"), "has"),
    "no picture": (lambda p: p["video"].update(frames=["chat.json"] * 5), "its chat.json looks"),
    "a file, too": (lambda p: p.update(file="chat.json"), "a file or a video"),
    "neither": (lambda p: p.pop("video"), "a file or a video"),
    "not an object": (lambda p: p.update(video=[]), "must be an object"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_video_in_a_saved_chat_is_refused_in_one_line(
    name: str, made: Made, saved: Path
) -> None:
    change, says = HOSTILE[name]
    changed(saved, change)
    with made.vlm.chat(STILL) as chat, pytest.raises(ChatFileError, match=says) as raised:
        chat.load(saved)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


def test_a_saved_video_is_of_the_size_that_is_read(
    made: Made, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgevlm.runtimes.saved_chat._MOST_PIXELS", 5 * 40 * 48 - 1)
    with made.vlm.chat() as chat, pytest.raises(ChatFileError, match="megapixels each"):
        chat.load(saved)
    with made.vlm.chat(FILM) as chat:
        chat.ask("x", max_tokens=1)
        with pytest.raises(ChatFileError, match="VLM.read_video makes them as small"):
            chat.save(saved.with_name("other"))
        assert not saved.with_name("other").exists()
