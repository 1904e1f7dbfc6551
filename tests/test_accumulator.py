"""The gradient of one window against plain autograd: scale, dummies, errors, buffers."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ftaccum.accumulation.accumulator import GradientAccumulator
from ftaccum.accumulation.buffers import MovingBuffers
from ftaccum.data.loader import MicroBatch
from ftaccum.errors import SettingsError
from ftaccum.planning.micro_batches import MicroBatchRows
from ftaccum.runtime.accelerator import accelerator_session
from ftaccum.runtime.fingerprint import fingerprint
from ftaccum.runtime.gradients.plain import GradientStrategy
from ftaccum.runtime.log import run_logging
from ftaccum.runtime.memory import WindowOutOfMemoryError
from ftaccum.runtime.process_group import SINGLE
from ftaccum.runtime.state_guards import preserve_buffers
from ftaccum.settings.runtime import Runtime


class Net(nn.Module):
    """A linear model that counts its forward passes and draws a random number in each."""

    passes: Tensor
    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 1, dtype=torch.float64)
        self.unused = nn.Linear(2, 1)
        self.register_buffer("passes", torch.zeros(()))
        self.register_buffer("table", torch.zeros(5000))
        self.modes: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        self.modes.append(self.training)
        torch.rand(())
        return self.layer(x).squeeze(1)


class SquaredError:
    """A loss of two terms: the mean squared error, and that of every second row."""

    terms = ("all", "even")
    modules: Sequence[nn.Module] = ()
    window = None

    def attributes_before_lazy_passes(self) -> None:
        """Return None: no layer is lazy."""

    def __init__(self, complaint: str | None = None) -> None:
        self.report = SimpleNamespace(in_training=SimpleNamespace(complaint=complaint))

    def means(
        self, model: nn.Module, batch: Any, _: Any, terms: Sequence[str], __: str
    ) -> tuple[dict[str, Tensor], None]:
        errors = (model(batch[0]) - batch[1]) ** 2
        means = {"all": errors.mean(), "even": errors[::2].mean()}
        return {term: means[term] for term in terms}, None


def micro_batch(n_rows: int, seed: int) -> MicroBatch:
    draw = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((n_rows, 3), (n_rows,)))
    counts = {"all": n_rows, "even": -(-n_rows // 2)}
    return MicroBatch((x, y), counts, ("all", "even"), MicroBatchRows(tuple(range(n_rows))), 0, 0)


def dummy() -> MicroBatch:
    real = micro_batch(1, seed=99)
    return MicroBatch(real.batch, dict.fromkeys(real.counts, 0), real.terms, MicroBatchRows(), 0, 0)


def expected(window: Sequence[MicroBatch]) -> tuple[float, dict[str, Tensor]]:
    """Return the loss and the gradient of all rows of the window at once, by plain autograd."""
    model = Net()
    errors = [(model(micro.batch[0]) - micro.batch[1]) ** 2 for micro in window]
    loss = torch.cat(errors).mean() + torch.cat([each[::2] for each in errors]).mean()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    with accelerator_session(Runtime(), 0, None) as made:
        yield made


def accumulator_of(
    accelerator: Accelerator, model: Net, complaint: str | None = None, loss: nn.Module | None = None
) -> GradientAccumulator:
    objective: Any = SquaredError(complaint)
    objective.modules = () if loss is None else (loss,)
    strategy = GradientStrategy(torch.optim.SGD(model.layer.parameters()))
    return GradientAccumulator(accelerator, model, objective, strategy, SINGLE)


@pytest.mark.parametrize("sizes", [(7,), (1, 1, 5), (4, 3), (2, 2, 2, 1)])
def test_the_gradient_is_that_of_all_rows_at_once(sizes: tuple[int, ...], accelerator: Accelerator) -> None:
    model, window = Net(), [micro_batch(n, seed) for seed, n in enumerate(sizes)]
    accumulated = accumulator_of(accelerator, model).accumulate(window)
    loss, gradient = expected(window)
    for name, p in model.layer.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(p.grad, gradient[f"layer.{name}"], rtol=1e-14, atol=1e-15)
    assert accumulated.losses.total() == pytest.approx(loss, rel=1e-14)
    numbers = accumulated.read_with(torch.tensor(3.0))
    assert (numbers.grad_norm, numbers.n_items) == (3.0, sum(sum(micro.counts.values()) for micro in window))
    assert sum(numbers.losses) == pytest.approx(loss, rel=1e-14)
    assert [micro for micro, _ in accumulated.contributions] == window
    assert model.unused.weight.grad is None


def test_two_windows_add_up_until_gradients_are_dropped(accelerator: Accelerator) -> None:
    model, window = Net(), [micro_batch(3, 0)]
    accumulator = accumulator_of(accelerator, model)
    for times in (1.0, 2.0):
        accumulator.accumulate(window)
        assert model.layer.weight.grad is not None
        torch.testing.assert_close(model.layer.weight.grad, times * expected(window)[1]["layer.weight"])
    model.unused.weight.grad = torch.ones_like(model.unused.weight)  # no optimizer holds it
    accumulator.zero_gradients()
    assert all(p.grad is None for p in model.parameters())


def test_a_dummy_runs_only_if_other_processes_may_wait_and_leaves_no_trace(accelerator: Accelerator) -> None:
    model, real = Net(), micro_batch(3, 0)
    accumulator = accumulator_of(accelerator, model)
    before = torch.get_rng_state()
    accumulated = accumulator.accumulate([dummy(), real])
    assert model.passes == 1, "the last pass is one of the process's own rows"
    assert len(accumulated.contributions) == 1
    torch.testing.assert_close(model.layer.weight.grad, expected([real])[1]["layer.weight"])
    accumulator.zero_gradients()
    torch.set_rng_state(before)
    accumulated = accumulator.accumulate([dummy()])
    assert torch.equal(torch.get_rng_state(), before)
    assert model.passes == 1
    assert model.modes == [True, True]
    assert torch.equal(model.layer.weight.grad, torch.zeros_like(model.layer.weight))
    numbers = accumulated.read_with(torch.tensor(0.0))
    assert (numbers.n_items, numbers.losses) == (0, [0.0])


def test_a_dummy_runs_in_eval_mode_if_the_model_cannot_train_on_a_single_row(accelerator: Accelerator) -> None:
    model = Net()
    accumulator_of(accelerator, model, complaint="more than one value").accumulate([dummy()])
    assert model.modes == [False]
    assert model.training


@pytest.mark.parametrize(
    ("error", "raised"),
    [(RuntimeError("out of memory: tried"), WindowOutOfMemoryError), (ZeroDivisionError(), ZeroDivisionError)],
)
def test_a_window_that_fails_is_undone(error: Exception, raised: type[Exception], accelerator: Accelerator) -> None:
    model, window = Net(), [micro_batch(2, seed) for seed in range(3)]
    accumulator = accumulator_of(accelerator, model)

    def fail(*_: Any) -> None:
        if model.passes == 2:
            raise error

    hook = model.register_forward_hook(fail)
    before = torch.get_rng_state()
    with pytest.raises(raised) as caught:
        accumulator.accumulate(window)
    if raised is WindowOutOfMemoryError:
        assert caught.value.failed.index == 1  # type: ignore[attr-defined]
        assert caught.value.failed.message == str(error)  # type: ignore[attr-defined]
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), before)
    assert model.passes == 0
    hook.remove()
    accumulator.accumulate(window)
    torch.testing.assert_close(model.layer.weight.grad, expected(window)[1]["layer.weight"])
    assert model.passes == 3


def test_the_start_of_a_window_restores_its_buffers(accelerator: Accelerator) -> None:
    model = Net()
    accumulated = accumulator_of(accelerator, model).accumulate([micro_batch(2, 0)] * 2)
    assert model.passes == 2
    accumulated.start.restore()
    assert model.passes == 0


def moved(buffers: MovingBuffers) -> list[bool]:
    return [bool(flag) for flag in buffers.moved()]


@pytest.mark.parametrize(
    "move",
    [
        lambda table: table.add_(1),
        lambda table: table.data[7].fill_(2.5),  # does not change its version counter
        lambda table: table.numpy().__setitem__(7, 2.5),
    ],
)
def test_large_buffers_are_copied_after_their_first_change(move: Callable[[Tensor], Any]) -> None:
    model = Net()
    buffers = MovingBuffers(model, SINGLE)
    for _ in range(2):
        buffers.snapshot()
        assert moved(buffers) == [False]
        buffers.observe([False], undone=False)
    start = buffers.snapshot()
    move(model.table)
    assert moved(buffers) == [True]
    start.restore()
    assert not model.table.any(), "the window in which it first moved can be undone"
    buffers.observe([True], undone=True)
    assert moved(buffers) == []
    model.table += 3
    start = buffers.snapshot()
    model.table += 1
    start.restore()
    assert (model.table == 3).all()


def test_replacing_a_large_buffer_counts_as_a_change() -> None:
    model = Net()
    buffers, table = MovingBuffers(model, SINGLE), model.table
    start = buffers.snapshot()
    model.table = torch.zeros(5000)
    assert moved(buffers) == [True]
    start.restore()
    assert model.table is table


def test_a_change_to_a_buffer_too_large_to_copy_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ftaccum.accumulation.buffers._KEPT", 1000)
    model = Net()
    buffers = MovingBuffers(model, SINGLE)
    start = buffers.snapshot()
    model.table += 1
    with run_logging(enabled=True):
        buffers.restore(start)
        assert "The buffer 'table' of Net first changed in an update that was skipped" in capsys.readouterr().err
        buffers.observe([True], undone=False)
        assert not capsys.readouterr().err
    start = buffers.snapshot()
    model.table += 1
    start.restore()
    assert (model.table == 1).all(), "once seen to move, it is copied"


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.int16, torch.complex64, torch.float64])
def test_large_buffers_of_any_type_and_layout_are_watched(dtype: torch.dtype) -> None:
    model = nn.Module()
    model.register_buffer("table", torch.zeros(101, 51).to(dtype).T)
    buffers = MovingBuffers(model, SINGLE)
    start = buffers.snapshot()
    model.table[50, 100] = 1
    assert moved(buffers) == [True]
    start.restore()
    assert not model.table.any()


def test_a_buffer_registered_as_none_is_restored_to_none() -> None:
    model = nn.Module()
    model.register_buffer("mean", None)
    with preserve_buffers(model):
        model.mean = torch.ones(2)
    assert model.mean is None
    start = MovingBuffers(model, SINGLE).snapshot()
    model.mean = torch.ones(2)
    start.restore()
    assert model.mean is None


@pytest.mark.parametrize("buffer", [torch.arange(8192), torch.randn(100, 128), torch.arange(400_000)])
def test_reordering_a_buffer_changes_its_fingerprint(buffer: Tensor) -> None:
    before = fingerprint(buffer)
    assert before == fingerprint(buffer.clone())
    assert before != fingerprint(buffer.roll(1, 0))
    assert before != fingerprint(buffer.flip(0))


def test_the_fingerprint_of_an_expanded_buffer_reads_only_its_storage() -> None:
    buffer = torch.ones(3, 1).expand(3, 10**12)
    assert fingerprint(buffer) == fingerprint(torch.ones(3, 1))


def test_the_buffers_of_the_loss_are_restored(accelerator: Accelerator) -> None:
    model, loss = Net(), nn.BatchNorm1d(2)
    accumulator = accumulator_of(accelerator, model, loss=loss)
    start = accumulator.accumulate([micro_batch(2, 0)]).start
    loss.running_mean += 1  # type: ignore[operator]
    start.restore()
    assert not loss.running_mean.any()  # type: ignore[union-attr, operator]


@pytest.mark.slow
@pytest.mark.processes
def test_buffers_on_two_processes(two_processes: Callable[..., str]) -> None:
    printed = two_processes("buffers_of_two.py")
    found = json.loads(next(line for line in printed.splitlines() if line.startswith("FOUND "))[6:])
    assert all(map(all, found["kinds"]))
    for size in ("1", "5000"):
        main, other = found["evaluated"][size]
        assert main == other, "every evaluation is of the same model, also one in the middle of an epoch"
        assert len(main) == 4, "before training, twice in the epoch, at its end"
        main, other = found["trained"][size]
        assert main == other
        assert len(main) == 1


@pytest.mark.processes
@pytest.mark.slow
def test_a_batch_that_one_process_cannot_train_on_stops_both_with_one_message(
    two_processes: Callable[..., str], tmp_path: Path
) -> None:
    printed = two_processes("passes_of_two.py", str(tmp_path))
    found = json.loads(next(line for line in printed.splitlines() if line.startswith("FOUND "))[6:])
    sharded, constant = found.pop("sharded"), "does not depend on any trainable parameter"
    sentences = {
        "late_term": r"has a term 'b', .* Give `count_items`",
        "constant": constant + r"\. .* return 0 times the sum of an output",
        "changed_in_place": r"changes `targets` of a batch in place\. .* over 1 items, but 2 were counted .* Make the",
    }
    assert len(found) == 8
    for case, ((one, other), kept, n_updates, difference) in found.items():
        assert one == other
        assert re.search(r"rows \d+, \d+ of `train_data` " + sentences[case.split()[0]], one), one
        assert "(Process 1 raised this, so all processes stop.)" in one
        assert kept == ["update-00000005"]
        assert n_updates == 5
        assert difference == 0, "resumed with another loss, the run ends as one that was never interrupted"
    assert sharded[0] == sharded[1]
    assert constant in sharded[0]


def test_a_weight_unfrozen_during_a_run_of_several_processes_is_refused() -> None:
    model, buffers = Net(), MovingBuffers(Net(), SINGLE)
    model.layer.bias.requires_grad_(False)
    strategy = GradientStrategy(torch.optim.SGD(model.parameters()))
    several: Any = SimpleNamespace(is_single=False)
    accelerator: Any = None
    objective: Any = SquaredError()
    accumulator = GradientAccumulator(accelerator, model, objective, strategy, several, buffers)
    model.layer.bias.requires_grad_(True)
    with pytest.raises(SettingsError, match=r"The weight `layer\.bias` was frozen at the start of the run"):
        accumulator.accumulate([])
