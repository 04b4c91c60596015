"""Videos for Qwen2-VL and Qwen2.5-VL: pairs of frames and their places in time, as transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

import edgevlm
from edgevlm.bundle import open_bundle
from edgevlm.cli import cli
from edgevlm.errors import ContextOverflow, PromptError, SourceError
from edgevlm.export import export_bundle, inspect_source
from edgevlm.export.parity.quiet import quiet
from edgevlm.manifest import MANIFEST, write_manifest
from edgevlm.runtimes.messages import parted
from edgevlm.runtimes.request import Request, embedded, input_blocks, prepare
from edgevlm.runtimes.session import VLM
from edgevlm.sampling import Sampling
from edgevlm.specs import VideoSpec
from edgevlm.video import Video, chosen
from tests.answers import greedy, sequence
from tests.checkpoints.qwen2_vl import write_qwen2_vl
from tests.test_qwen2_vl import Original
from tests.test_video import decoded, transformers_own, write_video

av = pytest.importorskip("av", reason='videos need pip install "edgevlm[video]"')
pytestmark = pytest.mark.usefixtures("children_inside")

WORDS = "what happens?"
VARIANTS: dict[str, dict[str, Any]] = {
    "2": {},
    "2.5": {"new": True, "nested": True, "tied": False, "full_layers": (0, 2)},
}
VIDEO_FILE = "video_preprocessor_config.json"
Frames = Sequence[NDArray[np.uint8]]


class Shown:
    """The original, shown frames as its processor of videos shows them, which wants torchvision to
    be there: that of pictures has the same steps.
    """

    def __init__(self, folder: Path) -> None:
        self._original = Original(folder)
        self.model: Any = self._original.model
        self.new = "2_5" in self.model.config.model_type

    def inputs(
        self, frames: Frames, fps: float, most: int, system: str | None = None
    ) -> dict[str, Any]:
        """The input of a question about frames of at most so many pixels."""
        import torch

        pictures = self._original.processor.image_processor
        with quiet():
            patches, grid = pictures._preprocess(
                list(frames),
                do_resize=True,
                size={"shortest_edge": pictures.min_pixels, "longest_edge": most},
                resample=pictures.resample,
                do_rescale=True,
                rescale_factor=pictures.rescale_factor,
                do_normalize=True,
                image_mean=pictures.image_mean,
                image_std=pictures.image_std,
                patch_size=pictures.patch_size,
                temporal_patch_size=pictures.temporal_patch_size,
                merge_size=pictures.merge_size,
                do_convert_rgb=True,
            )
        rows = int(np.prod(grid)) // pictures.merge_size**2
        text = (
            f"<|im_start|>system\n{system or 'You are a helpful assistant.'}<|im_end|>\n"
            f"<|im_start|>user\n<|vision_start|>{'<|video_pad|>' * rows}<|vision_end|>{WORDS}"
            "<|im_end|>\n<|im_start|>assistant\n"
        )
        ids = self._original.processor.tokenizer(text, return_tensors="pt")["input_ids"]
        made = {
            "input_ids": ids,
            "pixel_values_videos": torch.from_numpy(patches),
            "video_grid_thw": torch.tensor([grid]),
        }
        if self.new:
            made["second_per_grid_ts"] = torch.tensor([2 / fps])
        return made

    def positions(self, inputs: dict[str, Any]) -> NDArray[np.int64]:
        """Times, lines and columns [rows, 3]."""
        given = {k: v for k, v in inputs.items() if k != "pixel_values_videos"}
        found: NDArray[np.int64] = self.model.model.get_rope_index(**given)[0][:, 0].T.numpy()
        return found

    def embeddings(self, inputs: dict[str, Any]) -> NDArray[np.float32]:
        """Of all pairs, float32 [rows, n_embd]."""
        import torch

        with torch.inference_mode():
            found: NDArray[np.float32] = self.model.model.visual(
                inputs["pixel_values_videos"], grid_thw=inputs["video_grid_thw"]
            ).numpy()
        return found

    def logits(self, inputs: dict[str, Any], tokens: Sequence[int]) -> NDArray[np.float32]:
        """After the prompt and after each token, everything read at once."""
        import torch

        ids = torch.cat([inputs["input_ids"], torch.tensor([list(tokens)]).long()], 1)
        self.model.model.rope_deltas = None
        with torch.inference_mode():
            out = self.model(**{**inputs, "input_ids": ids})
        found: NDArray[np.float32] = out.logits[0, -len(tokens) - 1 :].numpy()
        return found


@pytest.fixture(scope="module", params=VARIANTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen2_vl(tmp_path_factory.mktemp("video") / "source", **VARIANTS[request.param])


@pytest.fixture(scope="module")
def shown(checkpoint: Path) -> Shown:
    return Shown(checkpoint)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    out = checkpoint.with_name("out")
    return export_bundle(checkpoint, out, quant="f32", vision_precision="fp32").folder


@pytest.fixture(scope="module")
def vlm(bundle: Path) -> Iterator[VLM]:
    with edgevlm.load(bundle) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3.5 seconds of 96 x 64 pixels."""
    return write_video(tmp_path_factory.mktemp("clips") / "clip.mp4", 35)


def spec_of(vlm: VLM) -> VideoSpec:
    found = vlm.manifest.prompt.video
    assert found
    return found


def asked(vlm: VLM, video: Video, system: str | None = None) -> Request:
    said, exchanges, images = parted(WORDS, video, system)
    return prepare(vlm.engines, exchanges, images, Sampling(max_tokens=8), said)


def check(
    vlm: VLM, shown: Shown, request: Request, inputs: dict[str, Any], video_token: int
) -> None:
    """Ids, pixels, embeddings, positions, logits and tokens are those of the original."""
    assert sequence(request, video_token) == inputs["input_ids"][0].tolist()
    seen = zip(request.pictures, request.specs, strict=True)
    pixels = np.concatenate([pair.cut(spec) for pair, spec in seen])
    np.testing.assert_array_equal(pixels, _pairs(inputs, shown.model.config.vision_config))
    blocks = input_blocks(vlm.engines, replace(request, pictures=[*request.pictures]))
    ours, tokens = greedy(vlm, request, 8)
    places = np.concatenate([block.positions for block in blocks])
    np.testing.assert_array_equal(places[:, :3], shown.positions(inputs))
    theirs = shown.logits(inputs, tokens)
    assert theirs[:-1].argmax(1).tolist() == tokens
    assert theirs.std() > 3 and np.abs(ours - theirs).max() < 5e-3


def _pairs(inputs: dict[str, Any], vision: Any) -> NDArray[np.float32]:
    """Pixels [pairs, 6, height, width] of the patches that a processor lists."""
    pairs, lines, columns = inputs["video_grid_thw"][0].tolist()
    merge, side = vision.spatial_merge_size, vision.patch_size
    patches = inputs["pixel_values_videos"].numpy()
    shape = (pairs, lines // merge, columns // merge, merge, merge, 3, 2, side, side)
    found = patches.reshape(shape).transpose(0, 6, 5, 1, 3, 7, 2, 4, 8)
    return np.ascontiguousarray(found.reshape(pairs, 6, lines * side, columns * side))


@pytest.mark.parametrize("system", [None, "You are terse. {}"])
@pytest.mark.parametrize(
    ("fps", "wanted"),
    [(None, [0, 5, 11, 17, 23, 29]), (0.7, [0, 8, 17, 26])],
)
def test_it_answers_like_the_original(
    vlm: VLM, shown: Shown, clip: Path, fps: float | None, wanted: list[int], system: str | None
) -> None:
    video = vlm.read_video(clip, fps)
    assert [round(t, 6) for t in video.times] == [i / 10 for i in wanted]
    inputs = shown.inputs([decoded(clip)[i] for i in wanted], fps or 2.0, 6400, system)
    request = asked(vlm, video, system)
    np.testing.assert_allclose(
        np.concatenate(embedded(vlm.engines, asked(vlm, video, system))),
        shown.embeddings(inputs),
        atol=1e-4,
    )
    check(vlm, shown, request, inputs, shown.model.config.video_token_id)


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_an_odd_last_frame_stands_twice(vlm: VLM, shown: Shown, n: int) -> None:
    rng = np.random.default_rng(n)
    frames = [rng.integers(0, 256, (90, 37, 3), np.uint8) for _ in range(n)]
    # One a second, which the times say.
    video = Video(frames, tuple(float(i) for i in range(n)), float(n))
    inputs = shown.inputs(frames, 1.0 if n > 1 else 2.0, 6400)
    check(vlm, shown, asked(vlm, video), inputs, shown.model.config.video_token_id)


def test_many_frames_share_the_bound_on_all_of_them(bundle: Path, shown: Shown) -> None:
    rng = np.random.default_rng(1)
    frames = [rng.integers(0, 256, (50, 70, 3), np.uint8) for _ in range(8)]
    video = Video(frames, tuple(i / 2 for i in range(8)), 4.0, fps=2.0)
    with edgevlm.load(bundle) as vlm:
        manifest = vlm.manifest
        few = replace(spec_of(vlm), total=4 * 1500)
        fewer = replace(manifest, prompt=replace(manifest.prompt, video=few))
        vlm.engines = replace(vlm.engines, manifest=fewer)
        request = asked(vlm, video)
        inputs = shown.inputs(frames, 2.0, 1500)
        check(vlm, shown, request, inputs, shown.model.config.video_token_id)
    with edgevlm.load(bundle, max_pixels=1500) as vlm:
        request = asked(vlm, video)
        check(vlm, shown, request, inputs, shown.model.config.video_token_id)


def test_frames_that_become_larger_where_they_are_fewer_fit_at_the_number_that_is_named(
    bundle: Path, tmp_path: Path
) -> None:
    clip = write_video(tmp_path / "long.mp4", 200, size=(192, 160))
    with edgevlm.load(bundle) as vlm:
        # 40 frames of at most 24 squares of 64 pixels, fewer of up to 100.
        few = replace(spec_of(vlm), total=20 * 1536, most=40)
        manifest = replace(
            vlm.manifest,
            prompt=replace(vlm.manifest.prompt, video=few),
            decoder=replace(vlm.manifest.decoder, context_length=400),
        )
        vlm.manifest, vlm.engines = manifest, replace(vlm.engines, manifest=manifest)
        with pytest.raises(ContextOverflow, match="--fps") as raised:
            vlm.ask(WORDS, vlm.read_video(clip, 2))
        fps = raised.value.fps
        assert fps
        fits = vlm.read_video(clip, fps)
        assert 4 <= len(fits.frames) < 40 and vlm.ask(WORDS, fits, max_tokens=1).tokens.image < 300
        # Four frames are the fewest.
        tight = replace(manifest, decoder=replace(manifest.decoder, context_length=150))
        vlm.manifest, vlm.engines = tight, replace(vlm.engines, manifest=tight)
        with pytest.raises(ContextOverflow, match="lower max_pixels"):
            vlm.ask(WORDS, vlm.read_video(clip, 2))


def test_a_still_picture_is_two_equal_frames(vlm: VLM) -> None:
    rng = np.random.default_rng(2)
    still = rng.normal(size=(1, 3, 40, 56)).astype(np.float32)
    encoder = vlm.engines.encoder
    twice = encoder.features(np.concatenate([still, still], 1))
    np.testing.assert_array_equal(encoder.features(still), twice)
    other = encoder.features(np.concatenate([still, still + 1], 1))
    assert np.abs(other - twice).max() > 0.1


def test_another_question_reads_only_its_words(vlm: VLM, clip: Path) -> None:
    video = vlm.read_video(clip)
    vlm.forget()
    first = vlm.ask(WORDS, video, max_tokens=4)
    again = vlm.ask("and then?", video, max_tokens=4)
    assert first.tokens.kept == 0 and again.tokens.kept > again.tokens.image
    vlm.forget()
    assert vlm.ask("and then?", video, max_tokens=4).token_ids == again.token_ids


def test_frames_are_chosen_as_transformers_chooses_them(vlm: VLM) -> None:
    theirs = transformers_own("models/qwen2_vl/video_processing_qwen2_vl.py", "sample_frames")
    spec = spec_of(vlm)
    own = SimpleNamespace(
        num_frames=None,
        fps=spec.fps,
        temporal_patch_size=2,
        min_frames=spec.least,
        max_frames=spec.most,
    )
    rng = np.random.default_rng(0)
    for n, rate in zip(rng.integers(2, 30000, 300), rng.uniform(0.5, 60, 300), strict=True):
        for fps in (None, 0.3, 7.0):
            facts = SimpleNamespace(total_num_frames=int(n), fps=float(rate))
            ours = chosen(int(n), float(rate), spec, fps)
            expected = theirs(own, facts, fps=fps).numpy()[: len(ours)]
            assert len(ours) == len(expected) and len(ours) % 2 == 0
            # Float32 finds some that end at a frame in the one beside it.
            share = np.arange(len(ours)) * n / len(ours) % 1
            clear = (share > 0.01) & (share < 0.99)
            np.testing.assert_array_equal(ours[clear], expected[clear])
            assert np.abs(ours - expected).max() <= 1
    assert chosen(1, 10.0, spec).tolist() == [0]


def test_the_command_asks_about_a_video(vlm: VLM, bundle: Path, clip: Path) -> None:
    given = ["ask", WORDS, "--video", str(clip), "--fps", "1.3", "-m", str(bundle), "--json"]
    result = CliRunner().invoke(cli, [*given, "--max-tokens", "4"])
    assert result.exit_code == 0, result.output
    expected = vlm.ask(WORDS, vlm.read_video(clip, 1.3), max_tokens=4)
    assert json.loads(result.stdout)["text"] == expected.text


def test_an_older_bundle_is_to_be_exported_again(bundle: Path, tmp_path: Path, clip: Path) -> None:
    manifest = open_bundle(bundle).manifest
    for file in bundle.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / MANIFEST).unlink()
    write_manifest(tmp_path, replace(manifest, prompt=replace(manifest.prompt, video=None)))
    result = CliRunner().invoke(cli, ["ask", WORDS, "--video", str(clip), "-m", str(tmp_path)])
    assert result.exit_code == 1 and "exported again" in str(result.exception)


def test_frames_that_would_be_at_one_time_are_refused(vlm: VLM, shown: Shown, clip: Path) -> None:
    frames = [np.zeros((64, 64, 3), np.uint8)] * 6
    fast = Video(frames, tuple(i / 10 for i in range(6)), 0.6)
    if shown.new:
        with pytest.raises(PromptError, match="4 frames a second are too many .* 2 a second"):
            vlm.read_video(clip, 4)
        with pytest.raises(PromptError, match="10 frames a second are too many"):
            vlm.ask(WORDS, fast)
        fast = replace(fast, fps=2)
    assert vlm.ask(WORDS, fast, max_tokens=1).tokens.image == 3 * 64
    frames = [*frames[:5], np.zeros((64, 32, 3), np.uint8)]
    with pytest.raises(PromptError, match="frame 6 of the video has 32 x 64 pixels"):
        vlm.ask(WORDS, replace(fast, frames=frames))
    with pytest.raises(PromptError, match="fps is 0"):
        replace(fast, fps=0)


@pytest.mark.parametrize(
    ("stated", "says"),
    [
        ({"fps": 0}, "fps is 0"),
        ({"max_frames": 3}, "max_frames is 3; with min_frames 4"),
        ({"size": {"height": 4}}, "size is"),
        ({"patch_size": 8}, "patch_size is 8; that of pictures is 4"),
        ({"image_mean": [0, 0, 0]}, "image_mean is"),
    ],
)
def test_settings_of_videos_that_are_not_known_are_refused(
    stated: dict[str, Any], says: str, tmp_path: Path
) -> None:
    source = write_qwen2_vl(tmp_path, layers=1)
    (tmp_path / VIDEO_FILE).write_text(json.dumps(stated), encoding="utf-8")
    with pytest.raises(SourceError, match=f"{VIDEO_FILE}: {says}"):
        inspect_source(source)


def test_a_file_of_their_own_says_how_videos_are_read(tmp_path: Path) -> None:
    source = write_qwen2_vl(tmp_path, layers=1)
    video = inspect_source(source).prompt.video
    assert video and video.native and (video.native.least, video.native.most) == (256, 6400)
    own = {"size": {"shortest_edge": 512, "longest_edge": 1024}, "max_frames": 8, "fps": 1}
    (tmp_path / VIDEO_FILE).write_text(json.dumps(own), encoding="utf-8")
    other = inspect_source(source).prompt.video
    assert other and other.native and (other.native.least, other.native.most) == (512, 1024)
    assert (other.fps, other.least, other.most) == (1.0, 4, 8)
    (tmp_path / VIDEO_FILE).write_text("{}", encoding="utf-8")
    plain = inspect_source(source).prompt.video
    assert plain and plain.native and plain.native.least == 128 * 64


@pytest.mark.parametrize("vision", ["int8", "fp16"])
def test_quantized_it_still_sees_frames_change(vision: str, tmp_path: Path, clip: Path) -> None:
    source = write_qwen2_vl(tmp_path / "source", new=True)
    rows = []
    for precision in ("fp32", vision):
        made = export_bundle(
            source, tmp_path / precision, quant="f16", vision_precision=precision, verify=False
        )
        with edgevlm.load(made.folder) as vlm:
            rows.append(np.concatenate(embedded(vlm.engines, asked(vlm, vlm.read_video(clip)))))
    a, b = rows
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert cosines.min() > 0.97
