"""`ExactAccumulation` in hand-written loops, compared with one batch of a window's rows in plain PyTorch."""

import gc
import itertools
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from ftaccum import (
    DataError,
    ExactAccumulation,
    InexactLossError,
    InexactLossWarning,
    LossScaleWarning,
    PaddingWarning,
    SettingsError,
)
from ftaccum.runtime.accelerator import fresh_accelerate_state
from ftaccum.runtime.gradients.averaged import AveragedGradients
from ftaccum.runtime.loop_accelerator import LoopAccelerator
from heads import HEADS, Row, all_in_float64, one_batch, one_batch_gradient, relative_error
from test_readme import ROOT, blocks

FAST = {"causal LM, GPT-2", "masked LM, BERT", "sequence classification, GPT-2", "question answering, BERT"}
BERT = HEADS["masked LM, BERT"]
CUT = (3, 4, 8)  # micro-batches of 3, 1, 4 and 3 of 11 rows


def cut(rows: Sequence[Row], ends: Sequence[int] = CUT) -> list[dict[str, Tensor]]:
    return [one_batch(rows[i:j]) for i, j in itertools.pairwise((0, *ends, len(rows)))]


def gradient_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in HEADS])
def test_the_gradient_of_a_window_is_that_of_one_batch_for_every_kind_of_head(name: str) -> None:
    head = HEADS[name]
    model, rows = head.model(), head.rows(11)
    with all_in_float64():
        wanted, whole = one_batch_gradient(model, rows), model(**one_batch(rows)).loss.item()
        accumulation = ExactAccumulation(model, on_inexact="error")
        loss = accumulation.backward(cut(rows))
    assert relative_error(gradient_of(model), wanted) < 1e-12
    assert loss == pytest.approx(whole, rel=1e-12)
    assert sum(accumulation.means.values()) == loss


def test_dividing_the_loss_by_k_gives_another_gradient() -> None:
    model, rows = BERT.model(), BERT.rows(11)
    wanted = one_batch_gradient(model, rows)
    for batch in cut(rows):
        (model(**batch).loss / 4).backward()
    assert relative_error(gradient_of(model), wanted) > 0.05


def test_weights_after_several_updates_are_those_of_large_batches() -> None:
    def trained(backward: Callable[[nn.Module, slice], object]) -> dict[str, Tensor]:
        model = Net()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-4)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
        for _, part in itertools.product(range(2), (slice(0, 6), slice(6, 10))):
            backward(model, part)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        return {name: p.detach() - before[name] for name, p in model.named_parameters()}

    def exactly(model: nn.Module, part: slice) -> None:
        (window,) = accumulations.setdefault(model, new(model)).windows(loaded(X[part], LABELS[part]), 3)
        accumulations[model].backward(window)

    def divided(model: nn.Module, part: slice) -> None:
        for x, labels in (batches := loaded(X[part], LABELS[part])):
            (F.cross_entropy(model(x), labels) / len(batches)).backward()

    new = lambda model: ExactAccumulation(model, loss_fn=nn.CrossEntropyLoss())
    accumulations: dict[nn.Module, ExactAccumulation] = {}
    wanted = trained(lambda model, part: F.cross_entropy(model(X[part]), LABELS[part]).backward())
    assert relative_error(trained(exactly), wanted) < 1e-9
    assert relative_error(trained(divided), wanted) > 0.01


def test_windows_are_lists_of_k_batches_and_the_last_one_may_be_shorter() -> None:
    loader: Any = DataLoader(torch.arange(11), batch_size=2)  # type: ignore[arg-type]
    windows = list(ExactAccumulation(nn.Linear(1, 1)).windows(loader, 4))
    assert [[batch.tolist() for batch in window] for window in windows] == [
        [[0, 1], [2, 3], [4, 5], [6, 7]],
        [[8, 9], [10]],
    ]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh()).double()
        self.classes, self.value = nn.Linear(5, 3).double(), nn.Linear(5, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.classes(self.body(x))


def pairs(n: int = 10) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    x, labels = torch.randn(n, 4, generator=draw, dtype=torch.float64), torch.randint(3, (n,), generator=draw)
    labels[[1, 2, 5]] = -100
    return x, labels


X, LABELS = pairs()


def loaded(*columns: Tensor) -> list[Any]:
    """Return batches of pairs as a DataLoader makes them: lists of unequal numbers of labels that count."""
    return list(DataLoader(TensorDataset(*columns), batch_size=3))


LOSSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "mean": (nn.CrossEntropyLoss(), {}),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), {"reduction": "sum"}),
    "class weights": (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.2]).double()), {}),
    "count_items": (
        lambda outputs, labels: (
            F.cross_entropy(outputs, labels, reduction="none").sum() / (2 * (labels == 1).sum() + 1)
        ),
        {"count_items": lambda batch: 2 * (batch[1] == 1).sum() + 1},
    ),
    "ignore_index": (nn.CrossEntropyLoss(ignore_index=1), {}),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_plain_module_with_a_loss_of_its_own_is_exact(name: str) -> None:
    loss_fn, arguments = LOSSES[name]
    model, (x, labels) = Net(), pairs()
    if name == "ignore_index":
        labels[labels == -100] = 1
    if name == "count_items":
        labels[labels == -100] = 2
    whole = loss_fn(model(x), labels)
    if name == "sum":
        whole = whole / (labels != -100).sum()
    if name == "count_items":  # each micro-batch adds 1 to its count
        whole = F.cross_entropy(model(x), labels, reduction="sum") / (2 * (labels == 1).sum() + 4)
    whole.backward()
    wanted = gradient_of(model)
    model.zero_grad()
    accumulation = ExactAccumulation(model, loss_fn=loss_fn, on_inexact="ignore", **arguments)
    assert accumulation.backward(loaded(x, labels)) == pytest.approx(whole.item(), rel=1e-12)
    assert relative_error(gradient_of(model), wanted) < 1e-12


def test_named_losses_are_means_over_items_of_their_own() -> None:
    model, (x, labels) = Net(), pairs()
    values = torch.randn(10, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    values[[0, 1, 2, 4, 9]] = torch.nan  # the first and the last micro-batch have none

    def losses(outputs: Tensor, targets: dict[str, Tensor]) -> dict[str, Tensor]:
        known = ~targets["values"].isnan()
        found = {"class": F.cross_entropy(outputs, targets["labels"])}
        return found | ({"value": F.mse_loss(outputs[known, 0], targets["values"][known])} if known.any() else {})

    def items(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"class": (batch["labels"] != -100).sum(), "value": (~batch["values"].isnan()).sum()}

    wanted = losses(model(x), {"labels": labels, "values": values})
    sum(wanted.values()).backward()  # type: ignore[union-attr]
    gradient = gradient_of(model)
    model.zero_grad()
    batches = [{"x": x[i : i + 3], "labels": labels[i : i + 3], "values": values[i : i + 3]} for i in range(0, 10, 3)]
    accumulation = ExactAccumulation(model, loss_fn=losses, count_items=items)
    loss = accumulation.backward(batches)
    assert relative_error(gradient_of(model), gradient) < 1e-12
    assert accumulation.means == pytest.approx({term: mean.item() for term, mean in wanted.items()}, rel=1e-12)
    assert loss == pytest.approx(sum(accumulation.means.values()), rel=1e-12)
    assert "'value'" in accumulation.report


@pytest.mark.parametrize("name", ["labels", "kind", None], ids=["labels", "another column", "several targets"])
def test_a_task_that_some_rows_lack_is_measured_on_rows_with_and_without_it(name: str | None) -> None:
    model, (x, kinds) = Net(), pairs(12)
    prices = torch.randn(12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def losses(outputs: Tensor, targets: Any) -> dict[str, Tensor]:
        kind, price = (targets[name], targets["price"]) if name else targets
        return {"kind": F.cross_entropy(outputs, kind), "price": F.mse_loss(outputs[:, 0], price)}

    def batch(rows: slice) -> Any:
        columns = {name: kinds[rows], "price": prices[rows]}
        return {"x": x[rows]} | columns if name else ((x[rows],), (kinds[rows], prices[rows]))

    whole = batch(slice(12))
    sum(losses(model(x), whole if name else whole[1]).values()).backward()  # type: ignore[union-attr]
    wanted = gradient_of(model)
    model.zero_grad()
    ExactAccumulation(model, loss_fn=losses, on_inexact="error").backward(
        [batch(slice(n, n + 3)) for n in range(0, 12, 3)]
    )
    assert relative_error(gradient_of(model), wanted) < 1e-12


def test_a_micro_batch_without_loss_items_changes_nothing() -> None:
    model, (x, labels) = Net(), pairs()
    ignored = torch.full((2,), -100)
    accumulation = ExactAccumulation(model, loss_fn=nn.CrossEntropyLoss())
    loss = accumulation.backward([(x[:2], ignored), *loaded(x, labels), (x[2:4], ignored)])
    gradient = gradient_of(model)
    model.zero_grad()
    whole = F.cross_entropy(model(x), labels)
    whole.backward()
    assert loss == pytest.approx(whole.item(), rel=1e-12)
    assert relative_error(gradient, gradient_of(model)) < 1e-12


def test_a_window_without_loss_items_has_no_gradient_and_no_loss() -> None:
    model, (x, labels) = Net(), pairs()
    accumulation = ExactAccumulation(model, loss_fn=nn.CrossEntropyLoss())
    empty = [(x[:3], torch.full((3,), -100))]
    for report in ("not been measured yet", "labels (measured)"):  # as the first window, and later
        assert accumulation.backward(empty) != accumulation.backward([])  # both are NaN
        assert gradient_of(model) == {}
        assert report in accumulation.report
        assert accumulation.backward(loaded(x, labels)) > 0
        model.zero_grad()


def test_a_first_window_of_one_row_does_not_hide_that_a_loss_is_no_mean() -> None:
    accumulation = ExactAccumulation(Net(), loss_fn=lambda outputs, targets: F.mse_loss(outputs, targets).sqrt())
    targets = X[:, :3] * 2
    accumulation.backward([(X[:1], targets[:1])])
    with pytest.warns(InexactLossWarning, match="not a mean over items that can be counted"):
        accumulation.backward(loaded(X[1:8], targets[1:8]))
    assert [audit["audit"] for audit in accumulation.audits] == [1, 2]


def test_gradients_add_up_as_in_pytorch() -> None:
    model, (x, labels) = Net(), pairs()
    accumulation = ExactAccumulation(model, loss_fn=nn.CrossEntropyLoss())
    accumulation.backward(loaded(x, labels))
    once = gradient_of(model)
    accumulation.backward(loaded(x, labels))
    assert relative_error(gradient_of(model), {name: 2 * g for name, g in once.items()}) < 1e-12


def test_weights_may_be_frozen_and_unfrozen_between_windows() -> None:
    model, (x, labels) = Net(), pairs()
    model.body.requires_grad_(False)
    accumulation = ExactAccumulation(model, loss_fn=nn.CrossEntropyLoss())
    accumulation.backward(loaded(x, labels))
    assert gradient_of(model).keys() == {"classes.weight", "classes.bias"}
    model.zero_grad()
    model.body.requires_grad_(True)
    accumulation.backward(loaded(x, labels))
    found = gradient_of(model)
    model.zero_grad()
    F.cross_entropy(model(x), labels).backward()
    assert relative_error(found, gradient_of(model)) < 1e-12


def test_audits_follow_weights_that_are_frozen_and_unfrozen() -> None:
    model, (x, labels) = Net(), pairs()
    accumulation = ExactAccumulation(model, loss_fn=nn.CrossEntropyLoss())
    for update in range(1, 5):
        model.body.requires_grad_(update > 3)
        accumulation.backward(loaded(x, labels))
    assert [(audit["audit"], audit["error"] < 1e-12) for audit in accumulation.audits] == [(1, True), (4, True)]


@pytest.mark.parametrize("is_module", [True, False])
def test_audits_leave_the_gradients_of_weights_outside_the_model_alone(is_module: bool) -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(2)
            self.classes, self.unused = nn.Linear(3, 3).double(), nn.Parameter(torch.zeros(1))

        def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(self.classes(outputs), labels)

    model, head, (x, labels) = Net(), Head(), pairs()
    head(model(x), labels).backward()
    wanted = gradient_of(head)
    head.unused.grad = torch.ones(1)  # the gradient before the window, to which it adds
    loss_fn = head if is_module else lambda outputs, labels: head(outputs, labels)
    accumulation = ExactAccumulation(model, loss_fn=loss_fn)
    accumulation.backward(loaded(x, labels))
    found = gradient_of(head)
    assert found.pop("unused").item() == 1
    assert relative_error(found, {name: 2 * gradient for name, gradient in wanted.items()}) < 1e-12
    assert [audit["error"] < 1e-12 for audit in accumulation.audits] == [True]


def test_processes_average_the_gradients_of_a_loss_that_is_a_module() -> None:
    model, loss = Net(), nn.Linear(3, 3)
    loss.bias.requires_grad_(False)
    assert [*AveragedGradients(model, loss, model).parameters] == [*model.parameters(), loss.weight]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_disabled_gradients_are_refused(context: Callable[[], Any]) -> None:
    accumulation = ExactAccumulation(Net(), loss_fn=nn.CrossEntropyLoss())
    with context(), pytest.raises(SettingsError, match=r"needs gradients, but they are disabled.*no_grad"):
        accumulation.backward(loaded(X, LABELS))


def test_a_window_that_fails_leaves_no_gradient() -> None:
    model, (x, labels) = Net(), pairs()
    calls = itertools.count()

    def loss_fn(outputs: Tensor, labels: Tensor) -> Tensor:
        if armed and next(calls) == 1:
            raise ZeroDivisionError
        return F.cross_entropy(outputs, labels)

    armed = False
    accumulation = ExactAccumulation(model, loss_fn=loss_fn)
    accumulation.backward(loaded(x, labels))
    armed = True
    with pytest.raises(ZeroDivisionError):
        accumulation.backward(loaded(x, labels))
    assert gradient_of(model) == {}


def test_out_of_memory_names_a_remedy() -> None:
    model, (x, labels) = Net(), pairs()
    full = False

    def loss_fn(outputs: Tensor, labels: Tensor) -> Tensor:
        if full:
            raise torch.OutOfMemoryError("9 GiB are missing")
        return F.cross_entropy(outputs, labels)

    accumulation = ExactAccumulation(model, loss_fn=loss_fn)
    accumulation.backward(loaded(x, labels))
    full = True
    with pytest.raises(torch.OutOfMemoryError, match=r"smaller batches and a larger k.*9 GiB are missing"):
        accumulation.backward(loaded(x, labels))


def test_autocast_of_accelerate_acts_in_training_but_not_while_measuring() -> None:
    rows = BERT.rows(11)
    wanted = one_batch_gradient(BERT.model(), rows)
    with fresh_accelerate_state():
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        model, seen = BERT.model().float(), set()
        model.cls.register_forward_hook(  # type: ignore[union-attr, operator]
            lambda module, _, outputs: seen.add((module.training and torch.is_grad_enabled(), outputs.dtype))
        )
        accumulation = ExactAccumulation(accelerator.prepare(model), accelerator, on_inexact="error")
        accumulation.backward(cut(rows))
        forward = model.forward
        seen_while_measuring, _ = set(seen), seen.clear()
        model.zero_grad()
        accumulation.backward(cut(rows))
    assert (False, torch.bfloat16) not in seen_while_measuring
    assert seen == {(True, torch.bfloat16)}
    assert model.forward == forward
    assert relative_error(gradient_of(model), wanted) < 0.02


def test_a_gradient_scaler_scales_the_gradient_of_a_window() -> None:
    rows = BERT.rows(11)
    wanted, model = one_batch_gradient(BERT.model(), rows), BERT.model().float()
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=2.0**10), torch.optim.SGD(model.parameters(), lr=0.1)
    accumulation = ExactAccumulation(model, scaler=scaler, on_inexact="error")
    with torch.autocast("cpu", dtype=torch.float16):
        loss = accumulation.backward(cut(rows))
    assert relative_error({name: g / 2.0**10 for name, g in gradient_of(model).items()}, wanted) < 0.01
    scaler.unscale_(optimizer)
    assert relative_error(gradient_of(model), wanted) < 0.01
    scaler.step(optimizer)
    scaler.update()
    assert accumulation.backward(cut(rows)) < loss


class CountingScaler(torch.amp.GradScaler):
    """A gradient scaler that counts its steps."""

    n_steps = 0

    def step(self, optimizer: Any, *args: Any, **kwargs: Any) -> float | None:
        self.n_steps += 1
        return super().step(optimizer, *args, **kwargs)


def test_the_docs_skip_the_step_of_a_scaler_for_a_window_without_loss_items() -> None:
    block = next(b for b in blocks(ROOT / "docs" / "keep_your_loop.md", "python") if "scaler.step" in b)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [(X.float(), LABELS), (X.float(), LABELS.where(LABELS < -100, -100)), (X.float(), LABELS)]
    scaler = CountingScaler("cpu", init_scale=4.0)
    names: dict[str, Any] = {
        "net": model,
        "optimizer": optimizer,
        "pairs": batches,
        "scaler": scaler,
        "device": "cpu",
        "k": 1,
    }
    exec(compile(block, "docs", "exec"), names)
    assert scaler.n_steps == 2
    names["accumulation"].backward(batches[1:2])
    scaler.unscale_(optimizer)
    with pytest.raises(AssertionError, match="No inf checks"):  # so the docs have a reason
        scaler.step(optimizer)


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16")])
def test_autocast_of_torch_is_named_as_accelerate_names_it(dtype: torch.dtype, name: str) -> None:
    accelerator = LoopAccelerator(None, None, torch.device("cpu"))
    assert accelerator.mixed_precision == "no"
    with torch.autocast("cpu", dtype=dtype):
        assert accelerator.mixed_precision == name


def test_every_so_many_windows_are_audited_on_demand() -> None:
    accumulation = ExactAccumulation(Net(), loss_fn=nn.CrossEntropyLoss(), audit=2)
    for _ in range(4):
        accumulation.backward(loaded(X, LABELS))
    assert [audit["audit"] for audit in accumulation.audits] == [1, 3]


@pytest.fixture
def default_group() -> Iterator[None]:
    """A process group of this process alone, for DistributedDataParallel."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("default_group")
def test_the_hook_on_a_wrapper_goes_with_the_object() -> None:
    wrapped = DistributedDataParallel(Net())
    accumulation = ExactAccumulation(wrapped, loss_fn=nn.CrossEntropyLoss())
    accumulation.backward(loaded(X, LABELS))
    assert len(wrapped._forward_hooks) == 1
    del accumulation
    gc.collect()
    assert len(wrapped._forward_hooks) == 0


@dataclass
class Outputs:
    logits: Any


NESTED: dict[str, Callable[[Tensor], Any]] = {
    "tuples": lambda logits: (None, (logits, 3)),
    "a dataclass": lambda logits: Outputs([logits]),
    "a dict of dicts": lambda logits: {"all": {"logits": logits}},
}


@pytest.mark.usefixtures("default_group")
@pytest.mark.parametrize("nest", NESTED.values(), ids=NESTED)
def test_an_unfinished_forward_pass_is_seen_in_nested_outputs(nest: Callable[[Tensor], Any]) -> None:
    class Nested(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            kept[:] = [super().forward(x)]
            return nest(kept[0])

    kept: list[Tensor] = []
    wrapped = DistributedDataParallel(Nested(4, 3).double())
    accumulation = ExactAccumulation(
        wrapped, loss_fn=lambda _, labels: F.cross_entropy(kept[0], labels), count_items=lambda b: (b[1] != -100).sum()
    )
    wrapped(X)
    kept[0].sum().backward()
    accumulation.backward(loaded(X, LABELS))
    wrapped(X)
    with pytest.raises(SettingsError, match="no backward pass"):
        accumulation.backward(loaded(X, LABELS))


@pytest.mark.usefixtures("default_group")
def test_communication_hooks_are_refused() -> None:
    wrapped = DistributedDataParallel(Net())
    accumulation = ExactAccumulation(wrapped, loss_fn=nn.CrossEntropyLoss())
    wrapped.register_comm_hook(None, fp16_compress_hook)
    message = "has the communication hook fp16_compress_hook.*`register_comm_hook`"
    with pytest.raises(SettingsError, match=message):  # registered before the first window
        accumulation.backward(loaded(X, LABELS))
    with pytest.raises(SettingsError, match=message):
        ExactAccumulation(wrapped)


@pytest.mark.slow
def test_a_compiled_model_is_measured_eagerly_and_trains_compiled() -> None:
    model, runs = Net(), []
    F.cross_entropy(model(X), LABELS).backward()
    wanted = gradient_of(model)
    model.zero_grad()

    def backend(graph: Any, _: Any) -> Any:
        runs.append(torch.is_grad_enabled())
        return graph

    compiled: Any = torch.compile(model, backend=backend, dynamic=True)
    accumulation = ExactAccumulation(compiled, loss_fn=nn.CrossEntropyLoss(), on_inexact="error")
    accumulation.backward(loaded(X, LABELS))
    assert relative_error(gradient_of(model), wanted) < 1e-12
    assert set(runs) == {True}


def test_padding_that_counts_is_reported_and_rows_get_one_width() -> None:
    head = HEADS["masked LM, BERT"]
    rows, model = head.rows(11), head.model()

    def loss_fn(outputs: Any, _: dict[str, Tensor]) -> Tensor:
        return outputs.logits.logsumexp(-1).mean()  # a mean over all positions

    whole = loss_fn(model(**one_batch(rows)), one_batch(rows))
    whole.backward()
    wanted = gradient_of(model)
    model.zero_grad()
    accumulation = ExactAccumulation(model, loss_fn=loss_fn, count_items=lambda batch: len(batch["labels"]))
    with pytest.warns(PaddingWarning, match="Padding counts"):
        accumulation.backward(cut(rows))
    assert relative_error(gradient_of(model), wanted) < 1e-9
    with pytest.raises(SettingsError, match="padded on the left"):
        accumulation.backward([one_batch(rows, left=True)])


def test_a_loss_that_compares_rows_is_reported() -> None:
    x, labels = pairs()

    def backward(on_inexact: str) -> ExactAccumulation:
        model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
        accumulation = ExactAccumulation(model, loss_fn=nn.CrossEntropyLoss(), on_inexact=on_inexact)
        accumulation.backward([(x[:4], labels[:4]), (x[4:], labels[4:])])
        return accumulation

    with pytest.warns(InexactLossWarning, match="In train mode"):
        accumulation = backward("warn")
    assert "In train mode" in accumulation.report
    with pytest.raises(InexactLossError, match="In train mode"):
        backward("error")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward("ignore")


def test_a_loss_that_divides_by_k_is_reported() -> None:
    accumulation = ExactAccumulation(BERT.model(), loss_fn=lambda outputs, batch: own_loss(outputs, batch) / 4)
    with pytest.warns(LossScaleWarning, match="1/4 of the model's own loss"):
        accumulation.backward(cut(BERT.rows(11)))


def own_loss(outputs: Any, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(outputs.logits.flatten(0, 1), batch["labels"].flatten())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "bert"}, "`model` must be a torch.nn.Module, but is 'bert' instead"),
        ({"model": nn.Flatten()}, "`model` has no parameters to train. It is a Flatten"),
        ({"accelerator": "cpu"}, "`accelerator` must be an accelerate.Accelerator or None, but is 'cpu'"),
        ({"loss_fn": 3}, "`loss_fn` must be a function or None, but is 3"),
        ({"reduction": "none"}, "`reduction` must be 'mean' or 'sum', but is 'none'"),
        ({"count_items": 7}, "`count_items` must be a function or None, but is 7"),
        ({"loss_fn": nn.MSELoss}, "`loss_fn` must be a function or None, but is <class"),
        ({"on_inexact": "raise"}, "`on_inexact` must be 'error', 'warn' or 'ignore', but is 'raise'"),
        ({"audit": 0}, "`audit` must be True, False or a positive integer, but is 0"),
        ({"scaler": 2.0}, r"`scaler` must be a torch.amp.GradScaler or None, but is 2.0"),
        ({"model": nn.DataParallel(nn.Linear(4, 3))}, "runs in DataParallel.*`torchrun`"),
        (
            {"model": nn.Sequential(nn.Linear(4, 4), nn.DataParallel(nn.Linear(4, 3)))},
            "runs in DataParallel",
        ),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        ExactAccumulation(**{"model": nn.Linear(4, 3), **arguments})


def test_an_accelerator_that_does_not_see_all_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with fresh_accelerate_state():
        accelerator = Accelerator(cpu=True)
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(SettingsError, match=r"sees 1 of 2 processes.*Accelerator\(cpu=True\)"):
            ExactAccumulation(nn.Linear(4, 3), accelerator)


def test_all_bad_arguments_are_named_at_once() -> None:
    with pytest.raises(SettingsError, match=r"(?s)reduction.*on_inexact.*model"):
        ExactAccumulation(None, reduction="max", on_inexact="no")  # type: ignore[arg-type]


def test_other_kinds_of_parallelism_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with fresh_accelerate_state():
        accelerator = Accelerator(cpu=True)
        with pytest.raises(SettingsError, match="an Accelerator has its own scaler"):
            ExactAccumulation(nn.Linear(4, 3), accelerator, scaler=torch.amp.GradScaler("cpu"))
        monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.DEEPSPEED)
        with pytest.raises(SettingsError, match="uses DEEPSPEED, but"):
            ExactAccumulation(nn.Linear(4, 3), accelerator)


@pytest.mark.parametrize("k", [0, -1, 2.0, True, "4", None])
def test_k_must_be_a_positive_integer(k: Any) -> None:
    with pytest.raises(SettingsError, match="`k` must be a positive integer"):
        ExactAccumulation(nn.Linear(4, 3)).windows([], k)


@pytest.mark.parametrize("loader", [{"input_ids": torch.ones(2)}, torch.ones(3), None, "rows"])
def test_a_loader_must_yield_batches(loader: Any) -> None:
    with pytest.raises(SettingsError, match="`loader` must yield batches"):
        ExactAccumulation(nn.Linear(4, 3)).windows(loader, 2)


@pytest.mark.parametrize(
    ("window", "message"),
    [
        ({"x": X, "labels": LABELS}, r"`window` must be a list of batches.*is a dict instead.*\[batch\]"),
        ((X, LABELS), r"Micro-batch 0 must be.*is a Tensor instead.*\[batch\]"),
        ([[{"x": X[0]}, {"x": X[1]}]], "a list of 2 dicts instead.*`collate_fn`"),
        ([(X, X, LABELS)], r"has 3 parts instead.*\(\(ids, mask\), labels\)"),
        ([{"text": ["a", "b"]}], "has no tensors"),
        ([{"x": X}], r"The loader has the columns \['x'\].*no label column"),
        ([{"x": X, "labels": LABELS, "n": 3}], "cannot be split into rows"),
    ],
)
def test_bad_windows_are_named(window: Any, message: str) -> None:
    with pytest.raises((SettingsError, DataError), match=message):
        ExactAccumulation(Net()).backward(window)


def test_pairs_need_a_loss() -> None:
    with pytest.raises(DataError, match=r"The loader gives \(inputs, targets\) tuples, but `loss_fn` is None"):
        ExactAccumulation(Net()).backward([(X, LABELS)])


def test_the_loop_of_the_docs_trains_as_on_large_batches() -> None:
    before, after, *_ = blocks(ROOT / "docs" / "keep_your_loop.md", "python")
    rows = BERT.rows(11)

    def moved(train: Callable[[dict[str, Any]], object]) -> dict[str, Tensor]:
        model = BERT.model()
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        loader = DataLoader(rows, batch_size=2, collate_fn=one_batch)  # type: ignore[arg-type, var-annotated]
        train({"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader, "k": 4})
        return {name: p.detach() - start[name] for name, p in model.named_parameters()}

    def in_docs(block: str) -> Callable[[dict[str, Any]], object]:
        def run(names: dict[str, Any]) -> None:
            with fresh_accelerate_state():
                exec(compile(block, "docs", "exec"), names)

        return run

    def in_large_batches(names: dict[str, Any]) -> None:
        for part in (rows[:8], rows[8:]):
            names["model"](**one_batch(part)).loss.backward()
            nn.utils.clip_grad_norm_(names["model"].parameters(), 1.0)
            names["optimizer"].step()
            names["scheduler"].step()
            names["optimizer"].zero_grad()

    wanted = moved(in_large_batches)
    assert relative_error(moved(in_docs(after)), wanted) < 1e-9
    assert relative_error(moved(in_docs(before)), wanted) > 0.01


@pytest.mark.slow
@pytest.mark.processes
def test_two_processes(two_processes: Callable[..., str]) -> None:
    found = json.loads(two_processes("loops_of_two.py").splitlines()[-1])
    rows, messages = found.pop("rows"), found.pop("messages")
    assert rows == {
        "even": [list(range(11)), list(range(11)), [3, 3]],
        "few": [[0, 1], [0, 1], [1, 1]],
        "split": [list(range(11)), list(range(11)), [6, 6]],
    }
    for name, part in {
        "weights": "The weights of `model` differ between processes",
        "window": "Micro-batch 0 must be",
        "norms": "SyncBatchNorm layers",
        "evaluation": "a forward pass with gradients, but no backward pass",
        "own group": "The process group of `model` has only some of the processes",
        "precision": "`mixed_precision` of DistributedDataParallel casts weights in hooks",
        "sharded": "The model uses FSDP",
        "sharded later": "The model uses FSDP",
    }.items():
        first, second = messages[name]
        assert part in first
        assert part in second
    assert found.pop("statistics") == 0
    assert found.pop("sparse") == [pytest.approx(0, abs=1e-12), "torch.sparse_coo"]
    (exact, settings), (control, _) = found.pop("trained"), found.pop("trained by loss / k")
    assert exact < 1e-9
    assert settings == [[True, 3, 0]] * 4
    assert control > 0.05
    for name in ("lacking", "unequal", "empty", "empty, finding unused"):
        error, without = found.pop(name)
        assert error < 1e-12, name
        assert without == ["frozen.bias", "frozen.weight", "unused.bias", "unused.weight"]
    assert {name: error for name, error in found.items() if not error < 1e-12} == {}
    assert len(found) == 12
