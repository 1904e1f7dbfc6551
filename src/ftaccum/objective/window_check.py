"""The check of a loss over the window before training: what it reads of each row must depend on that row alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..errors import SettingsError
from ..runtime.gradient_hooks import gradient_hooks
from ..runtime.module_attributes import ModuleAttributes, preserve_attributes
from ..runtime.process_group import of_main_process
from ..runtime.state_guards import inspection_mode, preserve_buffers
from ..runtime.written_weights import WrittenWeights
from .batch_changes import fresh_batch_for
from .deterministic_forward import DeterministicMode
from .equal_draws import equal_draws
from .forward import scalars_of, total_of
from .gradient_check import GradientDifference
from .hidden_state import find_hidden_state
from .item_counts import Batch, rows_of
from .loss_memory import LossMemory
from .moving_weights import find_moving_weights
from .objective import Objective
from .perturbation import float32_weights, has_narrow_weights, perturb_norms
from .probe import EXPLAINED, EXPLAINED_IN_HALF, Explanation
from .report import ExactnessReport, InTraining
from .row_terms import RowTerms
from .sample import PAIRS, Sample
from .train_mode import complaint_of_one_row
from .window_forward import WindowForward
from .window_gradient import WindowGradientCheck
from .window_loss import WindowLoss
from .window_report import WindowReport
from .window_terms import Values


def window_objective(model: nn.Module, forward: WindowForward, sample: Sample) -> Objective:
    """Return the objective of a loss over the window, after checking what the loss reads of a few rows.

    This takes some ten forward passes of at most four rows. Weights, gradients, modes, generators and buffers are
    restored. All processes use the main process's findings.

    Args:
        model: the model on its device, before it is wrapped.
        sample: the rows to check on.

    Raises:
        SettingsError: if the loss reads nothing that can be trained, or a row's values depend on other rows.
        DataError: if the inputs of the loss are not tensors with one entry per row.
    """
    forward.window_loss.find_columns([sample.together, sample.longest, *sample.own_width])
    check = _Check(model, forward, sample)
    _refuse_other_rows(sample)
    with inspection_mode(model, *forward.modules):
        try:
            with float32_weights(model, *forward.modules) as widened:
                report = replace(check, prepared=widened).report(EXPLAINED)
        except RuntimeError:  # memory ran out, or the model needs its own type
            if not has_narrow_weights(model):
                raise
            report = check.report(EXPLAINED_IN_HALF)
    report = of_main_process(report)
    names = list(report.ways)
    return Objective(
        forward, lambda batch: dict.fromkeys(names, rows_of(batch)), report, RowTerms(names, forward.window_loss, model)
    )


def _refuse_other_rows(sample: Sample) -> None:
    """Raise SettingsError if the collator returns several rows for one."""
    if (n := rows_of(sample.longest)) != 1:
        raise SettingsError(
            [
                f"`data_collator` returns {n} rows for a single one. With `loss_over='window'`, each row must stay one "
                "row of its batch. Return the parts of a row as columns, or as a second dimension of shape "
                f"(rows, {n}, …), and let the model flatten them."
            ]
        )


@dataclass(frozen=True)
class _Check:
    """The check of one loss; for the other fields see `window_objective`.

    Attributes:
        prepared: converts a batch to the types that the model takes.
    """

    model: nn.Module
    forward: WindowForward
    sample: Sample
    prepared: Callable[[Batch], Batch] = lambda batch: batch

    def report(self, tolerance: float) -> ExactnessReport:
        """Check the loss; differences up to `tolerance` count as rounding."""
        if ModuleAttributes(self.model, *self.forward.modules).hold_generators():
            raise SettingsError([_OWN_GENERATORS])
        self._read(self.sample.longest)  # it needs the most memory
        together = self._read(self.sample.together)
        padding = self._padding_difference(together, tolerance)
        names = list(scalars_of(self.forward.window_loss.loss(together)))
        written = WrittenWeights(self.model, *self.forward.modules)
        hidden = find_hidden_state(self.model, self.forward.modules, self._norms, tolerance)
        if not hidden.off:
            hidden = find_moving_weights(self.model, self.forward.modules, self._norms, written.found())
        self._check_gradient()
        in_training, gradient = self._in_training(names, tolerance)
        loss = {term: mean.item() for term, mean in scalars_of(self.forward.window_loss.loss(together)).items()}
        return ExactnessReport(
            ways=dict.fromkeys(names, "rows"),
            measured=False,
            shifts=False,
            explanation=Explanation(dict.fromkeys(names, 0.0), padding, adds_up=False),
            in_training=in_training,
            joint=loss,
            single_rows=loss,
            parts=(),
            tolerance=tolerance,
            sums=False,
            own_loss=False,
            gradient=gradient,
            gradient_hooks=gradient_hooks(self.model),
            hidden_state=hidden,
            window=WindowReport(
                self._read_parameters(together), LossMemory.measure(self.forward.window_loss, together)
            ),
        )

    def _on_device(self, batch: Batch) -> Batch:
        return self.prepared(fresh_batch_for(self.model, batch))

    def _read(self, batch: Batch) -> Values:
        """Return what the loss reads of a batch; attributes of modules are restored."""
        with preserve_attributes(self.model, *self.forward.modules), equal_draws(self.model, batch):
            return self.forward.values(self.model, self._on_device(batch))

    def _norms(self) -> dict[str, float]:
        """Return the norm of each input of the loss, for the rows in one batch."""
        inputs = WindowLoss.inputs(self._read(self.sample.together))
        return {name: value.double().norm().item() for name, value in inputs.items()}

    def _padding_difference(self, together: Values, tolerance: float) -> float:
        """Return how far the inputs change with the width that rows are padded to; 0 if that is rounding.

        Raises:
            SettingsError: if a row's inputs depend on the other rows, or their shapes depend on padding.
        """
        sample = self.sample
        equal_width = [] if sample.cut is None else sample.separate(sample.together)
        groups = (parts for parts in (equal_width, sample.own_width) if parts)
        differences = (_difference(together, [self._read(part) for part in parts]) for parts in groups)
        off, name = next(differences)
        if off > tolerance:
            raise SettingsError([_DEPENDS_ON_ROWS.format(name=WindowLoss.describe(name), off=f"{off:.1e}")])
        off, _ = next(differences, (0.0, ""))
        return off if off > tolerance else 0.0

    def _in_training(self, names: Sequence[str], tolerance: float) -> tuple[InTraining, GradientDifference]:
        """Measure whether train mode mixes rows, and if not, whether two passes give the gradient of one batch."""
        mode = DeterministicMode.of(self.model, lambda: list(self._norms().values()), self.forward.modules)
        terms = RowTerms(names, self.forward.window_loss, self.model)
        check = WindowGradientCheck(self.model, self.forward, terms, self.sample, self._on_device)
        with mode.passes():
            check.refuse_unknown_parameters()
        in_training = self._mixing(mode, names)
        if max(in_training.differences.values(), default=0.0) > tolerance:
            return in_training, GradientDifference()
        with mode.passes():
            return in_training, check.difference(10 * tolerance)

    def _mixing(self, mode: DeterministicMode, names: Sequence[str]) -> InTraining:
        """Measure whether modules such as batch norm mix rows in train mode, or move what the next pass depends on."""
        if not mode.moving:
            return InTraining(dict.fromkeys(names, 0.0))
        with mode.passes(), perturb_norms(mode.moving.values()):

            def from_the_start(batch: Batch) -> Values:
                with preserve_buffers(self.model, *mode.modules):
                    return self._read(batch)

            together = from_the_start(self.sample.together)
            separate = [from_the_start(part) for part in self.sample.separate(self.sample.together, PAIRS)]
            off, _ = _difference(together, separate)
            complaint = complaint_of_one_row(from_the_start, self.sample)
            drift, _ = _difference(self._read(self.sample.together), [self._read(self.sample.together)])
        return InTraining(dict.fromkeys(names, off), drift, mode.names_of_moving, complaint)

    def _check_gradient(self) -> None:
        """Raise SettingsError if no input of the loss has a gradient."""
        with torch.enable_grad():
            values = self.forward.values(self.model, self._on_device(self.sample.together))
        inputs = WindowLoss.inputs(values)
        if not any(value.requires_grad for value in inputs.values()):
            raise SettingsError(
                [
                    "With `loss_over='window'`, at least one input of the loss must depend on a trainable parameter, "
                    f"but none of {len(inputs)} does. Do not detach what `loss_inputs` returns, and check that the "
                    "model has trainable parameters."
                ]
            )

    def _read_parameters(self, values: Values) -> list[str]:
        """Return the names of the model's parameters that the loss reads itself."""
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        with torch.enable_grad():
            total = total_of(self.forward.window_loss.loss(values))
        if not total.requires_grad:
            return []
        found = torch.autograd.grad(total, [p for _, p in named], allow_unused=True)
        return [name for (name, _), gradient in zip(named, found, strict=True) if gradient is not None]


_OWN_GENERATORS = (
    "With `loss_over='window'`, each micro-batch runs twice and must draw the same random numbers, but the model or "
    "the loss holds a random number generator of its own. Draw from the global generators, which ftaccum replays."
)
_DEPENDS_ON_ROWS = (
    "With `loss_over='window'`, what the loss reads of a row must not depend on the other rows of its micro-batch, but "
    "{name} does: it differs by {off} (relative) between one batch and separate ones. Return the values of single rows "
    "from `loss_inputs`, such as their embeddings, and let `loss_fn` compare, center or normalize them over all rows."
)


def _difference(together: Values, separate: Sequence[Values]) -> tuple[float, str]:
    """Return the largest difference of any input between one batch and separate ones, relative to its largest number,
    and the name of that input.

    Raises:
        SettingsError: if an input has another shape, besides the number of rows.
    """
    worst, worst_name = 0.0, ""
    for name, whole in WindowLoss.inputs(together).items():
        parts = [values[name] for values in separate]
        for part in parts:
            if part.shape[1:] != whole.shape[1:]:
                raise SettingsError(
                    [
                        "With `loss_over='window'`, each input of the loss must have a fixed shape, besides the number "
                        f"of rows, but {WindowLoss.describe(name)} has the shapes {tuple(whole.shape)} and "
                        f"{tuple(part.shape)} in two batches. Let `loss_inputs` return one vector or number per row: "
                        "pool tokens where `attention_mask` is 1, and compute similarities of rows in `loss_fn`."
                    ]
                )
        off = _relative(torch.cat(parts), whole)
        worst, worst_name = max((worst, worst_name), (off, name))
    return worst, worst_name


def _relative(one: Tensor, other: Tensor) -> float:
    largest = other.double().abs().max().item() if other.numel() else 0.0
    return ((one.double() - other.double()).abs().max().item() / (largest or 1.0)) if one.numel() else 0.0
