"""With `loss_over="window"`, an update has the gradient of one batch in plain PyTorch, however it is cut and run."""

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from exactness import accumulated_gradients, windows_of
from ftaccum import InexactLossError, InexactLossWarning, Result, test_fine_tuning
from ftaccum.checkpoint.manager import CheckpointManager
from ftaccum.objective.gradient_check import GradientDifference
from ftaccum.objective.row_terms import ComputedRows
from ftaccum.objective.window_gradient import WindowGradientCheck
from heads import RecordingOptimizer, relative_error
from training_passes import in_self_check
from window_cases import (
    CASES,
    BiEncoder,
    Case,
    encoder,
    gradient_of,
    in_two_terms,
    in_two_terms_again,
    info_nce,
    info_nce_again,
    made,
    padded,
    pooled,
)

INFO_NCE, POSITIONS = CASES["bi-encoder, InfoNCE"], CASES["by position"]
IN_FIVES: dict[str, Any] = {"batch_size": 2, "effective_batch_size": 5}
SPLITS: dict[str, dict[str, Any]] = {
    "updates of 5 rows, in twos": IN_FIVES,
    "updates of 5 rows, one by one": {"batch_size": 1, "effective_batch_size": 5},
    "all rows, in threes as they come": {"batch_size": 3, "effective_batch_size": 13, "planner": False},
    "all rows, sorted by length": {"batch_size": 3, "effective_batch_size": 13},
    "all rows in one micro-batch": {"batch_size": 13, "effective_batch_size": 13},
    "limited by tokens": {"batch_size": 8, "max_tokens": 30, "effective_batch_size": 13},
    "remainders carried over": {"batch_size": 2, "effective_batch_size": 6, "remainder": "carry", "n_epochs": 3},
}


def errors(case: Case, model: Any = None, **arguments: Any) -> list[float]:
    """Return the relative error of each update's gradient."""
    model, rows = model if model is not None else case.model(), case.rows(13)
    wanted = [case.gradient(model, window) for window in windows_of(rows, **arguments)]
    found = accumulated_gradients(model, rows, **{**defaults(), **case.arguments(model), **arguments})
    assert [f.keys() for f in found] == [w.keys() for w in wanted]
    return [relative_error(f, w) for f, w in zip(found, wanted, strict=True)]


def defaults() -> dict[str, Any]:
    return {"loss_over": "window", "audit": False, "verbosity": "quiet"}


def test_a_cap_of_the_longest_rows_leaves_the_gradient_of_all_rows() -> None:
    assert max(errors(POSITIONS, batch_size=2, effective_batch_size=13, max_tokens="auto")) < 1e-11


def run(case: Case, model: nn.Module, n_rows: int = 13, **arguments: Any) -> Result:
    given = {
        "n_epochs": 1, "validation_split": 0.0, "progress": False, "lr_scheduler": "constant", **IN_FIVES, **defaults(),
    }  # fmt: skip
    return test_fine_tuning(model, train_data=case.rows(n_rows), **{**given, **case.arguments(model), **arguments})


def sgd(rate: float) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda groups: torch.optim.SGD([p for group in groups for p in group["params"]], lr=rate)


@pytest.mark.filterwarnings("ignore::ftaccum.PaddingWarning")
@pytest.mark.parametrize("name", CASES)
def test_updates_have_the_gradient_of_one_batch(name: str) -> None:
    found = errors(CASES[name], **IN_FIVES)
    assert len(found) == 3
    assert max(found) < 1e-12


@pytest.mark.filterwarnings("ignore::ftaccum.PaddingWarning")
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.slow
def test_the_gradient_does_not_depend_on_the_cut(name: str, split: str) -> None:
    assert max(errors(CASES[name], **SPLITS[split])) < 1e-11


def test_a_frozen_tower_gets_no_gradient() -> None:
    model: Any = INFO_NCE.model()
    model.questions.requires_grad_(False)
    assert max(errors(INFO_NCE, model, **IN_FIVES)) < 1e-12
    model.log_scale.requires_grad_(False)
    assert max(errors(INFO_NCE, model, batch_size=1, effective_batch_size=13)) < 1e-12


def test_a_window_of_one_row_has_the_loss_of_one_row() -> None:
    """The last of three updates has one row, whose only candidate is right: its loss and its gradient are 0."""
    model, rows = INFO_NCE.model(), INFO_NCE.rows(11)
    found = accumulated_gradients(model, rows, **{**defaults(), **INFO_NCE.arguments(model), **IN_FIVES})
    assert all(not g.any() for g in found[-1].values())
    result = run(INFO_NCE, model, 11)
    assert result.loss_history[-1] == 0.0 < min(result.loss_history[:-1])


def test_a_run_ends_with_the_weights_and_losses_of_a_plain_loop() -> None:
    model = INFO_NCE.model()
    plain: Any = copy.deepcopy(model)
    optimizer, losses, epochs = torch.optim.SGD(plain.parameters(), lr=0.3), [], []
    for window in windows_of(INFO_NCE.rows(13), n_epochs=2, **IN_FIVES):
        loss = INFO_NCE.reference(plain, window)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append((loss.item(), len(window)))
    for part in (losses[:3], losses[3:]):
        epochs.append(sum(loss * n for loss, n in part) / 13)

    result = run(INFO_NCE, model, n_epochs=2, optimizer=sgd(0.3), gradient_clip_norm=None)
    assert difference(model, plain) < 1e-12
    assert result.loss_history == pytest.approx([loss for loss, _ in losses], rel=1e-12)
    assert result.train_loss_history == pytest.approx(epochs, rel=1e-12)


def difference(one: nn.Module, other: nn.Module) -> float:
    of_other = other.state_dict()
    return max(float((value - of_other[name]).abs().max()) for name, value in one.state_dict().items())


def test_each_term_of_a_loss_is_logged() -> None:
    case = CASES["two terms"]
    model: Any = case.model()
    values = {name: value.item() for name, value in in_two_terms(whole_batch(model, case), None).items()}
    result = run(case, model, batch_size=3, effective_batch_size=13)
    assert result.loss_history == pytest.approx([sum(values.values())], rel=1e-12)


def whole_batch(model: Any, case: Case) -> Tensor:
    batch = padded(case.rows(13))
    return pooled(model(**batch), batch)


def test_clipping_acts_on_the_gradient_of_the_whole_update() -> None:
    model = INFO_NCE.model()
    wanted = INFO_NCE.gradient(model, INFO_NCE.rows(13))
    norm = sum(float((g**2).sum()) for g in wanted.values()) ** 0.5
    optimizer = RecordingOptimizer(model)
    result = run(INFO_NCE, model, effective_batch_size=13, optimizer=optimizer, gradient_clip_norm=norm / 2)
    assert result.grad_norm_history == pytest.approx([norm], rel=1e-12)
    clipped = {name: g * (norm / 2) / (norm + 1e-6) for name, g in wanted.items()}  # torch adds 1e-6
    assert relative_error(optimizer.gradients[0], clipped) < 1e-12


def test_an_optimizer_with_a_closure_evaluates_both_passes_again() -> None:
    model = INFO_NCE.model()
    plain = copy.deepcopy(model)

    def make(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(list(parameters), lr=0.1, max_iter=4)

    optimizer = make(plain.parameters())
    for window in windows_of(INFO_NCE.rows(13), **IN_FIVES):

        def closure(window: Sequence[Any] = window) -> Tensor:
            optimizer.zero_grad()
            loss = INFO_NCE.reference(plain, window)
            loss.backward()
            return loss

        optimizer.step(closure)
    run(INFO_NCE, model, optimizer=lambda groups: make(p for g in groups for p in g["params"]), gradient_clip_norm=None)
    assert difference(model, INFO_NCE.model()) > 1e-2
    assert difference(model, plain) < 1e-10


class Centred(nn.Module):
    """A loss with a trained temperature and a running mean, which each update moves once."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
        self.register_buffer("centre", torch.zeros(8, dtype=torch.float64))
        self.register_buffer("n_calls", torch.zeros(()))

    def forward(self, inputs: Any, batch: Any) -> Tensor:  # noqa: ARG002
        loss = info_nce(inputs["questions"] - self.centre, inputs["answers"], self.log_scale)
        if not in_self_check():
            self.centre = 0.5 * self.centre + 0.5 * inputs["questions"].detach().mean(0)
            self.n_calls += 1
        return loss


def test_a_loss_that_is_a_module_trains_its_weights_and_moves_its_buffers_once_per_update() -> None:
    model, loss = INFO_NCE.model(), Centred()
    plain: Any = copy.deepcopy(model)
    scale, centre = loss.log_scale.detach().clone().requires_grad_(), torch.zeros(8, dtype=torch.float64)
    trained = [p for name, p in plain.named_parameters() if name != "log_scale"]
    plain_optimizer = torch.optim.SGD([*trained, scale], lr=0.3)
    for window in windows_of(INFO_NCE.rows(13), **IN_FIVES):
        batch = padded(window)
        found = plain(batch["input_ids"], batch["answer_ids"])
        plain_optimizer.zero_grad()
        info_nce_again(found["questions"] - centre, found["answers"], scale).backward()
        plain_optimizer.step()
        centre = 0.5 * centre + 0.5 * found["questions"].detach().mean(0)
    weights = [p for name, p in model.named_parameters() if name != "log_scale"]
    optimizer = torch.optim.SGD([*weights, loss.log_scale], lr=0.3)
    run(INFO_NCE, model, loss_fn=loss, optimizer=optimizer, gradient_clip_norm=None)
    assert loss.n_calls == 3
    assert float((loss.centre - centre).abs().max()) < 1e-12
    assert abs(loss.log_scale.item() - scale.item()) < 1e-12 < abs(scale.item() - 0.7)
    assert difference(model, plain) < 1e-12


def test_a_loss_may_change_its_inputs_in_place() -> None:
    def in_place(inputs: Any, _: Any) -> Tensor:
        inputs["questions"].mul_(3).sub_(inputs["questions"].mean(0))
        return inputs["questions"].square().mean()

    def reference(model: Any, rows: Sequence[Any]) -> Tensor:
        batch = padded(rows)
        tripled = 3 * model(batch["input_ids"], batch["answer_ids"])["questions"]
        return (tripled - tripled.mean(0)).pow(2).mean()

    case = Case(INFO_NCE.model, INFO_NCE.rows, lambda _: {"loss_fn": in_place, "data_collator": padded}, reference)
    assert max(errors(case, **IN_FIVES)) < 1e-12


def test_the_loss_gets_columns_of_few_dimensions_with_one_shape() -> None:
    seen: set[frozenset[str]] = set()

    def loss(inputs: Any, batch: Any) -> Tensor:
        seen.add(frozenset(batch))
        return inputs["image"].square().mean() + 0 * batch["number"].sum() + 0 * batch["pair"].sum()

    case = CASES["CLIPModel"]
    model, rows = case.model(), case.rows(6)
    rows = [{**row, "number": n, "pair": torch.tensor([n, n])} for n, row in enumerate(rows)]
    given = {**defaults(), **case.arguments(model), "loss_fn": loss, **IN_FIVES}
    test_fine_tuning(model, train_data=rows, n_epochs=1, validation_split=0.0, progress=False, **given)
    assert seen == {frozenset({"number", "pair"})}


# Random draws


class Passes:
    """What a model was given in the first pass of each micro-batch, with the state of torch's generator before."""

    def __init__(self, model: nn.Module, k: int) -> None:
        self.found: list[tuple[Tensor, dict[str, Tensor]]] = []
        self._k = k
        model.register_forward_pre_hook(self._record, with_kwargs=True)

    def _record(self, module: nn.Module, _: Any, given: dict[str, Any]) -> None:
        if module.training and not torch.is_grad_enabled() and not in_self_check():
            self.found.append((torch.get_rng_state(), {n: v.clone() for n, v in given.items() if torch.is_tensor(v)}))

    def windows(self) -> Iterator[list[tuple[Tensor, dict[str, Tensor]]]]:
        for start in range(0, len(self.found), self._k):
            yield self.found[start : start + self._k]


def of_encoder(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    mask = batch["attention_mask"].unsqueeze(-1)
    return (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)


def adapted(dropout: float) -> nn.Module:
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], lora_dropout=dropout)
    model = peft.get_peft_model(encoder(dropout), config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight)  # if it stayed zero, lora_A would have no gradient
    return model


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (encoder, {}),
        (encoder, {"gradient_checkpointing": True}),
        (adapted, {}),
        (adapted, {"gradient_checkpointing": True}),
    ],
    ids=["dropout", "with checkpointing", "with LoRA", "with LoRA and checkpointing"],
)
def test_the_second_pass_draws_what_the_first_drew(make: Any, arguments: dict[str, Any]) -> None:
    """The reference is one graph over the same micro-batches, each with the draws of its first pass."""
    case = CASES["two terms"]
    model: Any = made(lambda: make(0.3))()
    plain = copy.deepcopy(model)  # before checkpointing is switched on
    passes, ends = Passes(model, k=2), []

    class Recording(RecordingOptimizer):
        def step(self, closure: Any = None) -> None:
            ends.append(torch.get_rng_state())
            super().step(closure)

    optimizer = Recording(model)
    run(
        case, model, 12, batch_size=3, effective_batch_size=6, optimizer=optimizer, gradient_clip_norm=None,
        **arguments,
    )  # fmt: skip
    plain.train()
    assert len(optimizer.gradients) == 2
    for found, end, window in zip(optimizer.gradients, ends, passes.windows(), strict=True):
        values = []
        for state, batch in window:
            torch.set_rng_state(state)
            values.append(of_encoder(plain, batch))
        assert torch.equal(torch.get_rng_state(), end), "the generator ends where one pass leaves it"
        wanted = gradient_of(plain, in_two_terms_again(torch.cat(values), range(6)))  # type: ignore[arg-type]
        assert relative_error(found, wanted) < 1e-12


# Precision


def with_dtype(case: Case, dtype: torch.dtype, precision: str | None = None) -> tuple[Any, dict[str, Tensor]]:
    """Return a model, and the gradient of one batch in this type, or autocast to `precision`, in plain PyTorch."""
    model = case.model().to(dtype)
    plain = copy.deepcopy(model).train()
    types = {"bf16": torch.bfloat16, "fp16": torch.float16}
    if precision is None:
        return model, case.gradient(plain, case.rows(13))
    batch = padded(case.rows(13))
    with torch.autocast("cpu", types[precision]):
        found = plain(batch["input_ids"], batch["answer_ids"])
    found = {name: value.float() for name, value in found.items()}
    return model, gradient_of(plain, info_nce_again(found["questions"], found["answers"], plain.log_scale))


def in_float64(gradient: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: g.double() for name, g in gradient.items()}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_is_as_exact_as_one_batch_with_autocast(precision: str) -> None:
    model, one = with_dtype(INFO_NCE, torch.float32, precision)
    wanted = INFO_NCE.gradient(INFO_NCE.model(), INFO_NCE.rows(13))
    optimizer = RecordingOptimizer(model)
    run(
        INFO_NCE, model, effective_batch_size=13, optimizer=optimizer, mixed_precision=precision,
        gradient_clip_norm=None, n_epochs=3,
    )  # fmt: skip
    found, alone = (relative_error(in_float64(g), wanted) for g in (optimizer.gradients[0], one))
    assert 1e-5 < alone < 2e-2, "autocast rounds"
    assert found < 1.5 * alone, (found, alone)


def test_16_bit_weights_with_sums_in_float32_are_as_exact_as_one_batch() -> None:
    model, one = with_dtype(INFO_NCE, torch.bfloat16)
    wanted = INFO_NCE.gradient(copy.deepcopy(model).double(), INFO_NCE.rows(13))
    optimizer = RecordingOptimizer(model)
    given = {"effective_batch_size": 13, "batch_size": 1, "optimizer": optimizer, "gradient_clip_norm": None}
    run(INFO_NCE, model, accumulate_in_fp32=True, **given)
    found, alone = (relative_error(in_float64(g), wanted) for g in (optimizer.gradients[0], one))
    assert 1e-3 < alone < 0.1, "bf16 rounds"
    assert found < 1.3 * alone, (found, alone)


@pytest.mark.slow
def test_a_compiled_model_has_the_same_gradient() -> None:
    case, model = CASES["two terms"], made(encoder)().float()
    wanted = case.gradient(made(encoder)(), case.rows(13))
    optimizer = RecordingOptimizer(model)
    run(case, model, effective_batch_size=13, batch_size=4, optimizer=optimizer, compile=True, gradient_clip_norm=None)
    assert relative_error(in_float64(optimizer.gradients[0]), wanted) < 1e-4


# Memory, resuming, audits


class _RunsOut(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(_: Any, *__: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def runs_out(model: nn.Module, most: int, where: str) -> None:
    """Make training passes with more than `most` rows raise the error of a GPU."""

    def after(module: nn.Module, _: Any, outputs: Any) -> Any:
        n_rows = len(next(iter(outputs.values())))
        is_first = not torch.is_grad_enabled()
        if n_rows <= most or not module.training or in_self_check() or is_first != (where == "first pass"):
            return outputs
        if where == "backward pass":
            return {name: _RunsOut.apply(value) for name, value in outputs.items()}
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    model.register_forward_hook(after)


@pytest.mark.parametrize("where", ["first pass", "second pass", "backward pass"])
def test_running_out_of_memory_in_either_pass_changes_no_update(where: str) -> None:
    model, rows = INFO_NCE.model(), INFO_NCE.rows(13)
    wanted = [INFO_NCE.gradient(model, window) for window in windows_of(rows, effective_batch_size=5)]
    runs_out(model, 1, where)
    optimizer = RecordingOptimizer(model)
    result = run(INFO_NCE, model, batch_size=4, optimizer=optimizer, gradient_clip_norm=None)
    assert result.out_of_memory > 0
    found = [relative_error(f, w) for f, w in zip(optimizer.gradients, wanted, strict=True)]
    assert max(found) < 1e-12


def test_running_out_of_memory_in_the_loss_says_that_smaller_micro_batches_do_not_help() -> None:
    def loss(inputs: Any, batch: Any) -> Tensor:  # noqa: ARG001
        if not in_self_check():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return inputs["questions"].mean()

    message = "the loss of all 5 rows.*5 × 5 scores takes 0 MiB.*Lower the effective batch.*Tried to allocate"
    with pytest.raises(torch.OutOfMemoryError, match=message):
        run(INFO_NCE, INFO_NCE.model(), loss_fn=loss)


def test_a_resumed_run_with_dropout_ends_with_the_same_bits(tmp_path: Path) -> None:
    """The checkpoint is in the middle of the second epoch."""

    def trained(**arguments: Any) -> tuple[dict[str, Tensor], Result]:
        model = made(lambda: BiEncoder(dropout=0.3))()
        result = run(INFO_NCE, model, n_epochs=3, learning_rate=0.05, **arguments)
        return model.state_dict(), result

    with patch.object(CheckpointManager, "finish", lambda *_, **__: None):  # it would remove all but the newest
        whole, result = trained(output_dir=str(tmp_path / "whole"), checkpoint_every=2, keep_checkpoints=9)
    there = tmp_path / "whole" / "checkpoints" / "update-00000004"
    again, of_again = trained(resume=str(there))
    assert len(result.loss_history) == 9
    assert of_again.loss_history == result.loss_history
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def audits_of(folder: Path) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    return [entry for entry in entries if "audit" in entry]


@pytest.mark.parametrize("name", ["by position", "two terms", "bi-encoder, InfoNCE"])
def test_audits_of_exact_updates_find_no_error(name: str, tmp_path: Path) -> None:
    model = CASES[name].model()
    run(CASES[name], model, audit=2, n_epochs=2, on_inexact="error", output_dir=str(tmp_path), optimizer=sgd(0.01))
    audits = audits_of(tmp_path)
    assert len(audits) >= 2
    assert all(entry["reference"] == "one batch" and entry["error"] < 1e-12 for entry in audits)
    assert all(entry["loss_error"] < 1e-12 for entry in audits)


def test_audits_run_without_the_models_dropout(tmp_path: Path) -> None:
    model = made(lambda: BiEncoder(dropout=0.3))()
    run(INFO_NCE, model, audit=True, on_inexact="error", output_dir=str(tmp_path), optimizer=sgd(0.01))
    assert max(entry["error"] for entry in audits_of(tmp_path)) < 1e-12


def _temperature_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ComputedRows.of_parameters
    monkeypatch.setattr(ComputedRows, "of_parameters", lambda self: 2 * right(self))


def _rows_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ComputedRows.part
    monkeypatch.setattr(ComputedRows, "part", lambda self, _, values: right(self, 0, values))


@pytest.mark.parametrize("fault", [_temperature_twice, _rows_of_others])
def test_audits_find_faults_in_the_second_pass(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    no_check = lambda *_: GradientDifference()
    monkeypatch.setattr(WindowGradientCheck, "difference", no_check)
    with pytest.raises(InexactLossError, match="update 1"):
        run(INFO_NCE, INFO_NCE.model(), audit=True, on_inexact="error", batch_size=1)


def test_the_loss_gets_all_rows_of_an_update_in_training_and_in_audits(tmp_path: Path) -> None:
    """So it may need a number of rows that a micro-batch does not have. The check before training takes four rows."""
    seen: set[int] = set()

    def of_even_rows(inputs: Any, _: Any) -> Tensor:
        if not in_self_check():
            seen.add(len(inputs["questions"]))
        return (inputs["questions"][::2] - inputs["answers"][1::2]).square().mean()

    run(
        INFO_NCE, INFO_NCE.model(), 18, loss_fn=of_even_rows, batch_size=1, effective_batch_size=6, audit=2, n_epochs=2,
        on_inexact="error", output_dir=str(tmp_path), optimizer=sgd(0.01),
    )  # fmt: skip
    assert seen == {6}
    assert max(entry["error"] for entry in audits_of(tmp_path)) < 1e-12


# Buffers, and passes that differ


class Normed(nn.Module):
    """An encoder with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(61, 8, padding_idx=0), nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(input_ids).sum(1)))


def test_batch_norm_is_reported_and_its_buffers_move_once_per_micro_batch() -> None:
    model: Any = made(Normed)()
    plain: Any = copy.deepcopy(model).train()
    case = Case(
        lambda: model, CASES["two terms"].rows, lambda _: {"loss_fn": in_two_terms, "loss_inputs": lambda o, _: o}, None
    )  # type: ignore[arg-type]
    passes = Passes(model, k=3)
    with pytest.warns(InexactLossWarning, match="BatchNorm1d 'norm' mixes the rows of a batch"):
        run(case, model, 12, batch_size=2, effective_batch_size=6, on_inexact="warn", optimizer=sgd(0.0))
    assert len(passes.found) == 6
    for _, given in passes.found:
        plain(**given)
    assert model.norm.num_batches_tracked == 6
    assert difference(model, plain) < 1e-12


def drifting(model: nn.Module, after: int) -> list[int]:
    """Let the model count its passes in training, and change its outputs with each of those after the first."""
    count = [0, after]

    def change(module: nn.Module, _: Any, outputs: Any) -> Any:
        if not module.training or in_self_check():
            return outputs
        count[0] += 1
        return {name: value * (1 + 1e-3 * max(0, count[0] - count[1])) for name, value in outputs.items()}

    model.register_forward_hook(change)
    return count


@pytest.mark.parametrize("on_inexact", ["error", "warn"])
def test_a_run_whose_passes_differ_ends_with_a_checkpoint_and_the_model(tmp_path: Path, on_inexact: str) -> None:
    """It ends in the third of six updates: the first takes six passes, and the second as many."""
    whole = INFO_NCE.model()
    wanted = run(INFO_NCE, whole, n_epochs=2, on_inexact=on_inexact)
    model = INFO_NCE.model()
    drifting(model, after=13)
    message = "differ by .*; up to 1e-05 counts as rounding(.|\n)*The model after 2 updates is in (.|\n)*update-0000000"
    with pytest.raises(InexactLossError, match=message) as raised:
        run(INFO_NCE, model, n_epochs=2, on_inexact=on_inexact, output_dir=str(tmp_path))
    assert "to train anyway" not in str(raised.value), "no setting allows it"
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())
    sound = INFO_NCE.model()
    result = run(INFO_NCE, sound, n_epochs=2, on_inexact=on_inexact, output_dir=str(tmp_path), resume="auto")
    assert result.loss_history == wanted.loss_history
    assert all(torch.equal(value, sound.state_dict()[name]) for name, value in whole.state_dict().items())


@pytest.mark.slow
def test_passes_that_differ_in_a_closure_undo_the_whole_step(tmp_path: Path) -> None:
    def lbfgs(groups: Any) -> torch.optim.Optimizer:
        return torch.optim.LBFGS([p for group in groups for p in group["params"]], lr=0.1, max_iter=3)

    def trained(after: int | None, **arguments: Any) -> dict[str, Tensor]:
        model = made(lambda: BiEncoder(dropout=0.3))()
        if after is not None:
            drifting(model, after)
        run(INFO_NCE, model, optimizer=lbfgs, **arguments)
        return model.state_dict()

    whole = trained(None)
    with pytest.raises(InexactLossError, match="The model after 1 updates"):
        trained(30, output_dir=str(tmp_path))  # each evaluation takes six passes
    again = trained(None, output_dir=str(tmp_path), resume="auto")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_hidden_generator_ends_the_run() -> None:
    hidden = torch.Generator().manual_seed(0)
    model = INFO_NCE.model()

    def noise(module: nn.Module, _: Any, outputs: Any) -> Any:
        if not module.training:
            return outputs
        return {n: v + 0.1 * torch.randn(v.shape, generator=hidden, dtype=v.dtype) for n, v in outputs.items()}

    model.register_forward_hook(noise)
    with pytest.raises(InexactLossError, match="draws random numbers that ftaccum does not replay"):
        run(INFO_NCE, model, audit=True)


# Updates that are not finite


def test_rows_with_values_that_are_not_finite_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    model = INFO_NCE.model()
    rows = [{**row, "bad": float(n == 7)} for n, row in enumerate(INFO_NCE.rows(13))]

    def inputs(outputs: Any, batch: Any) -> dict[str, Tensor]:
        broken = batch["bad"].bool() if not in_self_check() else batch["bad"] > 9
        return {**outputs, "questions": outputs["questions"].masked_fill(broken[:, None], torch.nan)}

    given = {**defaults(), **INFO_NCE.arguments(model), **IN_FIVES, "loss_inputs": inputs, "verbosity": "normal"}
    result = test_fine_tuning(model, train_data=rows, n_epochs=1, validation_split=0.0, progress=False, **given)
    assert result.skipped_steps == 1
    assert (
        "Rows with a number among the inputs of the loss that is not finite: row 7 of `train_data`"
        in capsys.readouterr().err
    )


def test_a_loss_that_is_not_finite_for_sound_rows_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    def loss(inputs: Any, _: Any) -> Tensor:
        return inputs["questions"].mean() / (0.0 if len(inputs["questions"]) in (1, 3) else 1.0)

    result = run(INFO_NCE, INFO_NCE.model(), loss_fn=loss, verbosity="normal")
    assert result.skipped_steps == 1
    assert "all that it reads is finite" in capsys.readouterr().err
