"""TinyGPT-V: EVA ViT-g, BLIP-2's Q-Former, two linear maps and a Phi-2 with norms of its own.

A model is assembled from four downloads, as the original loads them: Phi-2 (the main checkpoint),
eva_vit_g.pth, blip2_pretrained_flant5xxl.pth, and what a training stage saved. Facts from
DLYuanGod/TinyGPT-V (minigpt4/models, modeling_phi.py) and transformers 4.36 (models/phi).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from edgevlm.boxes import parse_percent
from edgevlm.family import (
    IGNORED,
    Config,
    Family,
    Model,
    Source,
    WeightFile,
    decoder_spec,
    read_config,
    rope_parameters,
    section,
    setting,
)
from edgevlm.parts import Shapes
from edgevlm.parts.eva import EvaTower
from edgevlm.parts.phi2 import Phi2
from edgevlm.parts.qformer import QFormer
from edgevlm.processors import CLIP_MEAN, CLIP_STD
from edgevlm.specs import AnswerSpec, ImageSpec, PromptSpec
from edgevlm.templates import SYSTEM

_EVA, _BLIP2, _STAGE = "eva", "blip2", "stage"

# create_eva_vit_g, where the file does not say: blocks that are run, and the width of a head.
_EVA_DEPTH = 39
_EVA_HEAD = 88
_QFORMER_HEAD = 64  # of bert-base-uncased
_ROTARY = 0.4
# LoraConfig's default in base_model.py, where the stage's run does not say.
_LORA_ALPHA = 16.0
# minigpt4/processors/blip_processors.py; both resize to a square and differ in name alone.
_PROCESSORS = ("blip2_image_train", "blip2_image_eval")
# The original's classes: of stages 1 to 3, of stage 4; pixels of a side and template of each.
_ARCHS = ("minigpt4", "minigpt_v2")
_SIDES = {"minigpt4": 224, "minigpt_v2": 448}
_DEFAULTS = {"minigpt4": "vicuna0", "minigpt_v2": "demo_v2"}

# transformers' names (configuration_phi.py) by Microsoft's; a config has one or the other.
_MICROSOFT = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "layer_norm_epsilon": "layer_norm_eps",
    "activation_function": "hidden_act",
}
# PhiConfig's defaults; 0 where the class derives one number from others.
_PHI = Phi2(
    hidden_size=2048,
    num_hidden_layers=24,
    num_attention_heads=32,
    num_key_value_heads=0,
    head_dim=0,
    intermediate_size=8192,
    vocab_size=51200,
    max_position_embeddings=2048,
    layer_norm_eps=1e-5,
    rms_norm_eps=1e-6,  # LlamaRMSNorm's default in modeling_phi.py
    rope_theta=10000.0,
    rotary_dim=0,
    extra_norms=True,
    lora_alpha=_LORA_ALPHA,
)

_VICUNA0 = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I "
    "provide it to you. Please answer my questions.###Human: "
)
# What stands before the picture (a begin token or text), after the user's words, and before the
# words of later questions; the picture is always between <Img> and </Img>.
_TEMPLATES: dict[str, tuple[tuple[str, ...], str, str | None]] = {
    # demo.py, CONV_VISION_Vicuna0: stages 1 to 3.
    "vicuna0": ((_VICUNA0,), "###Assistant: ", "###Human: "),
    # Stage 4: demo_v2.py, the wrapper of its training, eval_scripts.
    "demo_v2": (("<s>[INST] ",), " [/INST]", "<s>[INST] "),
    "training": (("{bos}", "[INST] "), "  [/INST]", None),
    "minigptv2": (("###Human: ",), "###Assistant: ", "###Human: "),
}
# The one that opens with words of a system; the conversations of the others have none.
_SYSTEMATIC = "vicuna0"
# Tags and words of the training sets (minigpt4/datasets); plain text to the model. Only stage 4 was
# trained with them.
_TASKS = {
    "answer": "[vqa] {prompt}",
    "caption": "[caption] Briefly describe this image.",
    "detect": "[detection] {prompt}",
    "ground": "[grounding] please describe this image in details",
    "identify": "[identify] what object is in this location {prompt}",
    "refer": "[refer] give me the location of {prompt}",
}
_SETTINGS = {
    "stage": "1, 2, 3 or 4, the training stage of the weights",
    "partial_rotary_factor": "share of a head that rotary positions turn, 0.4 in the original",
    "lora_alpha": "scale of the adapters times their rank, 16 in the original",
    "vision_heads": "heads of the vision tower",
}


def _describe(source: Source) -> Model:
    shapes = {name: shape for raw, shape in source.shapes.items() if (name := _locate(raw))}
    arch, stage = _arch(source)
    run = _run(source)
    size = setting(run, "image_size", 0) if run.get("arch", arch) == arch else 0
    vision = _vision(source, shapes, size or _SIDES[arch])
    text, rotary = _text(source, source.files["config.json"])
    projector = _projector(source, shapes, text)
    return Model(
        image=_image(source, vision.image_size, projector.tokens(vision.rows)),
        prompt=_prompt(source, arch),
        decoder=decoder_spec(text, "causal", extra_norms=text.extra_norms),
        # conversation.py: how an answer ends, what is cut off it, and the length demo.py allows.
        answer=AnswerSpec(
            stop_tokens=(),
            stop_strings=("###",),
            max_tokens=300,
            strip=True,
            role="Assistant:",
        ),
        vision=vision,
        projector=projector,
        text=text,
        stop_pieces=("###",),
        # transformers 4.36 begins to count with the begin token where it is given embeddings.
        penalized_pieces=("<|endoftext|>",),
        notes=(stage, rotary, *_notes(source, vision)),
    )


def _arch(source: Source) -> tuple[str, str]:
    """The original's class, minigpt4 for stages 1 to 3 and minigpt_v2 for stage 4, and who says."""
    stated, file = source.settings.get("stage"), source.origins[_STAGE]
    if stated is not None:
        if stated not in ("1", "2", "3", "4"):
            raise ValueError(f"stage {stated!r} is not one of 1, 2, 3, 4")
        return _ARCHS[stated == "4"], f"stage {stated}, as stated"
    named = re.search(r"stage[ _-]?([1-4])", file, re.IGNORECASE)
    arch = _run(source).get("arch")
    if arch is not None and arch not in _ARCHS:
        raise ValueError(f"{file} was saved by a run of {arch!r}, not of {' or '.join(_ARCHS)}")
    if arch and named and arch != _ARCHS[named[1] == "4"]:
        raise ValueError(
            f"{file} was saved by a run of {arch}, which is not stage {named[1]}; state the stage "
            "(--set stage=N)"
        )
    if arch:
        return str(arch), f"{arch}, says the run that saved {file}"
    if named:
        return _ARCHS[named[1] == "4"], f"stage {named[1]}, says the name of {file}"
    raise ValueError(f"{file} does not say of which stage it is; state it (--set stage=1 to 4)")


def _run(source: Source) -> Config:
    """The model's part of the config of the run that saved the stage's file."""
    found = source.files.get(f"{_STAGE}/config.json", {}).get("model", {})
    return found if isinstance(found, Mapping) else {}


@dataclass(frozen=True)
class _Train:
    """A dataset's picture processor, as the run states it."""

    image_size: int
    name: str = _PROCESSORS[0]
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None


def _image(source: Source, size: int, tokens: int) -> ImageSpec:
    """Pictures as the run that saved the stage read them: OpenAI's normalisation unless it says."""
    mean, std = CLIP_MEAN, CLIP_STD
    datasets = section(source.files.get(f"{_STAGE}/config.json", {}), "datasets")
    processors = (section(section(datasets, name), "vis_processor") for name in datasets)
    trains = [read_config(_Train(size), section(p, "train")) for p in processors]
    for key, default in (("mean", mean), ("std", std)):
        if len({getattr(one, key) or default for one in trains}) > 1:
            raise ValueError(f"{source.origins[_STAGE]}: its datasets differ in {key}")
    for one in trains:
        if one.name not in _PROCESSORS or one.image_size != size:
            raise ValueError(
                f"{source.origins[_STAGE]}: vis_processor is {one.name!r} at {one.image_size!r} "
                f"pixels; only {' or '.join(_PROCESSORS)} at {size} is known"
            )
        mean, std = one.mean or mean, one.std or std
    return ImageSpec(
        size=size,
        tokens=tokens,
        mean=mean,
        std=std,
    )


def _text(source: Source, config: Config) -> tuple[Phi2, str]:
    """Phi-2's config, and where its rotary share comes from."""
    own = any(key in config for key in _MICROSOFT)
    if own != any(name.startswith("transformer.h.") for name in source.shapes):
        raise ValueError(
            "config.json is of one layout of Phi-2 and the weights are in another; take both from "
            "the same revision"
        )
    given = {_MICROSOFT.get(key, key): value for key, value in config.items()}
    text = read_config(_PHI, {key: value for key, value in given.items() if value is not None})
    d, heads = text.hidden_size, text.num_attention_heads
    rope = rope_parameters(given)
    known = {
        "hidden_act": (given.get("hidden_act", "gelu_new"), "gelu_new"),
        "tie_word_embeddings": (given.get("tie_word_embeddings", False), False),
        "num_key_value_heads": (text.num_key_value_heads or heads, heads),
        "rope_type": (rope["rope_type"], "default"),
        "hidden_size % num_attention_heads": (d % heads, 0),
    }
    for key, (value, only) in known.items():
        if value != only:
            raise ValueError(f"config.json: {key} is {value!r}; only {only!r} is known")
    rotary, note = _rotary(source, {**given, **rope}, d // heads)
    alpha = setting(_run(source), "lora_alpha", _LORA_ALPHA)
    return replace(
        text,
        # Microsoft's n_inner is null.
        intermediate_size=text.intermediate_size if given.get("intermediate_size", 1) else 4 * d,
        num_key_value_heads=heads,
        head_dim=d // heads,
        rope_theta=setting(rope, "rope_theta", text.rope_theta),
        rotary_dim=rotary,
        lora_alpha=_number(source, "lora_alpha", alpha),
    ), note


def _rotary(source: Source, config: Config, head: int) -> tuple[int, str]:
    """Dimensions of a head that are turned: the original's share, unless another is stated."""
    if "partial_rotary_factor" in source.settings:
        factor, who = _number(source, "partial_rotary_factor", _ROTARY), "as stated"
    else:
        # transformers assumes 0.5 where its config has no such key.
        factor, who = setting(config, "partial_rotary_factor", 0.5), "says config.json"
        if "rotary_dim" in config and "partial_rotary_factor" not in config:
            factor = setting(config, "rotary_dim", 0) / head
        if abs(factor - _ROTARY) > 1 / head:
            raise ValueError(
                f"config.json: partial_rotary_factor is {factor:g}, but TinyGPT-V's Phi-2 has "
                f"{_ROTARY}; state the one of the training (--set partial_rotary_factor={_ROTARY})"
            )
    dimensions = int(factor * head)
    if not 0 < dimensions <= head or dimensions % 2:
        raise ValueError(
            f"partial_rotary_factor {factor:g} turns {dimensions} of {head} dimensions"
        )
    return dimensions, f"rotary positions turn {dimensions} of {head} dimensions, {who}"


def _number(source: Source, name: str, default: float) -> float:
    try:
        return float(source.settings.get(name, default))
    except ValueError:
        raise ValueError(f"{name} {source.settings[name]!r} is not a number") from None


def _vision(source: Source, shapes: Shapes, size: int) -> EvaTower:
    width, channels, patch, _ = _shape(shapes, "vision.embeddings.patch_embedding.weight", 4)
    _, positions, _ = _shape(shapes, "vision.embeddings.position_embedding", 3)
    mlp, _ = _shape(shapes, "vision.encoder.layers.0.mlp.fc1.weight", 2)
    grid, depth = math.isqrt(positions - 1), _layers(shapes, "vision.encoder.layers.")
    heads = _number(source, "vision_heads", width / _EVA_HEAD)
    if heads < 1 or heads % 1 or width % heads:
        raise ValueError(
            f"a tower of width {width} has no heads of {_EVA_HEAD}; state how many it has "
            "(--set vision_heads=N)"
        )
    if size % patch or grid * grid != positions - 1:
        raise ValueError(
            f"the tower has patches of {patch} and {positions - 1} positions, which no square of "
            f"{size} pixels can be cut into"
        )
    return EvaTower(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=min(_EVA_DEPTH, depth),
        num_attention_heads=int(heads),
        num_channels=channels,
        image_size=size,
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
        final_norm_eps=1e-5,  # torch's default, which ln_vision has
        positions=grid,
        depth=depth,
    )


def _projector(source: Source, shapes: Shapes, text: Phi2) -> QFormer:
    _, queries, width = _shape(shapes, "projector.query_tokens", 3)
    layer = "projector.encoder.layer."
    mlp, _ = _shape(shapes, f"{layer}0.intermediate_query.dense.weight", 2)
    _, encoder = _shape(shapes, f"{layer}0.crossattention.attention.key.weight", 2)
    middle, _ = _shape(shapes, "projector.maps.0.weight", 2)
    bert: Config = next((c for c in source.files.values() if c.get("model_type") == "bert"), {})
    return QFormer(
        in_features=encoder,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=_layers(shapes, layer),
        num_attention_heads=setting(bert, "num_attention_heads", width // _QFORMER_HEAD),
        cross_attention_frequency=2,
        layer_norm_eps=1e-12,
        queries=queries,
        widths=(middle, text.hidden_size),
    )


def _shape(shapes: Shapes, name: str, sides: int) -> tuple[int, ...]:
    if len(shapes.get(name, ())) != sides:
        raise ValueError(f"the files hold no tensor for {name}, or one of another shape")
    return shapes[name]


def _layers(shapes: Shapes, start: str) -> int:
    return 1 + max(int(n[len(start) :].split(".")[0]) for n in shapes if n.startswith(start))


def _notes(source: Source, vision: EvaTower) -> Iterator[str]:
    """Notes on what the weight files do not say; raises ValueError for a stage's file without
    TinyGPT-V's norms.
    """
    file, names = source.origins[_STAGE], [n for n in source.shapes if n.startswith(f"{_STAGE}/")]
    for norm in ("q_layernorm", "k_layernorm", "post_layernorm"):
        if not any(n.endswith(f".{norm}.weight") for n in names):
            raise ValueError(
                f"{file} has no {norm}, a norm that Phi-2 itself lacks; "
                "it is not a stage of TinyGPT-V"
            )
    if not any(".lora_A." in n for n in names):
        yield f"{file} has no adapters (LoRA); Phi-2's matrices are used as they are"
    if not any(n.endswith("q_layernorm.bias") for n in names):
        yield f"{file} has no biases for the norms of queries and keys; they are 0"
    for part in ("Qformer.bert.encoder", "query_tokens", "ln_vision"):
        own = any(n.startswith(f"{_STAGE}/{part}") for n in names)
        yield f"{part.partition('.')[0]} from {file if own else source.origins[_BLIP2]}"
    side, stored = vision.grid, vision.positions
    if side != stored:
        yield f"position grid {stored} x {stored} -> {side} x {side}, bicubic"
    if vision.unread:
        yield f"{vision.num_hidden_layers} of {vision.depth} blocks of the tower are run"


def _prompt(source: Source, arch: str) -> PromptSpec:
    name = source.template or _DEFAULTS[arch]
    if name not in _TEMPLATES:
        raise ValueError(f"the template {name!r} is not one of {', '.join(_TEMPLATES)}")
    before, after, again = _TEMPLATES[name]
    system = (f"{SYSTEM}###Human: ",) if name == _SYSTEMATIC else ()
    return PromptSpec(
        template=(*before[:-1], f"{before[-1]}<Img>", "{image}", f"</Img> {{prompt}}{after}"),
        text_template=(*before[:-1], f"{before[-1]}{{prompt}}{after}"),
        turn=() if again is None else (f"{again}{{prompt}}{after}",),
        tasks=_TASKS,
        joined=True,
        system_template=system and (f"{system[0]}<Img>", "{image}", f"</Img> {{prompt}}{after}"),
        system_text_template=system and (f"{system[0]}{{prompt}}{after}",),
    )


# Names in the original's own module tree, which every file's are brought to -> canonical ones.
_PHI_LAYER = (
    r"llama_model\.model\.(layers\.\d+\.(?:input_layernorm|post_layernorm|mlp\.fc[12]|self_attn\."
    r"(?:query_key_value|[qkv]_proj|dense|[qk]_layernorm)))"
)
_BLOCK = r"visual_encoder\.blocks\.(\d+)\."
_BERT = r"Qformer\.bert\."
_NAMES = tuple(
    (re.compile(pattern), target)
    for pattern, target in (
        (r"llama_model\.(lm_head\.(?:weight|bias))", r"decoder.\1"),
        (rf"{_PHI_LAYER}\.lora_([AB])\.(?:default\.)?weight", r"decoder.\1.lora_\2.weight"),
        (rf"{_PHI_LAYER}(?:\.base_layer)?\.(weight|bias)", r"decoder.\1.\2"),
        (r"llama_model\.model\.((?:embed_tokens|final_layernorm)\.\w+)", r"decoder.\1"),
        (r"llama_model\.transformer\.embd\.wte\.(.+)", r"decoder.embed_tokens.\1"),
        (r"llama_model\.transformer\.h\.(\d+)\.ln\.(.+)", r"decoder.layers.\1.input_layernorm.\2"),
        (
            r"llama_model\.transformer\.h\.(\d+)\.mixer\.(Wqkv\..+)",
            r"decoder.layers.\1.self_attn.\2",
        ),
        (
            r"llama_model\.transformer\.h\.(\d+)\.mixer\.out_proj\.(.+)",
            r"decoder.layers.\1.self_attn.dense.\2",
        ),
        (r"llama_model\.transformer\.h\.(\d+\.mlp\..+)", r"decoder.layers.\1"),
        (r"llama_model\.lm_head\.ln\.(.+)", r"decoder.final_layernorm.\1"),
        (r"llama_model\.lm_head\.linear\.(.+)", r"decoder.lm_head.\1"),
        (r"visual_encoder\.cls_token", "vision.embeddings.class_embedding"),
        (r"visual_encoder\.pos_embed", "vision.embeddings.position_embedding"),
        (r"visual_encoder\.patch_embed\.proj\.(.+)", r"vision.embeddings.patch_embedding.\1"),
        (rf"{_BLOCK}norm([12])\.(.+)", r"vision.encoder.layers.\1.layer_norm\2.\3"),
        (rf"{_BLOCK}attn\.(qkv\.weight|[qv]_bias)", r"vision.encoder.layers.\1.self_attn.\2"),
        (rf"{_BLOCK}attn\.proj\.(.+)", r"vision.encoder.layers.\1.self_attn.projection.\2"),
        (rf"{_BLOCK}(mlp\..+)", r"vision.encoder.layers.\1.\2"),
        (r"ln_vision\.(.+)", r"vision.post_layernorm.\1"),
        (r"query_tokens", "projector.query_tokens"),
        (rf"{_BERT}embeddings\.LayerNorm\.(.+)", r"projector.layernorm.\1"),
        (
            rf"{_BERT}(encoder\.layer\.\d+\.(?:cross)?attention)\.self\.(.+)",
            r"projector.\1.attention.\2",
        ),
        (
            rf"{_BERT}(encoder\.layer\.\d+\.(?:\w*attention\.output|\w+_query)\..+)",
            r"projector.\1",
        ),
        (r"llama_proj\.(.+)", r"projector.maps.0.\1"),
        (r"llama_proj2\.(.+)", r"projector.maps.1.\1"),
    )
)
# Buffers that some releases stored.
_UNUSED = re.compile(r".+\.(?:position_ids|rotary_emb\..+)")
# Where a weight file's names belong in that tree: eva_vit_g.pth and Phi-2 do not know of it.
_ROOTS = {"": "llama_model.", _EVA: "visual_encoder."}


def _locate(name: str) -> str | None:
    file, _, own = name.rpartition("/")
    own = _ROOTS.get(file, "") + own
    own = own.replace("llama_model.base_model.model.", "llama_model.", 1)
    if _UNUSED.fullmatch(own):
        return IGNORED
    for pattern, target in _NAMES:
        if match := pattern.fullmatch(own):
            return match.expand(target)
    return None


FAMILY = Family(
    name="tinygptv",
    license="other",
    model_types=("phi", "phi-msft"),
    describe=_describe,
    locate=_locate,
    boxes=parse_percent,
    weight_files=(
        WeightFile(_EVA, "eva_vit_g.pth", holds="patch_embed.proj.weight"),
        WeightFile(
            _BLIP2,
            "blip2_pretrained_flant5xxl.pth",
            holds="query_tokens",
            lacks="llama_proj.weight",
        ),
        WeightFile(_STAGE, "TinyGPT-V_for_Stage<N>.pth", holds="llama_proj.weight", strict=True),
    ),
    settings=_SETTINGS,
)
