"""Every form of data that `test_fine_tuning` accepts, and every fault in data that it reports."""

import copy
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.tracking import GeneralTracker
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    ResNetConfig,
    ResNetForImageClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    SegformerConfig,
    SegformerForSemanticSegmentation,
)

from ftaccum import Accuracy, DataError, InexactLossWarning, Result, SettingsError, TextWarning, test_fine_tuning
from ftaccum.data.convert import synthetic_rows
from ftaccum.planning.shuffle import hold_out
from heads import CLASSES, HEADS, Row, one_batch
from silent_errors.case import update_error
from silent_errors.tokenizer_padding import llama_classifier

CLASSIFIER, CAUSAL = HEADS["sequence classification, BERT"], HEADS["causal LM, Llama"]


def run(model: nn.Module, data: Any, **arguments: Any) -> Result:
    defaults = {"n_epochs": 1, "validation_split": 0.0, "batch_size": 2, "effective_batch_size": 5, "progress": False}
    return test_fine_tuning(model, train_data=data, **(defaults | arguments))


class PlainLM(nn.Module):
    """A language model whose `forward(tokens)` returns logits and takes neither labels nor masks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(61, 8), nn.Linear(8, 61)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens))


def token_rows(n: int = 7) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [
        torch.randint(1, 61, (int(length),), generator=draw) for length in torch.randint(3, 9, (n,), generator=draw)
    ]


def test_lists_of_dicts_and_datasets_are_the_same_rows() -> None:
    rows = CLASSIFIER.rows()
    as_list = run(CLASSIFIER.model(), rows)
    as_dataset = run(CLASSIFIER.model(), Dataset.from_list(rows))
    called_label = run(
        CLASSIFIER.model(), [{"input_ids": r["input_ids"], "label": r["labels"], "id": "x"} for r in rows]
    )
    assert as_list.loss_history == as_dataset.loss_history == called_label.loss_history
    assert as_list.padding_fraction == as_dataset.padding_fraction


@pytest.mark.slow
def test_torch_datasets_of_dicts() -> None:
    class Wrapped(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 9

        def __getitem__(self, index: int) -> Row:
            return CLASSIFIER.rows()[index]

    assert run(CLASSIFIER.model(), Wrapped()).loss_history == pytest.approx(
        run(CLASSIFIER.model(), CLASSIFIER.rows()).loss_history, rel=1e-9
    )


def test_token_ids_train_a_causal_lm_and_a_plain_module_on_the_next_token() -> None:
    rows = token_rows()
    assert run(CAUSAL.model(), rows).loss_history == pytest.approx(
        run(CAUSAL.model(), [{"input_ids": ids, "labels": ids} for ids in rows]).loss_history
    )
    model = PlainLM()
    one_by_one = [nn.functional.cross_entropy(model(ids[None])[0, :-1], ids[1:], reduction="sum") for ids in rows]
    wanted = sum(loss.item() for loss in one_by_one) / sum(len(ids) - 1 for ids in rows)
    result = run(model, rows, config=SimpleNamespace(vocab_size=61, pad_token_id=0), effective_batch_size=7)
    assert result.loss_history == pytest.approx([wanted], rel=1e-5)


def test_pairs_of_inputs_and_targets_with_a_loss_function() -> None:
    draw = torch.Generator().manual_seed(0)
    images, labels = torch.randn(9, 4, generator=draw), torch.randint(3, (9,), generator=draw)
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    wanted = nn.functional.cross_entropy(model(images), labels).item()
    result = run(model, TensorDataset(images, labels), loss_fn=nn.CrossEntropyLoss(), effective_batch_size=9)
    assert result.loss_history == pytest.approx([wanted], rel=1e-6)


@pytest.mark.slow
def test_small_regression_learns_as_with_full_batches() -> None:
    """A 10 → 5 → 2 network on 32 rows with MSE: 4 × 8 rows and the full batch give the same loss in every epoch."""
    draw = torch.Generator().manual_seed(0)
    rows = TensorDataset(torch.randn(32, 10, generator=draw), torch.randn(32, 2, generator=draw))

    def losses(**sizes: int) -> list[float]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, 5), nn.ReLU(), nn.Linear(5, 2))
        return test_fine_tuning(
            model, train_data=rows, loss_fn=nn.MSELoss(), n_epochs=20, validation_split=0.0, learning_rate=1e-2,
            progress=False, **sizes,
        ).train_loss_history  # fmt: skip

    accumulated, full = losses(batch_size=8, gradient_accumulation_steps=4), losses(batch_size=32)
    assert accumulated == pytest.approx(full, rel=1e-4)
    assert full[-1] < full[0]


@pytest.mark.slow
def test_without_data_it_trains_on_synthetic_tokens_and_reports_it(capsys: pytest.CaptureFixture[str]) -> None:
    result = run(PlainLM(), None, config=SimpleNamespace(vocab_size=61, pad_token_id=0), effective_batch_size=500)
    assert result.optimizer_steps == 2
    shown = capsys.readouterr().out
    assert "SYNTHETIC" in shown
    assert "Training samples: 1000" in shown
    small = SimpleNamespace(vocab_size=61, max_position_embeddings=6)
    assert run(PlainLM(), None, config=small, effective_batch_size=500).tokens_per_second
    assert max(map(len, synthetic_rows(61, 6, seed=0).source)) == 6


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> BertTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "a", "the"]
    (folder / "vocab.txt").write_text("\n".join(words))
    return BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=8)


def text_classifier() -> nn.Module:
    torch.manual_seed(0)
    small = CLASSIFIER.config.to_dict() | {
        "num_labels": 2,
        "id2label": {0: "neg", 1: "pos"},
        "label2id": {"neg": 0, "pos": 1},
    }
    return BertForSequenceClassification(BertConfig(**small))


def test_raw_text_is_tokenised_and_truncated_at_the_limit(tokenizer: BertTokenizerFast) -> None:
    texts = ["a good film", "the bad film", "good", "bad bad bad bad bad bad bad bad bad bad"]
    named = Dataset.from_dict({"text": texts, "label": ["pos", "neg", "pos", "neg"]})
    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    numbered = Dataset.from_dict({"text": texts, "label": [1, 0, 1, 0]}, features=features)
    listed = [{"sentence": t, "label": n} for t, n in zip(texts, [1, 0, 1, 0], strict=True)]
    with pytest.warns(TextWarning, match=r"1 of 4 rows \(the first is row 3\) are longer than 8 tokens"):
        by_name, by_number, as_list = (
            run(text_classifier(), rows, tokenizer=tokenizer) for rows in (named, numbered, listed)
        )
    assert by_name.loss_history == by_number.loss_history == as_list.loss_history
    # [CLS] and [SEP] around 3, 3, 1 and 6 words (truncated at 8 tokens), in micro-batches of (8, 5) and (5, 3)
    assert by_name.padding_fraction == pytest.approx(1 - (8 + 5 + 5 + 3) / (2 * 8 + 2 * 5))


def test_raw_text_without_labels_trains_a_causal_lm(tokenizer: BertTokenizerFast) -> None:
    rows = Dataset.from_dict({"text": ["a good film", "the bad film", "good film"]})
    assert run(CAUSAL.model(), rows, tokenizer=tokenizer).optimizer_steps == 1
    with pytest.raises(DataError, match="have no label column"):
        run(text_classifier(), rows, tokenizer=tokenizer)


def test_a_causal_lm_ignores_the_class_of_a_text(tokenizer: BertTokenizerFast) -> None:
    texts = ["a good film", "the bad film", "good film"]
    alone = run(CAUSAL.model(), Dataset.from_dict({"text": texts}), tokenizer=tokenizer)
    labelled = run(CAUSAL.model(), Dataset.from_dict({"text": texts, "label": [1, 0, 1]}), tokenizer=tokenizer)
    assert labelled.loss_history == alone.loss_history


def test_blank_texts_are_accepted_with_a_warning(tokenizer: BertTokenizerFast) -> None:
    class NoSpecial:
        pad_token_id, padding_side, model_max_length = 0, "right", 8

        def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [tokenizer.convert_tokens_to_ids(text.split()) for text in texts]}

    rows = [{"text": text} for text in (" ", "a good film", "", "the bad film", "")]
    with pytest.warns(TextWarning, match=r"In `train_data`, 3 of 5 rows \(the first is row 0\) have no text"):
        assert run(CAUSAL.model(), rows, tokenizer=NoSpecial(), batch_size=2).loss_history[0] > 0


@pytest.mark.slow
def test_text_columns_that_the_model_does_not_take_are_ignored(tokenizer: BertTokenizerFast) -> None:
    rows = [{**row, "sentence": "a film", "id": "x", "tokens": ["a", "film"]} for row in CLASSIFIER.rows()]
    for collator in (None, DataCollatorWithPadding(tokenizer)):
        assert run(CLASSIFIER.model(), rows, data_collator=collator).optimizer_steps == 2
    images = [{**row, "path": "a.png"} for row in HEADS["image classification, ViT"].rows()]
    assert run(HEADS["image classification, ViT"].model(), images).optimizer_steps == 2


def test_a_model_of_images_without_embeddings() -> None:
    config = ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=CLASSES
    )
    rows = [{"pixel_values": torch.randn(1, 64, 64), "labels": n % CLASSES} for n in range(9)]
    assert run(ResNetForImageClassification(config), rows, on_inexact="ignore").optimizer_steps == 2


def test_several_inputs_before_a_target() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 1)

        def forward(self, one: Tensor, other: Tensor) -> Tensor:
            return self.net(one * other)

    rows = [((torch.full((4,), float(n)), torch.ones(4)), torch.tensor([float(n)])) for n in range(6)]
    assert run(Two(), rows, loss_fn=nn.MSELoss()).optimizer_steps == 2


@pytest.mark.slow
def test_a_wrapper_with_keyword_arguments_gets_every_column() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = CLASSIFIER.model()

        def forward(self, input_ids: Tensor, **others: Tensor) -> Any:
            assert others.keys() == {"attention_mask", "labels"}
            return self.inner(input_ids=input_ids, **others)

    assert run(Wrapper(), CLASSIFIER.rows()).loss_history == run(CLASSIFIER.model(), CLASSIFIER.rows()).loss_history


def test_a_plain_module_that_takes_no_labels_needs_a_loss_function() -> None:
    with pytest.raises(DataError, match=r"label columns \['labels'\] that forward does not take"):
        run(PlainLM(), [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in token_rows()])


@pytest.mark.parametrize("batch_size", [1, 2, 12])
def test_integers_among_floats_become_floats(batch_size: int) -> None:
    head = HEADS["regression, BERT"]
    values = [5, 3.8, 2.5, 4, 1, 0.25]
    rows = [{**row, "labels": value} for row, value in zip(head.rows(6), values, strict=True)]
    model = head.model().float()  # torch 2.9 does not accept float32 labels for a float64 model
    wanted = model(**one_batch([{**row, "labels": float(row["labels"])} for row in rows])).loss.item()
    found = run(model, rows, batch_size=batch_size, effective_batch_size=6).loss_history
    assert found == pytest.approx([wanted], rel=1e-6)


@pytest.mark.slow
def test_narrow_integers_are_accepted() -> None:
    rows = [{"input_ids": np.array(r["input_ids"], dtype=np.int32), "labels": np.int32(r["labels"])} for r in ROWS]
    assert run(CLASSIFIER.model(), rows).loss_history == run(CLASSIFIER.model(), ROWS).loss_history
    as_tensors = [ids.int() for ids in token_rows()]
    assert run(CAUSAL.model(), as_tensors).loss_history == run(CAUSAL.model(), token_rows()).loss_history


def test_a_column_named_labels_takes_precedence_over_label() -> None:
    rows = [{**row, "label": 7} for row in CAUSAL.rows()]
    assert run(CAUSAL.model(), rows).loss_history == run(CAUSAL.model(), CAUSAL.rows()).loss_history


def test_multiple_choice_must_have_one_number_of_choices() -> None:
    """A choice of padding alone would get a share of the softmax."""
    head = HEADS["multiple choice, BERT"]
    rows = head.rows(9)
    rows[5] = {**rows[5], "input_ids": rows[5]["input_ids"][:2], "labels": 1}
    with pytest.raises(DataError, match=r"row 5 .* 'input_ids' has the shape \(2, \d+\), but must have \(3, \d+\)"):
        run(head.model(), rows)


def test_masked_lm_on_short_rows_with_the_usual_collator(tokenizer: BertTokenizerFast) -> None:
    head = HEADS["masked LM, BERT"]
    rows = [{"input_ids": [5, 6, 7, 8, 9][: 3 + n % 3]} for n in range(40)]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    assert run(head.model(), rows, data_collator=collator, effective_batch_size=20).skipped_steps == 0


def test_images_and_their_labels_must_have_one_size() -> None:
    config = SegformerConfig(
        num_channels=1, num_encoder_blocks=1, depths=[1], sr_ratios=[1], hidden_sizes=[8], patch_sizes=[3], strides=[2],
        num_attention_heads=[1], mlp_ratios=[2], decoder_hidden_size=8, num_labels=CLASSES,
    )  # fmt: skip
    rows = [
        {"pixel_values": torch.randn(1, 16, width), "labels": torch.randint(CLASSES, (16, width))}
        for width in (16, 24, 16, 24, 16, 24)
    ]
    with pytest.raises(DataError, match=r"'pixel_values' has the shape \(1, 16, \d+\), but must have .* as in other"):
        run(SegformerForSemanticSegmentation(config), rows, effective_batch_size=6)
    same = [row for row in rows if row["labels"].shape == (16, 16)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InexactLossWarning)  # batch norm
        assert run(SegformerForSemanticSegmentation(config), same, effective_batch_size=3).optimizer_steps == 1


def test_long_texts_are_truncated_if_positions_start_after_the_padding_index(tokenizer: BertTokenizerFast) -> None:
    torch.manual_seed(0)
    small = HEADS["sequence classification, RoBERTa"].config.to_dict() | {
        "max_position_embeddings": 12,
        "pad_token_id": 1,
    }
    model = RobertaForSequenceClassification(RobertaConfig(**small))
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = 10**30
    rows = [{"text": "a good film " * 9, "label": n % 2} for n in range(4)]
    with pytest.warns(TextWarning, match="4 of 4 rows .* are longer than 10 tokens"):
        assert run(model, rows, tokenizer=tokenizer).optimizer_steps == 1


def test_a_float16_model_with_fp16_is_refused() -> None:
    with pytest.raises(SettingsError, match="the trainable weights are float16"):
        run(CLASSIFIER.model().half(), ROWS, mixed_precision="fp16")


@pytest.mark.slow
def test_a_frozen_base_in_float16_may_have_adapters_in_float32() -> None:
    adapters = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(CAUSAL.model().half(), adapters)
    result = run(model, CAUSAL.rows(), mixed_precision="fp16", effective_batch_size=9)
    plain = run(get_peft_model(CAUSAL.model().half(), adapters), CAUSAL.rows(), effective_batch_size=9)
    assert result.optimizer_steps == 1
    assert result.loss_history == pytest.approx(plain.loss_history, rel=1e-3)


ROWS = CLASSIFIER.rows()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "`train_data` has no rows"),
        (Dataset.from_list([]), "`train_data` has no rows"),
        ("imdb", "`train_data` must be a datasets.Dataset, .* but is str instead"),
        (torch.utils.data.DataLoader([1]), "is a DataLoader instead. Give its `.dataset`"),
        (7, "`train_data` must be .* but is int instead"),
        (
            DatasetDict({"train": Dataset.from_list(ROWS)}),
            r"is a DatasetDict instead. Give one split, such as `train_data=data\['train'\]`",
        ),
        ({"input_ids": [1, 2], "labels": 1}, r"is a dict instead\. .* put a single row in a list"),
        ({"input_ids": [[1, 2]] * 9, "labels": [1] * 8}, "columns of unequal lengths: 9 in 'input_ids', 8 in 'labels'"),
        ({"train": ROWS, "test": ROWS}, r"is a dict instead. Give one split, such as `train_data=data\['train'\]`"),
        ([1, 2, 3], "its first row is a int instead"),
        ([{"text": "a film", "label": 1}], "is raw text, but `tokenizer` is None"),
        ([{"input_ids": [1, 2, 3]}] * 4, "have no label column"),
        ([(torch.ones(3), torch.ones(()))] * 4, r"\(inputs, targets\) tuples, but `loss_fn` is None"),
        (
            [*ROWS[:3], {**ROWS[3], "labels": CLASSES}],
            f"In `train_data`, row 3 has the label {CLASSES}, but the model has 3 classes",
        ),
        ([*ROWS[:3], {**ROWS[3], "labels": -1}], "row 3 has the label -1"),
        (
            [*ROWS[:3], {**ROWS[3], "input_ids": [5, 61]}],
            "row 3 has the token id 61, but the model's vocabulary is 0 to 60",
        ),
        (
            [*ROWS[:3], {"input_ids": [5, 6]}],
            "row 3 cannot be batched: it has no value in its column 'labels', but 3",
        ),
        (
            [*ROWS[:3], {**ROWS[3], "labels": None}],
            "row 3 cannot be batched: it has no value in its column 'labels', but 3 of 4",
        ),
        ([*ROWS[:3], {**ROWS[3], "input_ids": [[5], [6]]}], "row 3 cannot be batched: .*dimensions"),
        ([*ROWS[:3], {**ROWS[3], "input_ids": "film"}], "row 3 cannot be batched: .*'film'"),
        ([{**row, "labels": -100} for row in ROWS], "has no label that counts"),
        ([{**row, "labels": 0.5} for row in ROWS], "The loss of row 0 of `train_data` cannot be computed"),
    ],
)
def test_faults_in_data_are_reported_before_training(data: Any, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = CLASSIFIER.model()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(DataError, match=words):
        run(model, data)
    assert "FINE-TUNING TEST" not in capsys.readouterr().out
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("loss_fn", "words"),
    [
        (
            lambda outputs, batch: outputs.logits.sum() + batch["label"],
            "The batch that `loss_fn` gets has the columns .*'labels'",
        ),
        (lambda outputs: outputs, r"`loss_fn` is called with two arguments: \(outputs, batch\)"),
        (
            lambda outputs, batch, weights: outputs + batch + weights,
            r"`loss_fn` is called with two arguments: \(outputs, batch\)",
        ),
    ],
    ids=["a missing key", "one argument", "three arguments"],
)
def test_faults_of_a_loss_function_are_not_those_of_rows(loss_fn: Any, words: str) -> None:
    with pytest.raises(DataError, match=words) as raised:
        run(CLASSIFIER.model(), ROWS, loss_fn=loss_fn)
    assert "Check that its columns" not in str(raised.value)


def test_a_classifier_without_a_padding_token_is_told_to_set_one() -> None:
    with pytest.raises(DataError, match=r"`model\.config\.pad_token_id = tokenizer\.pad_token_id`"):
        run(llama_classifier(None), [{"input_ids": [5, 6, 7][: 2 + n % 2], "labels": n % 2} for n in range(8)])


@pytest.mark.parametrize("argument", ["train_data", "val_data"])
def test_rows_without_tokens_change_nothing(argument: str) -> None:
    given = {"train_data": CAUSAL.rows(4), "val_data": CAUSAL.rows(5)}
    more = given | {argument: [*given[argument], {"input_ids": [], "labels": []}]}
    alone, among = (
        test_fine_tuning(CAUSAL.model(), **data, batch_size=1, effective_batch_size=9, n_epochs=1, progress=False)
        for data in (given, more)
    )
    assert among.val_loss_history == pytest.approx(alone.val_loss_history, rel=1e-6)
    assert among.loss_history == pytest.approx(alone.loss_history, rel=1e-6)


def test_faults_in_validation_data_name_it() -> None:
    with pytest.raises(DataError, match="`val_data` has no rows"):
        run(CLASSIFIER.model(), ROWS, val_data=[])
    with pytest.raises(DataError, match=r"`val_data` lacks the columns \['labels'\] that `train_data` has"):
        run(CLASSIFIER.model(), ROWS, val_data=[{"input_ids": [1, 2]}])
    with pytest.raises(DataError, match="In `val_data`, row 1 has the label 9"):
        run(CLASSIFIER.model(), ROWS, val_data=[ROWS[0], {**ROWS[1], "labels": 9}])
    _, held = hold_out(9, 0.5, seed=42)
    rows = [{**row, "labels": [-100] * len(row["labels"])} if n in held else row for n, row in enumerate(CAUSAL.rows())]
    with pytest.raises(
        DataError, match=r"The part that `validation_split` \(0\.5\) holds out of `train_data` has no row that counts"
    ):
        run(CAUSAL.model(), rows, validation_split=0.5)


def test_a_data_set_that_raises_names_the_row() -> None:
    class Broken(list):
        def __getitem__(self, index: Any) -> Any:
            if index == 2:
                raise OSError("disk on fire")
            return super().__getitem__(index)

    with pytest.raises(DataError, match=r"Row 2 of `train_data` cannot be read: OSError\('disk on fire'\)"):
        run(CLASSIFIER.model(), Broken(ROWS))


def test_held_out_rows_keep_their_names() -> None:
    rows = [*ROWS[:8], {**ROWS[8], "labels": 7}]
    with pytest.raises(DataError, match="row 8 has the label 7"):
        run(CLASSIFIER.model(), rows, validation_split=0.3)


def test_a_row_that_a_plain_module_cannot_take_is_named() -> None:
    rows = token_rows()
    rows[3] = torch.tensor([5, 99])
    with pytest.raises(DataError, match="In `train_data`, row 3 has the token id 99"):
        run(PlainLM(), rows)


def test_a_classifier_cannot_train_on_synthetic_tokens() -> None:
    with pytest.raises(DataError, match="BertForSequenceClassification cannot train on synthetic tokens"):
        run(CLASSIFIER.model(), None)


def test_no_data_and_no_vocabulary_is_an_error() -> None:
    with pytest.raises(DataError, match="`config` has no `vocab_size`"):
        run(nn.Linear(2, 2), None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model": "bert-base-uncased"}, "`model` must be a torch.nn.Module, but is str instead"),
        ({"loss_fn": 3}, "`loss_fn` must be callable or None, but is 3 instead"),
        ({"data_collator": "pad"}, "`data_collator` must be callable"),
        ({"reduction": "none"}, "`reduction` must be 'mean' or 'sum', but is 'none' instead"),
        ({"compute_metrics": "accuracy"}, "`compute_metrics` must be a function"),
        ({"early_stopping_patience": 1}, "`early_stopping_patience` needs validation rows"),
        ({"restore_best_weights": True}, "`restore_best_weights` needs validation rows"),
        ({"lr_scheduler": "linaer"}, "`lr_scheduler` must be one of 'linear', .* but is 'linaer' instead"),
        ({"lr_scheduler": "reduce_lr_on_plateau"}, "`lr_scheduler` must be one of"),
        ({"optimizer": 5}, "`optimizer` must be a name such as .adamw., a torch Optimizer, or a function"),
        ({"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1)}, "`optimizer` holds none of the model's"),
        ({"gradient_accumulation_steps": 2, "effective_batch_size": 7}, "Sizes of an update disagree"),
        ({"log_with": "tensorbord"}, "`log_with` is 'tensorbord', but must be .*. Did you mean 'tensorboard'?"),
        ({"log_with": "none"}, "`log_with` is 'none', but must be .*. None logs to no tracker"),
        ({"log_with": GeneralTracker}, "`log_with` is the class GeneralTracker. Give an object"),
        ({"tokenizer": "minilm"}, "`tokenizer` is the name 'minilm'. Load it"),
        ({"loss_fn": nn.MSELoss}, r"`loss_fn` is the class MSELoss. Give an object: `MSELoss\(\)`"),
        ({"compute_metrics": Accuracy}, "`compute_metrics` is the class Accuracy"),
        ({"compute_metrics": np.take}, "`compute_metrics` is called with one argument"),
        ({"use_wandb": True}, "The trackers .'wandb'. were requested, but are not installed"),
        ({"output_dir": "/dev/null/x"}, "`output_dir` is '/dev/null/x', which cannot be created"),
    ],
)
def test_faults_in_other_arguments(arguments: dict[str, Any], words: str) -> None:
    model = arguments.pop("model", None) or CLASSIFIER.model()
    with pytest.raises(SettingsError, match=words):
        run(model, ROWS, **arguments)


def test_rows_that_do_not_fit_the_functions_are_refused_with_the_columns_that_they_have() -> None:
    with pytest.raises(DataError, match="reads the column 'text', but the row has only 'input_ids'"):
        run(CLASSIFIER.model(), ROWS, data_collator=lambda rows: rows[0]["text"])
    with pytest.raises(DataError, match=r"The labels are decimal numbers.* Give whole numbers"):
        run(CLASSIFIER.model(), [row | {"labels": float(row["labels"])} for row in ROWS])
    with pytest.raises(DataError, match="`loss_fn` gets the outputs and the batch, a dict"):
        run(
            CLASSIFIER.model(),
            ROWS,
            loss_fn=lambda outputs, labels: nn.functional.cross_entropy(outputs.logits, labels),
        )
    rows = [{"x": torch.randn(3), "price": 1.0} for _ in range(8)]
    with pytest.raises(DataError, match=r"the columns 'x', 'price', and `forward` takes 'input'. Rename the columns"):
        run(nn.Linear(3, 1), rows, loss_fn=lambda outputs, _: outputs.mean())
    rows = [{"input": torch.randn(3), "price": 1.0} for _ in range(8)]
    with pytest.raises(SettingsError, match=r"the validation rows have none, only 'input', 'price'. Name the column"):
        run(
            nn.Linear(3, 1),
            rows,
            validation_split=0.5,
            loss_fn=lambda outputs, _: outputs.mean(),
            compute_metrics=print,
        )


def test_targets_may_be_several_tensors() -> None:
    torch.manual_seed(0)
    rows = [
        (torch.randn(3).double(), (torch.tensor(n % 3 if n % 4 else -100), torch.randn(()).double())) for n in range(9)
    ]
    x, (kinds, prices) = (
        torch.stack([x for x, _ in rows]),
        map(torch.stack, zip(*(targets for _, targets in rows), strict=True)),
    )

    def losses(outputs: torch.Tensor, targets: Any) -> dict[str, torch.Tensor]:
        cross_entropy = nn.functional.cross_entropy(outputs[:, :3], targets[0])
        return {"kind": cross_entropy, "price": (outputs[:, 3] - targets[1]).square().mean()}

    def loss_of_all(model: nn.Module) -> torch.Tensor:
        return sum(losses(model(x), (kinds, prices)).values(), torch.zeros(()).double())

    assert update_error(nn.Linear(3, 4).double(), rows, loss_of_all, 9, loss_fn=losses) < 1e-9


def test_frozen_models_and_unsupported_checkpointing_are_refused() -> None:
    with pytest.raises(SettingsError, match="`model` has no trainable parameter"):
        run(CLASSIFIER.model().requires_grad_(False), ROWS)
    with pytest.raises(SettingsError, match="`gradient_checkpointing` is True, but PlainLM does not support it"):
        run(PlainLM(), token_rows(), gradient_checkpointing=True)
