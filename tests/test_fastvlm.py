"""FastVLM in both layouts, against Apple's code written anew with its tower in the form for
training.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgevlm
from edgevlm.errors import SourceError
from edgevlm.export import ReadOptions, export_bundle, inspect_source
from edgevlm.image.pixels import cut
from edgevlm.image.read import read_picture
from edgevlm.prompt import Exchange
from edgevlm.runtimes.request import prepare
from edgevlm.runtimes.session import VLM
from edgevlm.sampling import Sampling
from edgevlm.specs import ImageSpec
from edgevlm.types import Reply
from tests.answers import greedy, sequence
from tests.checkpoints.fastvit_tensors import training
from tests.checkpoints.fastvlm import CHAT, ROWS, SIZE, Tiny, write_fastvlm
from tests.checkpoints.paligemma import write_safetensors
from tests.fastvlm_reference import IMAGE, SYSTEM, Original, weights
from tests.test_tiles import pictures

pytestmark = pytest.mark.usefixtures("children_inside")

TOWER = "model.vision_tower.vision_tower.model."
RNG = np.random.default_rng(11)
WIDE = RNG.integers(0, 256, (70, 110, 3), np.uint8)
TALL = RNG.integers(0, 256, (301, 40, 3), np.uint8)
# With what Qwen2's tokenizers compose first.
WORDS = "what is in 2024's picture? опиши 图片 cafe\u0301"
VARIANTS: dict[str, dict[str, Any]] = {
    "0.5b": {},
    "training": {"form": "training", "files": "json", "image_token": True},
    "7b": {
        "form": "training",
        "tied": False,
        "dtype": "bfloat16",
        "shards": 2,
        "config": {"image_aspect_ratio": None},
    },
    "hf": {"layout": "hf", "files": "json", "tied": False},
    "hf training": {"layout": "hf", "files": "json", "form": "training", "size": 128},
}
CASES: dict[str, tuple[list[Exchange], list[Any]]] = {
    "wide": ([Exchange(WORDS, 1)], [WIDE]),
    "newlines": ([Exchange("\n\na", 1)], [TALL]),
    "two": ([Exchange(WORDS, 2)], [WIDE, TALL]),
    "none": ([Exchange(WORDS)], []),
    "turns": ([Exchange("one", 1, "a cat"), Exchange("two", 0, "a dog"), Exchange(WORDS)], [TALL]),
    "two in turns": ([Exchange("one", 1, "a cat"), Exchange(WORDS, 1)], [TALL, WIDE]),
    # What the model said is tokenized anew with the texts around it.
    "reply": (
        [Exchange("one", 1, Reply("\n cafe\u0301", (5, 6), "stop")), Exchange(WORDS)],
        [WIDE],
    ),
}


@pytest.fixture(scope="module", params=VARIANTS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def tiny(name: str) -> Tiny:
    return Tiny(**VARIANTS[name])


@pytest.fixture(scope="module")
def checkpoint(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fastvlm(tmp_path_factory.mktemp("fastvlm") / name, **VARIANTS[name])


@pytest.fixture(scope="module")
def original(checkpoint: Path, tiny: Tiny) -> Original:
    tower = training(tiny.widths, tiny.depths, tiny.seed)
    if tiny.dtype != "float32":
        found = weights(checkpoint)
        tower = {name: found[TOWER + name].numpy() for name in tower}
    return Original(checkpoint, tower, tiny.widths, tiny.depths)


@pytest.fixture(scope="module")
def vlm(checkpoint: Path) -> Iterator[VLM]:
    out = checkpoint.with_name(checkpoint.name + "-out")
    made = export_bundle(checkpoint, out, quant="f32", vision_precision="fp32")
    assert made.manifest.family == "fastvlm" and all(s.ok for s in made.manifest.parity)
    with edgevlm.load(out) as loaded:
        yield loaded


def wanted(original: Original, exchanges: list[Exchange], system: str = "") -> list[int]:
    turns = [
        (e.question, e.n_pictures, None if e.answer is None else str(e.answer)) for e in exchanges
    ]
    if not original.own:
        return original.chat_ids(CHAT, turns, system)
    return original.ids(turns, system or SYSTEM)


@pytest.mark.parametrize("case", CASES)
def test_it_answers_like_the_original(vlm: VLM, original: Original, tiny: Tiny, case: str) -> None:
    exchanges, shown = CASES[case]
    rows = (tiny.size // 64) ** 2
    request = prepare(vlm.engines, exchanges, shown, Sampling(max_tokens=16))
    ids = wanted(original, exchanges)
    assert sequence(request, IMAGE) == [i for n in ids for i in [n] * (rows if n == IMAGE else 1)]
    systematic = prepare(vlm.engines, exchanges, shown, Sampling(), "You are terse. 你好")
    more = wanted(original, exchanges, "You are terse. 你好")
    expected = [i for n in more for i in [n] * (rows if n == IMAGE else 1)]
    assert sequence(systematic, IMAGE) == expected
    ours, tokens = greedy(vlm, request, 16)
    theirs = original.logits(ids, shown, tokens)
    assert theirs[:-1].argmax(1).tolist() == tokens
    assert np.abs(ours - theirs).max() < 5e-3


def test_pictures_are_told_apart(vlm: VLM) -> None:
    wide, tall = (vlm.image_embeddings(picture) for picture in (WIDE, TALL))
    assert (wide - tall).std() > 0.2 * wide.std()


@pytest.mark.parametrize("precision", ["fp16", "qdq8", "int4"])
def test_at_other_precisions_it_stays_within_their_bounds(precision: str, tmp_path: Path) -> None:
    source = write_fastvlm(tmp_path / "source", tied=False)
    made = export_bundle(source, tmp_path / "out", quant="f32", vision_precision=precision)
    parity = {stage.stage: stage for stage in made.manifest.parity}
    assert 1e-9 < parity["features"].worst <= parity["features"].tolerance
    assert all(stage.ok for stage in parity.values())


# Both fits, and that of Apple's code where its config does not say "pad".
FITS: dict[str, dict[str, Any]] = {
    "pad": {},
    "crop": {"config": {"image_aspect_ratio": "square"}},
    "hf": {"layout": "hf", "files": "json"},
}


@pytest.fixture(scope="module", params=FITS)
def fitting(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ImageSpec, Original]:
    tiny = Tiny(size=128, **FITS[request.param])
    folder = tmp_path_factory.mktemp("fits") / "source"
    write_fastvlm(folder, size=128, **FITS[request.param])
    tower = training(tiny.widths, tiny.depths, tiny.seed)
    return inspect_source(folder).image, Original(folder, tower, tiny.widths, tiny.depths)


@pytest.mark.parametrize("picture", pictures())
def test_pixels_are_the_originals(fitting: tuple[ImageSpec, Original], picture: str) -> None:
    spec, original = fitting
    given = read_picture(pictures()[picture])
    np.testing.assert_array_equal(cut(given, spec), original.pixels(given.rgb).numpy())


def test_a_picture_is_padded_with_black(tmp_path: Path) -> None:
    found = inspect_source(write_fastvlm(tmp_path / "own")).image
    assert (found.fit, found.mean, found.std) == ("pad", (0, 0, 0), (1, 1, 1))
    assert (found.size, found.tokens, found.resample) == (SIZE, ROWS, "bicubic")
    pixels = cut(read_picture(np.full((40, 80, 3), 255, np.uint8)), found)[0]
    assert (pixels[:, : SIZE // 5] == 0).all() and (pixels[:, SIZE // 2] == 1).all()
    for ratio in (None, "square"):
        source = write_fastvlm(tmp_path / str(ratio), config={"image_aspect_ratio": ratio})
        assert inspect_source(source).image.fit == "crop"


def test_transformers_layout_reads_the_checkpoints_processor(tmp_path: Path) -> None:
    source = write_fastvlm(tmp_path / "hf", layout="hf", files="json")
    assert inspect_source(source).image.fit == "crop"
    assert inspect_source(source, ReadOptions(image_fit="pad")).image.fit == "pad"
    stated = {"image_mean": [0.5] * 3, "resample": 2, "size": {"shortest_edge": SIZE + 32}}
    other = inspect_source(
        write_fastvlm(tmp_path / "other", layout="hf", files="json", processor=stated)
    ).image
    assert (other.mean, other.resample) == ((0.5,) * 3, "bilinear")
    assert (other.size, other.resize) == (SIZE, SIZE + 32)


def test_the_published_sizes() -> None:
    from edgevlm.benchmarks.synthetic import make
    from edgevlm.benchmarks.synthetic.models import MODELS

    sizes = {"fastvlm-0.5b": 896, "fastvlm-1.5b": 1536, "fastvlm-7b": 3584}
    for name, width in sizes.items():
        _, model = make.describe(MODELS[name], name)
        vision = model.vision.tensors()
        assert (model.vision.rows, model.image.size) == (256, 1024)
        assert model.text.hidden_size == width and model.image.fit == "pad"
        assert sum(int(np.prod(shape)) for shape in vision.values()) == 122_672_352


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "tower": (
        {"config": {"mm_vision_tower": "openai/clip-vit-large-patch14-336"}},
        "mm_vision_tower is 'openai/clip-vit-large-patch14-336'; only FastVLM's is known",
    ),
    "small": ({"config": {"mm_vision_tower": "mobileclip_s0_256"}}, "mobileclip_l_<pixels>"),
    "size": ({"config": {"mm_vision_tower": "mobileclip_l_1000"}}, "only multiples of 64"),
    "large": ({"config": {"mm_vision_tower": "mobileclip_l_8192"}}, "up to 4096 are known"),
    "frame": ({"config": {"mm_use_im_start_end": True}}, "mm_use_im_start_end is True"),
    "tiles": ({"config": {"image_aspect_ratio": "anyres"}}, "'anyres' is not known"),
    "unpad": ({"config": {"mm_patch_merge_type": "spatial_unpad"}}, "only 'flat' is known"),
    "projector": ({"config": {"mm_projector_type": "ldpnet"}}, "only linear maps are known"),
    "timm": (
        {"layout": "hf", "vision_config": {"architecture": "fastvit_mci4"}},
        "vision_config.architecture is 'fastvit_mci4'; only 'fastvit_mci3' is known",
    ),
    "clip": ({"layout": "hf", "vision_config": {"model_type": "clip_vision_model"}}, "timm_wrap"),
    "arguments": (
        {"layout": "hf", "model_args": {"lkc_use_act": False}},
        "vision_config.model_args.lkc_use_act is False; it is not known",
    ),
    "layer": ({"layout": "hf", "config": {"vision_feature_layer": -2}}, "only -1 is known"),
    "crop": (
        {"layout": "hf", "processor": {"crop_size": 100, "size": {"shortest_edge": 100}}},
        "only multiples of 64 up to 4096 are known",
    ),
    "no processor": ({"layout": "hf", "processor": None}, "processor_config.json: is not there"),
    "rows": ({"layout": "hf", "nested": {"patch_size": 32}}, "make 64 image embeddings"),
    "chat": ({"layout": "hf", "chat": "{{ 'USER: ' }}"}, "its chat_template is not known"),
    "decoder": (
        {"layout": "hf", "text_config": {"model_type": "llama"}},
        "the decoder is a 'llama'; only qwen2 is known",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_known_is_refused_by_name(case: str, tmp_path: Path) -> None:
    options, reason = REFUSED[case]
    files = {"files": "json"} if "layout" in options else {}
    with pytest.raises(SourceError, match=reason) as found:
        inspect_source(write_fastvlm(tmp_path / "source", **options, **files))
    assert "\n" not in str(found.value)


def test_a_template_can_be_chosen(tmp_path: Path) -> None:
    source = write_fastvlm(tmp_path / "hf", layout="hf", files="json", chat="{{ 'USER: ' }}")
    assert inspect_source(source, ReadOptions(template="qwen_2")).family == "fastvlm"
    with pytest.raises(SourceError, match="'hf' is not one of qwen_2, fast_vlm"):
        inspect_source(source, ReadOptions(template="hf"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fastvlm(tmp_path_factory.mktemp("trained") / "source", form="training")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"patch_embed.0.rbr_conv.0.bn.running_var": None}, "lacks the tensor for vision.stem.0"),
        ({"network.0.0.token_mixer.mixer.rbr_scale.conv.weight": None}, "mixer.conv_scale.conv"),
        ({"patch_embed.1.rbr_skip.weight": (8,)}, "patch_embed.1.rbr_skip.weight is not a tensor"),
        ({"network.1.proj.0.small_conv.conv.weight": (16, 1, 5, 5)}, r"shape \[16, 1, 5, 5\]"),
        (
            {"network.0.0.token_mixer.norm.rbr_scale.conv.weight": (8, 1, 1, 1)},
            "not a tensor of this",
        ),
        ({"network.11.0.token_mixer.qkv.weight": (3, 1)}, "stages are not those of fastvit_mci3"),
        ({"stem.0.conv_kxk.0.conv.weight": (8, 3, 3, 3)}, "unknown to the family"),
    ],
)
def test_branches_that_are_not_the_towers_are_refused(
    trained: Path, changed: dict[str, tuple[int, ...] | None], reason: str, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file

    found = load_file(trained / "model.safetensors")
    for name, shape in changed.items():
        found.pop(TOWER + name, None)
        if shape:
            found[TOWER + name] = np.ones(shape, np.float32)
    folder = tmp_path / "source"
    folder.mkdir()
    for file in trained.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    write_safetensors(folder / "model.safetensors", found, "float32")
    with pytest.raises(SourceError, match=reason):
        inspect_source(folder)


def test_without_a_tower_it_is_refused(trained: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    folder = write_fastvlm(tmp_path / "source")
    found = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in found.items() if not name.startswith(TOWER)}
    write_safetensors(folder / "model.safetensors", kept, "float32")
    with pytest.raises(SourceError, match="holds no vision tower of FastVLM's"):
        inspect_source(folder)


def test_apples_layout_passes_over_a_picture_processors_file(tmp_path: Path) -> None:
    # Its code makes the processor itself, and writes such a file for mlx-vlm.
    source = write_fastvlm(tmp_path / "source")
    stated = {"image_processor_type": "CLIPImageProcessor", "image_mean": [0.5] * 3}
    (source / "preprocessor_config.json").write_text(json.dumps(stated), "utf-8")
    assert inspect_source(source).image.mean == (0, 0, 0)
