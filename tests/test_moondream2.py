"""Moondream2 in its published layout, against its own code written out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import edgevlm
from edgevlm.bundle import DECODER_TOKENIZER
from edgevlm.errors import ExportError, PromptError, SourceError
from edgevlm.export import ReadOptions, export_bundle, inspect_source, requantize_bundle
from edgevlm.image import cut
from edgevlm.image.plan import limited, plan
from edgevlm.prompt import Exchange
from edgevlm.runtimes.request import input_blocks, prepare
from edgevlm.runtimes.session import VLM
from edgevlm.sampling import Sampling
from edgevlm.specs import ImageSpec, TileSpec
from tests.answers import greedy, sequence
from tests.checkpoints.moondream2 import starmie, templates, write_moondream2

pytestmark = pytest.mark.usefixtures("children_inside")

RNG = np.random.default_rng(7)
# Pictures of 1, 3 x 3, 1 x 6 and 3 x 3 tiles.
SMALL = RNG.integers(0, 256, (60, 200, 3), np.uint8)
SCENE = RNG.integers(0, 256, (300, 400, 3), np.uint8)
LONG = RNG.integers(0, 256, (115, 420, 3), np.uint8)
SQUARE = RNG.integers(0, 256, (150, 150, 3), np.uint8)
PICTURES = {"small": SMALL, "scene": SCENE, "long": LONG, "square": SQUARE}
WORDS = "what is in the picture of 2024's circle?\n<|md_reserved_2|> опиши 图片"
BROKEN = {"prefix": [-1], "suffix": []}
Picture = NDArray[np.uint8]


class Original:
    """The exporter's reference, asked by hand."""

    def __init__(self, folder: Path) -> None:
        from edgevlm.export.parity.references.moondream2 import Reference
        from edgevlm.export.pipeline import read

        self.reference = Reference(read(folder))

    def rows(self, picture: Picture) -> NDArray[np.float32]:
        import torch

        with torch.inference_mode():
            pixels, tiling = self.reference.crops(picture)
            found = self.reference.project(self.reference.features(pixels), tiling)
        rows: NDArray[np.float32] = found.numpy()
        return rows

    def logits(self, picture: Picture | None, ids: list[int], n: int) -> NDArray[np.float32]:
        """The last n logits after the begin token, a picture and the ids."""
        import torch

        with torch.inference_mode():
            rows = None if picture is None else torch.from_numpy(self.rows(picture))
            found: NDArray[np.float32] = self.reference.logits(rows, ids)[-n:].numpy()
        return found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_moondream2(tmp_path_factory.mktemp("moondream2") / "source")


@pytest.fixture(scope="module")
def original(checkpoint: Path) -> Original:
    return Original(checkpoint)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    out = checkpoint.with_name("bundle")
    made = export_bundle(checkpoint, out, quant="f32", vision_precision="fp32")
    assert made.manifest.family == "moondream2" and all(s.ok for s in made.manifest.parity)
    return made.folder


@pytest.fixture(scope="module")
def vlm(bundle: Path) -> Iterator[VLM]:
    with edgevlm.load(bundle, threads=1) as loaded:
        yield loaded


def spec(**tiles: Any) -> ImageSpec:
    """The published picture's."""
    half = (0.5, 0.5, 0.5)
    cutting = TileSpec("overlap", overview="first", overview_of="picture", most=12, margin=4)
    return ImageSpec(378, 729, half, half, "lanczos", tiles=cutting, exact="bfloat16", **tiles)


def test_plans_are_the_originals() -> None:
    from edgevlm.export.parity.references.moondream2 import tiling

    sizes = RNG.integers(1, 4000, (20_000, 2)).tolist()
    sizes += [[1, 1], [378, 378], [379, 379], [1, 60_000], [60_000, 400], [113, 113], [10**6] * 2]
    for width, height in sizes:
        planned = plan(width, height, spec())
        rows, columns = tiling(height - 112, width - 112, 266, 12)
        assert planned.n_tiles == (1 if rows * columns == 1 else rows * columns + 1)
        assert planned.canvas == (columns * 266 + 112, rows * 266 + 112)
        assert planned.rows == 729
        assert planned.tiles[-1][2:] == planned.canvas


@pytest.mark.parametrize("most", [13, 12, 7, 4, 1])
def test_fewer_tiles_are_coarser_grids(most: int) -> None:
    bounded = plan(1000, 700, limited(spec(), most))
    assert bounded.n_tiles <= most and bounded.rows == 729
    assert bounded.n_tiles == {13: 13, 12: 7, 7: 7, 4: 3, 1: 1}[most]


@pytest.mark.parametrize("name", PICTURES)
def test_pixels_and_embeddings_are_the_originals(vlm: VLM, original: Original, name: str) -> None:
    picture = PICTURES[name]
    pixels, (rows, columns) = original.reference.crops(picture)
    ours = cut(picture, vlm.manifest.image)
    assert len(ours) == {"small": 1, "scene": 10, "long": 7, "square": 10}[name]
    np.testing.assert_array_equal(ours, pixels[: len(ours)].numpy())
    theirs = original.rows(picture)
    assert len(ours) == 1 or len(ours) == 1 + rows * columns
    assert theirs.std() > 0.5 and np.abs(vlm.image_embeddings(picture) - theirs).max() < 1e-3


@pytest.mark.parametrize("name", [*PICTURES, "none"])
def test_it_answers_like_the_original(vlm: VLM, original: Original, name: str) -> None:
    picture = PICTURES.get(name)
    images = [] if picture is None else [picture]
    request = prepare(vlm.engines, [Exchange(WORDS, len(images))], images, Sampling(max_tokens=12))
    query = templates()["query"]
    # What reads like a token of control is text here.
    words = original.reference.token_ids([WORDS], plain=True)[0]
    asked = [*query["prefix"], *words, *query["suffix"], *query["suffix"]]
    assert sequence(request, -1) == [0, *[-1] * 25 * len(images), *asked]
    ours, tokens = greedy(vlm, request, 12)
    theirs = original.logits(picture, [*asked, *tokens], 13)
    assert theirs[:-1].argmax(1).tolist() == tokens
    assert theirs.std() > 3 and np.abs(ours - theirs).max() < 5e-3


@pytest.mark.parametrize("length", ["normal", "short", "long"])
def test_captions_have_templates_of_their_own(vlm: VLM, original: Original, length: str) -> None:
    reply = vlm.caption(SQUARE, length=length, max_tokens=4)
    ids, said = list(templates()["caption"][length]), list[int]()
    for _ in range(4):
        after = original.logits(SQUARE, [*ids, *said], 1)[0]
        if said:
            after[3] = -np.inf
        if (token := int(after.argmax())) == 0:
            break
        said.append(token)
    assert list(reply.token_ids) == said
    assert reply.text == starmie().decode(said).strip()
    assert reply.tokens.text == 1 + len(ids)


def test_a_picture_and_the_begin_token_are_kept_for_other_questions(vlm: VLM) -> None:
    vlm.engines.forget()
    first = vlm.ask("what is it?", SCENE, max_tokens=4)
    second = vlm.ask("a cat", SCENE, max_tokens=4)
    assert (first.tokens.kept, second.tokens.kept) == (0, 26)
    asked = [Exchange("a cat", 1)]
    request = prepare(vlm.engines, asked, [SCENE], Sampling(max_tokens=4))
    first_block, second_block = input_blocks(vlm.engines, request)
    assert (first_block.attention, len(first_block.rows)) == ("bidirectional", 26)
    assert second_block.attention == "causal"
    fresh = prepare(vlm.engines, asked, [SCENE], Sampling(max_tokens=4))
    kept, tokens = greedy(vlm, fresh, 4)
    vlm.engines.forget()
    again = prepare(vlm.engines, [Exchange("a cat", 1)], [SCENE], Sampling(max_tokens=4))
    anew, same = greedy(vlm, again, 4)
    assert tokens == same and np.abs(kept - anew).max() < 1e-4


def test_a_fixed_answer_token_is_never_said_after_the_first(vlm: VLM) -> None:
    vlm.ask("x", SMALL, max_tokens=1)
    decoder = vlm.engines.decoder
    likeliest = int(decoder.logits().argmax())
    decoder.rule_out([likeliest])
    assert decoder.logits()[likeliest] == -np.inf
    assert vlm.manifest.answer.never == (3,)


def test_conversations_and_tasks_without_a_picture_are_refused(vlm: VLM) -> None:
    with vlm.chat(SMALL) as chat:
        chat.ask("what?", max_tokens=1)
        chat.ask("and now?", max_tokens=1)  # the last question alone is told
    with pytest.raises(PromptError, match="was not trained on conversations"):
        vlm.ask(
            [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c"},
            ]
        )
    with pytest.raises(PromptError, match="the task 'caption' is about a picture"):
        vlm.ask(vlm.task("caption"))
    with pytest.raises(PromptError, match="no task 'caption_epic'; it has caption, caption_long"):
        vlm.caption(SMALL, length="epic")
    with pytest.raises(PromptError, match="2 pictures in one request; this model takes 1"):
        vlm.ask("x", [SMALL, SMALL])


def test_quantized_it_stays_within_its_bounds(checkpoint: Path, tmp_path: Path) -> None:
    made = export_bundle(checkpoint, tmp_path / "out", quant="q4_k_m", vision_precision="int8")
    assert all(0 <= s.worst <= s.tolerance for s in made.manifest.parity)


def test_requantized_it_keeps_its_tokenizer(bundle: Path, tmp_path: Path) -> None:
    made = requantize_bundle(bundle, tmp_path / "q8", quant="q8_0", verify=False)
    assert (made.folder / DECODER_TOKENIZER).read_bytes() == (
        bundle / DECODER_TOKENIZER
    ).read_bytes()
    with edgevlm.load(made.folder) as vlm:
        assert vlm.engines.tokenize(WORDS) == starmie_ids(WORDS)
    with pytest.raises(ExportError, match="this model has its own; leave out --languages"):
        requantize_bundle(bundle, tmp_path / "en", languages="en")


def starmie_ids(text: str) -> list[int]:
    """Ids of a text, in which nothing is a token of control."""
    own = starmie()
    own.encode_special_tokens = True
    ids: list[int] = own.encode(text).ids
    own.encode_special_tokens = False
    return ids


def test_half_precision_and_shards_are_read(tmp_path: Path) -> None:
    source = write_moondream2(tmp_path / "source", dtype="bfloat16", shards=2)
    made = export_bundle(source, tmp_path / "out", quant="f32", vision_precision="fp32")
    assert all(s.ok for s in made.manifest.parity)


def test_a_stale_tokenizer_is_replaced_by_the_one_that_is_named(tmp_path: Path) -> None:
    source = write_moondream2(tmp_path / "source", tokenizer="stale")
    named = {"tokenizer": str(tmp_path / "source-starmie")}
    made = export_bundle(
        source, tmp_path / "out", quant="f32", vision_precision="fp32", settings=named
    )
    assert all(s.ok for s in made.manifest.parity)
    assert "tokenizer/tokenizer.json" in {f.file for f in made.manifest.source}
    assert "tokenizer.json" not in {f.file for f in made.manifest.source}
    with edgevlm.load(made.folder) as vlm:
        assert vlm.engines.tokenize(WORDS) == starmie_ids(WORDS)


def test_the_tokenizer_that_the_code_names_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_moondream2(tmp_path / "source", tokenizer="stale")
    monkeypatch.chdir(tmp_path)
    Path("moondream").mkdir()
    (tmp_path / "source-starmie").rename("moondream/starmie-v1")
    assert inspect_source(source).family == "moondream2"
    shutil.rmtree("moondream")
    with pytest.raises(SourceError, match=r"the tokenizer; --set tokenizer=FOLDER names another"):
        inspect_source(source)


def test_the_published_config_says_nothing(tmp_path: Path) -> None:
    source = write_moondream2(tmp_path / "source", config={"config": {}})
    with pytest.raises(SourceError, match=r"shape \[256, 64\].*|config.json says"):
        inspect_source(source)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prefix": "text_model."}, "revision before 2025; name vikhyatk/moondream2@2025-06-21"),
        ({"code": "vikhyatk/moondream2"}, "moondream.py: is of another revision, whose tokenizer"),
        ({"code": None, "tokenizer": "stale"}, r"tokenizer.json: lacks <\|md_reserved_0\|>"),
        ({"config": {"model_type": "moondream3"}}, "Moondream 3, whose decoder has experts"),
        ({"sections": {"text": {"group_size": 128}}}, "weights in 4 bits; name vikhyatk"),
        ({"sections": {"text": {"n_kv_heads": 2}}}, "n_kv_heads is 2; only n_heads, 4, is known"),
        ({"sections": {"text": {"dims": 2}}}, "config.text.dims is not known"),
        ({"sections": {"text": {"dim": "x"}}}, "config.text.dim.* has the wrong value"),
        ({"sections": {"text": {"n_heads": 3}}}, "config.text.n_kv_heads|not 3 heads"),
        ({"sections": {"gaze": {}}}, "config.gaze is not known; only text, vision"),
        ({"sections": {"vision": {"overlap_margin": 3}}}, "overlap_margin is 3: a tile of 5"),
        ({"sections": {"vision": {"crop_size": 71}}}, "only 3 and whole patches are known"),
        ({"sections": {"vision": {"proj_out_dim": 8}}}, "proj_out_dim is 8, config.text.dim 256"),
        ({"sections": {"vision": {"enc_n_heads": 7}}}, "enc_dim is 64, not 7 heads"),
        ({"sections": {"tokenizer": {"bos_id": 50256}}}, "bos_id is 50256, but .* is 0"),
        ({"sections": {"tokenizer": {"answer_id": 10**6}}}, "answer_id is 1000000, not an id"),
        (
            {"sections": {"tokenizer": {"templates": templates() | {"query": {"prefix": [1]}}}}},
            "templates.query must have prefix, suffix",
        ),
        (
            {"sections": {"tokenizer": {"templates": templates() | {"query": BROKEN}}}},
            r"templates.query.prefix is \[-1\], not ids below",
        ),
    ],
)
def test_what_would_answer_otherwise_is_refused(
    changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match=says):
        inspect_source(write_moondream2(tmp_path / "source", **changes))


def test_there_is_no_template_to_choose(checkpoint: Path) -> None:
    with pytest.raises(SourceError, match="one fit of pictures and one template"):
        inspect_source(checkpoint, ReadOptions(template="chat"))
    with pytest.raises(SourceError, match="'--languages'|leave out --languages"):
        export_bundle(checkpoint, checkpoint.with_name("en"), languages="en", verify=False)


def test_a_tokenizer_that_adds_tokens_is_refused(tmp_path: Path) -> None:
    source = write_moondream2(tmp_path / "source")
    path = source / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    piece = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [piece, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
        },
    }
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(SourceError, match=r"puts the tokens \[0\] around texts"):
        export_bundle(source, tmp_path / "out", verify=False)


def test_published_gguf_files_are_refused(tmp_path: Path) -> None:
    source = write_moondream2(tmp_path / "source")
    (source / "model.safetensors").unlink()
    (source / "preprocessor_config.json").write_text("{}", encoding="utf-8")
    for name in ("moondream2-text-model-f16.gguf", "moondream2-mmproj-f16.gguf"):
        (source / name).write_bytes(b"GGUF")
    with pytest.raises(SourceError, match="published GGUF files of a moondream2 are not read"):
        inspect_source(source)
