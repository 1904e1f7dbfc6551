"""Bad input with `loss_over="window"` gets one clear sentence before training starts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ftaccum import DataError, SettingsError, test_fine_tuning
from window_cases import CASES, Case, padded, pooled

INFO_NCE, ENCODER, COX = (CASES[name] for name in ("bi-encoder, InfoNCE", "two terms", "Cox"))


class NeverSteps(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # noqa: ARG002
        pytest.fail("training has started")


def run(case: Case, model: nn.Module | None = None, **arguments: Any) -> None:
    model = model if model is not None else case.model()
    given: dict[str, Any] = {
        "loss_over": "window", "batch_size": 2, "effective_batch_size": 5, "n_epochs": 1, "validation_split": 0.0,
        "progress": False, "verbosity": "quiet", "optimizer": lambda groups: NeverSteps(groups, lr=0.1),
    }  # fmt: skip
    test_fine_tuning(model, train_data=case.rows(13), **{**given, **case.arguments(model), **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss_fn": None, "loss_inputs": None}, "`loss_over` is 'window', but `loss_fn` is None"),
        ({"loss_over": "items", "loss_inputs": pooled}, "`loss_inputs` is given, but `loss_over` is 'items'"),
        ({"loss_over": "windows"}, "`loss_over` must be 'items' or 'window', but is 'windows' instead"),
        ({"reduction": "sum"}, "`reduction` is 'sum', but with `loss_over='window'` the loss is one number per update"),
        ({"count_items": len}, "`count_items` is given, but with `loss_over='window'` no items are counted"),
        ({"padding_free": True}, "`padding_free` is True, but with `loss_over='window'` each row must stay a row"),
        ({"class_weights": "balanced"}, "`class_weights` is 'balanced', .* but `loss_fn` is given"),
        ({"label_smoothing": 0.1}, "`label_smoothing` is 0.1, .* but `loss_fn` is given"),
        ({"loss_inputs": torch.nn.Linear(2, 2)}, "`loss_inputs` is a module with trainable parameters"),
        ({"loss_inputs": "embeds"}, "`loss_inputs` must be callable or None, but is 'embeds' instead"),
    ],
    ids=lambda given: given if isinstance(given, str) else ", ".join(given),
)
def test_arguments_that_contradict_each_other_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message) as raised:
        run(INFO_NCE, **arguments)
    assert len(raised.value.faults) == 1


def test_all_contradictions_are_listed_at_once() -> None:
    with pytest.raises(SettingsError) as raised:
        run(INFO_NCE, reduction="sum", count_items=len, padding_free=True)
    assert len(raised.value.faults) == 3


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (lambda o, _: [o["questions"]], "reads a tensor or a dict of tensors, but `loss_inputs` returns list"),
        (lambda *_: None, "but `loss_inputs` returns NoneType"),
        (lambda *_: {}, "but `loss_inputs` returns dict"),
        (lambda o, _: {"x": o["questions"], "margin": 0.2}, "a dict of tensors, but 'margin' is float"),
        (lambda o, _: o["questions"].mean(), r"one entry per row first, .* has the shape \(\) for \d rows"),
        (lambda o, _: o["questions"][:1], r"the tensor from `loss_inputs` has the shape \(1, 8\) for 4 rows"),
        (lambda o, _: {"x": o["questions"].t()}, r"'x' among the inputs .* has the shape \(8, \d\) for \d rows"),
        (lambda o, _: o["questions"] @ o["answers"].t(), r"a fixed shape, .* has the shapes \(4, 4\) and \(1, 1\)"),
        (lambda o, _: o["questions"] - o["questions"].mean(0), "must not depend on the other rows of its micro-batch"),
        (lambda o, _: o["questions"].detach(), "must depend on a trainable parameter, but none of 1 does"),
        (lambda o, _: o["questions"].argmax(1), "must depend on a trainable parameter, but none of 1 does"),
        (
            lambda o, _: o["pooler_output"],
            r"`loss_inputs` raised KeyError\('pooler_output'\). The outputs are \{'questions': \(1, 8\), .*"
            r"the batch is \{'input_ids'",
        ),
        (lambda outputs: outputs, "`loss_inputs` raised TypeError.*takes 1 positional argument"),
    ],
)  # fmt: skip
def test_inputs_of_the_loss_that_are_not_values_of_single_rows_are_refused(
    inputs: Callable[..., Any], message: str
) -> None:
    with pytest.raises((DataError, SettingsError), match=message):
        run(INFO_NCE, loss_inputs=inputs, loss_fn=_square)


def _square(inputs: Any, batch: Any) -> Tensor:  # noqa: ARG001
    return next(iter(inputs.values())).square().mean() if isinstance(inputs, dict) else inputs.float().square().mean()


@pytest.mark.parametrize("inputs", [None, lambda outputs, _: outputs.last_hidden_state])
def test_values_whose_shape_varies_with_padding_are_refused(inputs: Any) -> None:
    with pytest.raises(SettingsError, match=r"has the shapes \(4, \d+, 16\) and \(1, \d+, 16\).* pool tokens where"):
        run(ENCODER, loss_inputs=inputs, loss_fn=lambda found, _: found.square().mean())


def test_outputs_that_are_no_tensors_need_a_function() -> None:
    model: Any = INFO_NCE.model()
    model.register_forward_hook(lambda _, __, outputs: {**outputs, "scale": 0.5})
    with pytest.raises(DataError, match=r"no `loss_inputs`, all outputs .* must be tensors, but 'scale' is float"):
        run(INFO_NCE, model)


def test_outputs_without_rows_need_a_function() -> None:
    model: Any = INFO_NCE.model()
    model.register_forward_hook(lambda module, __, outputs: {**outputs, "scale": module.log_scale})
    with pytest.raises(DataError, match=r"the output 'scale' has the shape \(\) for \d rows. Give `loss_inputs`"):
        run(INFO_NCE, model)


def test_a_model_of_which_only_the_temperature_trains_is_refused() -> None:
    model: Any = INFO_NCE.model()
    model.requires_grad_(False)
    model.log_scale.requires_grad_(True)
    with pytest.raises(SettingsError, match="at least one input of the loss must depend on a trainable parameter"):
        run(INFO_NCE, model)


class _Draws(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator()

    def forward(self, inputs: Any, batch: Any) -> Tensor:  # noqa: ARG002
        return inputs["questions"].mean()


def test_random_number_generators_of_the_users_own_are_refused() -> None:
    model: Any = INFO_NCE.model()
    with pytest.raises(SettingsError, match="holds a random number generator of its own"):
        run(INFO_NCE, model, loss_fn=_Draws())
    model.generator = torch.Generator()
    with pytest.raises(SettingsError, match="holds a random number generator of its own"):
        run(INFO_NCE, model)


@pytest.mark.parametrize("column", ["input_ids", "attention_mask", "tme"])
def test_columns_that_the_loss_does_not_get_are_named_with_those_it_gets(column: str) -> None:
    message = (
        rf"reads column '{column}' .* rows all have the same shape: \['event', 'time'\]. Return what it needs from"
    )
    with pytest.raises(DataError, match=message):
        run(COX, loss_fn=lambda risks, batch: (risks * batch[column].sum()).mean())


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda *_: 1 / 0, r"`loss_fn` raised ZeroDivisionError.*inputs of all rows are \{'questions': \(4, 8\)"),
        (lambda inputs, _: inputs.logits, r"AttributeError.*'logits'.*'answers': \(4, 8\)\}, the columns are \{\}"),
        (lambda _: None, "`loss_fn` raised TypeError"),
        (lambda *_: None, "`loss_fn` must return one number for all rows .* but returns NoneType"),
        (lambda *_: 1.0, "as a tensor, .* but returns float"),
        (lambda *_: {}, r"but returns \{\}"),
        (lambda inputs, _: inputs["questions"].mean(1), r"returns a tensor of shape \(4,\). Return a mean over rows"),
        (lambda inputs, _: {"a": inputs["questions"].mean(1)}, r"but returns \{'a': \(4,\)\}"),
    ],
)  # fmt: skip
def test_faults_of_the_loss_are_named_with_what_it_was_given(loss: Any, message: str) -> None:
    with pytest.raises((DataError, SettingsError), match=message):
        run(INFO_NCE, loss_fn=loss)


# These come up in training, since they depend on the rows of an update.


def trained(case: Case, **arguments: Any) -> None:
    run(case, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1), **arguments)


def test_an_update_for_which_the_loss_fails_is_named_with_its_number_of_rows() -> None:
    def loss(inputs: Any, _: Any) -> Tensor:
        if len(inputs["questions"]) < 2:
            raise ValueError("needs negatives")
        return inputs["questions"].std(0).mean()

    with pytest.raises(DataError, match=r"ValueError\('needs negatives'\).*\{'questions': \(1, 8\)"):
        trained(INFO_NCE, loss_fn=loss, effective_batch_size=6)


@pytest.mark.parametrize("more", [True, False])
def test_terms_that_the_check_did_not_find_are_refused(more: bool) -> None:
    def loss(inputs: Any, _: Any) -> dict[str, Tensor]:
        mean = inputs["questions"].mean()
        return {"one": mean, "two": mean} if (len(inputs["questions"]) == 5) is more else {"one": mean}

    expected = r"\['one', 'two'\] for an update, but \['one'\]" if more else r"\['one'\] .* but \['one', 'two'\]"
    with pytest.raises(DataError, match=f"returns the terms {expected} in the check before training"):
        trained(INFO_NCE, loss_fn=loss, audit=False)


def test_columns_whose_shape_first_varies_in_training_are_named() -> None:
    """No row that is checked before training has the other shape."""

    def collate(rows: list[Any]) -> dict[str, Tensor]:
        wide = any(row["number"] == 31 for row in rows)
        batch = padded([{k: v for k, v in row.items() if k != "number"} for row in rows])
        return {**batch, "extra": torch.zeros(len(rows), 3 if wide else 2)}

    model: Any = INFO_NCE.model()
    rows = [{**row, "number": n} for n, row in enumerate(INFO_NCE.rows(60))]
    lengths = [len(row["input_ids"]) for row in rows]
    assert min(lengths) < lengths[31] < max(lengths)
    with pytest.raises(DataError, match=r"column 'extra' must have the same shape .* the shapes \(2,\) and \(3,\)"):
        test_fine_tuning(
            model, train_data=rows, batch_size=2, effective_batch_size=60, n_epochs=1, validation_split=0.0,
            progress=False, loss_over="window", audit=False,
            **{**INFO_NCE.arguments(model), "data_collator": collate},
        )  # fmt: skip
