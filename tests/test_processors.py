"""What a checkpoint's own picture processor says, a bundle does, or it is refused by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from edgevlm import schema
from edgevlm.errors import ParityError, SourceError
from edgevlm.export import export_bundle
from edgevlm.export.options import ReadOptions
from edgevlm.export.pipeline import read
from edgevlm.families import llava, paligemma, tinygptv
from edgevlm.image import RGB, preprocess
from edgevlm.specs import ImageSpec
from tests.checkpoints.llava import write_llava
from tests.checkpoints.paligemma import write_paligemma
from tests.checkpoints.tinygptv import write_tinygptv
from tests.checkpoints.vocabulary import write_json
from tests.tinygptv_sources import SMALL

pytestmark = pytest.mark.usefixtures("children_inside")

RNG = np.random.default_rng(3)
WIDE = RNG.integers(0, 256, (50, 90, 3), np.uint8)
TALL = RNG.integers(0, 256, (101, 67, 3), np.uint8)
PLAIN, NESTED = "preprocessor_config.json", "processor_config.json"
State = Callable[..., Path]


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny PaliGemma whose tower takes 56 pixels."""
    return write_paligemma(tmp_path_factory.mktemp("siglip") / "source", layers=1)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA in transformers' layout whose tower takes 48 pixels."""
    return write_llava(tmp_path_factory.mktemp("clip") / "source", layout="hf", layers=1)


@pytest.fixture
def stated(request: pytest.FixtureRequest) -> Iterator[State]:
    """A function that has a checkpoint's processor say something else, until the test is over."""
    kept: list[tuple[Path, bytes | None]] = []

    def state(folder: Path, changes: dict[str, Any], file: str = PLAIN) -> Path:
        for name in (PLAIN, NESTED):
            path = folder / name
            kept.append((path, path.read_bytes() if path.exists() else None))
        found = json.loads((folder / PLAIN).read_text(encoding="utf-8")) | changes
        found = {k: v for k, v in found.items() if v != "absent"}
        (folder / PLAIN).unlink()
        write_json(folder / file, found if file == PLAIN else {"image_processor": found})
        return folder

    yield state
    for path, data in reversed(kept):
        path.unlink(missing_ok=True)
        if data is not None:
            path.write_bytes(data)


def image(folder: Path, **options: Any) -> ImageSpec:
    return read(folder, ReadOptions(**options)).model.image


def transformers_pixels(folder: Path, picture: RGB, **options: Any) -> NDArray[np.float32]:
    """What transformers' own class for the folder makes of a picture."""
    import transformers

    hf: Any = transformers
    processor = hf.AutoImageProcessor.from_pretrained(folder, use_fast=False)
    made = processor(Image.fromarray(picture), return_tensors="np", **options)
    return np.asarray(made["pixel_values"][0], np.float32)


def same_pixels(folder: Path, spec: ImageSpec, **options: Any) -> None:
    for picture in (WIDE, TALL):
        theirs = transformers_pixels(folder, picture, **options)
        np.testing.assert_array_equal(preprocess(picture, spec), theirs)


BOTH = [
    {"image_mean": [0.3, 0.4, 0.5], "image_std": [0.2, 0.3, 0.4]},
    {"image_mean": 0.5, "image_std": 0.25},
    {"image_mean": None, "image_std": None},
    {"image_mean": "absent", "image_std": "absent", "resample": "absent"},
    *({"resample": n} for n in range(6)),
    {"rescale_factor": 1 / 127.5, "image_mean": [1.0, 1.0, 1.0], "image_std": [1.0, 1.0, 1.0]},
    {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [127.5] * 3},
    {"do_normalize": False},
    {"do_normalize": False, "do_rescale": False},
    {"do_convert_rgb": True},
    {"do_convert_rgb": False},
]
SIZES = [
    {"size": {"height": 48, "width": 48}, "crop_size": 48},
    {"size": {"height": 64, "width": 64}, "crop_size": {"height": 48, "width": 48}},
    {"size": [64, 64], "crop_size": 48},
    {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}},
    {"size": {"shortest_edge": 64}, "crop_size": 48},
    {"size": 71},
    {"size": {"height": 48, "width": 48}, "do_center_crop": False},
    {"do_pad": True},  # CLIPImageProcessor pads nothing
]


@pytest.mark.parametrize("file", [PLAIN, NESTED])
@pytest.mark.parametrize("changes", BOTH, ids=str)
def test_siglip_pixels_are_those_of_transformers(
    siglip: Path, stated: State, changes: dict[str, Any], file: str
) -> None:
    same_pixels(stated(siglip, changes, file), image(siglip))


def test_a_fast_processor_with_all_that_it_writes(siglip: Path, stated: State) -> None:
    more = ("crop_size", "device", "disable_grouping", "do_center_crop", "do_pad", "pad_size")
    nulls = dict.fromkeys((*more, "input_data_format", "return_tensors"))
    said = {"data_format": "channels_first", "default_to_square": False, "resample": 2}
    said["image_processor_type"] = "SiglipImageProcessorFast"
    same_pixels(stated(siglip, nulls | said), image(siglip))


def test_a_bilinear_processor_is_exported_as_one(clip: Path, stated: State, tmp_path: Path) -> None:
    source = stated(clip, {"resample": 2})
    bundle = export_bundle(source, tmp_path / "out", quant="f32", vision_precision="fp32")
    assert bundle.manifest.image.resample == "bilinear"
    assert all(stage.ok for stage in bundle.manifest.parity)
    same_pixels(source, bundle.manifest.image)


@pytest.mark.parametrize("kind", ["CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPFeature"])
@pytest.mark.parametrize("changes", [*BOTH, *SIZES], ids=str)
def test_clip_pixels_are_those_of_transformers(
    clip: Path, stated: State, changes: dict[str, Any], kind: str
) -> None:
    named = {"image_processor_type": kind}
    if kind == "CLIPFeature":
        named = {"image_processor_type": "absent", "feature_extractor_type": "CLIPFeatureExtractor"}
    same_pixels(stated(clip, changes | named), image(clip))


def test_a_llava_with_siglips_processor(clip: Path, stated: State) -> None:
    """The defaults are those of the class that the file names."""
    absent = dict.fromkeys(("image_mean", "image_std", "crop_size", "do_center_crop"), "absent")
    size = {"size": {"height": 48, "width": 48}, "image_processor_type": "SiglipImageProcessor"}
    same_pixels(stated(clip, absent | size), image(clip))
    assert image(clip).mean == (0.5, 0.5, 0.5) and image(clip).fit == "stretch"


PADDED = [
    {},
    {"do_normalize": False},
    {"size": {"height": 48, "width": 48}, "do_center_crop": False, "resample": 0},
    {"size": {"shortest_edge": 64}, "image_mean": [0.9, 0.1, 0.5], "resample": 4},
]


@pytest.mark.parametrize("kind", ["LlavaImageProcessor", "absent"])
@pytest.mark.parametrize("changes", [*PADDED, *SIZES], ids=str)
def test_llava_pixels_are_those_of_transformers(
    clip: Path, stated: State, changes: dict[str, Any], kind: str
) -> None:
    named = {"image_processor_type": kind, "feature_extractor_type": "absent", "do_pad": True}
    same_pixels(stated(clip, named | changes), image(clip))
    assert image(clip).fit == "pad"
    if "size" not in changes:
        same_pixels(clip, image(clip, image_fit="crop"), do_pad=False)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"do_resize": False}, "do_resize is False; only true is known"),
        ({"do_resize": None}, "do_resize is null, which transformers 4 and 5 read differently"),
        ({"resample": 9}, "resample is 9; only 0 (nearest), 1 (lanczos)"),
        ({"resample": "bicubic"}, "resample is 'bicubic'"),
        ({"resample": None}, "resample is null"),
        ({"rescale_factor": 0}, "rescale_factor is 0"),
        ({"rescale_factor": "1/255"}, "rescale_factor is '1/255'"),
        ({"rescale_factor": 10**400}, "only a number above 0 is known"),
        ({"image_mean": [0.5]}, "image_mean is [0.5]; only a number or three are known"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std is [0.5, 0, 0.5]; no channel's may be 0"),
        ({"do_normalize": "yes"}, "do_normalize is 'yes'; only true or false"),
        ({"size": {"height": 448, "width": 448}}, "vision tower takes"),
        ({"size": {"height": 56, "width": 48}}, "only a square (height and width) is known"),
        ({"size": {"longest_edge": 56}}, "size is {'longest_edge': 56}"),
        ({"size": {"shortest_edge": 56, "longest_edge": 100}}, "'longest_edge': 100}"),
        ({"size": True}, "size is True"),
        ({"size": "absent", "crop_size": "absent"}, "(the default of a"),
        ({"pad_size": {"height": 99, "width": 99}}, "pad_size is {'height': 99"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order is True"),
        ({"image_grid_pinpoints": [[336, 672]]}, "image_grid_pinpoints is [[336, 672]]"),
        ({"image_processor_type": "ViTImageProcessor"}, "image_processor_type is 'ViTImage"),
        ({"auto_map": {"AutoImageProcessor": "x.Y"}}, "code of a checkpoint is not run"),
    ],
)
@pytest.mark.parametrize("file", [PLAIN, NESTED])
@pytest.mark.parametrize("source", ["siglip", "clip"])
def test_what_a_manifest_cannot_say_is_refused_by_name(
    source: str,
    file: str,
    changes: dict[str, Any],
    says: str,
    stated: State,
    request: pytest.FixtureRequest,
) -> None:
    if source == "clip" and set(changes) == {"size"} and "height" in str(changes["size"]):
        changes = changes | {"do_center_crop": False}
    folder = stated(request.getfixturevalue(source), changes, file)
    with pytest.raises(SourceError) as raised:
        image(folder)
    assert str(raised.value).startswith(f"{folder / file}: ") and says in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"crop_size": 64}, "crop_size is 64; the vision tower takes 48 pixels"),
        ({"size": {"shortest_edge": 40}}, "size is {'shortest_edge': 40}; no less than crop_size"),
        ({"do_center_crop": False}, "do_center_crop is False; size keeps a picture's shape"),
        (
            {
                "image_processor_type": "LlavaImageProcessor",
                "do_pad": True,
                "image_mean": [120] * 3,
            },
            "image_mean is [120, 120, 120]; a picture is padded with it",
        ),
    ],
)
def test_what_clip_cuts_must_be_what_its_tower_takes(
    clip: Path, stated: State, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(SourceError) as raised:
        image(stated(clip, changes))
    assert says in str(raised.value)


def test_siglip_cuts_nothing_out(siglip: Path, stated: State) -> None:
    with pytest.raises(SourceError, match="size is 56; only height and width are known"):
        image(stated(siglip, {"size": 56}))
    with pytest.raises(SourceError, match="do_center_crop is True; a SiglipImageProcessor ignores"):
        image(stated(siglip, {"do_center_crop": True}))


def test_two_files_must_agree(siglip: Path, stated: State) -> None:
    """transformers 4 reads the one, 5 the other."""
    plain = json.loads((siglip / PLAIN).read_text(encoding="utf-8"))
    folder = stated(siglip, {})
    write_json(folder / NESTED, {"image_processor": plain | {"size": [56, 56]}})
    assert image(folder).size == 56
    write_json(folder / NESTED, {"image_processor": plain | {"resample": 2}})
    with pytest.raises(SourceError, match="resample is 2, but 3 in preprocessor_config.json; remo"):
        image(folder)


@pytest.mark.parametrize(
    ("source", "processor", "says"),
    [
        ("siglip", {"image_seq_length": 256}, "image_seq_length is 256, config.json makes 16"),
        ("clip", {"patch_size": 14}, "patch_size 14, num_additional_image_tokens 1"),
        ("clip", {"patch_size": 4, "num_additional_image_tokens": 0}, "make 143 image embeddings"),
        (
            "clip",
            {"patch_size": 4, "vision_feature_select_strategy": "full"},
            "make 145 image embeddings",
        ),
        ("clip", {"image_token": "<|image|>"}, "image_token is '<|image|>'"),
    ],
)
def test_a_processor_that_counts_other_rows_is_refused(
    source: str, processor: dict[str, Any], says: str, stated: State, request: pytest.FixtureRequest
) -> None:
    folder = stated(request.getfixturevalue(source), {})
    default = {"vision_feature_select_strategy": "default"}
    write_json(folder / NESTED, default | processor)
    with pytest.raises(SourceError) as raised:
        image(folder)
    assert says in str(raised.value) and f"{folder / NESTED}: " in str(raised.value)
    right = {"patch_size": 4, "num_additional_image_tokens": 1} if source == "clip" else {}
    write_json(folder / NESTED, default | right)
    assert image(folder).tokens == (144 if source == "clip" else 16)


def test_the_tower_of_an_original_brings_its_processor(tmp_path: Path) -> None:
    source = write_llava(tmp_path / "source", tower="folder", layers=1)
    tower = tmp_path / "source-tower"
    write_json(source / PLAIN, {"image_mean": [0.1, 0.1, 0.1]})
    edited = json.loads((tower / PLAIN).read_text(encoding="utf-8")) | {
        "resample": 2,
        "image_std": [0.5] * 3,
    }
    write_json(tower / PLAIN, edited)
    bundle = export_bundle(source, tmp_path / "out", quant="f32", vision_precision="fp32")
    assert bundle.manifest.image.resample == "bilinear"
    assert bundle.manifest.image.std == (0.5,) * 3 and bundle.manifest.image.fit == "pad"
    write_json(tower / PLAIN, edited | {"size": 40})
    with pytest.raises(SourceError, match="source-tower/preprocessor_config.json: size is 40"):
        image(source)


def test_a_tower_inside_is_read_as_its_named_folder_says(tmp_path: Path) -> None:
    write_llava(tmp_path / "source", tower="folder", layers=1)
    tower = tmp_path / "source-tower"
    write_json(
        tower / PLAIN, json.loads((tower / PLAIN).read_text(encoding="utf-8")) | {"resample": 2}
    )
    source = write_llava(tmp_path / "source", layers=1)
    bundle = export_bundle(source, tmp_path / "out", quant="f32", vision_precision="fp32")
    assert bundle.manifest.image.resample == "bilinear" and not bundle.manifest.notes
    assert "tower/preprocessor_config.json" in [r.file for r in bundle.manifest.source]
    other = write_llava(tmp_path / "other", layers=1, config={"mm_vision_tower": "openai/clip"})
    found = read(other).model
    assert found.image.resample == "bicubic"
    assert (
        "pictures as CLIPImageProcessor reads them unless told, those of openai/clip"
        in found.notes[0]
    )


def test_tinygptv_reads_pictures_as_the_run_of_its_stage(tmp_path: Path) -> None:
    mean = [0.3, 0.4, 0.5]

    def says(changes: dict[str, Any]) -> Path:
        train = {"name": "blip2_image_train", "image_size": 56} | changes
        datasets = {"laion": {"vis_processor": {"train": train}}}
        return write_tinygptv(tmp_path / "source", stage=3, datasets=datasets, **SMALL)

    bundle = export_bundle(
        says({"mean": mean}), tmp_path / "out", quant="f32", vision_precision="fp32"
    )
    assert bundle.manifest.image.mean == tuple(mean)
    with pytest.raises(SourceError, match="vis_processor is 'blip_caption' at 56 pixels"):
        image(says({"name": "blip_caption"}))
    with pytest.raises(SourceError, match="vis_processor is 'blip2_image_train' at 112 pixels"):
        image(says({"image_size": 112}))


READINGS: dict[str, tuple[Any, Callable[..., Path], dict[str, Any]]] = {
    "paligemma": (paligemma, write_paligemma, {}),
    "llava-hf": (llava, write_llava, {"layout": "hf"}),
    "llava": (llava, write_llava, {"tower": "folder"}),
    "tinygptv": (tinygptv, write_tinygptv, {"stage": 3, **SMALL}),
}


@pytest.mark.parametrize("wrong", [{"mean": (0.4, 0.4, 0.4)}, {"resample": "bilinear"}], ids=str)
@pytest.mark.parametrize("name", READINGS)
def test_a_wrong_reading_of_the_processor_is_noticed(
    name: str, wrong: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison is with the checkpoint's own processor, not with the exporter's reading."""
    module, write, options = READINGS[name]
    read = module._image

    def misread(*given: Any) -> Any:
        found = read(*given)
        if isinstance(found, tuple):
            return dataclasses.replace(found[0], **wrong), *found[1:]
        return dataclasses.replace(found, **wrong)

    source = write(tmp_path / "source", layers=1, **options)
    monkeypatch.setattr(module, "_image", misread)
    with pytest.raises(ParityError) as raised:
        export_bundle(source, tmp_path / "out", quant="f32", vision_precision="fp32")
    assert raised.value.stage == "pixels"


def test_manifests_of_before_are_still_read() -> None:
    old = {"size": 8, "tokens": 4, "mean": [0.5] * 3, "std": [0.5] * 3, "fit": "crop"}
    assert schema.read(ImageSpec, old).rescale == 1 / 255
    spec = ImageSpec(8, 4, (0.0,) * 3, (1.0,) * 3, resample="box", resize=9, fill=(1, 2, 3))
    assert schema.read(ImageSpec, json.loads(json.dumps(dataclasses.asdict(spec)))) == spec
