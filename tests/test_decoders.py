"""Decoders that several families share: what their configs mean, and a GGUF beside the original."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgevlm import decoders
from edgevlm.export import precisions
from edgevlm.export.checkpoint.source import Checkpoint, read_header, read_json
from edgevlm.export.checkpoint.tokenizer.vocabulary import read_vocabulary
from edgevlm.export.gguf.decoder import DecoderSource, embedding_location, write_decoder
from edgevlm.family import decoder_spec
from edgevlm.parts.qwen2 import Qwen2
from edgevlm.runtimes.engines import sequential
from edgevlm.runtimes.llama.decoder import LlamaDecoder
from tests.checkpoints.qwen2_vocabulary import write_qwen2

QWEN2: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "max_position_embeddings": 512,
    "model_type": "qwen2",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rope_theta": 1e6,
}
DYNAMIC = {"rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}}
SLIDES = {"use_sliding_window": True, "sliding_window": 100}


@pytest.mark.parametrize("more", [{}, DYNAMIC, {"tie_word_embeddings": True}])
def test_qwen2s_logits_are_transformers(more: dict[str, Any], tmp_path: Path) -> None:
    import torch
    import transformers

    hf: Any = transformers
    rows = len(write_qwen2(tmp_path)) + 5
    torch.manual_seed(0)
    config = hf.Qwen2Config(
        **QWEN2, **more, vocab_size=rows, attn_implementation="eager", initializer_range=0.05
    )
    model = hf.Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # which a new model has as zeros
                parameter.normal_(0, 0.5)
        tied = model.lm_head.weight is model.model.embed_tokens.weight
        model.lm_head.weight.mul_(6)
    assert tied == bool(more.get("tie_word_embeddings"))
    model.save_pretrained(tmp_path)
    text = decoders.read(read_json(tmp_path / "config.json"), "llama")
    assert isinstance(text, Qwen2) and text.tie_word_embeddings == tied
    tensors = {
        t.name.removeprefix("model."): t for t in read_header(tmp_path / "model.safetensors")
    }
    assert {n: t.shape for n, t in tensors.items()} == text.tensors()
    spec = decoder_spec(text, "causal")
    about: Any = SimpleNamespace(
        decoder=spec, prefix="", markers={}, whole_tokens=(), own_tokenizer=False
    )
    configs = {p.name: read_json(p) for p in tmp_path.glob("*.json")}
    table = read_vocabulary(Checkpoint(tmp_path, configs, {}, ()), about)
    source = DecoderSource(tensors, text, table, "tiny")
    path = write_decoder(source, tmp_path, precisions.quant("f32"), None)
    ids = np.random.default_rng(0).integers(0, rows, 40).tolist()
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    decoder = LlamaDecoder(path, spec, embedding_location(path), threads=2, exact=True)
    try:
        decoder.prefill([sequential(decoder.embed(ids[:30]), "causal", 0)], room=20)
        found = [decoder.logits(), *decoder.extend(ids[30:])]
    finally:
        decoder.close()
    assert expected.std() > 2 and np.abs(np.stack(found) - expected[29:]).max() < 5e-3


@pytest.mark.parametrize(
    ("more", "longest"),
    [
        ({"sliding_window": 100, "max_window_layers": 0}, 512),
        (SLIDES, 512),  # by default only layers from the 28th on
        (SLIDES | {"max_window_layers": 1}, 100),
        (SLIDES | {"layer_types": ["full_attention", "sliding_attention"]}, 100),
        (SLIDES | {"layer_types": ["full_attention"] * 2, "max_window_layers": 0}, 512),
        (SLIDES | {"max_window_layers": 0, "sliding_window": None}, 512),
        (DYNAMIC, 512),
        ({"model_type": "mistral", "sliding_window": 64}, 64),
    ],
)
def test_the_context_ends_where_the_graph_would_differ(more: dict[str, Any], longest: int) -> None:
    text = decoders.read(QWEN2 | more, "llama")
    assert text.max_position_embeddings == longest
    assert text.rope_theta == 1e6 and text.head_dim == 64


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "scales its positions"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "scales its positions"),
        (SLIDES | {"max_window_layers": 0, "sliding_window": "wide"}, "sliding_window is 'wide'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"model_type": "qwen3"}, "model_type 'qwen3' is not one of"),
    ],
)
def test_what_the_graph_lacks_is_refused(more: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        decoders.read(QWEN2 | more, "llama")


def test_a_qwen2_without_its_own_output_table_has_one_table_less() -> None:
    text = decoders.read(QWEN2, "llama")
    tied = replace(text, tie_word_embeddings=True)
    assert text.tensors().keys() - tied.tensors().keys() == {"lm_head.weight"}
