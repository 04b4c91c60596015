"""Videos: the frames that a model is shown, and what it says to them, against transformers."""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

import edgevlm
from edgevlm import cli
from edgevlm.cli.chat.lines import completer
from edgevlm.errors import EngineMissing, ImageError, PromptError, SourceError
from edgevlm.export import export_bundle, inspect_source
from edgevlm.films import in_words
from edgevlm.image import cut
from edgevlm.runtimes.messages import parted
from edgevlm.runtimes.request import prepare
from edgevlm.runtimes.session import VLM
from edgevlm.sampling import Sampling
from edgevlm.video import Video, chosen
from tests.answers import greedy, sequence
from tests.chatting import piped
from tests.checkpoints.smolvlm import write_smolvlm
from tests.test_smolvlm import Original

av = pytest.importorskip("av", reason='videos need pip install "edgevlm[video]"')
pytestmark = pytest.mark.usefixtures("children_inside")

SAMPLING = {"fps": 2, "max_frames": 6, "video_size": {"longest_edge": 48}}
WORDS = "what happens?"
OPENING = "You are provided the following series of {} frames from a {} [H:MM:SS] video.\n"


def write_video(
    path: Path, n: int, rate: int = 10, size: tuple[int, int] = (96, 64), turned: int = 0
) -> Path:
    """A film of a bright bar that moves down, compressed; players turn it, in degrees."""
    with partial(av.open, mode="w")(str(path)) as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        if turned:
            stream.set_display_rotation(turned)
        for i in range(n):
            rgb = np.full((size[1], size[0], 3), (30, 60, 120), np.uint8)
            rgb[(5 * i) % size[1] :][:8] = (250, 200, 10)
            for packet in stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def decoded(path: Path) -> list[NDArray[np.uint8]]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("video") / "smolvlm2"
    return write_smolvlm(folder, model_type="smolvlm", processor={"video_sampling": SAMPLING})


@pytest.fixture(scope="module")
def vlm(checkpoint: Path) -> Iterator[VLM]:
    out = checkpoint.with_name("out")
    export_bundle(checkpoint, out, quant="f32", vision_precision="fp32")
    with edgevlm.load(out) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("clips") / "clip.mp4", 25)


@pytest.mark.parametrize("system", [None, "You are terse. {}"])
@pytest.mark.parametrize("fps", [None, 1.3])
def test_it_answers_like_the_original(
    vlm: VLM, checkpoint: Path, clip: Path, fps: float | None, system: str | None
) -> None:
    video, original = vlm.read_video(clip, fps), Original(checkpoint)
    # 2.5 seconds at two frames a second, or at 1.3.
    wanted = [0, 6, 12, 18, 24] if fps is None else [0, 12, 24]
    frames = [decoded(clip)[i] for i in wanted]
    assert [round(t, 6) for t in video.times] == [i / 10 for i in wanted]
    assert video.duration == pytest.approx(2.5)
    count = {5: "five", 3: "three"}[len(wanted)]
    shown = "".join(f"\nFrame from 00:0{i // 10}:<image>" for i in wanted)
    said = f"System: {system}<end_of_utterance>\n" if system else ""
    text = (
        f"<|im_start|>{said}User: {OPENING.format(count, '0:00:02')}{shown}\n\n{WORDS}"
        "<end_of_utterance>\nAssistant:"
    )
    inputs: Any = original.processor(
        text=text,
        images=frames,
        return_tensors="pt",
        images_kwargs={"do_image_splitting": False, "size": SAMPLING["video_size"]},
    )
    words, asked, images = parted(WORDS, video, system)
    request = prepare(vlm.engines, asked, images, Sampling(max_tokens=8), words)
    assert request.n_tiles == len(wanted)
    assert (
        sequence(request, original.model.config.image_token_id) == inputs["input_ids"][0].tolist()
    )
    seen = zip(request.pictures, request.specs, strict=True)
    pixels = np.concatenate([cut(p.picture, spec) for p, spec in seen])
    np.testing.assert_array_equal(pixels, inputs["pixel_values"][0].numpy())
    ours, tokens = greedy(vlm, request, 8)
    theirs = original.logits(inputs, tokens)
    assert theirs[:-1].argmax(1).tolist() == tokens
    assert np.abs(ours - theirs).max() < 5e-3
    assert vlm.ask(WORDS, video, system=system, max_tokens=8).token_ids == tuple(tokens)


def transformers_own(file: str, name: str) -> Any:
    """A method as transformers' file has it; that wants torchvision to be imported."""
    found = importlib.util.find_spec("transformers")
    assert found and found.origin
    path = Path(found.origin).parent / file
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (method,) = (
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name
    )
    for argument in (*method.args.args, method.args.kwarg):
        if argument:
            argument.annotation = None
    import torch

    names: dict[str, Any] = {"np": np, "math": math, "torch": torch}
    module = ast.fix_missing_locations(ast.Module([method], []))
    exec(compile(module, str(path), "exec"), names)
    return names[name]


def test_frames_are_chosen_as_transformers_chooses_them(vlm: VLM) -> None:
    theirs = transformers_own("models/smolvlm/video_processing_smolvlm.py", "sample_frames")
    spec = vlm.manifest.prompt.video
    assert spec
    own = SimpleNamespace(num_frames=spec.most, fps=spec.fps)
    rng = np.random.default_rng(0)
    for n, rate in zip(rng.integers(1, 900, 300), rng.uniform(0.5, 60, 300), strict=True):
        for fps in (None, 0.3, 7.0):

            class Facts(dict[str, Any]):
                fps, total_num_frames = float(rate), int(n)

            facts = Facts(duration=n / rate, fps=float(rate))
            expected = theirs(own, facts, fps=fps)
            assert chosen(int(n), float(rate), spec, fps).tolist() == expected.tolist()


@pytest.mark.parametrize("turned", [90, -90, 180])
def test_a_phones_clip_is_upright(vlm: VLM, tmp_path: Path, turned: int) -> None:
    if not hasattr(av.VideoStream, "set_display_rotation"):
        pytest.skip("this PyAV cannot write a clip that is to be turned")
    lying = vlm.read_video(write_video(tmp_path / "lying.mp4", 5)).frames[0]
    upright = vlm.read_video(write_video(tmp_path / "clip.mp4", 5, turned=turned)).frames[0]
    # Players turn a frame so far against the clock.
    expected = np.rot90(lying, turned // 90)
    assert upright.shape == expected.shape
    assert np.abs(upright.astype(int) - expected).mean() < 1


def test_numbers_are_words() -> None:
    assert [in_words(n) for n in (1, 12, 20, 21, 64, 99)] == [
        *("one", "twelve", "twenty", "twenty-one", "sixty-four", "ninety-nine")
    ]


def test_the_bytes_of_a_file_are_read_as_the_file(vlm: VLM, clip: Path) -> None:
    video, other = vlm.read_video(clip), vlm.read_video(clip.read_bytes())
    assert (video.source, other.source) == (str(clip), None) and video.times == other.times
    np.testing.assert_array_equal(np.stack([*video.frames]), np.stack([*other.frames]))


def test_a_clip_that_is_cut_short_is_refused(vlm: VLM, tmp_path: Path) -> None:
    data = write_video(tmp_path / "clip.avi", 60).read_bytes()
    assert len(vlm.read_video(data).frames) == 6
    with pytest.raises(ImageError, match="cut short or damaged: .* of its 60 frames"):
        vlm.read_video(data[: len(data) // 2])


def test_a_clip_that_does_not_say_how_long_it_is(vlm: VLM, tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mkv", 25)
    assert len(vlm.read_video(path).frames) == 5


def test_what_is_not_a_video_is_refused_in_one_line(
    vlm: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: Path
) -> None:
    (tmp_path / "text.mp4").write_bytes(b"no film" * 100)
    (tmp_path / "empty.mp4").touch()
    whole, other = clip.read_bytes(), write_video(tmp_path / "clip.avi", 5).read_bytes()
    # A playlist that names a film which is there.
    listed = f"ffconcat version 1.0\nfile {clip}\n"
    (tmp_path / "list.ffconcat").write_text(listed, encoding="utf-8")
    wrong: Any
    for wrong, says in (
        (tmp_path / "list.ffconcat", "cannot be read as a video"),
        ("https://127.0.0.1/clip.mp4", "videos are read from files alone"),
        (tmp_path / "none.mp4", "No such file"),
        (tmp_path / "empty.mp4", "is empty"),
        (b"", "the video of 0 bytes: is empty"),
        (b"no film" * 100, "the video of 700 bytes: cannot be read as a video"),
        (whole[: len(whole) // 2], "cut short or damaged|cannot be read as a video"),
        (3.5, "an object of type float: is not a video"),
        (other.replace(b"FMP4", b"ZZZZ"), "a codec that is not known"),
        (tmp_path / "text.mp4", "cannot be read as a video"),
        (tmp_path, "cannot be read as a video"),
    ):
        with pytest.raises(ImageError, match=says) as raised:
            vlm.read_video(wrong)
        assert "\n" not in str(raised.value)
    with pytest.raises(PromptError, match="fps is 0"):
        vlm.read_video(clip, 0)
    with pytest.raises(PromptError, match="2 frames has 1 times"):
        Video([np.zeros((2, 2, 3), np.uint8)] * 2, (0.0,), 1.0)
    many = Video([np.zeros((2, 2, 3), np.uint8)] * 7, (0.0,) * 7, 1.0)
    with pytest.raises(PromptError, match="7 frames in one request; this model takes 6"):
        vlm.ask("x", many)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(EngineMissing, match=r"edgevlm\[video\]"):
        vlm.read_video(clip)


class Terminal:
    """The command line in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *words: str) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of a command."""
        self._monkeypatch.setattr(sys, "argv", ["edgevlm", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), *self._capsys.readouterr()


@pytest.fixture
def edge(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(monkeypatch, capsys)


def test_models_without_videos_say_so(clip: Path, edge: Terminal) -> None:
    with edgevlm.load() as pico:
        with pytest.raises(PromptError, match="not trained on videos"):
            pico.read_video(clip)
        with pytest.raises(PromptError, match="not trained on videos"):
            pico.ask("x", Video([np.zeros((2, 2, 3), np.uint8)], (0.0,), 1.0))
    code, _, err = edge("ask", "x", "--video", str(clip), "--model", "pico")
    assert code == 1 and "not trained on videos" in err and "Traceback" not in err
    for wrong in (["--fps", "2"], ["--video", str(clip), "--each"]):
        assert edge("ask", "x", *wrong)[0] == 2


def test_the_command_asks_about_a_video(
    vlm: VLM, checkpoint: Path, clip: Path, edge: Terminal
) -> None:
    model = str(checkpoint.with_name("out"))
    given = ("ask", WORDS, "--video", str(clip), "--fps", "1.3", "--model", model, "--json")
    code, out, err = edge(*given, "--max-tokens", "4")
    assert code == 0, err
    expected = vlm.ask(WORDS, vlm.read_video(clip, 1.3), max_tokens=4)
    assert json.loads(out)["text"] == expected.text


@pytest.mark.parametrize(
    "wrong", [{"fps": 0}, {"max_frames": 100}, {"video_size": {"height": 3}}, {"fps": True}]
)
def test_a_sampling_that_is_not_known_is_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    options = {"video_sampling": {**SAMPLING, **wrong}}
    source = write_smolvlm(tmp_path, model_type="smolvlm", layers=1, processor=options)
    with pytest.raises(SourceError, match="video_sampling is"):
        inspect_source(source)


def test_models_before_smolvlm2_have_none(tmp_path: Path) -> None:
    source = write_smolvlm(tmp_path, layers=1, processor={"video_sampling": SAMPLING})
    assert inspect_source(source).prompt.video is None


@pytest.mark.parametrize("model", ["smolvlm2", "pico"])
def test_a_chat_about_a_video(
    model: str,
    vlm: VLM,
    checkpoint: Path,
    clip: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(clip.parent)
    Path("my clip.mov").write_bytes(clip.read_bytes())
    Image.new("RGB", (80, 60)).save("a.png")
    typed = (
        "/video --fps 1.3 clip.mp4",
        "what happens?",
        '/video "my clip.mov"',
        "and here?",
        "/image a.png",
        "my clip.mov",
        "/undo",
        "/save talk.chat",
        "/clear",
        "/load talk.chat",
        "/video clip.mp4 --fps=0",
        "/video clip.mp4 --fps many",
        "/video",
        "/video nowhere.mp4",
        "/video a.png",
        "/image clip.mp4",
    )
    if model == "pico":
        _, err = piped(None, ("/video clip.mp4", "clip.mp4"), capsys)
        assert all("pico: it was not trained on videos" in line for line in err[-2:])
        return
    model_of_its_own = edgevlm.load(checkpoint.with_name("out"))
    out, err = piped(model_of_its_own, typed, capsys, "--max-tokens", "2")
    first, second = "clip.mp4 (3 frames of 2.5 s)", "my clip.mov (5 frames of 2.5 s)"
    stay = "in the conversation."
    expected = vlm.ask(WORDS, vlm.read_video(clip, 1.3), max_tokens=2).text
    assert out.splitlines()[0] == expected
    assert [line for line in err[1:] if not line.startswith("Cut at")] == [
        f"Looking at {first}.",
        f"Looking at {second} as well; {first} stays {stay}",
        f"Looking at a.png (80 x 60) as well; {first}, {second} stay {stay}",
        # In place of the picture that nothing was asked about.
        f"Looking at {second} as well; {first}, {second} stay {stay}",
        "Took back: and here?",
        "Saved 1 question to talk.chat; /load goes on with them.",
        f"Forgot the conversation; still looking at {first}, {second}, {second}.",
        f"Loaded 1 question; looking at {first}, {second}, {second}.",
        f"> what happens?\n{expected}".splitlines()[0],
        *expected.splitlines(),
        "fps is 0; only a number above 0 is known",
        "--fps needs a number, such as --fps 0.5",
        "/video needs a file's name, such as /video clip.mp4 --fps 1",
        "nowhere.mp4: cannot be read as a video (No such file or directory)",
        "a.png: cannot be read as a video (it is damaged, or not in a format of videos that is "
        "known)",
        "clip.mp4: looks like a video; name it by --video (/video in a chat), or take a frame of "
        "it, as PNG or JPEG",
    ]


def test_a_chat_begins_with_a_video(
    vlm: VLM, checkpoint: Path, clip: Path, capsys: pytest.CaptureFixture[str], edge: Terminal
) -> None:
    options = ("--video", str(clip), "--fps", "1.3", "--max-tokens", "2")
    out, err = piped(edgevlm.load(checkpoint.with_name("out")), [WORDS], capsys, *options)
    expected = vlm.ask(WORDS, vlm.read_video(clip, 1.3), max_tokens=2)
    assert out == f"{expected.text}\n" and "(3 frames of 2.5 s)." in err[1]
    for wrong in (["--fps", "2"], ["--video", str(clip), "-i", str(clip)]):
        assert edge("chat", *wrong)[0] == 2


def test_names_of_videos_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("clip.mp4", "clip.png", "clip.txt"):
        (tmp_path / name).touch()
    typed = Document("/video cl")
    assert [one.text for one in completer().get_completions(typed, CompleteEvent())] == ["clip.mp4"]
