"""Models with blocks that only some rows use, and one whose blocks run twice."""

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from heads import CLASSES, VOCABULARY


class Skipping(nn.Module):
    """A model of four blocks. Each row skips one, by its first token. A pass skips a block that no row uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, CLASSES)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        mask_BL1 = attention_mask.unsqueeze(-1)
        hidden_BD = (self.embed(input_ids) * mask_BL1).sum(1) / mask_BL1.sum(1)
        logits_BC = self.head(self.run_blocks(hidden_BD, input_ids[:, 0]))
        loss = None if labels is None else nn.functional.cross_entropy(logits_BC, labels)
        return SequenceClassifierOutput(loss, logits_BC)

    def run_blocks(self, hidden_BD: Tensor, first_B: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            used_B = first_B % len(self.blocks) != number
            if used_B.any():
                hidden_BD = torch.where(used_B[:, None], block(hidden_BD).tanh(), hidden_BD)
        return hidden_BD


class Unused(Skipping):
    """A model whose third block no row uses."""

    def run_blocks(self, hidden_BD: Tensor, first_B: Tensor) -> Tensor:  # noqa: ARG002
        for number, block in enumerate(self.blocks):
            if number != 2:
                hidden_BD = block(hidden_BD).tanh()
        return hidden_BD


class Looping(Skipping):
    """A model that runs its blocks twice."""

    def run_blocks(self, hidden_BD: Tensor, first_B: Tensor) -> Tensor:  # noqa: ARG002
        for block in (*self.blocks, *self.blocks):
            hidden_BD = block(hidden_BD).tanh()
        return hidden_BD


class Turning(Skipping):
    """A model that runs its blocks in reverse order for rows of one kind, which a check on few rows cannot show.

    Attributes:
        turns: whether it does.
    """

    turns = False

    def run_blocks(self, hidden_BD: Tensor, first_B: Tensor) -> Tensor:  # noqa: ARG002
        for block in reversed(self.blocks) if self.turns else self.blocks:
            hidden_BD = block(hidden_BD).tanh()
        return hidden_BD


class Hooked(Skipping):
    """A model whose blocks have hooks of the user, which change inputs, outputs and gradients of a block that runs."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 1.5,))
            block.register_forward_hook(lambda _, __, output: output * 1.5)
