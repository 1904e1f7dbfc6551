"""The prompts of a decoder-only model: the tokens before the first label, padded on the left."""

from collections.abc import Sequence

import torch
from torch import Tensor


def prompt_of(ids_L: Tensor, labels_L: Tensor | None, mask_L: Tensor | None, ignore_index: int) -> Tensor:
    """Return the tokens before the first label, without padding; all tokens if there are no labels.

    It is empty if the first token has a label.
    """
    if mask_L is not None:
        kept = mask_L.bool()
        ids_L, labels_L = ids_L[kept], None if labels_L is None else labels_L[kept]
    if labels_L is None:
        return ids_L
    labelled = (labels_L != ignore_index).nonzero().flatten()
    return ids_L[: int(labelled[0])] if len(labelled) else ids_L


def left_padded(prompts: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return prompts as one batch with an attention mask.

    The padding repeats a prompt's first token. A penalty on tokens that occur in the prompt then does not depend on the
    padding.
    """
    width = max(map(len, prompts))
    ids_BL = torch.stack([torch.cat([prompt[:1].expand(width - len(prompt)), prompt]) for prompt in prompts])
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=ids_BL.device)
    mask_BL = torch.arange(width, device=ids_BL.device) >= width - lengths[:, None]
    return {"input_ids": ids_BL, "attention_mask": mask_BL.long()}
