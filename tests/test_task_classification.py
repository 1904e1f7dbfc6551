"""The tasks that give a row one class, several classes or a number."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, EvalPrediction, ViTConfig, ViTForImageClassification, ViTImageProcessor

from ftaccum import DataError, SettingsError, TextWarning, load_task, test_fine_tuning
from ftaccum.tasks.classification import multi_label_metrics, regression_metrics
from ftaccum.tasks.image_classification import in_colors
from ftaccum.tasks.labels import Labels
from silent_errors.text_columns import word_tokenizer
from task_files import TEXTS, needs_image_processor, save_encoder, save_rows, task_errors

QUIET = {"progress": False, "verbosity": "quiet", "n_epochs": 1}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_encoder(tmp_path_factory.mktemp("encoder"))


def labelled(labels: list[Any]) -> list[dict[str, Any]]:
    return [{"text": text, "label": label} for text, label in zip(TEXTS, labels, strict=True)]


def tokens(rows: list[dict[str, Any]]) -> Any:
    return word_tokenizer()([row["text"] for row in rows], padding=True, return_tensors="pt")


@pytest.mark.parametrize(
    ("labels", "is_odd"),
    [([1, 2, 1, 2], True), ([1.0, 2.0, 1.0, 2.0], True), ([[1], [2], [1, 2], [1]], True), ([0, 1, 0, 1], False),
     (["1", "2", "1", "2"], False), ([True, False, True, True], False)],
)  # fmt: skip
def test_whole_numbers_that_start_at_1_warn_of_the_empty_class_0(
    labels: list[Any], is_odd: bool, encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = save_rows(tmp_path / "rows.jsonl", labelled((labels * len(TEXTS))[: len(TEXTS)]))
    more = {"problem_type": "single_label_classification"} if isinstance(labels[0], float) else {}
    load_task("text-classification", encoder, rows, **more)
    assert ("No row has class 0. Do the labels start at 1?" in capsys.readouterr().err) == is_odd


def test_classes_by_name_train_exactly_and_are_saved_in_the_config(encoder: str, tmp_path: Path) -> None:
    names = ["neutral", "bad", "good"]
    rows = labelled([names[n % 3] for n in range(7)])

    def loss(model: nn.Module, window: list[dict[str, Any]]) -> Tensor:
        classes = torch.tensor([sorted(names).index(row["label"]) for row in window])
        return F.cross_entropy(model(**tokens(window)).logits, classes)

    file = save_rows(tmp_path / "rows.jsonl", rows)
    assert max(task_errors("text-classification", encoder, file, rows, loss)) < 1e-12
    config = load_task("text-classification", encoder, file).model.config
    assert config.id2label == {0: "bad", 1: "good", 2: "neutral"}


def test_lists_of_names_are_several_classes(encoder: str, tmp_path: Path) -> None:
    names = ["fun", "long", "sad"]
    rows = labelled([["fun"], [], ["sad", "fun"], ["long"], ["long", "sad"], ["fun"], ["sad"]])

    def loss(model: nn.Module, window: list[dict[str, Any]]) -> Tensor:
        wanted = torch.tensor([[float(name in row["label"]) for name in names] for row in window]).double()
        return F.binary_cross_entropy_with_logits(model(**tokens(window)).logits, wanted)

    file = save_rows(tmp_path / "rows.jsonl", rows)
    # The loss of float32 labels is float32, also for float64 logits, so the shares of its parts round to float32.
    assert max(task_errors("text-classification", encoder, file, rows, loss)) < 1e-7
    loaded = load_task("text-classification", encoder, file, file)
    result = test_fine_tuning(**loaded.arguments(), **QUIET)
    assert result.metrics[-1].keys() == {"f1_micro", "f1_macro", "exact_match"}
    assert loaded.model.config.problem_type == "multi_label_classification"


NUMBERS = labelled([0.5, -1.0, 2.25, 0.0, 1.5, -0.5, 3.0])


@pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason="older torch cannot derive `mse_loss` of float64 and float32"
)
def test_decimal_numbers_train_exactly(encoder: str, tmp_path: Path) -> None:
    def loss(model: nn.Module, window: list[dict[str, Any]]) -> Tensor:
        wanted = torch.tensor([row["label"] for row in window]).double()
        return F.mse_loss(model(**tokens(window)).logits.squeeze(-1), wanted)

    file = save_rows(tmp_path / "rows.jsonl", NUMBERS)
    assert max(task_errors("text-classification", encoder, file, NUMBERS, loss)) < 1e-12


def test_decimal_numbers_are_predicted_as_numbers(encoder: str, tmp_path: Path) -> None:
    file = save_rows(tmp_path / "rows.jsonl", NUMBERS)
    loaded = load_task("text-classification", encoder, file, file)
    result = test_fine_tuning(**loaded.arguments(), **QUIET)
    assert result.metrics[-1].keys() == {"mse", "mae", "pearson", "spearman"}
    columns = loaded.task.predicted_columns(np.array([[0.5], [1.0]]), loaded.train, None, loaded.model)
    assert columns == {"prediction": [0.5, 1.0]}


@pytest.mark.parametrize(
    ("labels", "options", "classes"),
    [
        ([True, False, True, True, False, False, True], {}, ["false", "true"]),
        ([0, 2, 0, 1, 2, 0, 1], {}, ["0", "1", "2"]),
        ([0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0], {"problem_type": "single_label_classification"}, ["0", "1"]),
        ([[1, 0], [1, 1], [0, 0], [0, 1], [1, 0], [1, 1], [0, 1]], {}, ["class 0", "class 1"]),
    ],
)
def test_forms_of_labels(
    encoder: str, tmp_path: Path, labels: list[Any], options: dict[str, Any], classes: list[str]
) -> None:
    file = save_rows(tmp_path / "rows.jsonl", labelled(labels))
    loaded = load_task("text-classification", encoder, file, **options)
    assert list(loaded.model.config.id2label.values()) == classes
    test_fine_tuning(**loaded.arguments(), **QUIET)


@pytest.mark.parametrize(
    ("labels", "options", "words"),
    [
        ([0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0], {}, "such as 0.0, but all of them are whole. Set `problem_type`"),
        ([1, -1, 1, 1, -1, 1, 1], {}, "are -1, 1. Labels are names, whole numbers from 0"),
        (
            ["a", None, "b", None, "a", "a", "b"],
            {},
            "2 of the 7 rows of `train_data` have no label in 'label'; the first",
        ),
        (["a", "", "b", "a", "a", "a", "b"], {}, "the first is row 1. Give these rows a label, or drop them."),
        (
            ["a", "b", "a", "b", "a", "a", "b"],
            {"problem_type": "regression"},
            "row 0 has the label 'a', but the label of",
        ),
        ([["a"], ["b"]] * 3 + [[]], {"problem_type": "single_label_classification"}, "row 0 has the label ['a'], but"),
        ([0, 1, 0, 1, 1, 1, 0], {"problem_type": "multi_label_classification"}, "is a list of classes"),
    ],
)
def test_labels_that_do_not_fit_are_refused_before_the_model_is_loaded(
    tmp_path: Path, labels: list[Any], options: dict[str, Any], words: str
) -> None:
    file = save_rows(tmp_path / "rows.jsonl", labelled(labels))
    with pytest.raises(DataError) as caught:
        load_task("text-classification", "/absent", file, **options)
    assert words in str(caught.value)


def test_a_validation_label_that_training_lacks_is_named(encoder: str, tmp_path: Path) -> None:
    train = save_rows(tmp_path / "rows.jsonl", labelled(["a", "b"] * 3 + ["a"]))
    val = save_rows(tmp_path / "val.jsonl", labelled(["a", "b", "c"] * 2 + ["a"]))
    with pytest.raises(
        DataError, match="In `val_data`, row 2 has the label 'c', which is none of the classes that the"
    ):
        load_task("text-classification", encoder, train, val)


RATED = Labels("single_label_classification", ("1", "10", "2"))  # sorted as text
SPECIES = Labels("single_label_classification", ("ant", "bee", "cat"))
NUMBERED = Labels("multi_label_classification", ("0", "1"), (0, 1))  # lists such as [0], [1] and [0, 1]
KINDS = Labels("multi_label_classification", ("fun", "sad", "long"))


def rows_with(labels: Any, feature: Any) -> Dataset:
    rows = Dataset.from_dict({"text": ["a"] * len(labels), "label": labels})
    return rows if feature is None else rows.cast(Features({"text": rows.features["text"], "label": feature}))


@pytest.mark.parametrize(
    ("labels", "feature", "given", "encoded"),
    [
        pytest.param(SPECIES, ClassLabel(names=["bee", "cat"]), [0, 1], [1, 2], id="a folder that lacks a class"),
        pytest.param(SPECIES, ClassLabel(names=["cat", "bee", "ant"]), [0, 2], [2, 0], id="another order"),
        pytest.param(SPECIES, None, [0, 2], [0, 2], id="numbers"),
        pytest.param(RATED, None, [1, 2, 10], [0, 2, 1], id="names that a CSV file has as numbers"),
        pytest.param(
            replace(SPECIES, names=("0", "1"), values=(0, 1)), ClassLabel(names=["no", "yes"]), [1, 0], [1, 0],
            id="classes without names",
        ),
        pytest.param(KINDS, None, [[1, 0, 1], [0, 1, 1]], [[1, 0, 1], [0, 1, 1]], id="0 or 1 for each class"),
        pytest.param(KINDS, None, [[0, 2], [1]], [[1, 0, 1], [0, 1, 0]], id="class numbers"),
        pytest.param(NUMBERED, None, [[0, 1], [1, 0]], [[1, 1], [1, 1]], id="all classes by number"),
        pytest.param(NUMBERED, None, [[0, 1], [1, 1]], [[0, 1], [1, 1]], id="0 or 1 for each of two classes"),
        pytest.param(KINDS, List(ClassLabel(names=["sad", "fun"])), [[0], [1, 0]], [[0, 1, 0], [1, 1, 0]], id="lists"),
    ],
)  # fmt: skip
def test_other_rows_may_number_the_classes_otherwise(labels: Labels, feature: Any, given: Any, encoded: Any) -> None:
    rows = rows_with(given, feature)
    assert labels.encode(rows, "data")["label"][:] == encoded


@pytest.mark.parametrize(
    ("labels", "feature", "given", "words"),
    [
        (SPECIES, ClassLabel(names=["bee", "dog"]), [0, 1], "row 1 has the label 'dog', which is none of the classes"),
        (SPECIES, ClassLabel(names=["bee", "cat"]), [0, -1], "row 1 has the label -1, which is none"),
        (replace(KINDS, multi_hot=True), None, [[1, 0, 1], [0, 1, 2]], "row 1 has the label [0, 1, 2], but needs a 0"),
        (KINDS, None, [1, 0], "row 0 has the label 1, which is no list of classes"),
        (SPECIES, None, [["ant"], ["bee"]], "row 0 has the label \"['ant']\", which is none"),
    ],
)
def test_a_class_that_the_model_lacks_is_named(labels: Labels, feature: Any, given: Any, words: str) -> None:
    rows = rows_with(given, feature)
    with pytest.raises(DataError) as caught:
        labels.encode(rows, "data")
    assert words in str(caught.value)


def test_the_length_of_texts_reaches_the_run(encoder: str, tmp_path: Path) -> None:
    rows = save_rows(tmp_path / "r.jsonl", labelled([0, 1] * 3 + [0]))
    loaded = load_task("text-classification", encoder, rows, validation_split=0.0, max_length=4)
    with pytest.warns(TextWarning, match="are longer than 4 tokens"):
        test_fine_tuning(**loaded.arguments(), **QUIET, max_updates=1, validation_split=0.0)


@pytest.mark.parametrize("problem_type", ["multi_label_classification", "single_label_classification", "regression"])
def test_a_trained_model_with_one_output_keeps_its_kind_of_labels(problem_type: str) -> None:
    config = SimpleNamespace(problem_type=problem_type, num_labels=1, id2label={0: "fun"})
    assert Labels.of_config(config).problem_type == problem_type


def test_a_missing_library_is_named_without_advice_about_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def needs_library(*_: Any, **__: Any) -> None:
        raise ImportError("\nAutoTokenizer requires the\nLibrary.\n")

    (tmp_path / "model").mkdir()
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", needs_library)
    file = save_rows(tmp_path / "rows.jsonl", labelled([0, 1] * 3 + [0]))
    with pytest.raises(SettingsError, match=r"/model' cannot be loaded: AutoTokenizer requires the Library\.$"):
        load_task("text-classification", str(tmp_path / "model"), file)


@needs_image_processor
def test_images_of_a_folder_become_classes(tmp_path: Path) -> None:
    for n in range(6):
        file = tmp_path / "images" / ("dark", "light")[n % 2] / f"{n}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (9, 7 + n), color=20 + 200 * (n % 2)).save(file)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **sizes)).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "vit")
    rows = [{"path": str(file), "label": file.parent.name} for file in sorted((tmp_path / "images").glob("*/*.png"))]
    file_of_rows = save_rows(tmp_path / "rows.jsonl", rows)
    loaded = load_task("image-classification", str(tmp_path / "vit"), file_of_rows, file_of_rows)
    result = test_fine_tuning(**loaded.arguments(), **{**QUIET, "n_epochs": 8}, learning_rate=1e-2)
    assert result.metrics[-1]["accuracy"] == 1
    assert loaded.model.config.id2label == {0: "dark", 1: "light"}


def test_the_right_choice_trains_exactly(encoder: str, tmp_path: Path) -> None:
    ends = [["good", "slow plot"], ["the film drags", "good"], ["a", "the film"]] * 2 + [["slow", "a good act"]]
    rows = [
        {"ctx": text, "endings": end, "label": n % 2} for n, (text, end) in enumerate(zip(TEXTS, ends, strict=True))
    ]

    def loss(model: nn.Module, window: list[dict[str, Any]]) -> Tensor:
        pairs = [(row["ctx"], end) for row in window for end in row["endings"]]
        batch = word_tokenizer()(*map(list, zip(*pairs, strict=True)), padding=True, return_tensors="pt")
        shaped = {name: values.view(len(window), 2, -1) for name, values in batch.items()}
        return F.cross_entropy(model(**shaped).logits, torch.tensor([row["label"] for row in window]))

    file = save_rows(tmp_path / "rows.jsonl", rows)
    assert max(task_errors("multiple-choice", encoder, file, rows, loss)) < 1e-12
    letters = save_rows(tmp_path / "letters.jsonl", [{**row, "label": "AB"[row["label"]]} for row in rows])
    loaded = load_task("multiple-choice", encoder, file)
    assert load_task("multiple-choice", encoder, letters).train["labels"][:] == loaded.train["labels"][:]
    bad = save_rows(tmp_path / "bad.jsonl", [*rows, {**rows[0], "label": 2}])
    with pytest.raises(DataError, match="row 7 has the label 2, but the label of 2 choices is a number from 0 to 1"):
        load_task("multiple-choice", "/absent", bad)
    bad = save_rows(tmp_path / "more.jsonl", [*rows, {**rows[0], "endings": ["a", "the", "film"]}])
    with pytest.raises(DataError, match="row 7 has 3 choices, but the first row has 2"):
        load_task("multiple-choice", "/absent", bad)


@pytest.mark.parametrize(
    ("labels", "numbers"),
    [(["1", "2", "1"], [1, 2, 1]), (["B", "C", "B"], [1, 2, 1]), (["3", "B", "4"], [0, 1, 1]), ([1, 2, 1], [1, 2, 1])],
)
def test_the_labels_of_choices_are_all_read_in_one_way(
    encoder: str, labels: list[Any], numbers: list[int], tmp_path: Path
) -> None:
    choices = [["3", "2", "0"], ["A", "B", "C"], ["1", "4", "2"]]
    rows = [{"context": "good", "choices": c, "label": label} for c, label in zip(choices, labels, strict=True)]
    loaded = load_task("multiple-choice", encoder, save_rows(tmp_path / "rows.jsonl", rows))
    assert loaded.train["labels"][:] == numbers


def test_a_label_that_names_two_choices_is_refused(tmp_path: Path) -> None:
    rows = [{"context": "good", "choices": ["0", "2", "1"], "label": label} for label in ("0", "1")]
    with pytest.raises(DataError, match=r"row 1 has the label '1', which is the number and the text of different"):
        load_task("multiple-choice", "/absent", save_rows(tmp_path / "rows.jsonl", rows))


def test_images_of_16_bits_keep_their_shades() -> None:
    shades = np.tile(np.arange(0, 256, 17, dtype=np.uint16), (4, 1))
    deep, plain = Image.fromarray(shades * 257), Image.fromarray(shades.astype(np.uint8))
    assert np.array_equal(in_colors(deep), in_colors(plain))
    for unknown in (shades.astype(np.float32) / 255, shades.astype(np.int32) * 257):
        with pytest.raises(DataError, match=r"numbers from 0 to .* it is unknown which of them is white"):
            in_colors(Image.fromarray(unknown))


def test_metrics_of_several_classes_and_of_numbers() -> None:
    wanted = np.array([[1, 0], [1, 1], [0, 0]])
    found = multi_label_metrics(EvalPrediction(np.array([[2.0, -1.0], [3.0, -0.5], [-1.0, -2.0]]), wanted))
    assert found == {
        "f1_micro": pytest.approx(0.8),
        "f1_macro": pytest.approx(0.5),
        "exact_match": pytest.approx(2 / 3),
    }
    found = regression_metrics(EvalPrediction(np.array([[1.0], [2.0], [4.0]]), np.array([1.0, 2.0, 3.0])))
    assert found["mse"] == pytest.approx(1 / 3)
    assert found["spearman"] == pytest.approx(1)
    assert np.isnan(regression_metrics(EvalPrediction(np.ones((3, 1)), np.array([1.0, 2.0, 3.0])))["pearson"])


def test_freezing_weights_besides_adapters_is_refused() -> None:
    """PEFT would train its own copy of a frozen head, and adapters in frozen layers."""
    with pytest.raises(SettingsError, match="`freeze` is \\['classifier'\\], but `lora` freezes all weights besides"):
        load_task("text-classification", "/absent", "/absent.csv", freeze=["classifier"], lora={})


def test_adapters_with_their_usual_options_can_be_trained_on_weights_of_few_bits() -> None:
    """The option `--lora` alone is an empty dict."""
    with pytest.raises((DataError, SettingsError)) as caught:
        load_task("text-classification", "/absent", "/absent.csv", load_in_8bit=True, lora={})
    assert "cannot be trained" not in str(caught.value)


def test_only_the_first_rows_of_each_file_are_read(encoder: str, tmp_path: Path) -> None:
    file = save_rows(tmp_path / "rows.jsonl", labelled(["a", "b", "a", "b", "a", "b", "a"]))
    loaded = load_task("text-classification", encoder, file, file, max_train_rows=4, max_val_rows=2)
    assert (len(loaded.train), len(loaded.val or ())) == (4, 2)
    assert loaded.val is not None
    assert loaded.val["label"][:] == [0, 1]
