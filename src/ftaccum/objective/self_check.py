"""Measure how to count a loss and whether accumulating it is exact, before training."""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from ..runtime.log import logger
from ..runtime.module_attributes import preserve_attributes
from ..runtime.process_group import of_main_process
from ..runtime.state_guards import inspection_mode
from ..runtime.written_weights import WrittenWeights
from .deterministic_forward import DeterministicMode
from .forward import Forward
from .hidden_state import HiddenState, find_hidden_state
from .item_counts import CountItems, ItemCounter
from .labelled_check import candidate_head
from .labelled_head import LabelledHead
from .measured_counts import chosen_counts
from .measurement import Measurement
from .model_forward import ModelForward
from .moving_weights import find_moving_weights
from .objective import Objective
from .own_loss import LOSS
from .perturbation import float32_weights, has_narrow_weights
from .probe import EXPLAINED, EXPLAINED_IN_HALF
from .report import ExactnessReport
from .router_check import find_router_terms
from .sample import PAIRS, SINGLE, Sample
from .self_check_cache import Verdict, VerdictCache
from .short_check import confirmed, found_in_losses, length_of_longest
from .structure import terms_of


def measured_objective(
    model: nn.Module,
    forward: Forward,
    sample: Sample,
    *,
    item_counter: ItemCounter,
    count_items: CountItems | None = None,
    sums: bool = False,
    balances_window: bool = False,
    cache: VerdictCache | None = None,
    is_audited: bool = False,
    tries_labels: bool = False,
) -> Objective:
    """Decide how to count the loss, and measure whether accumulating it is exact.

    The count is the user's `count_items`, or follows from what is known about the loss, or is measured. In any case,
    measure whether it explains the loss, in eval mode and in train mode, and whether padding matters.

    This takes some twenty forward passes of at most four rows, or about eight if a short check is enough. No parameter
    gets a gradient; weights, modes, random-number states and buffers are restored. All processes use the main process's
    findings.

    Args:
        model: the model on its device, before it is wrapped.
        forward: its forward pass with the loss.
        sample: the rows to measure on.
        item_counter: the ways to count.
        count_items: the user's way to count, if there is one.
        sums: whether the loss is given as a sum instead of a mean.
        balances_window: whether to compute the balance of a mixture of experts over all tokens of a window, if its
            formula is known.
        cache: where to look for an earlier verdict, to be confirmed instead of measured, and to keep this one.
        is_audited: whether the audit of the first update will compare gradients. If so, losses alone confirm a verdict,
            and may be enough without one.
        tries_labels: whether to confirm an earlier verdict with logits at labelled positions only, if it says that they
            are enough. If the rows confirm it, `forward` computes only these from then on.
    """
    with inspection_mode(model, *forward.modules):
        measurement = Measurement(model, forward, sample, item_counter, count_items, sums)
        report = _cached(measurement, cache, is_audited=is_audited, tries_labels=tries_labels)
        if report is None and is_audited:
            report = _found_in_losses(measurement, cache)
        if report is None:
            measurement, report = _measured(measurement)
            logger.debug(report.describe_measurement())
            _keep(measurement, report, cache)
    report, forward.factors = of_main_process((report, forward.factors))
    measurement = replace(measurement, terms=measurement.terms or tuple(report.ways))
    chosen = chosen_counts(measurement.ways(), report.ways, report.own_rules)
    window = find_router_terms(model, forward, sample) if balances_window and report.parts else None
    if window is not None:
        report = report.over_whole_window(window.names, window.padding)
    return Objective(forward, lambda batch: {term: count(batch) for term, count in chosen.items()}, report, window)


def _cached(
    measurement: Measurement, cache: VerdictCache | None, *, is_audited: bool, tries_labels: bool
) -> ExactnessReport | None:
    """Return the report of an earlier verdict, if these rows confirm it. The main process decides."""
    verdict = of_main_process(None if cache is None else cache.find())
    if verdict is None:
        return None
    head = _labelled_head(measurement, verdict) if tries_labels else None
    report = of_main_process(confirmed(measurement, verdict, head, with_gradient=not is_audited))
    if report is not None:
        measurement.forward.labelled_head = head
        logger.debug(f"The rows confirm the cached verdict of the self-check: a mean over {report.ways[LOSS]}.")
    return report


def _found_in_losses(measurement: Measurement, cache: VerdictCache | None) -> ExactnessReport | None:
    """Return the report that a few losses show, and keep its verdict. The main process decides."""
    report = of_main_process(found_in_losses(measurement))
    if report is not None:
        logger.debug(f"{report.describe_measurement()} No other way to count explains the losses of a few passes.")
        _keep(measurement, report, cache)
    return report


def _labelled_head(measurement: Measurement, verdict: Verdict) -> LabelledHead | None:
    """Return the head that an earlier run has used, if nothing speaks against it; else None."""
    forward = measurement.forward
    if not verdict.at_labels or not isinstance(forward, ModelForward):
        return None
    ignore_index, together = measurement.item_counter.ignore_index, measurement.sample.together
    head = candidate_head(measurement.model, forward, together, verdict.way, ignore_index)
    if not isinstance(head, LabelledHead):
        return None
    head.gives_logits = verdict.gives_logits
    return head


def _keep(measurement: Measurement, report: ExactnessReport, cache: VerdictCache | None) -> None:
    """Write the verdict to the cache, if it is a plain one of a loss that the outputs name."""
    verdict = Verdict.of(report, length_of_longest(measurement))
    is_named = measurement.forward.loss_place is None and not measurement.forward.has_spans
    whole = measurement.mode is None or measurement.mode.whole
    if cache is not None and verdict is not None and is_named and whole and tuple(report.ways) == (LOSS,):
        cache.keep(verdict)


def _measured(measurement: Measurement) -> tuple[Measurement, ExactnessReport]:
    """Return the complete measurement and its report."""
    model, modules = measurement.model, measurement.forward.modules
    in_longest = measurement.run_longest()
    try:
        with float32_weights(model, *modules) as widened:
            found = _begun(replace(measurement, prepared=widened), in_longest, EXPLAINED)
            return found, found.report(EXPLAINED)
    except RuntimeError:  # memory ran out, or the model needs its own type
        if not has_narrow_weights(model):
            raise
    found = _begun(measurement, in_longest, EXPLAINED_IN_HALF)
    return found, found.report(EXPLAINED_IN_HALF)


def _begun(measurement: Measurement, in_longest: Sequence[str], tolerance: float) -> Measurement:
    """Run the rows in one batch, with the model's own weights, and return the measurement with the results.

    Args:
        in_longest: the terms of the loss of the longest row.
    """
    known = dict.fromkeys(in_longest, 0.0)
    first, outputs = measurement.first_pass()
    found: dict[str, float] = known | first

    def run() -> dict[str, float]:
        nonlocal outputs
        means, outputs = measurement.outputs(measurement.sample.together)
        losses = {term: mean.item() for term, mean in means.items()}
        found.update(losses)
        return losses

    def run_once() -> list[float]:
        with preserve_attributes(measurement.model, *measurement.forward.modules):
            return list(run().values())

    modules, written = measurement.forward.modules, WrittenWeights(measurement.model, *measurement.forward.modules)
    mode, agree = DeterministicMode.of_pair(measurement.model, run, modules, tolerance)
    hidden = HiddenState() if agree else find_hidden_state(measurement.model, modules, run, tolerance)
    if not hidden.off:
        again = lambda: {
            term: mean.item() for term, mean in measurement.outputs(measurement.sample.together)[0].items()
        }
        hidden = find_moving_weights(measurement.model, modules, again, written.found())
    mode = mode or DeterministicMode.of(measurement.model, run_once, modules)
    terms = terms_of(found, measurement.sample.together, measurement.count_items)
    begun = replace(measurement, terms=terms, first=first, mode=mode, hidden=hidden)
    # The user's count is of the whole loss, and so is the count that divides a sum.
    if measurement.count_items is None and not measurement.sums and measurement.forward.may_have_parts(outputs):
        few = measurement.sample.separate(measurement.sample.together, PAIRS if mode.moving else SINGLE)
        with mode.passes():
            measurement.forward.take_apart(measurement.model, [measurement.on_device(batch) for batch in few])
    return begun
