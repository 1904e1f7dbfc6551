"""16-bit training: autocast, a gradient scaler, and 16-bit weights whose gradients are summed in float32."""

import copy
import gc
import json
import math
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ftaccum import Result, test_fine_tuning
from ftaccum.runtime.accelerator import accelerator_session
from ftaccum.runtime.gradients.fp32 import Fp32Gradients, RoundingOptimizer
from ftaccum.settings.runtime import Runtime
from heads import HEADS, RecordingOptimizer, Row, one_batch, one_batch_gradient, relative_error
from running_out import limited
from structures import Branching
from training_passes import in_self_check

CLASSIFIER, CAUSAL = HEADS["sequence classification, BERT"], HEADS["causal LM, Llama"]
SIXTEEN_BITS = [torch.bfloat16, torch.float16]


def update(model: nn.Module, rows: list[Row], batch_size: int, **arguments: Any) -> tuple[dict[str, Tensor], Result]:
    """Return the gradient of the first completed update, as the optimizer gets it, and the result. Weights stay."""
    optimizer = RecordingOptimizer(model)
    defaults = {"optimizer": optimizer, "n_epochs": 1, "gradient_clip_norm": None, "planner": False}
    result = test_fine_tuning(
        model, train_data=rows, batch_size=batch_size, effective_batch_size=len(rows), validation_split=0.0,
        progress=False, **(defaults | arguments),
    )  # fmt: skip
    return optimizer.gradients[0] if optimizer.gradients else {}, result


def in_float64(gradient: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: g.double() for name, g in gradient.items()}


def summed_by_hand(model: nn.Module, rows: list[Row]) -> dict[str, Tensor]:
    """Return Σ over rows of the 16-bit gradients of their parts of the mean loss, in float64."""
    sums: dict[str, Tensor] = {}
    for row in rows:
        (model(**one_batch([row])).loss.float() / len(rows)).backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                sums[name] = sums.get(name, 0) + p.grad.double()
        model.zero_grad()
    return sums


def norm(gradient: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradient.values()))


@pytest.mark.parametrize("head", [CLASSIFIER, CAUSAL], ids=["classifier", "causal LM"])
@pytest.mark.slow
def test_accumulating_under_bf16_autocast_is_as_exact_as_one_batch(head: Any) -> None:
    rows = head.rows(23)
    wanted = one_batch_gradient(head.model(), rows)
    errors = {
        size: relative_error(in_float64(update(head.model().float(), rows, size, mixed_precision="bf16")[0]), wanted)
        for size in (23, 4, 1)
    }
    assert 1e-4 < errors[23] < 2e-2, "autocast rounds"
    assert max(errors[4], errors[1]) < 1.5 * errors[23], errors


def test_updates_that_overflow_are_recorded_and_the_first_finite_one_is_exact(tmp_path: Path) -> None:
    """The loss is multiplied by 100, so the scale first has to fall from 2^16."""
    rows = CLASSIFIER.rows(7)

    def loss(outputs: Any, batch: Any) -> Tensor:
        return 100 * nn.functional.cross_entropy(outputs.logits.float(), batch["labels"])

    def first_finite(batch_size: int, **arguments: Any) -> tuple[dict[str, Tensor], Result]:
        return update(
            CLASSIFIER.model().float(), rows, batch_size, loss_fn=loss, mixed_precision="fp16", n_epochs=9,
            lr_scheduler="linear", warmup_steps=2, **arguments,
        )  # fmt: skip

    accumulated, result = first_finite(2, output_dir=str(tmp_path))
    n = result.skipped_steps
    assert 3 <= n < 8
    assert result.final_loss_scale == 2.0 ** (16 - n)
    assert [math.isfinite(norm) for norm in result.grad_norm_history] == [False] * n + [True] * (9 - n)
    # Skipped updates do not advance the schedule: they and the next one have the first rate of a warm-up of 2.
    assert result.lr_history[: n + 3] == [0.0] * (n + 1) + [0.5, 1.0]
    entries = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    told = [(entry["skipped"], entry["grad_norm"] is None) for entry in entries if "skipped" in entry]
    assert told == [(True, True)] * n + [(False, False)] * (9 - n)

    wanted = {name: 100 * g for name, g in one_batch_gradient(CLASSIFIER.model(), rows).items()}
    off, off_in_one_batch = (relative_error(g, wanted) for g in (accumulated, first_finite(7)[0]))
    assert off < 1.5 * off_in_one_batch < 2e-3


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.slow
def test_sums_in_float32_add_up_the_passes_and_are_rounded_once(dtype: torch.dtype) -> None:
    rows, model = CLASSIFIER.rows(64), CLASSIFIER.model().to(dtype)
    model.bert.embeddings.requires_grad_(
        False
    )  # its gradient is summed by rows, with less rounding than `summed_by_hand`
    wanted = summed_by_hand(model, rows)
    in_float32, result = update(model, rows, 1, accumulate_in_fp32=True)
    assert result.grad_norm_history == pytest.approx([norm(wanted)], rel=1e-6)
    assert unlike(in_float32, wanted) < 1e-3
    # Clipping comes before rounding: after it, numbers would be rounded twice.
    clipped, _ = update(model, rows, 1, accumulate_in_fp32=True, gradient_clip_norm=0.3 * norm(wanted))
    factor = 0.3 * norm(wanted) / (norm(wanted) + 1e-6)  # torch adds 1e-6 to avoid division by 0
    assert unlike(clipped, {name: factor * g for name, g in wanted.items()}) < 1e-3
    in_sixteen_bits, result = update(model, rows, 1)
    assert relative_error(in_float64(in_sixteen_bits), wanted) > 4 * relative_error(in_float64(in_float32), wanted)
    assert unlike(in_sixteen_bits, wanted) > 0.05


def unlike(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Return the share of numbers that differ from the rounded expected ones."""
    unequal = sum(int((g != wanted[name].to(g.dtype)).sum()) for name, g in found.items())
    return unequal / sum(g.numel() for g in found.values())


@pytest.mark.parametrize("name", ["causal LM, Llama", "sequence classification, BERT"])
@pytest.mark.slow
def test_sums_in_float32_do_not_grow_worse_with_k(name: str) -> None:
    """The reference is one batch in float64. Without float32 sums, the error doubles up to k = 64."""
    head = HEADS[name]
    rows, model = head.rows(64), head.model().bfloat16()
    wanted = one_batch_gradient(copy.deepcopy(model).double(), rows)

    def error(batch_size: int, in_float32: bool) -> float:
        return relative_error(in_float64(update(model, rows, batch_size, accumulate_in_fp32=in_float32)[0]), wanted)

    whole = error(64, False)
    assert error(1, True) < 1.3 * whole
    assert error(1, False) > 1.7 * whole


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_sums_in_float32_work_with_autocast_and_with_a_scaler(dtype: torch.dtype, precision: str) -> None:
    """This includes float16 weights, whose own gradients a scaler refuses to unscale."""
    rows, model = CLASSIFIER.rows(8), Branching().to(dtype)
    wanted = one_batch_gradient(copy.deepcopy(model).double(), rows)
    gradient, result = update(model, rows, 2, accumulate_in_fp32=True, mixed_precision=precision, n_epochs=3)
    assert (result.skipped_steps, result.final_loss_scale) == (0, {"bf16": None, "fp16": 2.0**16}[precision])
    assert relative_error(in_float64(gradient), wanted) < 2 * torch.finfo(torch.bfloat16).eps
    assert result.grad_norm_history == pytest.approx([norm(wanted)] * 3, rel=1e-2)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_sums_in_float32_that_overflow_skip_the_update(dtype: torch.dtype) -> None:
    huge = lambda outputs, batch: 1e5 * nn.functional.cross_entropy(outputs.logits.float(), batch["labels"])
    model = Branching().to(dtype)
    before = copy.deepcopy(model.state_dict())
    _, result = update(
        model, CLASSIFIER.rows(8), 2, accumulate_in_fp32=True, mixed_precision="fp16", n_epochs=3, loss_fn=huge,
        optimizer=torch.optim.SGD(model.parameters()),
    )  # fmt: skip
    assert (result.skipped_steps, result.final_loss_scale) == (3, 2.0**13)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_sums_in_float32_are_clamped_to_the_largest_16_bit_number() -> None:
    """A gradient that is finite in float32 must not become infinite in 16 bits."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, dtype=torch.float16))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * x.to(self.weight.dtype)

    steep = lambda outputs, _: 120000 * outputs.float().mean()  # four passes with 30000 each
    rows = [(torch.ones(1), torch.zeros(1))] * 4
    gradient, result = update(Scaled(), rows, 1, loss_fn=steep, accumulate_in_fp32=True)
    assert result.grad_norm_history == [120000.0]
    assert gradient["weight"].item() == 65504


def test_sums_in_float32_do_not_affect_wider_weights() -> None:
    rows = CLASSIFIER.rows(8)
    for wide in (torch.float32, torch.float64):
        model = CLASSIFIER.model().to(wide)
        with_it, without = (update(model, rows, 2, accumulate_in_fp32=wanted)[0] for wanted in (True, False))
        assert all(torch.equal(with_it[name], without[name]) for name in without)


def test_rows_of_an_embedding_are_added_to_its_sum_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse: list[bool] = []
    add = RoundingOptimizer.add

    def watched(sums: RoundingOptimizer, p: Tensor) -> None:
        sparse.append(p.grad.is_sparse)
        add(sums, p)

    monkeypatch.setattr(RoundingOptimizer, "add", watched)
    model = CLASSIFIER.model().bfloat16()
    update(model, CLASSIFIER.rows(4), 1, accumulate_in_fp32=True, audit=False)
    assert sum(sparse) == 4 * sum(isinstance(module, nn.Embedding) for module in model.modules())


@pytest.mark.slow
def test_a_window_that_ran_out_of_memory_leaves_nothing_in_the_sums() -> None:
    rows = [{**row, "input_ids": row["input_ids"][:3]} for row in CLASSIFIER.rows(24)]
    weights = []
    for batch_size, most in ((2, 2), (4, 2)):
        model = CLASSIFIER.model().bfloat16()
        limited(model, most, "backward")
        result = test_fine_tuning(
            model, train_data=rows, batch_size=batch_size, effective_batch_size=8, n_epochs=1, validation_split=0.0,
            learning_rate=1e-2, accumulate_in_fp32=True, planner=False, progress=False,
        )  # fmt: skip
        weights.append(model.state_dict())
    assert result.out_of_memory == 1, "and all passes after it were of 2 rows"
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_placeholders_for_the_float32_sums_take_no_memory() -> None:
    model = CLASSIFIER.model().bfloat16()
    optimizer = torch.optim.AdamW(model.parameters())
    update(model, CLASSIFIER.rows(4), 2, accumulate_in_fp32=True, optimizer=optimizer)
    with accelerator_session(Runtime(), 0, None) as accelerator:
        _, prepared = Fp32Gradients(optimizer).prepare(accelerator, model)
        stand_ins = [s for group in prepared.param_groups for s in group["params"]]
    assert all(s.untyped_storage().nbytes() == 4 for s in stand_ins)


def test_rates_scaled_with_the_batch_reach_the_optimizer_despite_float32_sums() -> None:
    """The updates have 2 and 8 rows, so the second has 4 times the rate."""
    rows = [(torch.ones(3).bfloat16(), torch.ones(1).bfloat16()) for _ in range(10)]
    model, moved = nn.Linear(3, 1).bfloat16(), []

    class Recording(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # noqa: ARG002
            moved.append(self.param_groups[0]["lr"])

    test_fine_tuning(
        model, train_data=rows, loss_fn=nn.MSELoss(), batch_size=2, gradient_accumulation_steps=[(0, 1), (1, 4)],
        learning_rate_scaling="linear", learning_rate=0.5, lr_scheduler="constant", optimizer=Recording, n_epochs=1,
        validation_split=0.0, accumulate_in_fp32=True, progress=False,
    )  # fmt: skip
    assert moved == [0.5, 2.0]


def test_sums_of_weights_outside_the_model_restart_in_every_window() -> None:
    taken: list[float] = []
    scale = nn.Parameter(torch.ones((), dtype=torch.bfloat16))

    class Watching(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            taken.append(scale.grad.item())
            super().step(closure)

    model = CLASSIFIER.model().bfloat16()
    update(
        model, CLASSIFIER.rows(8), 2, accumulate_in_fp32=True, n_epochs=3,
        optimizer=Watching([*model.parameters(), scale], lr=0.0),
        loss_fn=lambda outputs, batch: nn.functional.cross_entropy(outputs.logits * scale, batch["labels"]),
    )  # fmt: skip
    assert taken[1:] == pytest.approx(taken[:1] * 2, rel=0.1) != [0, 0]


def test_rounded_sums_have_the_memory_layout_of_the_weights() -> None:
    """Kernels that step all weights at once rely on it."""

    class Net(nn.Sequential):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images.to(self[0].weight.dtype))

    model = Net(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(16, 2)).to(
        torch.bfloat16, memory_format=torch.channels_last
    )
    images = [(torch.randn(3, 3, 3), n % 2) for n in range(4)]
    gradient, _ = update(model, images, 1, accumulate_in_fp32=True, loss_fn=nn.CrossEntropyLoss())
    assert gradient["0.weight"].stride() == model[0].weight.stride() != gradient["0.weight"].contiguous().stride()


def test_a_model_is_returned_without_its_sums() -> None:
    left: list[weakref.ref[Any]] = []

    def call(fails: bool) -> None:
        model = CLASSIFIER.model().bfloat16()
        left.append(weakref.ref(model))
        passes: list[int] = []

        def in_the_third(*_: Any) -> None:
            if not in_self_check():
                passes.append(1)
            if fails and len(passes) == 3:
                raise ZeroDivisionError

        model.bert.pooler.register_full_backward_pre_hook(in_the_third)
        with pytest.raises(ZeroDivisionError) if fails else nullcontext():
            update(model, CLASSIFIER.rows(8), 2, accumulate_in_fp32=True)
        assert all(p.grad is None for p in model.parameters())
        assert not any(p._post_accumulate_grad_hooks for p in model.parameters())

    gc.disable()
    try:
        call(fails=False)
        assert left[0]() is None
        call(fails=True)
    finally:
        gc.enable()
