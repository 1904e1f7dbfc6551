"""Optimizers of users: rates, modes, wrapped optimizers, states and steps."""

import copy
import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, AdamW, Optimizer, SparseAdam
from transformers import Adafactor

from ftaccum import CheckpointError, Preempted, SettingsError, search
from ftaccum.settings.recipe import Recipe
from ftaccum.training.optimizer import make_optimizer
from interrupted import fine_tuned
from optimizers import SAM, Chain
from schedule_free import ScheduleFreeSGD
from silent_errors.rates import regression, train
from silent_errors.sparse import Bag, rows_of_ids
from slow_parameters import some_slow


def test_a_function_may_set_a_rate_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    model, rows = regression()
    result = train(model, rows, lambda groups: SGD(groups, lr=0.1, weight_decay=0.3))
    assert result.lr_history == [0.1] * 3
    assert "Optimizer: SGD, learning rate 0.1, weight decay 0.3 and 0" in capsys.readouterr().out


def test_a_function_that_names_no_rate_gets_that_of_the_settings() -> None:
    for optimizer in (SGD, lambda groups: SGD(groups, momentum=0.9)):
        model, rows = regression()
        assert train(model, rows, optimizer, learning_rate=0.2).lr_history == [0.2] * 3
        assert train(model, rows, optimizer).lr_history == [5e-5] * 3


class Passing(SGD):
    """An optimizer that passes on its arguments."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)


class Own(AdamW):
    """An optimizer without an option for weight decay."""

    def __init__(self, params: Any, lr: float = 0.5) -> None:
        super().__init__(params, lr, weight_decay=0)


RECIPE = Recipe()
RATE, DECAY = RECIPE.learning_rate, RECIPE.weight_decay
DEFAULT = torch.tensor(1e-3)


@pytest.mark.parametrize(
    ("factory", "rate", "decay"),
    [
        (lambda groups: SGD(groups, 1, weight_decay=0), 1, 0),
        (lambda groups: SGD(groups, 1e-3, 0.9, 0, 0), 1e-3, 0),
        (lambda groups: SGD(groups, lr=DEFAULT), 1e-3, DECAY),
        (partial(AdamW, lr=1e-3, weight_decay=0.01), 1e-3, 0.01),
        (partial(AdamW, weight_decay=0), RATE, 0),
        (lambda groups: Passing(groups, weight_decay=0), RATE, 0),
        (Passing, RATE, DECAY),
        (Own, RATE, 0),
        (lambda groups: Chain(SGD(groups[:1], weight_decay=0), SGD(groups[1:])), RATE, 0),
        (lambda groups: SAM(groups, partial(SGD, weight_decay=0)), RATE, 0),
        (lambda groups: SAM(groups, SGD), RATE, DECAY),
        (lambda groups: copy.copy(SGD(groups, momentum=0.9)), RATE, DECAY),
    ],
)
def test_an_explicit_argument_counts_even_if_it_equals_the_default(factory: Any, rate: float, decay: float) -> None:
    model, _ = regression()
    optimizer = make_optimizer(model, factory, RECIPE, ())
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([rate, rate])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [decay, 0]


def test_constructors_are_restored_after_an_error() -> None:
    before = SGD.__init__, Optimizer.__init__
    with pytest.raises(ZeroDivisionError):
        make_optimizer(regression()[0], lambda groups: SGD(groups, lr=1 / 0), RECIPE, ())
    assert (SGD.__init__, Optimizer.__init__) == before


def test_a_setting_given_at_its_default_conflicts_with_the_optimizer() -> None:
    model, rows = regression()
    with pytest.raises(SettingsError, match=r"`learning_rate` is 5e-05, but SGD was made with `lr=0.1`"):
        train(model, rows, lambda groups: SGD(groups, lr=0.1), learning_rate=5e-5)
    with pytest.raises(SettingsError, match=r"`weight_decay` is 0.01, but SGD was made with `weight_decay=0.5`"):
        train(model, rows, lambda groups: SGD(groups, weight_decay=0.5), weight_decay=0.01)


def test_rates_that_the_function_derives_from_the_settings_stay() -> None:
    def by_layer(groups: Any) -> SGD:
        return SGD([{**group, "lr": group["lr"] * 0.5**n} for n, group in enumerate(groups)])

    model, rows = regression()
    optimizers: list[SGD] = []
    train(model, rows, lambda groups: optimizers.append(by_layer(groups)) or optimizers[0], learning_rate=0.4)
    assert [group["lr"] for group in optimizers[0].param_groups] == [0.4, 0.2]


def test_an_instance_keeps_its_rate_and_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    model, rows = regression()
    optimizer = SGD(model.parameters(), lr=0.3)
    assert train(model, rows, optimizer).lr_history == [0.3] * 3
    assert train(model, rows, optimizer, learning_rate=0.3).lr_history == [0.3] * 3
    assert "Optimizer: SGD, learning rate 0.3, weight decay 0" in capsys.readouterr().out


def test_adafactor_sets_its_own_rate_under_any_schedule() -> None:
    model, rows = regression()
    optimizer = Adafactor(model.parameters())
    result = train(model, rows, optimizer, lr_scheduler="linear", warmup_steps=2)
    assert result.lr_history == [1e-2] * 3
    assert optimizer.param_groups[0]["lr"] is None


def test_a_group_without_a_rate_is_refused() -> None:
    model, rows = regression()
    optimizer = Adafactor(model.parameters(), relative_step=False)
    with pytest.raises(SettingsError, match="no numeric `lr`"):
        train(model, rows, optimizer)


def test_an_optimizer_that_refuses_the_groups_is_an_error_with_a_remedy() -> None:
    model, rows = regression()
    with pytest.raises(SettingsError, match=r"`optimizer` failed on the parameter groups: .* `lambda groups"):
        train(model, rows, torch.optim.LBFGS)


def test_an_object_that_is_no_optimizer_is_an_error_that_says_what_is_allowed() -> None:
    model, rows = regression()
    with pytest.raises(SettingsError, match="must be a name such as 'adamw', a torch Optimizer, or a function"):
        train(model, rows, 5)


def test_the_default_optimizer_is_looked_up_when_a_run_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Replaced(AdamW):
        def __init__(self, params: Any, **options: Any) -> None:
            super().__init__(params, **options)
            made.append(self)

    monkeypatch.setattr(torch.optim, "AdamW", Replaced)
    model, rows = regression()
    train(model, rows, None)
    assert len(made) == 1


def test_a_run_does_not_resume_at_another_rate_of_the_function(tmp_path: Path) -> None:
    model, rows = regression()
    train(model, rows, lambda groups: SGD(groups, lr=0.1), output_dir=str(tmp_path))
    with pytest.raises(CheckpointError, match=r"`learning_rate` was \[0.1, 0.1\], but is \[0.2, 0.2\]"):
        train(model, rows, lambda groups: SGD(groups, lr=0.2), output_dir=str(tmp_path), resume="auto")


def test_a_search_refuses_a_function_with_a_rate_of_its_own() -> None:
    _, rows = regression()
    with pytest.raises(SettingsError, match=r"but SGD was made with `lr=0.1`"):
        search(
            lambda: regression()[0], train_data=rows, val_data=rows, loss_fn=nn.MSELoss(), n_trials=1, n_epochs=1,
            optimizer=lambda groups: SGD(groups, lr=0.1), progress=False,
        )  # fmt: skip


def schedule_free(groups: Any) -> ScheduleFreeSGD:
    return ScheduleFreeSGD(groups)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", some_slow(["update-00000004", "update-00000007-epoch-0001", "update-00000012"], ["update-00000004"])
)
def test_a_schedule_free_run_resumes_to_the_last_bit(tmp_path: Path, name: str) -> None:
    arguments: dict[str, Any] = {"optimizer": schedule_free, "restore_best_weights": True}
    whole = fine_tuned(output_dir=str(tmp_path), checkpoint_every=4, keep_checkpoints=9, **arguments)
    again = fine_tuned(resume=str(tmp_path / "checkpoints" / name), **arguments)
    assert whole.differences(again) == []


@pytest.mark.slow
def test_how_often_a_schedule_free_run_is_saved_and_evaluated_changes_no_bit(tmp_path: Path) -> None:
    often = fine_tuned(optimizer=schedule_free, output_dir=str(tmp_path), checkpoint_every=1)
    never = fine_tuned(optimizer=schedule_free)
    assert often.differences(never) == []


def test_a_schedule_free_optimizer_inside_a_chain_is_switched_too() -> None:
    model, rows = regression()
    made: list[ScheduleFreeSGD] = []

    def chain(groups: Any) -> Chain:
        made.append(ScheduleFreeSGD(groups, lr=0.1))
        return Chain(*made)

    seen: list[tuple[bool, bool]] = []

    def see(module: nn.Module, *_: Any) -> None:
        seen.append((module.training, made[0].param_groups[0]["train_mode"]))

    model.register_forward_hook(see)
    train(model, rows, chain, val_data=rows)
    assert set(seen) >= {(True, True), (False, False)}
    assert (True, False) not in seen
    assert not made[0].param_groups[0]["train_mode"]


def test_an_error_leaves_a_schedule_free_optimizer_in_eval_mode() -> None:
    model, rows = regression()
    made: list[ScheduleFreeSGD] = []
    with pytest.raises(ZeroDivisionError):
        train(
            model, rows, lambda groups: made.append(ScheduleFreeSGD(groups)) or made[0], val_data=rows,
            compute_metrics=lambda _: {"n": 1 / 0},
        )  # fmt: skip
    assert not made[0].param_groups[0]["train_mode"]


def test_groups_that_no_schedule_reaches_are_refused() -> None:
    class Apart(Chain):
        def __init__(self, groups: Any) -> None:
            super().__init__(SGD([p for group in groups for p in group["params"]], lr=0.1))
            self.param_groups = [dict(group) for group in groups]

    model, rows = regression()
    with pytest.raises(SettingsError, match="Apart wraps SGD but does not share its parameter groups"):
        train(model, rows, Apart)


@pytest.mark.slow
def test_a_state_that_changes_when_loaded_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Forgetful(Chain):
        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            pass

    arguments = {"optimizer": lambda groups: Forgetful(SGD(groups, momentum=0.9))}
    fine_tuned(output_dir=str(tmp_path), checkpoint_every=4, keep_checkpoints=9, **arguments)
    capsys.readouterr()
    fine_tuned(resume=str(tmp_path / "checkpoints" / "update-00000004"), **arguments)
    assert "The state that Forgetful loaded (`load_state_dict`) differs from the one" in capsys.readouterr().err


def test_a_stop_without_a_checkpoint_is_reported(tmp_path: Path) -> None:
    class Unreadable(Chain):
        def state_dict(self) -> dict[str, Any]:
            return {"own": object()}

        def step(self, closure: Any = None) -> None:
            super().step(closure)
            os.kill(os.getpid(), signal.SIGTERM)

    model, rows = regression()
    with pytest.raises(Preempted, match=r"Stopped after update 1, as requested\. No checkpoint was kept"):
        train(model, rows, lambda groups: Unreadable(SGD(groups)), output_dir=str(tmp_path))


class Dropping(nn.Module):
    """A model with dropout and running statistics."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.dropout = nn.Linear(5, 2, dtype=torch.float64), nn.Dropout(0.5)
        self.register_buffer("n_seen", torch.zeros(()))
        self.register_buffer("large", torch.zeros(5000))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.training and torch.is_grad_enabled():
            self.n_seen += len(inputs)
            self.large += 1
        return self.dropout(self.linear(inputs))


@pytest.mark.parametrize("precision", [torch.float64, torch.bfloat16])
@pytest.mark.filterwarnings("ignore::ftaccum.InexactLossWarning")
def test_a_closure_repeats_rows_and_draws_and_updates_buffers_once(precision: torch.dtype) -> None:
    """At ρ = 0, sharpness-aware minimization equals its base optimizer bit for bit."""
    _, rows = regression()
    rows = [tuple(t.to(precision) for t in row) for row in rows]
    arguments: dict[str, Any] = {"learning_rate": 0.1, "gradient_clip_norm": 0.2, "on_inexact": "warn"}
    plain, sharp = Dropping().to(precision), Dropping().to(precision)
    one = train(plain, rows, SGD, accumulate_in_fp32=True, **arguments)
    other = train(sharp, rows, lambda groups: SAM(groups, rho=0.0), accumulate_in_fp32=True, **arguments)
    assert one.loss_history == other.loss_history
    assert one.grad_norm_history == other.grad_norm_history
    assert all(map(torch.equal, plain.state_dict().values(), sharp.state_dict().values()))
    assert sharp.n_seen == 3 * len(rows)


class Explodes(nn.Module):
    """A model whose loss is infinite once its weights differ from the start of an update."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(5, 2, dtype=torch.float64)
        self.register_buffer("n_seen", torch.zeros(()))
        self.start = self.linear.weight.detach().clone()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.training and torch.is_grad_enabled():
            self.n_seen += len(inputs)
        moved = not torch.equal(self.linear.weight.detach(), self.start)
        return self.linear(inputs) * (float("inf") if moved else 1.0)


@pytest.mark.filterwarnings("ignore::ftaccum.InexactLossWarning")
def test_a_nonfinite_closure_skips_the_update_and_changes_nothing() -> None:
    _, rows = regression()
    model = Explodes()
    optimizers: list[SAM] = []

    def sam(groups: Any) -> SAM:
        optimizers.append(SAM(groups, lambda groups: SGD(groups, momentum=0.9)))
        return optimizers[0]

    result = train(model, rows, sam, on_inexact="warn")
    assert result.skipped_steps == 3
    assert torch.equal(model.linear.weight, model.start)
    assert model.n_seen == 0
    assert not optimizers[0].base.state


def test_an_error_in_a_closure_restores_the_weights() -> None:
    model, rows = regression()
    start = copy.deepcopy(model.state_dict())

    class Failing(SAM):
        def step(self, closure: Any) -> Any:  # noqa: ARG002
            def failing() -> None:
                raise ZeroDivisionError

            return super().step(failing)

    with pytest.raises(ZeroDivisionError):
        train(model, rows, Failing, learning_rate=0.1)
    assert all(map(torch.equal, start.values(), model.state_dict().values()))


@pytest.mark.slow
def test_a_closure_run_resumes_to_the_last_bit(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"optimizer": lambda groups: SAM(groups, AdamW)}
    whole = fine_tuned(output_dir=str(tmp_path), checkpoint_every=4, keep_checkpoints=9, **arguments)
    again = fine_tuned(resume=str(tmp_path / "checkpoints" / "update-00000004"), **arguments)
    assert whole.differences(again) == []


@pytest.mark.slow
def test_an_lbfgs_run_resumes_to_the_last_bit(tmp_path: Path) -> None:
    def lbfgs(groups: Any) -> LBFGS:
        return LBFGS([p for group in groups for p in group["params"]], lr=1e-3, max_iter=3, history_size=3)

    whole = fine_tuned(optimizer=lbfgs, output_dir=str(tmp_path), checkpoint_every=4, keep_checkpoints=9)
    again = fine_tuned(optimizer=lbfgs, resume=str(tmp_path / "checkpoints" / "update-00000012"))
    assert whole.differences(again) == []


class TwoSteps(SGD):
    def first_step(self) -> None: ...

    def second_step(self) -> None: ...


def test_a_step_that_the_loop_cannot_call_is_refused() -> None:
    class Argument(SGD):
        def step(self, loss: Any) -> None:  # type: ignore[override]
            """Never called."""

    class NoClosure(TwoSteps):
        def step(self) -> None:  # type: ignore[override]
            """Never called."""

    for optimizer, words in ((Argument, "`step` of Argument requires 'loss'"), (NoClosure, "takes no `closure`")):
        model, rows = regression()
        with pytest.raises(SettingsError, match=words):
            train(model, rows, optimizer)


def test_a_gradient_scaler_and_a_closure_are_refused() -> None:
    model, rows = regression()
    rows = [tuple(t.float() for t in row) for row in rows]
    with pytest.raises(SettingsError, match="SAM steps with a closure, which the gradient scaler"):
        train(model.float(), rows, SAM, mixed_precision="fp16")


def test_a_two_part_step_gets_a_closure_even_if_it_is_optional() -> None:
    got: list[Any] = []

    class Optional(TwoSteps):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            got.append(closure())

    model, rows = regression()
    result = train(model, rows, Optional, learning_rate=0.1)
    assert [loss.item() for loss in got] == pytest.approx(result.loss_history, rel=1e-12)


class Descent(Optimizer):
    """An optimizer that updates only the rows of a sparse gradient and refuses dense gradients."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ARG002
        for group in self.param_groups:
            for p in group["params"]:
                assert p.grad.is_sparse
                p.sub_(group["lr"] * p.grad)


@pytest.mark.parametrize("table", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients_are_measured_and_clipped(table: Any) -> None:
    model, rows = Bag(table, trains_head=False), rows_of_ids()
    before = model.table.weight.detach().clone()
    reference = copy.deepcopy(model)
    inputs, targets = (torch.stack(column) for column in zip(*rows, strict=True))
    nn.functional.mse_loss(reference(inputs), targets).backward()
    gradient = reference.table.weight.grad.to_dense()
    result = train(model, rows, partial(Descent, lr=1.0), n_epochs=1, gradient_clip_norm=0.01)
    assert result.grad_norm_history == pytest.approx([gradient.norm().item()], rel=1e-12)
    wanted = before - gradient * 0.01 / (gradient.norm() + 1e-6)  # the formula of torch's clipping
    torch.testing.assert_close(model.table.weight.detach(), wanted, rtol=0, atol=1e-15)


@pytest.mark.parametrize("optimizer", [None, Adafactor, partial(SGD, lr=0.1, weight_decay=0.1)])
def test_optimizers_that_take_no_sparse_gradients_get_dense_ones(optimizer: Any) -> None:
    model, rows = Bag(nn.EmbeddingBag), rows_of_ids()
    assert train(model, rows, optimizer).skipped_steps == 0


def test_an_infinite_sparse_gradient_skips_the_update() -> None:
    model, rows = Bag(nn.EmbeddingBag, trains_head=False), rows_of_ids()
    model.table.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = model.table.weight.detach().clone()
    result = train(model, rows, partial(Descent, lr=1.0))
    assert result.skipped_steps == 3
    assert torch.equal(model.table.weight, before)


def test_sums_in_float32_and_sparse_gradients_are_refused() -> None:
    model, rows = Bag(nn.EmbeddingBag, trains_head=False).bfloat16(), rows_of_ids()
    rows = [(ids, target.bfloat16()) for ids, target in rows]
    with pytest.raises(SettingsError, match="SparseAdam takes sparse ones only"):
        train(model, rows, SparseAdam, accumulate_in_fp32=True)


@pytest.mark.slow
def test_all_optimizers_are_exact_on_two_processes(two_processes: Callable[..., str]) -> None:
    printed = two_processes("optimizers_of_two.py").splitlines()
    errors = json.loads(next(line for line in printed if line.startswith('{"')))
    assert len(errors) > 10
    assert {name: error for name, error in errors.items() if error > 1e-9} == {}
