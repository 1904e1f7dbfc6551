"""What `compute_metrics` gets: the predictions of `Trainer`, at any batch size, in little memory."""

import re
import tracemalloc
from collections import namedtuple
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    EvalPrediction,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from evaluated import VAL_ROWS, evaluated
from ftaccum import Accuracy, PaddingWarning, SettingsError, test_fine_tuning
from ftaccum.training.predictions import (
    BatchPredictions,
    HostArray,
    check_form,
    copy_to_host,
    ignored_outputs,
    join,
    named_outputs,
    unwrapped,
    without_numbers,
)
from heads import CLASSES, HEADS, Head, all_in_float64, one_batch
from training_passes import is_training_pass

CAUSAL, TAGGING, SPANS = "causal LM, Llama", "token classification, BERT", "question answering, BERT"
SEQ2SEQ = "seq2seq, BART"
Preprocess = Callable[[Any, Any], Any]


def arg_max(logits: Tensor, _: Any) -> Tensor:
    return logits.argmax(-1)


class EnoughError(Exception):
    """Ends a run before it trains."""

    def __init__(self, prediction: Any) -> None:
        super().__init__()
        self.prediction = prediction


def enough(prediction: EvalPrediction) -> dict[str, float]:
    raise EnoughError(prediction)


def predictions_of(name: str, **arguments: Any) -> EvalPrediction:
    """Return what `compute_metrics` gets before training."""
    with pytest.raises(EnoughError) as raised:
        evaluated(name, compute_metrics=enough, **arguments)
    return raised.value.prediction


@pytest.fixture
def _own_accelerator() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def predictions_of_trainer(name: str, preprocess: Preprocess | None, folder: Path) -> EvalPrediction:
    """Return what `Trainer` gives to `compute_metrics` for one batch of all rows."""
    got: list[EvalPrediction] = []
    settings = TrainingArguments(str(folder), use_cpu=True, report_to=[], per_device_eval_batch_size=13)
    trainer = Trainer(
        HEADS[name].model(), settings, data_collator=one_batch, eval_dataset=VAL_ROWS[name],
        compute_metrics=lambda prediction: got.append(prediction) or {}, preprocess_logits_for_metrics=preprocess,
    )  # fmt: skip
    with all_in_float64():
        trainer.evaluate()
    return got[0]


def first_of(logits: Any, _: Any) -> Any:
    return {"ids": logits[0].argmax(-1), "others": tuple(logits[1:])}


@pytest.mark.usefixtures("_own_accelerator")
@pytest.mark.parametrize(
    ("name", "preprocess"), [(TAGGING, None), (SPANS, None), (CAUSAL, arg_max), (SEQ2SEQ, first_of), (SPANS, first_of)]
)
def test_compute_metrics_gets_what_trainer_gives(name: str, preprocess: Preprocess | None, tmp_path: Path) -> None:
    wanted = predictions_of_trainer(name, preprocess, tmp_path)
    found = predictions_of(name, eval_batch_size=13, planner=False, preprocess_logits_for_metrics=preprocess)
    for one, other in ((found.predictions, wanted.predictions), (found.label_ids, wanted.label_ids)):
        assert structure_of(one) == structure_of(other)
        for mine, theirs in zip(leaves(one), leaves(other), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-12)


def leaves(value: Any) -> list[np.ndarray]:
    if isinstance(value, dict):
        value = tuple(value.values())
    return [leaf for part in value for leaf in leaves(part)] if isinstance(value, tuple | list) else [value]


def structure_of(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: structure_of(part) for name, part in value.items()}
    return tuple(map(structure_of, value)) if isinstance(value, tuple | list) else (value.dtype, value.shape)


def test_preprocessed_logits_of_all_batches_are_joined_in_order_and_padded() -> None:
    found = predictions_of(CAUSAL, eval_batch_size=3, preprocess_logits_for_metrics=arg_max)
    widest = max(len(row["labels"]) for row in VAL_ROWS[CAUSAL])
    assert found.predictions.shape == found.label_ids.shape == (13, widest)
    assert found.predictions.dtype == found.label_ids.dtype == np.int64
    for row, ids, labels in zip(VAL_ROWS[CAUSAL], found.predictions, found.label_ids, strict=True):
        length = len(row["labels"])
        with torch.no_grad(), all_in_float64():
            logits = HEADS[CAUSAL].model().eval()(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        assert ids[:length].tolist() == logits.argmax(-1).tolist()
        assert labels.tolist() == row["labels"] + [-100] * (widest - length)


@pytest.mark.parametrize(
    ("arguments", "largest"),
    [
        ({"batch_size": 2, "eval_batch_size": 5}, 5),
        ({"batch_size": 5, "eval_batch_size": 2}, 2),
        ({"eval_batch_size": 4, "max_tokens": 24}, 2),
    ],
)
def test_eval_batch_size_limits_the_rows_of_an_evaluated_batch(arguments: dict[str, Any], largest: int) -> None:
    shapes: list[torch.Size] = []

    def keep_shape(_: Any, labels: Tensor) -> Tensor:
        shapes.append(labels.shape)
        return labels

    rows = [{"input_ids": [3 + n] * 12, "labels": [1] * 12} for n in range(13)]
    predictions_of(TAGGING, val_data=rows, preprocess_logits_for_metrics=keep_shape, **arguments)
    assert max(rows for rows, _ in shapes) == largest
    assert sum(rows for rows, _ in shapes) == 13


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(61, 8), nn.Linear(8, 1)
        self.double()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embed(input_ids).tanh())[..., 0]


def over_padding(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Return a loss that ignores its mask."""
    return (outputs - batch["attention_mask"].flip(1).cumsum(1).flip(1)).square().mean()


@pytest.mark.parametrize("eval_batch_size", [7, 100])
def test_a_loss_that_padding_changes_does_not_depend_on_eval_batch_size(eval_batch_size: int) -> None:
    rows = [{"input_ids": row["input_ids"]} for row in HEADS[CAUSAL].rows(70, seed=2)]
    rows[5] = {"input_ids": list(range(3, 43))}  # makes the first 64 rows wider than the rest
    model = Tagger()
    with torch.no_grad():
        groups = [one_batch(rows[:64]), one_batch(rows[64:])]
        first, second = (over_padding(model(group["input_ids"]), group).item() for group in groups)
    with pytest.warns(PaddingWarning):
        found = test_fine_tuning(
            model, train_data=rows[:9], val_data=rows, loss_fn=over_padding, eval_batch_size=eval_batch_size,
            effective_batch_size=9, batch_size=3, n_epochs=1, progress=False, audit=False,
        )  # fmt: skip
    assert found.initial_loss == pytest.approx((64 * first + 6 * second) / 70, rel=1e-9)


@pytest.mark.parametrize("name", [CAUSAL, pytest.param("masked LM, BERT", marks=pytest.mark.slow), SEQ2SEQ])
def test_logits_of_a_language_model_are_refused_with_a_remedy_that_works(name: str) -> None:
    with pytest.raises(SettingsError, match=r"logits \(rows, length, vocabulary\), which would take about") as refused:
        predictions_of(name)
    if "seq2seq" not in name:  # the decoder's width follows from other columns
        n_bytes = 13 * max(len(row["input_ids"]) for row in VAL_ROWS[name]) * 61 * 8
        assert f"about {n_bytes:,} bytes" in str(refused.value)
    (remedy,) = re.findall(r"`preprocess_logits_for_metrics=(.*?)`", str(refused.value))
    found = predictions_of(name, preprocess_logits_for_metrics=eval(remedy))
    assert found.predictions.dtype == np.int64
    assert found.predictions.shape == found.label_ids.shape


def test_a_plain_language_model_is_recognised_by_its_next_token_loss() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Embedding(61, 8), nn.Linear(8, 61))

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.net(input_ids)

    rows = [torch.tensor(row["input_ids"]) for row in HEADS[CAUSAL].rows()]
    with pytest.raises(SettingsError, match=r"`preprocess_logits_for_metrics=lambda logits, labels: logits.argmax"):
        test_fine_tuning(Plain(), train_data=rows, val_data=rows, compute_metrics=lambda _: {}, progress=False)


def test_logits_are_refused_before_a_resumed_run_trains(tmp_path: Path) -> None:
    evaluated(CAUSAL, output_dir=str(tmp_path))
    model = HEADS[CAUSAL].model()
    passes: list[bool] = []
    model.register_forward_pre_hook(lambda *_: passes.append(is_training_pass()))
    with pytest.raises(SettingsError, match="`compute_metrics` would get"):
        evaluated(
            CAUSAL, model=model, output_dir=str(tmp_path), n_epochs=2, allow_changed="n_epochs", resume="auto",
            compute_metrics=lambda _: {},
        )  # fmt: skip
    assert passes
    assert not any(passes)


def test_hidden_states_are_refused_with_a_remedy_that_works() -> None:
    config = BartConfig(**HEADS[SEQ2SEQ].config.to_diff_dict() | {"num_labels": CLASSES})
    head = Head(BartForSequenceClassification, config, HEADS["sequence classification, BERT"].draw_row)
    rows = [{**row, "input_ids": [*row["input_ids"], 2]} for row in head.rows()]  # the end-of-text token is classified
    run = partial(test_fine_tuning, train_data=rows, val_data=rows, compute_metrics=enough, progress=False)
    with pytest.raises(SettingsError, match=r"`encoder_last_hidden_state` of all 9 rows, .* only `logits`") as refused:
        run(head.model())
    (remedy,) = re.findall(r"`preprocess_logits_for_metrics=(.*?)`", str(refused.value))
    with pytest.raises(EnoughError) as raised:
        run(head.model(), preprocess_logits_for_metrics=eval(remedy))
    assert raised.value.prediction.predictions.shape == (9, CLASSES)


def test_an_evaluation_keeps_no_logits_of_the_vocabulary() -> None:
    """It frees the logits of a batch before the next pass, even if the function returns a view of them."""
    vocabulary, rows = 3000, HEADS[CAUSAL].rows(40, seed=3)
    config = type(HEADS[CAUSAL].config)(**{**HEADS[CAUSAL].config.to_dict(), "vocab_size": vocabulary})
    model = LlamaForCausalLM(config).double()
    of_batches: list[StorageWeakRef] = []
    n_kept_at_pass: list[int] = []

    def n_kept() -> int:
        return sum(not logits.expired() for logits in of_batches)

    def preprocess(logits: Tensor, _: Tensor) -> Any:
        if not of_batches:
            tracemalloc.start()
        of_batches.append(StorageWeakRef(logits.untyped_storage()))
        return logits.argmax(-1), logits[..., 0]

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        peak = tracemalloc.get_traced_memory()[1]
        n_bytes = sum(array.nbytes for array in prediction.predictions)
        raise EnoughError({"peak": peak, "bytes": n_bytes, "kept": n_kept()})

    model.register_forward_pre_hook(lambda *_: n_kept_at_pass.append(n_kept()))
    try:
        with pytest.raises(EnoughError) as raised:
            evaluated(
                CAUSAL, model=model, val_data=rows, eval_batch_size=4, compute_metrics=compute,
                preprocess_logits_for_metrics=preprocess,
            )  # fmt: skip
    finally:
        tracemalloc.stop()
    found = raised.value.prediction
    assert len(of_batches) >= 10
    assert set(n_kept_at_pass) == {0}
    assert found["kept"] == 0
    longest = max(len(row["labels"]) for row in rows)
    assert found["bytes"] == len(rows) * longest * (8 + 8)  # token ids and one number a position, no logits
    assert found["peak"] < len(rows) * longest * vocabulary * 8 / 10


def test_integers_take_as_few_bytes_on_the_host_as_their_values_need() -> None:
    for highest, dtype in ((60, np.int8), (127, np.int8), (128, np.int16), (2**15, np.int32), (2**31, np.int64)):
        kept = copy_to_host(torch.tensor([[-100, highest]]))
        assert kept.values.dtype == dtype
        joined = join([kept], [(0,)])
        assert joined.dtype == np.int64
        assert joined.tolist() == [[-100, highest]]
    assert copy_to_host(torch.tensor([1.5], dtype=torch.bfloat16)).values.dtype == np.float32
    assert copy_to_host(torch.tensor([-129])).values.dtype == np.int16


def test_batches_of_unequal_types_and_widths_are_joined() -> None:
    first, second = torch.tensor([[1, 2, 3]], dtype=torch.uint8), torch.tensor([[250], [5]], dtype=torch.uint8)
    joined = join([copy_to_host(second), copy_to_host(first)], [(2, 0), (1,)])
    assert joined.tolist() == [[5, -100, -100], [1, 2, 3], [250, -100, -100]]
    joined = join([copy_to_host(torch.tensor([[True]])), copy_to_host(torch.tensor([[False]]))], [(1,), (0,)])
    assert joined.dtype == bool
    assert joined.tolist() == [[False], [True]]
    joined = join([copy_to_host(torch.tensor([1])), copy_to_host(torch.tensor([0.5]))], [(1,), (0,)])
    assert joined.tolist() == [0.5, 1.0]


def test_what_is_kept_is_a_copy() -> None:
    outputs = torch.tensor([1.0, 2.0])
    kept = copy_to_host(outputs)
    outputs += 1
    assert kept.values.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"compute_metrics": None}, "`preprocess_logits_for_metrics` is given, but `compute_metrics` is None"),
        ({"compute_metrics": Accuracy()}, "`compute_metrics` is an `evaluate` module"),
        ({"preprocess_logits_for_metrics": 3}, "`preprocess_logits_for_metrics` must be a function of logits"),
        ({"eval_batch_size": 0}, "`eval_batch_size` must be a positive integer or None, but is 0"),
    ],
)
def test_unusable_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    given = {"compute_metrics": lambda _: {}, "preprocess_logits_for_metrics": arg_max, **arguments}
    with pytest.raises(SettingsError, match=message):
        evaluated(TAGGING, **given)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.tensor(1.0), r"first dimension, but a tensor for 4 rows has the shape \(\) instead"),
        (torch.ones(8, 3), r"first dimension, but a tensor for 4 rows has the shape \(8, 3\) instead"),
        ((torch.ones(4), torch.ones(1, 4)), r"for 4 rows has the shape \(1, 4\) instead"),
        ([1, 2, 3, 4], r"must be a tensor, or a tuple, list or dict of tensors, but is \[1, 2, 3, 4\] instead"),
        (None, "must be a tensor, or a tuple, list or dict of tensors, but is None instead"),
        ((), r"must be a tensor, or a tuple, list or dict of tensors, but is \(\) instead"),
    ],
)
def test_results_without_an_entry_for_each_row_are_refused(result: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=f"The result .*{message}"):
        check_form(result, 4, "The result")


def test_batches_of_unequal_dimensions_are_refused() -> None:
    batches = [copy_to_host(torch.ones(4, 3)), copy_to_host(torch.ones(1))]
    with pytest.raises(SettingsError, match=r"have \(1,\) and \(2,\) dimensions in different batches"):
        join(batches, [(0, 1, 2, 3), (4,)])


def test_unusable_results_are_refused_before_training() -> None:
    with pytest.raises(SettingsError, match=r"result of `preprocess_logits_for_metrics` must have the rows of the"):
        predictions_of(TAGGING, preprocess_logits_for_metrics=lambda logits, _: logits.mean())


def test_an_error_in_the_function_is_raised_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError):
        predictions_of(TAGGING, preprocess_logits_for_metrics=lambda *_: 1 / 0)


def test_the_loss_and_what_the_config_ignores_are_no_predictions() -> None:
    one, other, loss = torch.ones(2, 3), torch.zeros(2), torch.tensor(1.0)
    ignored = ignored_outputs(HEADS[SEQ2SEQ].model())
    named = {
        "loss": loss,
        "logits": one,
        "past_key_values": (one, one),
        "missing": None,
        "scale": loss,
        "scores": other,
    }
    found = named_outputs(named, ignored, None)
    assert list(found) == ["logits", "scale", "scores"]
    assert list(without_numbers(found)) == ["logits", "scores"]
    assert list(named_outputs((one, loss, other), ignored, 1)) == ["0", "2"]
    assert list(named_outputs((one, loss, other), ignored, None)) == ["0", "1", "2"]
    assert list(named_outputs(namedtuple("Outputs", "loss scores")(loss, other), ignored, None)) == ["1"]
    assert unwrapped(named_outputs(one, ignored, None)).equal(one)


def test_predictions_of_rows_without_labels_have_a_size() -> None:
    """Processes send predictions to the main one in pieces of a certain size."""
    values = np.zeros((2, 3), np.float32)
    assert BatchPredictions((0, 1), {"logits": HostArray(values, values.dtype)}, None).n_bytes == 24
