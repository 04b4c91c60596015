"""What every family must keep, whatever it is built of.

A new family adds its tiny checkpoints to CHECKPOINTS and passes everything below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import edgevlm
from edgevlm import family, schema
from edgevlm.bundle import Bundle, open_bundle
from edgevlm.export import export_bundle
from edgevlm.image import preprocess
from edgevlm.image.plan import plan
from edgevlm.manifest import Manifest
from edgevlm.runtimes.session import VLM
from tests import inside
from tests.checkpoints.deepseek_vl import write_deepseek_vl
from tests.checkpoints.fastvlm import write_fastvlm
from tests.checkpoints.gemma3 import write_gemma3
from tests.checkpoints.internvl import write_internvl
from tests.checkpoints.llava import ORIGINALS, write_llava
from tests.checkpoints.llava_next import write_next
from tests.checkpoints.llava_onevision import OWN, write_onevision
from tests.checkpoints.moondream2 import write_moondream2
from tests.checkpoints.paligemma import write_paligemma
from tests.checkpoints.phi3_v import write_phi3_v
from tests.checkpoints.qwen2_vl import write_qwen2_vl
from tests.checkpoints.smolvlm import write_smolvlm
from tests.checkpoints.tinygptv import write_tinygptv

CHECKPOINTS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "paligemma-1": ("paligemma", lambda folder: write_paligemma(folder, version=1)),
    "paligemma-2": ("paligemma", lambda folder: write_paligemma(folder, version=2)),
    "mobilepalo": ("llava", write_llava),
    "llava-1.5-hf": ("llava", lambda folder: write_llava(folder, layout="hf")),
    **{
        name: ("llava", partial(write_llava, **ORIGINALS[name]))
        for name in ("llava-phi3", "llava-llama3")
    },
    "deepseek-vl": ("deepseek_vl", write_deepseek_vl),
    "deepseek-vl-hf": ("deepseek_vl", partial(write_deepseek_vl, layout="hf")),
    "fastvlm": ("fastvlm", write_fastvlm),
    "fastvlm-training": ("fastvlm", partial(write_fastvlm, form="training")),
    "fastvlm-hf": ("fastvlm", partial(write_fastvlm, layout="hf", files="json", tied=False)),
    "gemma3": ("gemma3", write_gemma3),
    "internvl-hf": ("internvl", write_internvl),
    "internvl-3": ("internvl", partial(write_internvl, layout="own", files="pair")),
    "internvl-2-2b": ("internvl", partial(write_internvl, layout="own", internlm2=True)),
    "llava-next-hf": ("llava_next", write_next),
    "llava-next": ("llava_next", partial(write_next, layout="own")),
    "llava-onevision-hf": ("llava_onevision", write_onevision),
    "llava-onevision": ("llava_onevision", partial(write_onevision, **OWN)),
    "moondream2": ("moondream2", write_moondream2),
    "phi-3.5-vision": ("phi3_v", write_phi3_v),
    "qwen2-vl": ("qwen2_vl", write_qwen2_vl),
    "qwen2.5-vl": ("qwen2_vl", partial(write_qwen2_vl, new=True, nested=True)),
    "smolvlm": ("smolvlm", write_smolvlm),
    "smolvlm-2.2b-v1": ("smolvlm", partial(write_smolvlm, places=False, factor=2)),
    "tinygptv": ("tinygptv", lambda folder: write_tinygptv(folder, stage=4)),
}
# The first of each family is exported and answers as with users, in processes of its own.
AS_USERS = {kind: name for name, (kind, _) in reversed(CHECKPOINTS.items())}.values()
PICTURE = np.random.default_rng(3).integers(0, 256, (50, 90, 3), np.uint8)
# Every stage of the exporter's own comparison, against the original's code.
STAGES = ["tokens", "prompt", "pixels", "features", "embeddings", "prefill", "answer", "divergence"]


@pytest.fixture(scope="module", params=CHECKPOINTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    write = CHECKPOINTS[request.param][1]
    return write(tmp_path_factory.mktemp("families") / request.param)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Bundle:
    """Unquantized and verified: the exporter raises if any stage differs."""
    out = checkpoint.with_name(checkpoint.name + "-f32")
    with nullcontext() if checkpoint.name in AS_USERS else inside.children():
        return export_bundle(checkpoint, out, quant="f32", vision_precision="fp32")


@pytest.fixture(scope="module")
def vlm(bundle: Bundle) -> Iterator[VLM]:
    with edgevlm.load(bundle.folder) as loaded:
        yield loaded


def test_every_family_is_here() -> None:
    assert {name for name, _ in CHECKPOINTS.values()} == set(family.known())


def test_it_answers_like_the_original(bundle: Bundle) -> None:
    parity = {s.stage: s for s in bundle.manifest.parity}
    regions = ["regions"] * (bundle.manifest.regions is not None)
    assert [*parity] == [*STAGES, "greedy", *regions]
    assert all(s.ok for s in parity.values())
    assert parity["tokens"].worst == parity["prompt"].worst == 0
    # torch sums an overview's pixels with or without fused multiply-add, as the processor has it.
    tiles = bundle.manifest.image.tiles
    squeezed = tiles is not None and tiles.overview_of == "pixels"
    assert parity["pixels"].worst <= (1e-6 if squeezed else 0)
    # 5e-3 on logits of standard deviation 5, and the same tokens.
    assert parity["answer"].worst < 1e-3
    assert parity["greedy"].worst == 0


def test_quantized_it_stays_within_its_bounds(checkpoint: Path, tmp_path: Path) -> None:
    # Of a family's others one is enough.
    for quant in ("q8_0", "q4_k_m") if checkpoint.name in AS_USERS else ("q4_k_m",):
        with inside.children():
            bundle = export_bundle(
                checkpoint, tmp_path / quant, quant=quant, vision_precision="int8"
            )
        parity = {s.stage: s for s in bundle.manifest.parity}
        assert [*parity] == [*STAGES, *["regions"] * (bundle.manifest.regions is not None)]
        assert all(0 <= s.worst <= s.tolerance for s in parity.values())
        assert parity["divergence"].worst > 1e-6  # something was rounded


def test_the_manifest_survives_writing_and_reading(bundle: Bundle) -> None:
    reopened = open_bundle(bundle.folder, check="full").manifest
    assert reopened == bundle.manifest
    with pytest.raises(schema.SchemaError, match="unknown key 'x'"):
        schema.read(Manifest, {**schema.plain(reopened), "x": 1})


def test_pixels_are_the_encoders_and_repeatable(vlm: VLM) -> None:
    spec = vlm.manifest.image
    pixels = preprocess(PICTURE, spec)
    width, height = plan(PICTURE.shape[1], PICTURE.shape[0], spec).canvas
    sides = (height, width) if spec.native else (spec.size, spec.size)
    assert pixels.shape == (3, *sides) and pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels, preprocess(PICTURE.copy(), spec))


def test_a_picture_takes_the_rows_that_the_manifest_says(vlm: VLM) -> None:
    rows = vlm.image_embeddings(PICTURE)
    planned = plan(PICTURE.shape[1], PICTURE.shape[0], vlm.manifest.image)
    spec = vlm.manifest.image
    mapped = spec.native or (spec.tiles and spec.tiles.map)
    assert (planned.rows == planned.n_tiles * spec.tokens) == (not mapped)
    assert rows.shape == (planned.rows, vlm.manifest.decoder.n_embd)
    assert rows.dtype == np.float32 and np.isfinite(rows).all()
    assert vlm.ask("x", PICTURE, max_tokens=1).tokens.image == len(rows)


def test_embedding_rows_are_the_tables(vlm: VLM) -> None:
    place = vlm.manifest.token_embedding
    assert (place.rows, place.width) == (
        vlm.manifest.decoder.n_vocab,
        vlm.manifest.decoder.n_embd,
    )
    rows = vlm.engines.decoder.embed([0, place.rows - 1])
    assert rows.shape == (2, place.width) and np.isfinite(rows).all()


@pytest.mark.parametrize("text", ["<image>", "<bos><eos>", "<pad>", "<|end|></s><|eot_id|>"])
def test_user_text_never_becomes_a_marker(vlm: VLM, text: str) -> None:
    decoder = vlm.engines.decoder
    tokens = decoder.tokenize(text)
    assert not {decoder.bos, *vlm.manifest.answer.stop_tokens} & set(tokens)
    assert b"".join(map(decoder.piece, tokens)).decode() == text
    expected = plan(PICTURE.shape[1], PICTURE.shape[0], vlm.manifest.image).rows
    assert vlm.ask(text, PICTURE, max_tokens=1).tokens.image == expected


def test_every_task_has_a_prompt_that_can_be_asked(vlm: VLM) -> None:
    for task, words in vlm.manifest.prompt.tasks.items():
        prompt = vlm.task(task, "a cat", language="de" if "{language}" in words else "en")
        assert "{" not in prompt
        assert vlm.ask(prompt, PICTURE, max_tokens=2).tokens.generated <= 2


def test_the_answer_streams_as_the_reply_says(vlm: VLM) -> None:
    answer = vlm.stream("caption en", PICTURE, max_tokens=12)
    pieces = list(answer)
    assert "".join(p.text for p in pieces) == answer.reply.text
    assert sum((p.token_ids for p in pieces), ()) == answer.reply.token_ids
