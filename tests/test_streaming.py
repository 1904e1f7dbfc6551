"""Streams: each row is used once, in order, and every window equals one batch."""

import itertools
import json
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, load_dataset
from datasets.distributed import split_dataset_by_node
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import BertTokenizerFast

from ftaccum import DataError, SettingsError, search, test_fine_tuning
from ftaccum.data import iterable as streaming
from ftaccum.planning.batch_size import BatchSizes
from ftaccum.planning.plan import Plan
from ftaccum.planning.stream_plan import StreamPlan
from heads import (
    CLASSES,
    HEADS,
    RecordingOptimizer,
    Row,
    all_in_float64,
    one_batch,
    one_batch_gradient,
    relative_error,
)
from running_out import limited
from streams import Plane, Seen, Stream, point
from training_passes import is_training_pass

BERT, LLAMA = HEADS["sequence classification, BERT"], HEADS["causal LM, Llama"]
HEADS_TRIED = ["causal LM, Llama", "sequence classification, BERT", "question answering, BERT", "seq2seq, T5"]
FOR_TWO: dict[str, Any] = {"n_epochs": 2, "remainder": "carry", "effective_batch_size": 12, "learning_rate": 1e-3}


def run(model: nn.Module, stream: Any, **arguments: Any) -> Any:
    defaults = {"n_epochs": 1, "max_updates": 99, "validation_split": 0.0, "batch_size": 2, "effective_batch_size": 5}
    return test_fine_tuning(model, train_data=stream, progress=False, **(defaults | arguments))


def gradient_errors(name: str, windows: list[list[int]], rows: list[Row], **arguments: Any) -> list[float]:
    model = HEADS[name].model()
    wanted = [one_batch_gradient(model, [rows[n] for n in window]) for window in windows]
    optimizer = RecordingOptimizer(model)
    run(model, Stream(rows), optimizer=optimizer, gradient_clip_norm=None, **arguments)
    return [relative_error(f, w) for f, w in zip(optimizer.gradients, wanted, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS_TRIED)
def test_gradient_of_every_window_is_that_of_one_batch_in_the_order_of_the_stream(name: str) -> None:
    rows, order = HEADS[name].rows(9), [*range(9), *range(9), *range(9)]
    ends = {
        "flush": [0, 4, 8, 9, 13, 17, 18, 22, 26, 27],
        "carry": [0, 4, 8, 12, 16, 20, 24, 27],
        "grows": [0, 4, 8, 18, 27],  # a window of 10 has one of the 9 rows twice; the last has the rest
    }
    windows = {kind: [order[a:b] for a, b in itertools.pairwise(e)] for kind, e in ends.items()}
    with all_in_float64():
        errors = gradient_errors(name, windows["flush"], rows, n_epochs=3, effective_batch_size=4)
        errors += gradient_errors(name, windows["carry"], rows, n_epochs=3, effective_batch_size=4, remainder="carry")
        errors += gradient_errors(
            name, windows["grows"], rows, n_epochs=3, effective_batch_size=None,
            gradient_accumulation_steps=[(0, 2), (2, 5)], remainder="carry",
        )  # fmt: skip
        errors += gradient_errors(name, windows["carry"][:4], rows, n_epochs=3, effective_batch_size=4,
                                  remainder="carry", max_updates=4)  # fmt: skip
    assert len(errors) == 9 + 7 + 4 + 4
    assert max(errors) < 1e-10


def test_micro_batches_without_loss_items_and_rows_without_padding_change_nothing() -> None:
    rows = LLAMA.rows(14)
    for row in rows[1::3]:
        row["labels"] = [-100] * len(row["input_ids"])
    order = list(range(14))
    windows = [order[:5], order[5:10], order[10:]]
    with all_in_float64():
        model = LLAMA.model()
        wanted = [one_batch_gradient(model, [rows[n] for n in window]) for window in windows]
        for way in ({"batch_size": 1}, {"batch_size": 3, "padding_free": True}):
            optimizer = RecordingOptimizer(model)
            run(model, Stream(rows), optimizer=optimizer, gradient_clip_norm=None, **way)
            errors = [relative_error(f, w) for f, w in zip(optimizer.gradients, wanted, strict=True)]
            assert max(errors) < 1e-10, way


@pytest.mark.parametrize("remainder", ["flush", "carry"])
def test_windows_of_a_stream_are_as_large_as_those_of_rows_that_can_be_counted(remainder: str) -> None:
    for n in (1, 2, 5, 8):
        for epochs in (1, 2, 4):
            for later in ((), ((1, 3), (4, 1))):
                for most in (1, 2, 99):
                    counted = Plan(n, epochs, BatchSizes(2, 1, 1, 2, later), remainder=remainder, max_updates=most)
                    wanted = [(w.index, w.epoch, len(w.rows)) for e in counted.epochs for w in counted.windows(e)]
                    left = dict.fromkeys(range(epochs), n)

                    def read(epoch: int, more: int, _: int, left: dict[int, int] = left) -> int:
                        came = min(more, left[epoch])
                        left[epoch] -= came
                        return came

                    plan = StreamPlan(epochs, BatchSizes(2, 1, 1, 2, later), most, read, remainder=remainder)
                    windows = [w for e in plan.epochs for w in plan.windows(e)]
                    assert [(w.index, w.epoch, len(w.rows)) for w in windows] == wanted
                    seen = [row for w in windows for row in w.rows]
                    assert seen == list(range(len(seen)))
                    assert (plan.shortfall() is None) == (len(windows) == most)


@pytest.mark.parametrize("passes", [(5, 0), (4, 0, 4), (3, 5), (2, 1, 3, 0)])
def test_a_window_of_a_stream_belongs_to_the_pass_that_its_last_row_came_in(passes: tuple[int, ...]) -> None:
    """Passes may have different lengths. The first empty one does not count and ends the stream."""
    left = [*passes, *[0] * 9]

    def read(epoch: int, more: int, _: int) -> int:
        came = min(more, left[epoch])
        left[epoch] -= came
        return came

    plan = StreamPlan(9, BatchSizes(4, 1, 1, 4), 99, read, remainder="carry")
    windows = [(epoch, window) for epoch in plan.epochs for window in plan.windows(epoch)]
    came_in = [epoch for epoch in range(passes.index(0) if 0 in passes else len(passes)) for _ in range(passes[epoch])]
    assert [n for _, window in windows for n in window.rows] == list(range(len(came_in)))
    assert all(epoch == window.epoch == came_in[window.rows[-1]] for epoch, window in windows)


@pytest.mark.parametrize("remainder", ["flush", "carry"])
def test_skipped_windows_of_a_stream_are_read(remainder: str) -> None:
    def windows(start: int) -> tuple[list[Any], int]:
        left = [7, 7, 7]

        def read(epoch: int, more: int, _: int) -> int:
            came = min(more, left[epoch])
            left[epoch] -= came
            return came

        plan = StreamPlan(3, BatchSizes(3, 1, 1, 3), 99, read, remainder=remainder)
        return [window for epoch in plan.epochs for window in plan.windows(epoch, start)], sum(left)

    whole, _ = windows(0)
    for start in range(len(whole) + 2):
        assert windows(start) == (whole[start:], 0)


@pytest.mark.slow
def test_the_physical_batch_the_cut_and_memory_change_nothing() -> None:
    def trained(prepare: Callable[[nn.Module], object] = lambda _: None, **arguments: Any) -> Any:
        model = BERT.model()
        prepare(model)
        settings = {"n_epochs": 2, "effective_batch_size": 12, "remainder": "carry", "learning_rate": 1e-3}
        result = run(model, Stream(BERT.rows(31)), val_data=BERT.rows(5), **(settings | arguments))
        return model.state_dict(), result

    whole, result = trained(batch_size=12)
    ways: list[dict[str, Any]] = [
        {"batch_size": 1}, {"batch_size": 5}, {"batch_size": "auto"}, {"max_tokens": 40}, {"planner": False},
        {"batch_size": 6, "prepare": lambda model: limited(model, 3)},
    ]  # fmt: skip
    for way in ways:
        weights, other = trained(**way)
        assert relative_error(weights, whole) < 1e-9, way
        assert other.loss_history == pytest.approx(result.loss_history, rel=1e-9)
        assert other.val_loss_history == pytest.approx(result.val_loss_history, rel=1e-9)
    assert other.out_of_memory > 0


def test_rows_examined_before_training_are_trained_on_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "LOOKED_AT", 10)
    stream = Stream([point(n) for n in range(23)])
    with Seen() as seen:
        run(Plane(), stream, loss_fn=nn.CrossEntropyLoss(), n_epochs=2)
    assert [sorted(window) for window in seen.windows[:5]] == [
        [0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14], [15, 16, 17, 18, 19], [20, 21, 22],
    ]  # fmt: skip
    assert seen.windows[:5] == seen.windows[5:]
    assert (stream.n_read, stream.epochs) == (46, [0, 1])


def test_no_more_of_a_stream_is_read_than_is_trained_on_and_read_ahead() -> None:
    stream = Stream([point(n) for n in range(1000)])
    result = run(Plane(), stream, loss_fn=nn.CrossEntropyLoss(), max_updates=60)
    assert (result.optimizer_steps, stream.n_read) == (60, 300)
    stream = Stream([point(n) for n in range(1000)])
    run(Plane(), stream, loss_fn=nn.CrossEntropyLoss(), max_updates=2)
    assert stream.n_read == streaming.LOOKED_AT


def test_only_windows_in_flight_and_the_first_rows_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "LOOKED_AT", 8)
    held: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    class Fresh(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            nonlocal most
            for n in range(200):
                most = max(most, len(held))
                row = point(n)
                held.add(row[0])
                yield row
                del row

    run(Plane(), Fresh(), loss_fn=nn.CrossEntropyLoss(), max_updates=40, batch_size=5)
    # The first eight; or the current window, the one being read, and the next row.
    assert 8 <= most <= 11


def test_a_stream_that_ends_early_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    result = run(BERT.model(), Stream(BERT.rows(9)), n_epochs=2, effective_batch_size=4)
    assert result.optimizer_steps == 6
    assert "The stream ended after 6 updates, but `max_updates` is 99, for which" in capsys.readouterr().err
    run(BERT.model(), Stream(BERT.rows(9)), n_epochs=2, effective_batch_size=4, max_updates=6)
    shown = capsys.readouterr().out
    assert "Training samples: a stream\n" in shown
    assert "Updates: 6 (`max_updates`), or fewer if the stream ends first (2 passes)\n" in shown
    assert "The stream ended" not in shown


@pytest.mark.parametrize("remainder", ["flush", "carry"])
def test_a_stream_that_cannot_be_repeated_ends_the_run(remainder: str) -> None:
    result = run(BERT.model(), Stream(BERT.rows(9), passes=1), n_epochs=5, effective_batch_size=4, remainder=remainder)
    assert result.optimizer_steps == 3
    assert len(result.train_loss_history) == 1
    assert not any(map(math.isnan, result.loss_history))
    assert result.final_loss == result.train_loss_history[-1]
    assert not math.isnan(result.final_loss)


@pytest.mark.slow
def test_a_stream_that_fails_loses_no_completed_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "LOOKED_AT", 8)
    model = BERT.model()
    with pytest.raises(
        DataError, match=r"`train_data` cannot be read further, after 23 rows: OSError\('the line is dead'\)"
    ):
        run(model, Stream(BERT.rows(40), fails_after=23), learning_rate=1e-2, output_dir=str(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert [line["rows"] for line in lines if "window" in line] == [5, 5, 5, 5]
    other = BERT.model()
    run(other, Stream(BERT.rows(20)), learning_rate=1e-2, max_updates=99)
    assert relative_error(model.state_dict(), other.state_dict()) == 0


def test_random_draws_of_a_stream_follow_the_seed_and_not_the_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "LOOKED_AT", 4)

    class Drawn(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            for _ in range(40):
                yield point(int(torch.randint(1000, ())))

    class Drawing(Plane):
        """A model that draws once per pass, as dropout does."""

        def forward(self, points_BD: Tensor) -> Tensor:
            return super().forward(points_BD) + 0.01 * torch.rand(())

    def seen(**arguments: Any) -> list[list[int]]:
        with Seen() as seen:
            run(Drawing(), Drawn(), loss_fn=nn.CrossEntropyLoss(), **arguments)
        return [sorted(window) for window in seen.windows]

    assert seen(batch_size=1) == seen(batch_size=5)
    assert seen() != seen(random_seed=1)


@pytest.mark.slow
def test_a_collator_that_draws_gets_each_window_whole() -> None:
    head = HEADS["masked LM, BERT"]

    def mask(rows: list[Row]) -> dict[str, Tensor]:
        batch = one_batch([{"input_ids": row["input_ids"]} for row in rows])
        masked = (torch.rand(batch["input_ids"].shape) < 0.5) & batch["attention_mask"].bool()
        return {**batch, "labels": torch.where(masked, batch["input_ids"], -100)}

    def losses(batch_size: int) -> list[float]:
        rows = [{"input_ids": row["input_ids"]} for row in head.rows(17)]
        return run(head.model(), Stream(rows), data_collator=mask, batch_size=batch_size).loss_history

    assert losses(1) == pytest.approx(losses(5), rel=1e-9)


def test_tokens_per_update_takes_the_mean_length_of_the_first_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "LOOKED_AT", 10)
    rows = [torch.arange(1, 9)] * 10 + [torch.arange(1, 17)] * 10
    result = run(LLAMA.model(), Stream(rows), effective_batch_size=None, tokens_per_update=40)
    assert (result.effective_batch_size, result.optimizer_steps) == (5, 4)


def test_a_compiled_model_gets_bucket_widths_within_its_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest row is not among the first ones and has as many tokens as the model has positions."""
    monkeypatch.setattr(streaming, "LOOKED_AT", 4)
    monkeypatch.setattr("ftaccum.training.base_run.compile_model", lambda _: nullcontext())
    rows = [{"input_ids": list(range(1, n + 1)), "labels": n % CLASSES} for n in (5, 6, 7, 9, 17, 31, 50, 60)]
    widths: set[int] = set()
    model = BERT.model()

    def note(_: nn.Module, __: Any, given: dict[str, Any]) -> None:
        if is_training_pass():
            widths.add(given["input_ids"].shape[1])

    model.register_forward_pre_hook(note, with_kwargs=True)
    monkeypatch.setattr(model.config, "max_position_embeddings", 60)  # the heads share it
    run(model, Stream(rows), compile=True, batch_size=1)
    assert widths <= {8, 16, 24, 32, 56, 60}
    assert 60 in widths


def tokenizer_of(folder: Path) -> BertTokenizerFast:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "a", "very"]
    (folder / "vocab.txt").write_text("\n".join(words))
    return BertTokenizerFast(str(folder / "vocab.txt"))


TEXTS = [{"text": "a very good film" if n % 2 else "bad film", "label": n % CLASSES} for n in range(13)]


@pytest.mark.slow
def test_streams_of_datasets_train_like_lists_of_their_rows(tmp_path: Path) -> None:
    rows = [{**row, "input_ids": [int(n) for n in row["input_ids"]]} for row in BERT.rows(13)]
    losses = run(BERT.model(), Stream(rows)).loss_history
    of_table = Dataset.from_list(rows).to_iterable_dataset()
    assert run(BERT.model(), of_table).loss_history == losses
    assert run(BERT.model(), of_table.with_format("torch")).loss_history == losses
    with (tmp_path / "rows.jsonl").open("w") as file:
        file.writelines(json.dumps(row, default=int) + "\n" for row in rows)
    streamed = load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), streaming=True, split="train")
    assert run(BERT.model(), streamed).loss_history == losses
    shuffled = streamed.shuffle(seed=1, buffer_size=5)
    result = run(BERT.model(), shuffled, n_epochs=2)
    assert result.loss_history[:3] != losses
    assert result.loss_history[:3] != result.loss_history[3:]


@pytest.mark.slow
def test_raw_text_is_tokenised_as_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "LOOKED_AT", 6)
    tokenizer = tokenizer_of(tmp_path)
    encoded = [{**tokenizer(row["text"]), "labels": row["label"]} for row in TEXTS]
    losses = run(BERT.model(), Stream(encoded)).loss_history
    Dataset.from_list(TEXTS).to_csv(str(tmp_path / "texts.csv"))
    from_file = load_dataset("csv", data_files=str(tmp_path / "texts.csv"), streaming=True, split="train")
    for stream in (Stream(TEXTS), Dataset.from_list(TEXTS).to_iterable_dataset(), from_file):
        assert run(BERT.model(), stream, tokenizer=tokenizer).loss_history == losses
    result = run(BERT.model(), Stream(TEXTS), tokenizer=tokenizer, val_data=TEXTS[:4], early_stopping_patience=1)
    assert len(result.val_loss_history) == 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"max_updates": None}, "`train_data` is a stream, .* and `max_updates` is None"),
        ({"validation_split": 0.1}, "no rows can be held out, but `validation_split` is 0.1 and `val_data` is None"),
        ({"num_workers": 2}, "`num_workers` is 2. Leave it out"),
        (
            {"train_data": split_dataset_by_node(Dataset.from_list(TEXTS).to_iterable_dataset(), 0, 2)},
            "that `split_dataset_by_node` has divided among processes",
        ),
        ({"val_data": Stream(TEXTS)}, "`val_data` must be .*, but is a stream instead. Take the rows you want first"),
        ({"train_data": Stream([])}, "`train_data` has no rows"),
        ({"train_data": Stream([1, 2])}, "its first row is a int instead"),
        ({"train_data": Stream([*BERT.rows(3), 1])}, "but row 3 is a int instead"),
        (
            {"train_data": iter(BERT.rows())},
            r"read only once\. .* `train_data=datasets\.IterableDataset\.from_gen",
        ),
        ({"train_data": Stream(TEXTS)}, "`train_data` is raw text, but `tokenizer` is None"),
        ({"train_data": Stream(BERT.rows(), fails_after=2)}, "cannot be read further, after 2 rows"),
        (
            {"train_data": Stream([*BERT.rows(3), {**BERT.rows(1)[0], "labels": CLASSES}])},
            f"In `train_data`, row 3 has the label {CLASSES}",
        ),
        ({"max_tokens": 2}, r"has \d+ tokens, but `max_tokens` is 2"),
        ({"max_tokens": "auto"}, "`max_tokens` is 'auto', which needs the longest training row"),
    ],
)
def test_unusable_rows_and_settings_are_reported_before_training(given: dict[str, Any], words: str) -> None:
    arguments = {"train_data": Stream(BERT.rows()), "max_updates": 9, "validation_split": 0.0, "progress": False}
    with pytest.raises((DataError, SettingsError), match=words):
        test_fine_tuning(BERT.model(), **(arguments | given))


@pytest.mark.slow
def test_faults_of_later_rows_name_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "LOOKED_AT", 4)
    good = BERT.rows(12)
    long = {**good[0], "input_ids": list(range(1, 60))}
    with pytest.raises(DataError, match=r"In `train_data`, row 12 has 59 tokens, but `max_tokens` is 50"):
        run(BERT.model(), Stream([*good, long]), max_tokens=50)
    with pytest.raises(DataError, match=r"In `train_data`, row 12 has the label 7"):
        run(BERT.model(), Stream([*good, {**good[0], "labels": 7}]))
    for odd in (3, torch.ones(4)):
        with pytest.raises(DataError, match=rf"`train_data` must be .*, but row 12 is a {type(odd).__name__} instead"):
            run(BERT.model(), Stream([*good, odd, *good]))


NO_TEXT = r"row {} has {} instead of text in its column 'text'\. Fix or drop the row"
ODD_TEXTS: list[tuple[Any, str, str]] = [
    # the row, and its error among the rows examined before training and later
    ({"label": 1}, NO_TEXT.format(3, None), NO_TEXT.format(9, None)),
    ({"text": None, "label": 1}, NO_TEXT.format(3, None), NO_TEXT.format(9, None)),
    ({"text": ["a", "film"], "label": 1}, "row 3 cannot be put into one table", NO_TEXT.format(9, r"\['a', 'film'\]")),
    ({"text": "\ud800", "label": 1}, "row 3 cannot be put into one table", "row 9 cannot be tokenized: TypeError"),
    ({"text": "a", "label": "odd"}, "row 3 cannot be put into one table", "row 9 has the label 'odd', but the model's"),
    ({"text": "a"}, "row 3 cannot be batched", "row 9 cannot be batched"),
    (7, "row 3 is a int instead", "row 9 is a int instead"),
]


@pytest.mark.parametrize(("odd", "early", "late"), ODD_TEXTS)
def test_a_row_whose_text_cannot_be_used_is_named_whenever_it_comes(
    odd: Any, early: str, late: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(streaming, "LOOKED_AT", 6)
    for place, words in ((3, early), (9, late)):
        with pytest.raises(DataError, match=words):
            run(BERT.model(), Stream([*TEXTS[:place], odd, *TEXTS]), tokenizer=tokenizer_of(tmp_path))
    with pytest.raises(DataError, match=early):
        run(BERT.model(), [*TEXTS[:3], odd, *TEXTS], tokenizer=tokenizer_of(tmp_path))


def test_errors_of_a_stream_state_how_many_rows_were_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "LOOKED_AT", 4)
    rows = LLAMA.rows(9)
    for row in rows[:4]:
        row["labels"] = [-100] * len(row["input_ids"])
    with pytest.raises(DataError, match=r"judging by its first 4 rows, has no label that counts: .* shuffle the"):
        run(LLAMA.model(), Stream(rows))
    with pytest.raises(DataError, match=r"The term 'loss' of .* but no items are counted for it there"):
        run(LLAMA.model(), Stream(LLAMA.rows(9)), count_items=lambda _: 0, on_inexact="ignore")


def test_a_search_takes_no_stream() -> None:
    with pytest.raises(SettingsError, match="`train_data` is a stream, but a search compares trials on the same rows"):
        search(BERT.model, train_data=Stream(BERT.rows()), val_data=BERT.rows(3))


@pytest.mark.slow
@pytest.mark.processes
def test_two_processes_see_every_row_once_between_them(two_processes: Callable[..., str], tmp_path: Path) -> None:
    alone = {}
    for name in HEADS_TRIED[:3]:
        model = HEADS[name].model()
        with all_in_float64():
            result = run(model, Stream(HEADS[name].rows(31)), **FOR_TWO, val_data=HEADS[name].rows(5))
        alone[name] = (model.state_dict(), result)
    torch.save(alone, tmp_path / "alone.pt")
    printed = two_processes("streams_of_two.py", str(tmp_path / "alone.pt"))
    found = json.loads(next(line for line in printed.splitlines() if line.startswith("FOUND "))[6:])
    assert max(found["differences"].values()) < 1e-9, found
    for kind, both in found["seen"].items():
        windows = [sorted(one + other) for one, other in zip(*both, strict=True)]
        assert [len(window) for window in windows] == [9, 9, 9, 9, 4] * 2, kind
        for one_pass in (windows[:5], windows[5:]):
            assert sorted(number for window in one_pass for number in window) == list(range(40)), kind
        assert all(any(windows) for windows in both), "one process did all the work"
    assert found["errors"][0] == found["errors"][1]
    assert "cannot be read further, after 23 rows: OSError" in found["errors"][0][0]
    assert "cannot be sent to other processes" in found["errors"][0][1]
    assert found["ledger"] == [5, 5, 5, 5]
    assert found["alone again"] == [0, 2]


def test_the_end_of_a_stream_that_ends_early_is_evaluated() -> None:
    rows = HEADS["sequence classification, BERT"].rows(16)
    result = run(BERT.model(), Stream(rows), val_data=rows[:4], evaluate_every=3)
    assert result.evaluation_updates == [3, 4]
    endless = run(BERT.model(), Stream(rows), val_data=rows[:4], n_epochs=3)
    assert endless.evaluation_updates == [4, 8, 12]
