"""Bundles trimmed to the tokens of some languages: what remains is the same to the bit."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

import edgevlm
from edgevlm.bundle import INPUT, Bundle, open_bundle
from edgevlm.errors import BundleCorrupt, EngineMissing, ExportError, PromptError
from edgevlm.export import export_bundle, languages, requantize_bundle
from edgevlm.export.checkpoint.tokenizer.vocabulary import NORMAL, UNUSED
from edgevlm.gguf_file import KEPT, opened
from edgevlm.hub.upload import card
from edgevlm.manifest import write_manifest
from edgevlm.models import built_in
from edgevlm.prompt import Exchange
from edgevlm.runtimes.engines import sequential
from edgevlm.runtimes.llama.paired import PairedDecoder
from edgevlm.runtimes.loading import open_decoder
from edgevlm.runtimes.request import input_blocks, prefill, prepare
from edgevlm.runtimes.rules import EngineSettings
from edgevlm.runtimes.session import VLM
from edgevlm.sampling import Sampling
from tests import inside
from tests.answers import greedy
from tests.checkpoints.llava import write_llava
from tests.checkpoints.paligemma import write_paligemma
from tests.checkpoints.smolvlm import write_smolvlm

pytestmark = pytest.mark.usefixtures("children_inside", "few_words")
SHAPES = Path(__file__).parent.parent / "examples" / "shapes.png"
CAPTION = "a red circle, a blue square, a yellow triangle and a green star"
# Words of pico's answers, and some that no token of its is a piece of.
WORDS = {"en": CAPTION.replace(",", "").split(), "el": ["κόκκινος", "κύκλος"], "zh": ["红色", "圆"]}


@pytest.fixture(scope="module")
def few_words() -> Iterator[None]:
    """Languages of a few words each: wordfreq's 300,000 take seconds."""
    known = {code: dict.fromkeys(words, 1e-3) for code, words in WORDS.items()}
    with mock.patch.object(languages, "_words", known.__getitem__):
        yield


@pytest.fixture(scope="module")
def trimmed(tmp_path_factory: pytest.TempPathFactory, few_words: None) -> Bundle:
    """Pico, trimmed to English."""
    out = tmp_path_factory.mktemp("trimmed") / "pico"
    return requantize_bundle(built_in(), out, languages="en", verify=False)


@pytest.fixture
def both(trimmed: Bundle) -> Iterator[tuple[VLM, VLM]]:
    """Pico as it is, and trimmed."""
    with edgevlm.load(built_in()) as whole, edgevlm.load(trimmed.folder) as less:
        yield whole, less


def kept(bundle: Bundle) -> list[int]:
    with opened(bundle.path("decoder")) as file:
        ids = file.integers(KEPT)
    assert ids is not None
    return [int(i) for i in ids]


def texts(bundle: Bundle) -> tuple[list[str], list[int]]:
    with opened(bundle.input) as file:
        types = file.integers("tokenizer.ggml.token_type")
        assert types is not None
        return file.texts("tokenizer.ggml.tokens"), types.tolist()


def test_answers_are_the_same_and_the_output_matrix_is_smaller(
    both: tuple[VLM, VLM], trimmed: Bundle
) -> None:
    whole, less = (vlm.caption(SHAPES) for vlm in both)
    assert whole.text == less.text == CAPTION
    assert whole.tokens == less.tokens and whole.token_ids == less.token_ids
    spec = trimmed.manifest.decoder
    assert spec.languages == ("en",) and spec.n_output == len(kept(trimmed)) < spec.n_vocab
    # As many rows more than a multiple of 64 as before, for the kernels' sake.
    assert (spec.n_vocab - spec.n_output) % 64 == 0
    with opened(trimmed.path("decoder")) as file:
        assert file.tensors()["token_embd.weight"].rows == spec.n_output
    assert open_bundle(trimmed.folder, "full").input.name == INPUT


def test_questions_are_read_in_any_language(both: tuple[VLM, VLM]) -> None:
    whole, less = both
    for text in ("answer en was für ein Kreis?", "что на картинке?", "图片里有什么？", "🙂 \n\n x"):
        assert whole.engines.tokenize(text) == less.engines.tokenize(text)
    ids = list(range(whole.manifest.decoder.n_vocab))
    decoders = [vlm.engines.decoder for vlm in both]
    assert np.array_equal(decoders[0].embed(ids), decoders[1].embed(ids))
    assert [decoders[0].piece(i) for i in ids] == [decoders[1].piece(i) for i in ids]
    assert decoders[0].bos == decoders[1].bos


@pytest.mark.parametrize(
    ("write", "quant"),
    [
        pytest.param(write_paligemma, "f32", id="gemma, tied, f32"),
        pytest.param(partial(write_paligemma, version=2), "q4_k_m", id="gemma2, tied, q4_k_m"),
        pytest.param(write_llava, "q8_0", id="llama, untied, q8_0"),
        pytest.param(write_smolvlm, "f16", id="llama, byte-level, f16"),
    ],
)
def test_logits_of_the_tokens_that_remain_are_the_same_to_the_bit(
    tmp_path: Path, write: Callable[[Path], Path], quant: str
) -> None:
    source = write(tmp_path / "checkpoint")
    whole = export_bundle(
        source, tmp_path / "whole", quant=quant, vision_precision="fp32", verify=False
    )
    less = requantize_bundle(whole.folder, tmp_path / "less", languages="en", verify=False)
    same_logits(whole, less)
    unused = {i for i, kind in enumerate(texts(less)[1]) if kind == UNUSED}
    assert not unused & set(kept(less))


def test_a_decoder_with_weights_in_two_orders_goes_by_the_same_ids(trimmed: Bundle) -> None:
    settings = EngineSettings(1, 1, 1, "decode", False, ())
    decoder, _ = open_decoder(trimmed, "cpu", [], settings)
    assert isinstance(decoder, PairedDecoder)
    ids = kept(trimmed)
    outside = int(np.setdiff1d(np.arange(trimmed.manifest.decoder.n_vocab), ids)[0])
    decoder.prefill([sequential(decoder.embed([5, outside, 7]), "causal")], room=4)
    first = decoder.logits()
    best = int(first.argmax())
    assert best in ids and decoder.writes(best) and not decoder.writes(outside)
    sampler = decoder.sampler(Sampling(repetition_penalty=1e6), (outside, best))
    assert sampler.sample() == int(np.argsort(first)[-2])
    decoder.step(outside)
    assert int(decoder.logits().argmax()) in ids
    sampler.close()
    decoder.close()


def same_logits(whole: Bundle, less: Bundle) -> None:
    """After the input, after tokens that are there and after one that is not."""
    found, ids = [], kept(less)
    dropped = np.setdiff1d(np.arange(whole.manifest.decoder.n_vocab), ids)
    read = [ids[-1], int(dropped[3]), ids[-2], int(dropped[-1])]
    for bundle in (whole, less):
        for repack in (True, False):
            with edgevlm.load(bundle.folder, device="cpu", repack=repack) as vlm:
                request = prepare(vlm.engines, [Exchange("caption en", 1)], [SHAPES], Sampling())
                prefill(vlm.engines, request, input_blocks(vlm.engines, request), 8)
                decoder = vlm.engines.decoder
                rows = [decoder.logits()]
                for token in read:
                    decoder.step(token)
                    rows.append(decoder.logits())
                found.append(np.stack([*rows, *decoder.extend(read)]))
    for ours, theirs in zip(found[2:], found[:2], strict=True):
        assert np.array_equal(ours[:, ids], theirs[:, ids]) and np.isfinite(theirs).all()
        assert np.isneginf(ours[:, dropped]).all()


def test_tokens_of_other_purposes_stay(trimmed: Bundle) -> None:
    pieces, types = texts(trimmed)
    ids = set(kept(trimmed))
    assert ids.issuperset(i for i, kind in enumerate(types) if kind not in (NORMAL, UNUSED))
    for text in ("<loc0001>", "<0x0A>", "<bos>", "<eos>", "7", "?", ",", "a", "Z", "\u2581"):
        if text in pieces:
            assert pieces.index(text) in ids, text
    stop = trimmed.manifest.answer.stop_tokens
    assert stop and ids.issuperset(stop)


def test_scores_are_refused_for_tokens_that_no_answer_has(
    both: tuple[VLM, VLM], trimmed: Bundle
) -> None:
    whole, less = both
    question = "answer en what shape is red?"
    expected = whole.score(question, ["circle", "star"], SHAPES)
    found = less.score(question, ["circle", "star"], SHAPES, with_end=False)
    # Of what is left of the distribution, so a little more each, by the same factor.
    assert np.all(found >= expected) and np.allclose(found, expected, atol=0.1)
    pieces, _ = texts(trimmed)
    ids = set(kept(trimmed))
    word = next(
        text for text in ("bicycle", "rectangle", "hexagon", "what", "shape", "purple", "orange")
        if not ids.issuperset(less.engines.tokenize(text))
    )  # fmt: skip
    with pytest.raises(PromptError, match=r"has the token '.+' \(\d+\): it was trimmed to en"):
        less.score(question, ["circle", word], SHAPES)
    assert np.isfinite(whole.score(question, ["circle", word], SHAPES)).all()


def test_samplers_and_penalties_go_by_the_models_ids(
    both: tuple[VLM, VLM], trimmed: Bundle
) -> None:
    answers = []
    for vlm in both:
        request = prepare(vlm.engines, [Exchange("caption en", 1)], [SHAPES], Sampling())
        logits, tokens = greedy(vlm, request, 3)
        ids = np.array(kept(trimmed))
        best = int(ids[logits[-1][ids].argmax()])
        dropped = int(np.setdiff1d(np.arange(len(logits[-1])), ids)[0])
        strong = Sampling(repetition_penalty=1e6)
        sampler = vlm.engines.decoder.sampler(strong, (dropped, best))
        answers.append((tokens, best, sampler.sample()))
        sampler.close()
        seeded = Sampling(temperature=1.0, top_k=1, seed=7)
        assert vlm.engines.decoder.sampler(seeded).sample() == best
    assert answers[0] == answers[1] and answers[1][2] != answers[1][1]


def test_grammars_and_log_probabilities_go_by_the_models_ids(both: tuple[VLM, VLM]) -> None:
    for penalty in (1.0, 3.0):
        whole, less = (
            vlm.ask(
                "caption en",
                SHAPES,
                choices=["a blue circle", "a red square"],
                repetition_penalty=penalty,
                logprobs=1,
            )
            for vlm in both
        )
        assert whole.parsed == less.parsed and whole.token_ids == less.token_ids
        for one, other in zip(whole.logprobs, less.logprobs, strict=True):
            assert (one.token_id, one.text) == (other.token_id, other.text)
            assert other.logprob >= one.logprob  # among fewer tokens
    for vlm in both:
        assert set(vlm.ask("x", choices=["red", "blue"]).text) <= set("redblue")


def test_an_export_is_compared_by_what_remains(paligemma_checkpoint: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"quant": "f32", "vision_precision": "fp32", "languages": "en, el"}
    made = export_bundle(paligemma_checkpoint, tmp_path / "made", verify=True, **options)
    assert made.manifest.decoder.languages == ("en", "el")
    assert {stage.stage for stage in made.manifest.parity} >= {"tokens", "greedy", "divergence"}
    assert all(stage.ok for stage in made.manifest.parity)
    assert not np.isinf([stage.worst for stage in made.manifest.parity]).any()


def test_precisions_change_as_before_and_languages_once(
    paligemma_bundle: Bundle, paligemma_checkpoint: Path, tmp_path: Path
) -> None:
    once = requantize_bundle(paligemma_bundle.folder, tmp_path / "once", languages=["en"])
    assert all(stage.worst == 0 for stage in once.manifest.parity if stage.stage == "answer")
    made = requantize_bundle(once.folder, tmp_path / "made", quant="q4_k_m", verify=False)
    direct = export_bundle(
        paligemma_checkpoint, tmp_path / "direct", quant="q4_k_m", vision_precision="fp32",
        languages="en", verify=False,
    )  # fmt: skip
    assert made.manifest.decoder == direct.manifest.decoder
    assert made.manifest.token_embedding == direct.manifest.token_embedding
    for record in direct.manifest.components["decoder"].files:
        assert record in made.manifest.components["decoder"].files
    with pytest.raises(ExportError, match="is trimmed to en already"):
        requantize_bundle(once.folder, tmp_path / "again", languages="el")
    assert not (tmp_path / "again").exists()


def test_an_untied_decoder_is_quantized_after_it_was_trimmed(tmp_path: Path) -> None:
    source = write_llava(tmp_path / "checkpoint")
    options: dict[str, Any] = {"vision_precision": "fp32", "verify": False}
    f16 = export_bundle(source, tmp_path / "f16", quant="f16", languages="en", **options)
    made = requantize_bundle(f16.folder, tmp_path / "made", quant="q8_0", verify=False)
    whole = export_bundle(source, tmp_path / "whole", quant="f16", **options)
    expected = requantize_bundle(whole.folder, tmp_path / "q8_0", quant="q8_0", verify=False)
    same_logits(expected, made)


def test_languages_by_code_and_nothing_else(tmp_path: Path) -> None:
    assert languages.checked("EN, fr,en") == ("en", "fr")
    assert languages.checked(["zh"]) == ("zh",) and languages.checked("") == ()
    for wrong in ("xx", "english", "en,,fr", ","):
        with pytest.raises(ExportError, match="unknown language .*; choose from ar, .*, zh$"):
            languages.checked(wrong)
    done = inside.edgevlm("requantize", "pico", str(tmp_path / "out"), "--languages", "en,klingon")
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    assert done.stderr.count("\n") == 1 and "unknown language 'klingon'" in done.stderr


def test_without_the_package_that_knows_words() -> None:
    find = importlib.util.find_spec
    with (
        mock.patch.object(languages, "find_spec", lambda n: n != "wordfreq" and find(n)),
        pytest.raises(EngineMissing, match=r'pip install "edgevlm\[languages\]"'),
    ):
        languages.checked("en")


def test_languages_that_need_every_token_save_nothing(
    paligemma_bundle: Bundle, tmp_path: Path
) -> None:
    everything = np.arange(paligemma_bundle.manifest.decoder.n_vocab)
    with (
        mock.patch.object(languages, "kept", lambda *_: everything),
        pytest.raises(ExportError, match="nothing would be saved; leave out --languages"),
    ):
        requantize_bundle(paligemma_bundle.folder, tmp_path / "out", languages="en")
    assert not (tmp_path / "out").exists()


def test_a_bundle_says_what_it_can_write(trimmed: Bundle) -> None:
    spec = trimmed.manifest.decoder
    said = f"Answers can have {spec.n_output} of {spec.n_vocab} tokens, those of en."
    assert said in card(trimmed, "me/pico") and "Answers" not in card(
        open_bundle(built_in()), "x/y"
    )
    shown = inside.edgevlm("models", "show", str(trimmed.folder))
    assert f"en: answers can have {spec.n_output} of {spec.n_vocab} tokens" in shown.stdout
    assert INPUT in shown.stdout
    assert "answers can have all 2560 tokens" in inside.edgevlm("models", "show", "pico").stdout


def test_a_list_of_tokens_that_is_not_the_manifests_is_refused(
    trimmed: Bundle, tmp_path: Path
) -> None:
    manifest, folder = trimmed.manifest, tmp_path / "changed"
    folder.mkdir()
    for path in trimmed.folder.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "edgevlm.json").unlink()
    n = manifest.decoder.n_output
    for changed in ({"n_output": n - 64}, {"n_output": 0, "languages": ()}, {"n_vocab": 4000}):
        decoder = dataclasses.replace(manifest.decoder, **changed)
        write_manifest(folder, dataclasses.replace(manifest, decoder=decoder))
        with pytest.raises(BundleCorrupt):
            edgevlm.load(folder)


def test_words_are_those_of_the_language(tmp_path: Path, paligemma_bundle: Bundle) -> None:
    """By script: Greek needs none of Latin's words, but its letters, all signs and digits."""
    greek = set(languages.kept(paligemma_bundle.path("decoder"), ["el"], [9]).tolist())
    english = set(languages.kept(paligemma_bundle.path("decoder"), ["en"], []).tolist())
    pieces, types = texts(paligemma_bundle)
    special = {i for i, kind in enumerate(types) if kind not in (NORMAL, UNUSED)}
    assert 9 in greek and special <= greek & english
    only = [pieces[i] for i in english - greek]
    assert only and all(any(c.isascii() and c.isalpha() for c in text) for text in only)


def test_the_package_has_words_and_frequencies() -> None:
    """wordfreq as it is, without the words above."""
    import wordfreq

    words = wordfreq.get_frequency_dict("hi", "best")
    assert words["लाल"] > 1e-6 and len(words) > 20_000
    written = dict(languages._written({"red": 1e-3, "Łódź": 1e-9}, joined=False))
    assert {" red", "red", " Red", "RED", "(red", '"Red'} <= set(written)
    assert written[" red"] > written["red"] and not any("Łódź" in text for text in written)
    joined = dict(languages._written({"红": 1e-3}, joined=True))
    assert joined["红"] > joined[" 红"]
