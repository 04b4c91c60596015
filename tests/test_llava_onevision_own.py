"""LLaVA-OneVision in its own layout, against LLaVA-NeXT's code written anew."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgevlm
from edgevlm.errors import SourceError
from edgevlm.export import ReadOptions, export_bundle, inspect_source
from edgevlm.image.pixels import cut
from edgevlm.image.plan import among, plan
from edgevlm.image.read import read_picture
from edgevlm.prompt import Exchange
from edgevlm.runtimes.request import prepare
from edgevlm.runtimes.session import VLM
from edgevlm.sampling import Sampling
from edgevlm.specs import MapSpec
from tests.answers import greedy, sequence
from tests.checkpoints.adapters import shapes_of, write_adapter
from tests.checkpoints.llava_onevision import OWN, SIZE, Tiny, write_onevision
from tests.onevision_reference import IMAGE, OwnOriginal
from tests.test_llava_onevision import CASES, TALL, WIDE, WORDS
from tests.test_tiles import pictures

pytestmark = pytest.mark.usefixtures("children_inside")

RANGE = {"image_grid_pinpoints": "(1x1),...,(3x3)"}
VARIANTS: dict[str, dict[str, Any]] = {
    "0.5b": {},
    # Of tiles whose last pixels are in no patch, as So400m's; <image> among the tokens.
    "7b": {
        "tied": False,
        "dtype": "bfloat16",
        "shards": 2,
        "size": 35,
        "most": 9,
        "image_token": True,
        "files": "json",
        "config": {"model_type": "llava"},
    },
    "range": {"vision_width": 64, "vision_heads": 1, "config": RANGE},
    "folder": {"tower": "folder", "vision_width": 64, "vision_heads": 4},
    "anyres": {"config": {"image_aspect_ratio": "anyres", "mm_newline_position": "grid"}},
}


@pytest.fixture(scope="module", params=VARIANTS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def checkpoint(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("own") / name, **VARIANTS[name])


def write(folder: Path, **options: Any) -> Path:
    return write_onevision(folder, **{**OWN, **options})


@pytest.fixture(scope="module")
def original(checkpoint: Path, name: str) -> OwnOriginal:
    tiny = Tiny(**{**OWN, **VARIANTS[name]})
    return OwnOriginal(checkpoint, tiny.vision_heads, tiny.size)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    out = checkpoint.with_name(checkpoint.name + "-out")
    made = export_bundle(checkpoint, out, quant="f32", vision_precision="fp32")
    assert made.manifest.family == "llava_onevision" and all(s.ok for s in made.manifest.parity)
    return made.folder


@pytest.fixture(scope="module")
def vlm(bundle: Path) -> Iterator[VLM]:
    with edgevlm.load(bundle) as loaded:
        yield loaded


def turns(exchanges: list[Exchange]) -> list[tuple[str, int, str | None]]:
    return [
        (e.question, e.n_pictures, None if e.answer is None else str(e.answer)) for e in exchanges
    ]


@pytest.mark.parametrize("case", CASES)
def test_it_answers_like_the_original(vlm: VLM, original: OwnOriginal, case: str) -> None:
    exchanges, shown = CASES[case]
    request = prepare(vlm.engines, exchanges, shown, Sampling(max_tokens=16))
    n_rows = [len(original.rows(picture, len(shown) == 1)) for picture in shown]

    def wanted(*system: str) -> list[int]:
        rows, ids = iter(n_rows), original.ids(turns(exchanges), *system)
        return [i for token in ids for i in ([IMAGE] * next(rows) if token == IMAGE else [token])]

    assert sequence(request, IMAGE) == wanted()
    systematic = prepare(vlm.engines, exchanges, shown, Sampling(), "You are terse. 你好")
    assert sequence(systematic, IMAGE) == wanted("You are terse. 你好")
    ours, tokens = greedy(vlm, request, 16)
    theirs = original.logits(turns(exchanges), shown, tokens)
    assert theirs[:-1].argmax(1).tolist() == tokens
    assert np.abs(ours - theirs).max() < 5e-3


@pytest.mark.parametrize("picture", pictures())
@pytest.mark.parametrize("alone", [True, False])
def test_pixels_are_the_originals(
    vlm: VLM, original: OwnOriginal, picture: str, alone: bool
) -> None:
    given = read_picture(pictures()[picture])
    spec = among(vlm.manifest.image, 1 if alone else 2)
    theirs = original.pixels(given.rgb, alone).numpy()
    np.testing.assert_array_equal(cut(given, spec), theirs)


def test_plans_are_the_originals(vlm: VLM, original: OwnOriginal) -> None:
    rng, spec = np.random.default_rng(0), vlm.manifest.image
    assert spec.tiles and spec.tiles.alone and spec.tiles.map
    assert spec.tiles.map.digits is None
    unit = int(spec.tokens**0.5)
    for width, height in rng.integers(1, 5000, (2000, 2)).tolist():
        found = plan(width, height, spec)
        assert found.canvas == original.canvas(width, height)
        columns, rows = (n // spec.size * unit for n in found.canvas)
        if width / height > columns / rows:
            rows -= (rows - int(height * (columns / width))) // 2 * 2
        else:
            columns -= (columns - int(width * (rows / height))) // 2 * 2
        times = ((rows * columns) / ((spec.tiles.map.most or 99) * unit**2)) ** 0.5
        if times > 1.1:
            rows, columns = int(rows // times), int(columns // times)
        assert found.rows == spec.tokens + rows * (columns + 1), (width, height)


def test_both_layouts_lay_a_small_square_their_own_way(tmp_path: Path) -> None:
    tiles = [[SIZE, 2 * SIZE], [2 * SIZE, SIZE]]
    pinpoints = {"image_grid_pinpoints": tiles}
    theirs = write_onevision(tmp_path / "hf", config=pinpoints, processor=pinpoints)
    own = write(tmp_path / "own", config=pinpoints)
    found = [inspect_source(source).image for source in (theirs, own)]
    assert [plan(20, 20, image).grid for image in found] == [(1, 2), (2, 1)]


# SigLIP's last layer is not kept, and not read where it is.
@pytest.mark.parametrize("layers", [26, 27])
def test_the_published_sizes(layers: int) -> None:
    from edgevlm.families.llava_onevision import FAMILY
    from edgevlm.family import AddedToken, Source, Tokenizer

    start = "model.vision_tower.vision_tower.vision_model."
    shapes: dict[str, tuple[int, ...]] = {
        f"{start}embeddings.patch_embedding.weight": (1152, 3, 14, 14),
        f"{start}embeddings.position_embedding.weight": (729, 1152),
        f"{start}encoder.layers.0.mlp.fc1.weight": (4304, 1152),
        f"{start}encoder.layers.{layers - 1}.mlp.fc1.weight": (4304, 1152),
    }
    config = {
        "hidden_size": 8192,
        "image_aspect_ratio": "anyres_max_9",
        "image_grid_pinpoints": "(1x1),...,(6x6)",
        "intermediate_size": 29568,
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu",
        "model_type": "llava_qwen",
        "num_attention_heads": 64,
        "num_hidden_layers": 80,
        "num_key_value_heads": 8,
    }
    added = {f"<|im_{end}|>": AddedToken(i, special=True) for i, end in enumerate(("start", "end"))}
    tokenizer = Tokenizer(bytes=True, add_bos=False, added=added)
    model = FAMILY.describe(Source({"config.json": config}, shapes, tokenizer=tokenizer))
    vision = model.vision
    assert (vision.num_hidden_layers, vision.num_attention_heads) == (26, 16)
    assert (vision.image_size, vision.rows, model.image.mean) == (384, 729, (0.5, 0.5, 0.5))
    tiles = model.image.tiles
    assert tiles and tiles.map == MapSpec(9) and len(tiles.canvases) == 36
    assert plan(4000, 3000, model.image).n_tiles == 31


def test_heads_may_be_stated(tmp_path: Path) -> None:
    source = write(tmp_path / "source", vision_width=64, vision_heads=4)
    stated = {"vision_heads": "4"}
    made = export_bundle(
        source, tmp_path / "out", quant="f32", vision_precision="fp32", settings=stated
    )
    assert all(s.ok for s in made.manifest.parity)
    with edgevlm.load(made.folder) as vlm:
        request = prepare(vlm.engines, [Exchange(WORDS, 1)], [TALL], Sampling())
        ours, tokens = greedy(vlm, request, 4)
        theirs = OwnOriginal(source, 4, SIZE).logits([(WORDS, 1, None)], [TALL], tokens)
        assert np.abs(ours - theirs).max() < 5e-3
    with pytest.raises(SourceError, match="cannot have 5 heads"):
        inspect_source(source, ReadOptions(settings={"vision_heads": "5"}))


def test_a_tower_that_waits_may_be_another(tmp_path: Path) -> None:
    """With delay_load and a frozen tower the original reads the named one, whatever is inside."""
    options: dict[str, Any] = {"vision_width": 64, "vision_heads": 4}
    write(tmp_path / "other", tower="folder", **options)
    frozen = {"delay_load": True, "mm_tunable_parts": "mm_mlp_adapter,mm_language_model"}
    for config, ok in ((frozen, True), ({"delay_load": True}, False), ({}, False)):
        source = write(tmp_path / f"source{len(config)}", config=config, **options)
        chosen = ReadOptions(vision_tower=tmp_path / "other-siglip")
        if ok:
            inspect_source(source, chosen)
            continue
        with pytest.raises(SourceError, match="own vision tower was trained with it"):
            inspect_source(source, chosen)


def test_an_adapter_is_merged(tmp_path: Path) -> None:
    source = write(tmp_path / "source")
    shapes = shapes_of(source)
    ends = ("self_attn.q_proj.weight", "mm_projector.0.weight")
    modules = [n.removesuffix(".weight") for n in shapes if n.endswith(ends)]
    adapter = write_adapter(tmp_path / "adapter", shapes, modules, whole=["model.image_newline"])
    made = export_bundle(
        source, tmp_path / "out", quant="f32", vision_precision="fp32", adapter=adapter
    )
    assert all(s.ok for s in made.manifest.parity)


@pytest.mark.parametrize("quant", ["q8_0", "q4_k_m"])
def test_quantized_it_stays_within_its_bounds(quant: str, tmp_path: Path) -> None:
    source = write(tmp_path / "source", tied=False)
    made = export_bundle(source, tmp_path / "out", quant=quant, vision_precision="int8")
    assert all(0 <= s.worst <= s.tolerance for s in made.manifest.parity)


def test_a_chosen_template(tmp_path: Path) -> None:
    source = write(tmp_path / "source")
    made = export_bundle(
        source, tmp_path / "out", quant="f32", vision_precision="fp32", template="chatml"
    )
    assert all(s.ok for s in made.manifest.parity)


def test_a_question_about_a_picture_in_a_later_turn(vlm: VLM) -> None:
    first = vlm.ask("one", WIDE, max_tokens=2)
    asked: Any = [
        {"role": "user", "content": [{"type": "image", "image": WIDE}, text("one")]},
        {"role": "assistant", "content": first},
        {"role": "user", "content": [{"type": "image", "image": TALL}, text("two")]},
    ]
    reply = vlm.ask(asked, max_tokens=2)
    assert first.tokens.tiles > reply.tokens.tiles == 2


def text(words: str) -> Any:
    return {"type": "text", "text": words}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"image_aspect_ratio": "pad"}, "image_aspect_ratio 'pad' is not known"),
        ({"image_aspect_ratio": "anyres_max_0"}, "image_aspect_ratio 'anyres_max_0'"),
        ({"mm_patch_merge_type": "spatial"}, "mm_patch_merge_type is 'spatial'"),
        ({"image_grid_pinpoints": "(1x1)-(x)"}, "image_grid_pinpoints is"),
        ({"mm_projector_type": "mlp2x_res2x_gelu"}, "mm_projector_type 'mlp2x_res2x_gelu'"),
        ({"mm_projector_type": "linear"}, "the projector is 'linear'"),
        ({"mm_resampler_type": "qformer"}, "mm_resampler_type is 'qformer'"),
        ({"mm_vision_select_layer": -3}, "mm_vision_select_layer is -3"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature is 'cls_patch'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True"),
    ],
)
def test_what_would_answer_otherwise_is_refused(
    config: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match=says):
        inspect_source(write(tmp_path / "source", config=config))


def test_towers_that_are_refused(tmp_path: Path) -> None:
    clip = {"model_type": "clip_vision_model"}
    for name, options, says in (
        ("kind", {"vision_config": clip}, "vision tower is a 'clip_vision_model'"),
        ("layers", {"vision_layers": 2, "vision_config": {"num_hidden_layers": 1}}, "one layer"),
    ):
        source = write(tmp_path / name, tower="folder", **options)
        with pytest.raises(SourceError, match=says):
            inspect_source(source)
    source = write(tmp_path / "none", tower="folder", config={"mm_vision_tower": None})
    with pytest.raises(SourceError, match="holds no vision tower"):
        inspect_source(source)


def test_fewer_tiles(bundle: Path) -> None:
    with edgevlm.load(bundle, max_tiles=1) as vlm:
        request = prepare(vlm.engines, [Exchange(WORDS, 1)], [WIDE], Sampling())
        spec = vlm.manifest.image
        assert (request.n_tiles, request.n_image) == (1, spec.tokens + 1)
