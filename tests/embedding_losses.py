"""A model that embeds rows, and losses over the window for it, for tests on several processes."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from ftaccum import test_fine_tuning
from heads import _BERT, HEADS, all_in_float64
from sharded_runs import whole_weights
from training_passes import in_self_check

WIDTH = 6  # of an embedding
Hook = Callable[[nn.Module, int], Any]
ROWS = [{**row, "row": n} for n, row in enumerate(HEADS["regression, BERT"].rows(21))]


class Embedder(nn.Module):
    """Embeds each row twice. It has a scale that only a loss reads, a weight that nothing uses, and dropout by rows.

    Attributes:
        masks: the latest mask of dropout of each row, by its number.
    """

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.head = BertModel(BertConfig(**_BERT), add_pooling_layer=False), nn.Linear(16, WIDTH)
        self.ignored = nn.Linear(16, WIDTH)
        self.log_scale, self.unused = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.ones(3))
        self.config, self.dropout = self.encoder.config, dropout
        self.masks: dict[int, Tensor] = {}

    supports_gradient_checkpointing = True

    def gradient_checkpointing_enable(self, options: Any = None) -> None:
        self.encoder.gradient_checkpointing_enable(options)

    def gradient_checkpointing_disable(self) -> None:
        self.encoder.gradient_checkpointing_disable()

    def disable_input_require_grads(self) -> None:
        self.encoder.disable_input_require_grads()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, row: Tensor, labels: Any = None) -> Any:  # noqa: ARG002
        hidden = self.encoder(input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1)
        mean = (hidden * mask).sum(1) / mask.sum(1)
        if self.dropout and self.training:
            mean = mean * self._mask(row, mean)
        return {"mean": self.head(mean), "first": self.head(hidden[:, 0]), "ignored": self.ignored(mean), "row": row}

    def _mask(self, row: Tensor, like: Tensor) -> Tensor:
        if self.masks.get(-1) is not None:  # the masks are given
            return torch.stack([self.masks[n] for n in row.tolist()])
        mask = (torch.rand_like(like) > self.dropout) / (1 - self.dropout)
        self.masks |= dict(zip(row.tolist(), mask, strict=True))
        return mask


class InfoNCE(nn.Module):
    """Symmetric InfoNCE with a scale of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(
            torch.tensor(0.7 + int(os.environ.get("RANK", "0")) / 4)
        )  # the main process's counts

    def forward(self, inputs: Mapping[str, Tensor], batch: Any) -> Tensor:
        return info_nce(inputs, batch, self.log_scale)


def info_nce(inputs: Mapping[str, Tensor], _: Any, log_scale: Tensor | float = 0.7) -> Tensor:
    one, other = (F.normalize(inputs[name], dim=-1) for name in ("mean", "first"))
    scores = one @ other.T * torch.as_tensor(log_scale).exp()
    target = torch.arange(len(scores))
    return (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2


def cox(inputs: Mapping[str, Tensor], batch: Any) -> Tensor:
    risk, time = inputs["mean"].sum(-1), batch["labels"]
    order = time.argsort(descending=True)
    at_risk = risk[order].logcumsumexp(0)
    return (at_risk - risk[order])[::2].mean()


def by_place(inputs: Mapping[str, Tensor], batch: Any) -> Tensor:
    """Compare each row with the next one, and weight rows by their places."""
    mean, n = inputs["mean"], len(inputs["mean"])
    weights = torch.arange(1, n + 1, dtype=mean.dtype)
    assert batch["row"].shape == (n,)
    return ((mean * mean.roll(1, 0)).sum(-1) * weights).mean() + (mean.sum(-1) * weights).sum() / n**2


def in_terms(inputs: Mapping[str, Tensor], batch: Any) -> dict[str, Tensor]:
    return {"contrast": info_nce(inputs, batch), "risk": cox(inputs, batch) * 0.5}


class Drawing:
    """A loss that draws random weights of the rows."""

    def __init__(self) -> None:
        self.drawn: Tensor | None = None
        self.given: Tensor | None = None

    def __call__(self, inputs: Mapping[str, Tensor], _: Any) -> Tensor:
        n = len(inputs["mean"])
        self.drawn = torch.rand(n) if self.given is None else self.given
        return (inputs["mean"].sum(-1) * self.drawn).pow(2).mean() - (inputs["first"].mean(0) * self.drawn.sum()).sum()


def inputs_of(outputs: Any, _: Any) -> dict[str, Tensor]:
    return {"mean": outputs["mean"], "first": outputs["first"]}


def with_another(outputs: Any, _: Any) -> dict[str, Tensor]:
    """Return an input that no loss reads, too."""
    return {name: outputs[name] for name in ("mean", "first", "ignored")}


def _rank() -> int:
    # Not when this module is imported, which may be in the process that forks the others.
    return int(os.environ.get("RANK", "0"))


def trained(hook: Hook | None = None, loss: Any = None, inputs: Any = inputs_of, **arguments: Any) -> dict[str, Any]:
    """Train for six updates, and return the weights, those of the loss included, and the result.

    Args:
        hook: called on the second process before each training pass, with the model and the number of rows.
    """
    model = arguments.pop("model", None) or Embedder(arguments.pop("dropout", 0.0)).double()
    loss = loss or InfoNCE().double()

    def before(module: nn.Module, _: Any, kwargs: dict[str, Any]) -> None:
        if module.training and _rank() and not in_self_check():
            hook(module, len(kwargs["input_ids"]))

    if hook is not None:
        model.register_forward_pre_hook(before, with_kwargs=True)
    given = {"n_epochs": 2, "batch_size": 2, "effective_batch_size": 8, "audit": False, "gradient_clip_norm": 0.5}
    with all_in_float64():
        result = test_fine_tuning(
            model, train_data=ROWS, loss_fn=loss, loss_over="window", loss_inputs=inputs, validation_split=0.0,
            learning_rate=1e-2, progress=False, verbosity="quiet", **given | arguments,
        )  # fmt: skip
    of_loss = (
        {f"loss_fn.{name}": p.detach().clone() for name, p in loss.named_parameters()}
        if isinstance(loss, nn.Module)
        else {}
    )
    return {"weights": whole_weights(model) | of_loss, "result": result}
