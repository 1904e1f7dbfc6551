"""The user's loss over a window: its value, and its gradients by rows and by parameters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError
from ..runtime.gradient_hooks import suspend_tensor_hooks
from ..runtime.memory import AgreedOutOfMemoryError, is_out_of_memory
from ..runtime.process_group import ProcessGroup
from ..runtime.state_guards import preserve_rng, seed_all
from ..runtime.tensor_collectives import gather_rows
from .forward import scalars_of
from .item_counts import Batch
from .normalizer import Means, widened
from .window_loss import WindowLoss
from .window_rows import MicroBatches, check_equal, joined
from .window_terms import CollectedValues, ComputedTerms, Values, WindowPart, WindowTerms


class RowTerms(WindowTerms):
    """The terms of a loss that reads values of all rows of a window, such as their embeddings."""

    def __init__(self, names: Sequence[str], window_loss: WindowLoss, model: nn.Module) -> None:
        """Args:
        model: the model on its device, before it is wrapped. The loss may read its parameters itself.
        """
        self.names = tuple(names)
        self._window_loss, self._model = window_loss, model
        self._device = next(model.parameters()).device

    def read(self, outputs: Any, batch: Batch) -> Values:
        return self._window_loss.read(outputs, batch)

    def compute(
        self, passes: Sequence[CollectedValues], process_group: ProcessGroup, seed: Sequence[int]
    ) -> "ComputedRows":
        own = MicroBatches.of(passes)
        shares = process_group.gather(own)
        check_equal([row for share in shares for row in share.rows])
        values = gather_rows(joined(passes), [share.specs for share in shares], process_group, self._device)
        places = [place for share in shares for place in share.places]
        order = torch.tensor(places).argsort().to(self._device)
        means, by_row, by_parameter = self._agreed_gradients(values, order, process_group, seed)
        finite = torch.stack([value.isfinite().all() for value in WindowLoss.inputs(values).values()]).all()
        back = torch.tensor(own.places, dtype=torch.long).to(self._device)
        sizes = [len(each.places) for each in passes]
        by_pass = {name: gradient[back].split(sizes) for name, gradient in by_row.items()}
        return ComputedRows(means, len(places), sizes, finite, by_pass, by_parameter)

    def _agreed_gradients(
        self, values: Values, order: Tensor, process_group: ProcessGroup, seed: Sequence[int]
    ) -> "tuple[Means, dict[str, Tensor], list[tuple[nn.Parameter, Tensor]]]":
        """Return `_gradients` of the values in this order.

        Raises:
            AgreedOutOfMemoryError: on all processes, if memory runs out on one of them.
        """
        found, failure = None, None
        with preserve_rng():
            seed_all(*seed)  # all processes draw the same numbers, however the window is cut
            try:
                found = self._gradients({name: value[order] for name, value in values.items()})
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                failure = error
        if process_group.any(failure is not None):
            raise AgreedOutOfMemoryError(_out_of_memory(len(order), failure)) from failure
        assert found is not None, "memory has run out on no process"
        return found

    def _gradients(self, values: Values) -> tuple[Means, dict[str, Tensor], list[tuple[nn.Parameter, Tensor]]]:
        """Return the loss of the window, its gradient by each input, rows first, and that by each parameter."""
        inputs = {name: value for name, value in WindowLoss.inputs(values).items() if value.is_floating_point()}
        inputs = {name: value.detach().requires_grad_() for name, value in inputs.items()}
        means = scalars_of(self._window_loss.loss({**values, **inputs}))
        if set(means) != set(self.names):
            raise DataError(
                f"`loss_fn` returns the terms {sorted(means)} for an update, but {sorted(self.names)} in the check "
                "before training. Return the same terms for any rows, and 0 for one that does not apply to them."
            )
        total = torch.stack([widened(mean) for mean in means.values()]).sum()
        # A loss may hold the model, or its parameters, as attributes. Each of them counts once.
        all_parameters = dict.fromkeys((*self._model.parameters(), *self._window_loss.parameters()))
        parameters = [p for p in all_parameters if p.requires_grad]
        found: Sequence[Tensor | None] = [None] * (len(inputs) + len(parameters))
        if total.requires_grad:
            with suspend_tensor_hooks(parameters):  # they run in the backward pass of the second pass
                found = torch.autograd.grad(total, [*inputs.values(), *parameters], allow_unused=True)
        by_row = dict(zip(inputs, found, strict=False))
        by_parameter = zip(parameters, found[len(inputs) :], strict=True)
        return (
            {term: mean.detach() for term, mean in means.items()},
            {name: gradient for name, gradient in by_row.items() if gradient is not None},
            [(p, gradient) for p, gradient in by_parameter if gradient is not None],
        )


@dataclass(frozen=True)
class ComputedRows(ComputedTerms):
    """The loss of a window and its gradient by each row.

    Attributes:
        n_rows: the number of rows of the window.
        sizes: the number of rows of each micro-batch of this process.
        finite: whether all inputs of the loss are finite (a scalar).
        by_pass: the gradient by each input of the loss, for the rows of each micro-batch of this process.
        by_parameter: the gradient by each parameter that the loss reads itself.
    """

    means: Means
    n_rows: int
    sizes: Sequence[int]
    finite: Tensor
    by_pass: Mapping[str, Sequence[Tensor]]
    by_parameter: Sequence[tuple[nn.Parameter, Tensor]]

    def part(self, index: int, values: Values) -> WindowPart:
        products = [
            (widened(values[name]) * widened(gradients[index])).sum() for name, gradients in self.by_pass.items()
        ]
        share = torch.stack([widened(mean) for mean in self.means.values()]).sum() * (self.sizes[index] / self.n_rows)
        surrogate = torch.stack(products).sum() if products else self.zero(values)
        return WindowPart(self._blamed(share, values), surrogate)

    def zero(self, values: Values) -> Tensor:
        names = self.by_pass or WindowLoss.inputs(values)  # the loss of this window may be a constant
        parts = [widened(values[name]).sum() * 0 for name in names if values[name].requires_grad]
        return torch.stack(parts).sum() if parts else torch.zeros((), device=self.finite.device)

    def _blamed(self, share: Tensor, values: Values) -> Tensor:
        """Return a part of a loss that is not finite as 0, if inputs of other micro-batches are at fault."""
        own = torch.stack([value.isfinite().all() for value in WindowLoss.inputs(values).values()]).all()
        return torch.where(share.isfinite() | self.finite | ~own, share, 0.0)

    def of_parameters(self) -> Tensor | None:
        products = [(widened(p) * widened(gradient)).sum() for p, gradient in self.by_parameter]
        return torch.stack(products).sum() if products else None


def _out_of_memory(n_rows: int, error: Exception | None) -> str:
    scores = 4 * n_rows**2 / 2**20
    return (
        f"Memory ran out while `loss_fn` computed the loss of all {n_rows:,} rows of an update together. Smaller "
        f"micro-batches do not help. A matrix of {n_rows:,} × {n_rows:,} scores takes {scores:,.0f} MiB in float32, "
        "and a loss holds several of that size. Lower the effective batch, or let `loss_fn` compute it in parts. All "
        "earlier updates are complete." + ("" if error is None else f" The device reported: {error}")
    )
