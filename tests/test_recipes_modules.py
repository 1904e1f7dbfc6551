"""The recipes that train modules of their own: preferences, distillation and plain PyTorch."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EvalPrediction,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from chats import save_chat_model
from exactness import accumulated_gradients
from ftaccum import DataError, SettingsError, TextWarning
from ftaccum.data.columns import ColumnRules
from ftaccum.data.padding import PaddingCollator
from heads import relative_error
from recipe_runs import RECIPES, run_recipe
from task_files import needs_image_processor, save_rows

PAIRS = [
    {"prompt": "hi", "chosen": "hello", "rejected": "a"}, {"prompt": "who", "chosen": "me", "rejected": "you or me"},
    {"prompt": "a film", "chosen": "good", "rejected": "bad"}, {"prompt": "b", "chosen": "c d e", "rejected": "f"},
    {"prompt": "no", "chosen": "yes it is", "rejected": "g"},
]  # fmt: skip
SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
TWO = ["--max_updates", "2", "--batch_size", "2", "--progress", "no"]


@pytest.fixture(autouse=True)
def _recipes_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(RECIPES), *sys.path])


def preference_words(folder: Path) -> list[str]:
    return ["--model", save_chat_model(folder / "model"), "--train_data", save_rows(folder / "pairs.jsonl", PAIRS * 2)]


def distillation_words(folder: Path) -> list[str]:
    for name, seed in (("student", 0), ("teacher", 1)):
        vit(seed).save_pretrained(folder / name)
        ViTImageProcessor(size={"height": 4, "width": 4}).save_pretrained(folder / name)
    for n in range(8):
        file = folder / "images" / ("dark", "light")[n % 2] / f"{n}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((6, 5), 128 * (n % 2) + n, dtype="uint8")).save(file)
    student, teacher = str(folder / "student"), str(folder / "teacher")
    return ["--model", student, "--teacher", teacher, "--train_data", str(folder / "images")]


def plain_pytorch_words(folder: Path) -> list[str]:
    torch.manual_seed(0)
    torch.save((torch.randn(20, 2, 6, 5), torch.arange(20) % 3), folder / "images.pt")
    return ["--train_data", str(folder / "images.pt")]


def vit(seed: int) -> ViTForImageClassification:
    torch.manual_seed(seed)
    names = {"id2label": {0: "dark", 1: "light"}, "label2id": {"dark": 0, "light": 1}}
    return ViTForImageClassification(ViTConfig(image_size=4, patch_size=2, **SMALL, **names))


def with_adapters(folder: str) -> Any:
    """Return a model in float64, with adapters that change it."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=2, target_modules="all-linear"))
    torch.manual_seed(2)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)
    return model.double()


def sides(folder: str) -> tuple[Dataset, Any]:
    import preference

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return preference.encode(Dataset.from_list(PAIRS), tokenizer, preference.Options(), None), tokenizer


def plain_losses(model: Any, rows: Dataset, beta: float) -> Tensor:
    """Return the DPO loss of each pair, one sequence at a time."""

    def log_probability(ids: Sequence[int], labels: Sequence[int]) -> Tensor:
        found = F.log_softmax(model(input_ids=torch.tensor([ids])).logits[0], dim=-1)
        return torch.stack([found[n - 1, label] for n, label in enumerate(labels) if label != -100]).sum()

    losses = []
    for row in rows:
        answers = [(row[f"{side}_input_ids"], row[f"{side}_labels"]) for side in ("chosen", "rejected")]
        chosen, rejected = (log_probability(*each) for each in answers)
        with torch.no_grad(), model.disable_adapter():
            first_chosen, first_rejected = (log_probability(*each) for each in answers)
        losses.append(-F.logsigmoid(beta * ((chosen - first_chosen) - (rejected - first_rejected))))
    return torch.stack(losses)


def test_the_labels_of_a_pair_are_its_answers_with_their_end(tmp_path: Path) -> None:
    rows, tokenizer = sides(save_chat_model(tmp_path))
    for row, pair in zip(rows, PAIRS, strict=True):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": pair["prompt"]}], add_generation_prompt=True, tokenize=False
        )
        for side in ("chosen", "rejected"):
            assert tokenizer.decode(row[f"{side}_input_ids"]) == prompt + pair[side] + tokenizer.eos_token
            labelled = [label for label in row[f"{side}_labels"] if label != -100]
            assert tokenizer.decode(labelled) == pair[side] + tokenizer.eos_token
            assert row[f"{side}_labels"][-len(labelled) :] == labelled


def test_long_prompts_are_cut_at_their_start_and_answers_never(tmp_path: Path) -> None:
    import preference

    whole, tokenizer = sides(save_chat_model(tmp_path))
    options, limit = preference.Options(), len("you or me") + 2  # with the end token, one token of the prompt fits
    with pytest.warns(
        TextWarning, match=r"In `val_data`, 5 of 5 pairs \(the first is row 0\) are longer than 11 tokens"
    ):
        rows = preference.encode(Dataset.from_list(PAIRS), tokenizer, options, limit, "val_data")
    for row, uncut in zip(rows, whole, strict=True):
        n = {side: len(row[f"{side}_input_ids"]) for side in ("chosen", "rejected")}
        assert max(n.values()) == limit
        for side in n:
            assert row[f"{side}_input_ids"] == uncut[f"{side}_input_ids"][-n[side] :]
            assert row[f"{side}_labels"] == uncut[f"{side}_labels"][-n[side] :]
            assert row[f"{side}_labels"][0] == -100
            assert len(row[f"{side}_attention_mask"]) == n[side]
    skips = r"2 of 5 pairs \(the first is row 1\) have an answer of 10 tokens or more and are skipped"
    with pytest.warns(TextWarning, match="are longer than 10 tokens"), pytest.warns(TextWarning, match=skips):
        assert len(preference.encode(Dataset.from_list(PAIRS), tokenizer, options, 10)) == 3
    with pytest.raises(DataError, match="Each pair of `train_data` has an answer of 2 tokens or more"):
        preference.encode(Dataset.from_list(PAIRS), tokenizer, options, 2)


def test_a_model_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="has no chat template or no end-of-text token"):
        sides(save_chat_model(tmp_path, template=None))


def test_a_window_of_preferences_has_the_gradient_of_one_batch(tmp_path: Path) -> None:
    import preference

    folder = save_chat_model(tmp_path)
    model, (rows, _) = with_adapters(folder), sides(folder)
    plain_losses(model, rows, 0.3).mean().backward()
    expected = {f"model.{name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    wrapped = preference.Preference(model, 0.3)
    found = accumulated_gradients(wrapped, rows, batch_size=2, effective_batch_size=5, verbosity="quiet")
    assert relative_error(found[0], expected) < 1e-12


def test_the_preference_loss_is_that_of_its_source(tmp_path: Path) -> None:
    import preference

    folder = save_chat_model(tmp_path)
    model, (rows, tokenizer) = with_adapters(folder), sides(folder)
    batch = PaddingCollator(ColumnRules(), pad_token_id=tokenizer.pad_token_id)(rows.to_list())
    del batch["labels"]
    found = preference.Preference(model, 0.3)(**batch)
    torch.testing.assert_close(-F.logsigmoid(found["margins"]), plain_losses(model, rows, 0.3))
    torch.testing.assert_close(found["loss"], plain_losses(model, rows, 0.3).mean())


def test_pairs_without_a_change_count_half() -> None:
    import preference

    found = preference.preferences(EvalPrediction(np.array([0.0, 0.5, -1.0, 2.0]), np.ones(4)))
    assert found == {"accuracy": 0.625, "margin": 0.375}


def test_preference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*preference_words(tmp_path), "--val_data", str(tmp_path / "pairs.jsonl"), "--beta", "1"]
    fast = ["--max_updates", "6", "--batch_size", "5", "--learning_rate", "0.1", "--progress", "no"]
    assert run_recipe("preference", *words, *fast, "--output_dir", str(tmp_path / "out")) == 0
    losses = re.search(r", loss ([\d.]+) \(([\d.]+) before\)", capsys.readouterr().out)
    assert losses is not None
    assert float(losses[1]) < 0.65 < float(losses[2]) == 0.693
    generate = pipeline("text-generation", model=str(tmp_path / "out" / "model"))
    assert generate([{"role": "user", "content": "hi"}], max_new_tokens=2)
    assert (tmp_path / "out" / "model" / "adapter_config.json").exists()


def test_a_window_of_distillation_has_the_gradient_of_one_batch() -> None:
    import distillation

    student, teacher = vit(0).double(), vit(1).double()
    pixels, labels = torch.randn(5, 3, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1])
    losses = []
    for x, label in zip(pixels, labels, strict=True):
        z, t = (model.eval()(pixel_values=x[None]).logits[0] for model in (student, teacher))
        p, q = F.softmax(t.detach() / 3, dim=0), F.softmax(z / 3, dim=0)
        losses.append(0.6 * 9 * (p * (p / q).log()).sum() - 0.4 * F.log_softmax(z, dim=0)[label])
    torch.stack(losses).mean().backward()
    expected = {f"model.{name}": p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    wrapped = distillation.Distillation(student, teacher, temperature=3.0, weight=0.6)
    rows = [{"pixel_values": x, "labels": label} for x, label in zip(pixels, labels.tolist(), strict=True)]
    found = accumulated_gradients(wrapped, rows, batch_size=2, effective_batch_size=5, verbosity="quiet")
    assert relative_error(found[0], expected) < 1e-12


def test_a_teacher_is_frozen_and_stays_in_eval_mode() -> None:
    import distillation

    wrapped = distillation.Distillation(vit(0), vit(1), temperature=1.0, weight=0.5).train()
    assert wrapped.model.training
    assert not any(module.training for module in wrapped.teacher.modules())
    assert {name.partition(".")[0] for name, p in wrapped.named_parameters() if p.requires_grad} == {"model"}


@needs_image_processor
def test_distillation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*distillation_words(tmp_path), *TWO, "--output_dir", str(tmp_path / "out")]
    assert run_recipe("distillation", *words) == 0
    assert "Held-out accuracy of the student: " in capsys.readouterr().out
    classify = pipeline("image-classification", model=str(tmp_path / "out" / "model"))
    assert {each["label"] for each in classify(str(tmp_path / "images" / "dark" / "0.png"))} == {"dark", "light"}
    assert len(classify.model.state_dict()) == len(vit(0).state_dict()), "the student alone is saved"


@needs_image_processor
def test_a_teacher_of_other_classes_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = distillation_words(tmp_path)
    (tmp_path / "images" / "light").rename(tmp_path / "images" / "bright")
    assert run_recipe("distillation", *words, *TWO) == 2
    assert (
        "The teacher has the classes ['dark', 'light'], but `train_data` has ['bright', 'dark']"
        in capfd.readouterr().err
    )


def test_plain_pytorch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import plain_pytorch

    words = [*plain_pytorch_words(tmp_path), *TWO, "--output_dir", str(tmp_path / "out")]
    assert run_recipe("plain_pytorch", *words) == 0
    assert "Held-out accuracy: " in capsys.readouterr().out
    load_model(plain_pytorch.DigitNet(2, 3), str(tmp_path / "out" / "model" / "model.safetensors"))


@pytest.mark.parametrize(
    ("name", "words", "expected"),
    [
        ("distillation", ["--weight", "5"], "`weight` must be from 0 to 1, but is 5.0 instead."),
        ("distillation", ["--temperature", "0"], "`temperature` must be a number above 0"),
        ("distillation", ["--teacher", "/nowhere"], "`teacher` '/nowhere' cannot be loaded"),
        ("plain_pytorch", ["--width", "6"], "`width` must be a positive multiple of 4, but is 6 instead."),
        ("preference", ["--beta", "0"], "`beta` must be a number above 0"),
    ],
)
def test_a_recipe_refuses_bad_values_of_its_options(
    name: str, words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    of_model = [] if name == "plain_pytorch" else ["--model", "/absent", "--train_data", "/absent.csv"]
    assert run_recipe(name, *of_model, *words) == 2
    assert capsys.readouterr().err.startswith(f"{name}: {expected}")


@pytest.mark.parametrize(
    ("saved", "expected"),
    [
        (b"not a file of torch\n", "cannot be read: "),
        (b"text,label\na good film,1\n", "cannot be read: "),
        ({"images": torch.zeros(2)}, "does not have two tensors, images and labels. Write it with"),
        ((torch.zeros(2, 3), torch.zeros(2)), "has images of the shape (2, 3) and labels of the shape (2,)"),
        ((torch.zeros(2, 1, 4, 4), torch.tensor([0])), "labels of the shape (1,) and the type torch.int64. Images"),
    ],
)
def test_a_file_without_images_and_labels_is_refused(saved: Any, expected: str, tmp_path: Path) -> None:
    import plain_pytorch

    file = tmp_path / "rows.pt"
    file.write_bytes(saved) if isinstance(saved, bytes) else torch.save(saved, file)
    with pytest.raises(DataError, match=re.escape(expected)) as raised:
        plain_pytorch.read(str(file))
    assert not str(raised.value).endswith("..")
