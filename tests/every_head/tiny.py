"""A tiny configuration of any configuration class, and a model with it.

The rules recognize sizes by Transformers' names for them. If one set of sizes breaks a constraint of a model, the next
may satisfy it. `HELP` has the settings of classes for which no set does.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

VOCABULARY, FIRST_WORD = 128, 32  # special tokens have the ids below the first word
PAD, BOS, EOS = 0, 1, 2
_MOST_PARAMETERS = 6_000_000


@dataclass(frozen=True)
class Size:
    hidden: int
    heads: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


TINY_SIZES = [Size(16, 2), Size(32, 4), Size(48, 4), Size(64, 4), Size(64, 8), Size(128, 8)]

# Patterns for the names of sizes, and the size in a tiny model. The first pattern that matches the whole name applies.
_RULES: list[tuple[str, Callable[[Size], int]]] = [
    (r".*(num_)?(key_value|kv)_(attention_)?heads|kv_n_heads|num_query_groups", lambda size: size.heads),
    (r"(.*_)?(n|num)_heads?|(.*_)?attention_heads|(.*_)?n_heads", lambda size: size.heads),
    (r"(.*_)?(n|num)_(hidden_)?layers?|(.*_)?(encoder|decoder)_layers|num_blocks|[lrx]_layers|num_hidden_groups"
     r"|(.*_)?depths?|layers|num_(encoder|decoder)_blocks|num_self_attends_per_block|num_layers_per_stack"
     r"|num_(spatial|temporal|auxiliary)_layers|n_attn_blocks|num_(residual|lstm)_layers|resampler_depth",
     lambda _: 2),
    (r"(.*_)?intermediate_size(_mlp)?|(.*_)?ffn_dim|(.*_)?(ffn|mlp)_hidden_size|d_ff|dim_ff|dff|d_inner|n_inner|mlp_dim"
     r"|feed_forward_size|(.*_)?mlp_size|share_expert_dim", lambda size: 2 * size.hidden),
    (r"(.*_)?head_dim|d_kv|kv_channels|d_head|(.*_)?v_head_dim|attention_head_size|(.*_)?dim_head|mamba_d_head"
     r"|mamba_headdim|(.*_)?qk_(nope|rope)_head_dim|rotary_dim", lambda size: size.head_dim),
    (r"(.*_)?lora_rank|(.*_)?rank", lambda _: 8),
    (r"(.*_)?hidden_sizes?|d_model|dim|n_embd|(.*_)?embed_dims?|(.*_)?embedding_size|(.*_)?emb_dim|embedding_dim"
     r"|word_embed_proj_dim|(.*_)?projection_dim|out_hidden_size|(.*_)?hidden_dim|lru_width|output_dim|dims|(.*_)?width"
     r"|classifier_proj_size|prediction_head_size|output_hidden_size|conv_dim|tdnn_dim|xvector_output_dim|d_latents"
     r"|(post_)?conv_\w*channels|(.*_)?codevector_dim|subsampling_conv_channels|projection_size|d_embed"
     r"|fusion_hidden_size|decoder_hidden_size|output_channels|base_channels|aspp_out_channels|auxiliary_channels"
     r"|conv_output_size|adapter_(in|out)_dim|projector_(input|output)_dim|proj_dim|codebook_dim"
     r"|stem_out_channels|stem_channels|hidden_size_global", lambda size: size.hidden),
    (r"(?!type_).*vocab_sizes?(_per_layer_input)?", lambda _: VOCABULARY),
    (r"(stage_)?(in|out|mid)_channels|num_filters", lambda size: size.hidden),
    (r"(.*_)?(max_)?position_embeddings|n_positions|n_ctx|max_seq_len|seq_len|max_\w*positions|block_size|context_length"
     r"|model_max_length", lambda _: 128),
    (r"image_size|img_size|max_image_size|resolution", lambda _: 64),
    (r"(.*_)?patch_size", lambda _: 16),
    (r"(.*_)?(num|n)_(routed_|local_)?experts|moe_num_experts", lambda _: 4),
    (r"(.*_)?experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts", lambda _: 2),
    (r"topk_group|n_group|num_expert_group|n_groups|num_conv_pos_embedding_groups|(first_k|mlp)_dense_replace"
     r"|(.*_)?n_shared_experts|mamba_n_groups|mamba_ngroups|num_dense_layers", lambda _: 1),
    (r"mamba_d_state|state_size|ssm_state_size|(.*_)?chunk_size(?<!chunk_size_feed_forward)", lambda _: 8),
    (r"(.*_)?num_mel_bins|n_mel_bins|feature_size|input_feat_per_channel", lambda _: 16),
    (r"max_source_positions", lambda _: 64),
    (r"num_conv_pos_embeddings|num_codevectors_per_group|num_codebooks|(.*_)?num_latents", lambda _: 8),
    (r"attention_window|local_attention|sliding_window(_size)?", lambda _: 4),
    (r"num_frames|conv_stride|window_size", lambda _: 2),
]  # fmt: skip
_CHANCE = re.compile(r"drop|jitter|noise|mask_(time|feature)_prob|stochastic|survival")
_TOKEN_ID = re.compile(r"\w+_(id|ids|index|idx)")
_DROPOUTS = (nn.modules.dropout._DropoutNd,)
_SPECIAL_IDS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "decoder_start_token_id": EOS}

# Sizes that a configuration may leave open, but that a model needs.
_OFTEN_NONE = {"head_dim", "num_key_value_heads", "num_experts_per_tok", "vocab_size"}

_THREE_AXES = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}

# Settings that no pattern can give, by configuration class.
HELP: dict[str, dict[str, Any]] = {
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "ReformerConfig": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"], "num_buckets": 2, "hash_seed": 0},
    "XmodConfig": {"default_language": "en_XX"},
    "BeitConfig": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
    "Data2VecVisionConfig": {"num_hidden_layers": 4, "out_indices": [0, 1, 2, 3]},
    "DPTConfig": {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]},
    "LayoutLMv3Config": {"coordinate_size": 2, "shape_size": 4},
    "Qwen2VLTextConfig": _THREE_AXES,
    "Qwen2_5_VLTextConfig": _THREE_AXES,
    "Glm4vTextConfig": _THREE_AXES,
    "Glm4vMoeTextConfig": _THREE_AXES,
    "GlmOcrTextConfig": _THREE_AXES,
    "PaddleOCRTextConfig": _THREE_AXES,
}


def tiny_config(
    config_class: type[PreTrainedConfig], size: Size, settings: Mapping[str, Any], switches: Mapping[str, Any]
) -> PreTrainedConfig:
    """Return a configuration of about this size.

    Args:
        settings: further arguments.
        switches: attributes to set at any depth where they exist.
    """
    shrunk = _shrunk(config_class(), size, {})
    config = config_class(**{**shrunk, **HELP.get(config_class.__name__, {}), **settings})
    config._experts_implementation = "eager"  # the others do not support float64
    _settle(config, switches)
    return config


def _shrunk(config: PreTrainedConfig, size: Size, ids: dict[str, int]) -> dict[str, Any]:
    """Return the arguments that make a configuration tiny.

    Args:
        ids: ids of the special tokens so far, by name. Nested configurations repeat some of the names.
    """
    found: dict[str, Any] = {}
    n_layers = getattr(config, "num_hidden_layers", None)
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        if isinstance(value, PreTrainedConfig):
            inner = _shrunk(value, size, ids)
            found[name] = {"model_type": value.model_type, **inner, **HELP.get(type(value).__name__, {})}
        elif value is None:
            if name in _OFTEN_NONE:
                found[name] = _tiny(name, 1 << 30, size)
        elif name == "vocab_size":
            found[name] = VOCABULARY
        elif _is_token_id(name, value):
            found[name] = _SPECIAL_IDS[name] if name in _SPECIAL_IDS else ids.setdefault(name, 3 + len(ids))
        elif name in ("rope_parameters", "rope_scaling"):
            found[name] = _rope(value, size)
        elif _one_a_layer(name, value, n_layers):
            found[name] = _two_unlike(value)
        elif _is_sizes(value):
            shrunk = _tiny(name, value, size)
            if shrunk != value:
                found[name] = shrunk
    return found


def _rope(value: Any, size: Size) -> Any:
    """Return rotary parameters whose sections (time, height, width) add up to half of a head's dimension."""
    if not isinstance(value, Mapping):
        return value
    third = size.head_dim // 2 // 3
    sections = {"mrope_section": [size.head_dim // 2 - 2 * third, third, third]}
    return {k: sections.get(k, _rope(v, size)) for k, v in value.items()}


def _one_a_layer(name: str, value: Any, n_layers: int | None) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == n_layers
        and n_layers > 2
        and (isinstance(value[0], str) or bool(re.search("layer|window|pattern|type", name)))
    )


def _two_unlike(layers: Sequence[Any]) -> list[Any]:
    """Return the entries of two layers, of different kinds if there are any."""
    return [layers[0], next((layer for layer in layers if layer != layers[0]), layers[0])]


def _is_token_id(name: str, value: Any) -> bool:
    """Return whether this is the id of a special token that must be moved into the small vocabulary."""
    if not _TOKEN_ID.fullmatch(name) or re.search("ignore|layer|feature|task", name) or isinstance(value, bool):
        return False
    return name in _SPECIAL_IDS or (isinstance(value, int) and value > EOS)


def _is_sizes(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and all(map(_is_sizes, value))
    return isinstance(value, int) and not isinstance(value, bool)


def _tiny(name: str, value: Any, size: Size) -> Any:
    rule = next((most for pattern, most in _RULES if re.fullmatch(pattern, name)), None)
    return value if rule is None else _at_most(value, rule(size))


def _at_most(value: Any, most: int) -> Any:
    return [_at_most(v, most) for v in value] if isinstance(value, list | tuple) else min(value, most)


def _settle(config: PreTrainedConfig, switches: Mapping[str, Any]) -> None:
    """Turn off randomness and caches, and set the ids of special tokens."""
    config.use_cache = False
    for name, number in _SPECIAL_IDS.items():
        setattr(config, name, number)
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            if name == "decoder":  # without this it attends to later tokens and not to the encoder
                value.is_decoder = value.add_cross_attention = True
            _settle(value, switches)
        elif name in switches:
            setattr(config, name, switches[name])
        elif name == "apply_spec_augment":
            config.apply_spec_augment = False
        elif _CHANCE.search(name) and isinstance(value, list | tuple):
            setattr(config, name, [0.0] * len(value))
        elif _CHANCE.search(name) and isinstance(value, float | int) and not isinstance(value, bool):
            setattr(config, name, type(value)(0))


def tiny_model(model_class: type[nn.Module], config: PreTrainedConfig) -> nn.Module:
    """Return the model in float64, without dropout, and with perturbed weights.

    With the initial weights of a model, its outputs hardly depend on the row.

    Raises:
        ValueError: if the model is not tiny.
    """
    with torch.device("meta"):
        n = sum(p.numel() for p in model_class(config).parameters())
    if n > _MOST_PARAMETERS:
        raise ValueError(f"the smallest one has {n:,} parameters")
    torch.manual_seed(0)
    model = model_class(config).double()
    for module in model.modules():  # probabilities that do not come from the configuration
        for name, value in vars(module).items():
            if isinstance(value, float) and (_CHANCE.search(name) or isinstance(module, _DROPOUTS)):
                setattr(module, name, 0.0)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=draw, dtype=torch.float64) * (0.1 if p.ndim > 1 else 0.05)
            p.copy_(p.nan_to_num(0.0, 0.0, 0.0).clamp(-10, 10) + noise)  # some weights are uninitialized memory
    return model
