"""Bundles of random weights: whole, runnable, made once, of the types and the work of real ones."""

import re
import shutil
from collections import Counter, namedtuple
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from gguf import GGUFReader

import edgevlm
from edgevlm.benchmarks.synthetic import make as synthetic
from edgevlm.benchmarks.synthetic.decoder import QUANTS, decoder_bytes, write_decoder
from edgevlm.benchmarks.synthetic.models import MODELS
from edgevlm.benchmarks.synthetic.words import vocabulary
from edgevlm.bundle import open_bundle
from edgevlm.errors import BenchError, EdgeVLMError
from edgevlm.export import export_bundle, pipeline, precisions
from edgevlm.export.checkpoint.tokenizer.vocabulary import BYTE
from edgevlm.export.gguf import tools
from edgevlm.family import TOWER, Source
from edgevlm.gguf_file import opened
from edgevlm.image.plan import plan
from edgevlm.processors import PREPROCESSOR
from edgevlm.progress import Stage
from tests.checkpoints.deepseek_vl import write_deepseek_vl
from tests.checkpoints.llava import write_llava
from tests.checkpoints.paligemma import write_paligemma
from tests.checkpoints.tinygptv import write_tinygptv

VISION = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "patch_size": 14, "image_size": 56,
}  # fmt: skip
GEMMA = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64,
    "num_hidden_layers": 2, "num_key_value_heads": 1, "vocab_size": 1000,
}  # fmt: skip
LLAMA = {k: v for k, v in GEMMA.items() if k != "head_dim"}


def paligemma(kind: str, **text: Any) -> Source:
    """A small PaliGemma's config."""
    config = {"model_type": "paligemma", "image_token_index": 900, "vision_config": VISION}
    return Source({"config.json": config | {"text_config": GEMMA | {"model_type": kind} | text}})


def llava(projector: str, **text: Any) -> Source:
    """A small MobileVLM's config; 8 x 8 patches, as the pooling projector needs some."""
    config = {"model_type": "mobilevlm", "mm_projector_type": projector} | LLAMA | text
    tower = VISION | {"model_type": "clip_vision_model", "image_size": 112}
    return Source({"config.json": config, f"{TOWER}config.json": tower})


def llava_next() -> Source:
    """A small LLaVA-NeXT's config."""
    size = VISION["image_size"]
    config = {"model_type": "llava_next", "vision_config": VISION, "text_config": LLAMA}
    pinpoints = [[size, 2 * size], [2 * size, size], [2 * size, 2 * size]]
    pictures = {"image_grid_pinpoints": pinpoints, "size": size, "crop_size": size}
    return Source({"config.json": config, PREPROCESSOR: pictures})


def tinygptv() -> Source:
    """A small TinyGPT-V's config."""
    text = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8,
            "num_hidden_layers": 9, "vocab_size": 1000, "partial_rotary_factor": 0.4,
            "hidden_act": "gelu_new", "model_type": "phi"}  # fmt: skip
    real = MODELS["tinygptv-stage4"]
    small = {1408: 176, 6144: 384, 768: 128, 3072: 256, 4096: 192, 2560: 256, 80: 32}
    shapes = {n: tuple(small.get(side, side) for side in s) for n, s in real.shapes.items()}
    shapes = {n.replace(".38.", ".1.").replace(".11.", ".2."): s for n, s in shapes.items()}
    run = {"model": {"arch": "minigpt_v2", "image_size": 112}}
    return replace(real, files={"config.json": text, "stage/config.json": run}, shapes=shapes)


def internvl(**llm: Any) -> Source:
    """The config of a small InternVL that cuts nothing."""
    real = MODELS["internvl3-1b"]
    config: dict[str, Any] = {**real.files["config.json"]}
    config |= {"force_image_size": VISION["image_size"], "dynamic_image_size": False}
    config["llm_config"] = {**config["llm_config"], **LLAMA, **llm}
    config["vision_config"] = {**config["vision_config"], **VISION}
    tokens = {t: replace(a, id=900 + i) for i, (t, a) in enumerate(real.tokenizer.added.items())}
    tokenizer = replace(real.tokenizer, added=tokens)
    return replace(real, files={"config.json": config}, tokenizer=tokenizer)


def gemma3() -> Source:
    """The config of a small Gemma 3."""
    real = MODELS["gemma-3-4b"]
    tokens = {t: replace(a, id=900 + i) for i, (t, a) in enumerate(real.tokenizer.added.items())}
    config: dict[str, Any] = {**real.files["config.json"], "mm_tokens_per_image": 4}
    config |= {"boi_token_index": 902, "eoi_token_index": 903, "image_token_index": 904}
    text = GEMMA | {"num_hidden_layers": 7, "query_pre_attn_scalar": 64}
    config["text_config"] = {**config["text_config"], **text}
    config["vision_config"] = {**config["vision_config"], **VISION}
    side = {"height": VISION["image_size"], "width": VISION["image_size"]}
    pictures = {**real.files[PREPROCESSOR], "image_seq_length": 4, "size": side}
    files = {**real.files, "config.json": config, PREPROCESSOR: pictures}
    return replace(real, files=files, tokenizer=replace(real.tokenizer, added=tokens))


def qwen2_vl() -> Source:
    """A small Qwen2.5-VL's config."""
    real = MODELS["qwen2.5-vl-3b"]
    config: dict[str, Any] = {**real.files["config.json"], **LLAMA}
    config["rope_scaling"] = {"type": "mrope", "mrope_section": [8, 12, 12]}
    vision = {"depth": 2, "fullatt_block_indexes": [1], "hidden_size": 64, "num_heads": 4}
    config["vision_config"] = {**config["vision_config"], **vision, "out_hidden_size": 256}
    tokens = {t: replace(a, id=900 + i) for i, (t, a) in enumerate(real.tokenizer.added.items())}
    config |= {"image_token_id": tokens["<|image_pad|>"].id}
    config |= {"vision_start_token_id": tokens["<|vision_start|>"].id}
    files = {**real.files, "config.json": config}
    return replace(real, files=files, tokenizer=replace(real.tokenizer, added=tokens))


def phi3_v() -> Source:
    """A small Phi-3.5-Vision's config, and what says how small its tower is."""
    real = MODELS["phi-3.5-vision"]
    factors = [1.0] * (256 // LLAMA["num_attention_heads"] // 2)
    config: dict[str, Any] = {**real.files["config.json"], **LLAMA}
    config["rope_scaling"] = {"long_factor": factors, "short_factor": factors, "type": "su"}
    config["img_processor"] = {**config["img_processor"], "image_dim_out": 64}
    tokens = {t: replace(a, id=900 + i) for i, (t, a) in enumerate(real.tokenizer.added.items())}
    files = {**real.files, "config.json": config, PREPROCESSOR: {"num_crops": 2}}
    tower = "model.vision_embed_tokens.img_processor.vision_model."
    shapes: dict[str, tuple[int, ...]] = {
        f"{tower}embeddings.patch_embedding.weight": (64, 3, 14, 14),
        f"{tower}embeddings.position_embedding.weight": (17, 64),
        **{f"{tower}encoder.layers.{i}.mlp.fc1.weight": (128, 64) for i in range(2)},
    }
    return replace(
        real, files=files, shapes=shapes, tokenizer=replace(real.tokenizer, added=tokens)
    )


def fastvlm() -> Source:
    """A small FastVLM's config, and what says how small its tower is."""
    real = MODELS["fastvlm-0.5b"]
    tokens = {t: replace(a, id=900 + i) for i, (t, a) in enumerate(real.tokenizer.added.items())}
    config = {**real.files["config.json"], **LLAMA, "mm_vision_tower": "mobileclip_l_128"}
    shapes = {n: (s[0] // 12, s[1] // 12, *s[2:]) for n, s in real.shapes.items()}
    shapes = {re.sub(r"\.(?:1|11|23|3)\.convffn", ".1.convffn", n): s for n, s in shapes.items()}
    tokenizer = replace(real.tokenizer, added=tokens)
    return replace(real, files={"config.json": config}, shapes=shapes, tokenizer=tokenizer)


def moondream2() -> Source:
    """A small Moondream2's config, with the published templates."""
    real = MODELS["moondream2"]
    config: dict[str, Any] = {**real.files["config.json"]}
    small = {
        "region": {"dim": 256, "inner_dim": 128},
        "text": {"dim": 256, "ff_dim": 512, "n_heads": 4, "n_kv_heads": 4, "n_layers": 2},
        "vision": {"enc_dim": 64, "enc_ff_dim": 128, "enc_n_heads": 4, "enc_n_layers": 2,
                   "proj_inner_dim": 128, "proj_out_dim": 256},
    }  # fmt: skip
    sections: Mapping[str, Any] = config["config"]
    config["config"] = {name: {**found, **small[name]} for name, found in sections.items()}
    return replace(real, files={"config.json": config})


SMALL = {
    "fastvlm": fastvlm(),
    "phi3_v": phi3_v(),
    "gemma3": gemma3(),
    "moondream2": moondream2(),
    "qwen2_vl": qwen2_vl(),
    "internvl": internvl(),
    "tinygptv": tinygptv(),
    "gemma": paligemma("gemma"),
    "gemma2": paligemma("gemma2"),
    "llava_next": llava_next(),
    **{name: llava(name) for name in ("linear", "mlp2x_gelu", "ldpnet", "ldpnetv2")},
}


@pytest.mark.parametrize("kind", SMALL)
def test_a_synthetic_bundle_answers(kind: str, tmp_path: Path) -> None:
    synthetic.make(tmp_path / "made", "synthetic-small", SMALL[kind], "q4_k_m")
    open_bundle(tmp_path / "made", check="full")
    picture = np.random.default_rng(0).integers(0, 256, (80, 90, 3), np.uint8)
    with edgevlm.load(tmp_path / "made") as vlm:
        rows = vlm.image_embeddings(picture)
        planned = plan(90, 80, vlm.manifest.image)
        assert rows.shape == (planned.rows, 256)
        assert np.isfinite(rows).all() and rows.std() > 0
        assert np.isfinite(vlm.score("hello", ["a", "b"], picture)).all()
        assert vlm.ask("hello", picture, max_tokens=3).tokens.image == planned.rows


def types(path: Path) -> dict[str, tuple[str, int, int]]:
    """Tensor name -> type and shape."""
    with opened(path) as file:
        return {name: (t.type, t.rows, t.width) for name, t in file.tensors().items()}


def decoder(path: Path, source: Source, quant: str) -> Path:
    """The decoder of a synthetic bundle, alone."""
    _, model = synthetic.describe(source, "small")
    added = {text: token.id for text, token in source.tokenizer.added.items()}
    write_decoder(path, "small", model, quant, added)
    return path


@pytest.fixture(scope="module")
def plain_decoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Half-precision decoders of nine layers: keys and values shared by many heads, by none, and
    in one matrix with the queries; the output table tied to the input's and its own.
    """
    folder = tmp_path_factory.mktemp("plain")
    return {name: decoder(folder / name, NINE_LAYERS[name], "f16") for name in NINE_LAYERS}


NINE_LAYERS = {
    "shared": paligemma("gemma", num_hidden_layers=9),
    "own": llava("linear", num_hidden_layers=9, num_key_value_heads=4),
    "fused": SMALL["tinygptv"],
    # Rows that no K-quant takes, with biases.
    "narrow": internvl(hidden_size=224, intermediate_size=480, num_hidden_layers=9),
}


@pytest.mark.usefixtures("children_inside")
@pytest.mark.parametrize(
    ("name", "quant"),
    [("own", q) for q in QUANTS if not precisions.quant(q).direct]
    + [("narrow", q) for q in ("q4_k_m", "q5_k_m", "q6_k", "iq4_xs", "q4_0")]
    + [("shared", "q4_k_m"), ("shared", "iq4_xs"), ("fused", "q4_k_m"), ("fused", "q5_k_m")],
)
def test_every_tensor_has_the_type_that_llama_cpp_gives_it(
    name: str, quant: str, plain_decoders: dict[str, Path], tmp_path: Path
) -> None:
    expected = tmp_path / "expected.gguf"
    stage = Stage(None, "quantize", 1, "B")
    tools.quantize(plain_decoders[name], expected, precisions.quant(quant).ftype, stage)
    assert types(decoder(tmp_path / "made", NINE_LAYERS[name], quant)) == types(expected)


@pytest.mark.parametrize("source", [SMALL["gemma"], NINE_LAYERS["narrow"]], ids=("wide", "narrow"))
@pytest.mark.parametrize("quant", QUANTS)
def test_weights_are_sane_numbers_of_the_size_that_was_foretold(
    quant: str, source: Source, tmp_path: Path
) -> None:
    tensors = GGUFReader(decoder(tmp_path / "made", source, quant)).tensors
    _, model = synthetic.describe(source, "small")
    assert sum(int(t.n_bytes) for t in tensors) == decoder_bytes(model, quant)
    from gguf.quants import dequantize

    for tensor in tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        assert np.isfinite(values).all()
        if len(tensor.shape) > 1:
            assert 0.01 < values.std() < 0.04, tensor.name


def heavy(path: Path) -> Counter[str]:
    """How often each costly operation stands in a graph."""
    kinds = ("MatMulInteger", "MatMul", "Conv", "Softmax", "LayerNormalization", "Erf", "Tanh",
             "Sigmoid", "DynamicQuantizeLinear", "HardSwish", "HardSigmoid")  # fmt: skip
    nodes = onnx.load(str(path), load_external_data=False).graph.node
    return Counter(n.op_type for n in nodes if n.op_type in kinds)


CHECKPOINTS: dict[str, Callable[[Path], Path]] = {
    "paligemma": write_paligemma,
    "tinygptv": partial(write_tinygptv, stage=4),
    "deepseek_vl": write_deepseek_vl,
    **{p: partial(write_llava, projector=p) for p in ("mlp2x_gelu", "ldpnet", "ldpnetv2")},
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_graphs_do_what_exported_ones_do(name: str, tmp_path: Path) -> None:
    source = CHECKPOINTS[name](tmp_path / "source")
    exported = export_bundle(source, tmp_path / "out", quant="f16", verify=False)
    model = pipeline.read(source).model
    synthetic.write_graphs(tmp_path, model)
    for part in ("vision", "projector"):
        assert heavy(tmp_path / f"{part}.onnx") == heavy(exported.path(part))


@pytest.mark.parametrize("name", MODELS)
def test_every_name_has_a_family_that_reads_its_config(name: str) -> None:
    _, model = synthetic.describe(MODELS[name], name)
    side = model.vision.image_size
    free = model.image.tiles or model.image.native
    assert f"-{side}" in name or side in (336, 384, 448, 1024) or free
    assert 1e8 < decoder_bytes(model, "f16") < 3e10


def test_a_vocabulary_has_all_bytes_and_the_originals_tokens_in_their_places() -> None:
    """The smallest of those that speak alike: fillers alone make a larger one."""
    described = [(source, synthetic.describe(source, n)[1]) for n, source in MODELS.items()]
    described.sort(key=lambda both: -both[1].decoder.n_vocab)
    for source, model in {
        repr(model.prompt): (source, model) for source, model in described
    }.values():
        added = {text: token.id for text, token in source.tokenizer.added.items()}
        tokens = vocabulary(model, added).tokens
        assert len(tokens) == model.decoder.n_vocab
        assert {f"<0x{i:02X}>" for i in range(256)} == {t.text for t in tokens if t.type == BYTE}
        assert [tokens[i].text for i in added.values() if i > 3] == [
            t for t in added if added[t] > 3
        ]


def test_words_of_the_models_own_prompts_are_one_token_each(tmp_path: Path) -> None:
    synthetic.make(tmp_path / "made", "synthetic-small", MODEL, "q8_0")
    with edgevlm.load(tmp_path / "made") as vlm:
        decoder = vlm.engines.decoder
        assert (
            len(decoder.tokenize(" A chat between a curious user and an assistant. USER: ")) <= 14
        )
        assert len(decoder.tokenize("What is in the picture?")) == 6
        assert len(decoder.tokenize(" zyzzyva")) == 8


MODEL = llava("linear", vocab_size=4000)
Disk = namedtuple("Disk", "total used free")


def test_a_full_disk_is_seen_before_the_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEVLM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(10**12, 10**12, 10**9))
    with pytest.raises(BenchError, match=r"llava-1.5-7b-q4_k_m takes 4\.\d GB, 1.0 GB are free"):
        synthetic.synthetic("llava-1.5-7b", "q4_k_m")
    assert not (tmp_path / "home").exists()


def test_a_place_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").write_text("a file", encoding="utf-8")
    monkeypatch.setenv("EDGEVLM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(synthetic, "MODELS", {"small": SMALL["gemma"]})
    with pytest.raises(EdgeVLMError, match="cannot be written"):
        synthetic.synthetic("small", "q8_0")


def test_a_synthetic_bundle_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEVLM_HOME", str(tmp_path))
    monkeypatch.setattr(synthetic, "MODELS", {"small": SMALL["gemma"]})
    started: list[str] = []
    first = synthetic.synthetic("small", "q8_0", started.append)
    again = synthetic.synthetic("small", "q8_0", started.append)
    assert started == ["small-q8_0"] and first == again
    assert first.manifest.name == "synthetic-small-q8_0"
    assert first.folder == tmp_path / "synthetic" / "small-q8_0"
