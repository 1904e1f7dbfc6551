"""Estimate the activations of a Transformer: what autograd keeps of a forward pass for the backward pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

_INTERMEDIATE = ("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "ffn_hidden_size", "hidden_dim", "n_inner")
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}  # kinds of layers
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_FLOAT32 = 4


@dataclass(frozen=True)
class BlockShape:
    """The numbers that decide how much a block of a Transformer keeps for each token.

    Attributes:
        hidden: the width of the residual stream.
        queries: heads × width of a head.
        keys: heads of keys and values × width of a head.
        heads: the heads of attention.
        intermediate: the width inside the feed-forward layer.
        is_gated: whether a third matrix gates it, as in SwiGLU.
        has_gelu_of_steps: whether its activation is GPT-2's GELU, which Transformers computes in steps.
        has_rms_norm: whether its norms are RMSNorm as Transformers computes it, in float32 steps.
        has_dropout: whether it drops out what attention and the feed-forward layer return.
    """

    hidden: int
    queries: int
    keys: int
    heads: int
    intermediate: int
    is_gated: bool
    has_gelu_of_steps: bool
    has_rms_norm: bool
    has_dropout: bool

    @classmethod
    def of(cls, config: Any, blocks: Sequence[nn.Module]) -> "BlockShape":
        """Return the shape of the blocks of a model with this config.

        Raises:
            ValueError: if the formula does not hold for this kind of model. The message is a clause that says why.
        """
        if reason := _reason_against(config, blocks):
            raise ValueError(reason)
        hidden, heads = _number(config, "hidden_size"), _number(config, "num_attention_heads")
        width = _number(config, *_INTERMEDIATE)
        if width is None and hasattr(config, "n_inner") and hidden:  # GPT-2's config stands for four times the width
            width = 4 * hidden
        if hidden is None or heads is None or width is None:
            raise ValueError("its config names no width, heads and feed-forward width of a Transformer")
        head = _number(config, "head_dim") or hidden // heads
        names = [type(module).__name__ for module in blocks[0].modules()]
        return cls(
            hidden,
            heads * head,
            (_number(config, "num_key_value_heads") or heads) * head,
            heads,
            width,
            sum(_widths(p.shape, width) for p in blocks[0].parameters() if p.ndim == 2) > 2,
            any("NewGELU" in name for name in names),
            any("RMSNorm" in name for name in names),
            any(isinstance(module, nn.Dropout) and module.p > 0 for module in blocks[0].modules()),
        )


def _reason_against(config: Any, blocks: Sequence[nn.Module]) -> str | None:
    """Return why the formula does not hold for a model, as a clause, or None."""
    kinds = set(getattr(config, "layer_types", None) or ())
    reasons = {
        "the model has no list of blocks": not blocks,
        "the model is an encoder and a decoder, whose lengths differ": getattr(config, "is_encoder_decoder", False),
        "the model reads more than text": config.get_text_config() is not config,
        "the model is a mixture of experts": any(getattr(config, name, None) for name in _EXPERTS),
        "its blocks are of several kinds": len({type(block) for block in blocks}) > 1 or kinds - _ATTENTION,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _number(config: Any, *names: str) -> int | None:
    """Return the first of these numbers that a config has."""
    found = (getattr(config, name, None) for name in names)
    return next((number for number in found if isinstance(number, int) and number), None)


def _widths(shape: Any, width: int) -> int:
    """Return how many feed-forward matrices a matrix stands for: two if it joins gate and input."""
    return 2 if 2 * width in shape else int(width in shape)


@dataclass(frozen=True)
class Activations:
    """What autograd keeps of one micro-batch, in bytes.

    Attributes:
        block: of one block.
        boundary: the input of one block, which is all that gradient checkpointing keeps of it.
        n_blocks: the number of blocks.
        head: of the last norm, and of the layer that computes the logits.
    """

    block: int
    boundary: int
    n_blocks: int
    head: int

    def total(self, *, checkpointing: bool) -> int:
        """Return the most bytes at one moment, at the start of the backward pass.

        With checkpointing, these are the inputs of all blocks, and one block that runs again.
        """
        blocks = self.boundary * self.n_blocks + self.block if checkpointing else self.block * self.n_blocks
        return blocks + self.head


def estimate_activations(
    shape: BlockShape, n_blocks: int, tokens: int, weight_size: int, *, autocast: bool, is_language_model: bool
) -> Activations:
    r"""Estimate what autograd keeps of a forward pass of a Transformer with PyTorch's fused attention.

    The count follows Korthikanti et al. 2022 (arXiv:2205.05198, section 4.1), who find 34·s·b·h bytes for a block with
    16-bit numbers besides attention's s × s matrices, which fused attention does not store. Their terms, with e bytes
    a number, w bytes a number of the residual stream, and d = heads × width of a head, are, for each token:

    .. math:: 2 n + c_a h e + (2 d + 2 d_{kv}) e + 4 a + c_f h e + m f e + 2 h \cdot [\text{dropout}]

    - n: a norm keeps its input, h·w. Transformers' RMSNorm keeps it in float32, and once more divided by its size:
      h·(4 + w).
    - the inputs of attention and of the feed-forward layer. Autocast copies them for each of the c_a = 3 and c_f = 2
      matrices (1 if not gated) that take them; else they are one tensor, c = 1.
    - queries, keys, values and the result of attention, and the logarithm of its sum for each of a heads in float32.
    - the feed-forward layer: what goes into the activation and into the last matrix, m = 2; a gated one also keeps the
      gate's activation and the other factor, m = 4. GPT-2's GELU keeps three numbers of its steps, m = 5.
    - a mask of one byte a number for each of two dropouts.

    With checkpointing, see their section 5: only the input of each block, 2·s·b·h bytes in 16 bits.

    Args:
        shape: the shape of a block.
        n_blocks: the number of blocks.
        tokens: the positions of a micro-batch, padding included.
        weight_size: the bytes of a number of the weights.
        autocast: whether the forward pass runs under autocast to 16 bits.
        is_language_model: whether a layer makes logits over a vocabulary from the last hidden states. The logits
            themselves are `logits_bytes`.
    """
    e, w = (2 if autocast else weight_size), weight_size
    norm = shape.hidden * (_FLOAT32 + w if shape.has_rms_norm else w)
    n_copied = 2 if shape.is_gated else 1
    inputs = (3 + n_copied if autocast and w > e else 2) * shape.hidden * e
    attention = (2 * shape.queries + 2 * shape.keys) * e + _FLOAT32 * shape.heads
    n_widths = 4 if shape.is_gated else 5 if shape.has_gelu_of_steps else 2
    feed_forward = n_widths * shape.intermediate * e
    masks = 2 * shape.hidden if shape.has_dropout else 0
    head = norm + (shape.hidden * e if is_language_model else 0)
    block = 2 * norm + inputs + attention + feed_forward + masks
    return Activations(block * tokens, shape.hidden * w * tokens, n_blocks, head * tokens)


def logits_bytes(vocabulary: int, tokens: int, size: int) -> int:
    """Return the bytes of logits: the model's output, and in float32 their log-softmax and its gradient.

    Args:
        vocabulary: the number of logits of a token.
        tokens: the positions of a micro-batch.
        size: the bytes of a number of the output.
    """
    return vocabulary * tokens * (size + 2 * _FLOAT32)
