"""Measuring how a loss is counted, on losses whose correct count is known."""

import contextlib
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from transformers import BertForPreTraining, MixtralConfig, MixtralForCausalLM

from ftaccum import DataError, InexactLossWarning, SettingsError, test_fine_tuning
from ftaccum.data.dataset import Rows
from ftaccum.data.rare_rows import LabelKind, RareRows
from ftaccum.objective.item_counts import ItemCounter
from ftaccum.objective.perturbation import float32_weights, perturb_head
from ftaccum.objective.probe import Explanation, choose, explain
from heads import HEADS

WIDTHS = (3, 5, 2, 7)


def batch(widths: tuple[int, ...] = WIDTHS) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    labels_BL = torch.full((len(widths), max(widths)), -100)
    for row, width in enumerate(widths):
        labels_BL[row, :width] = torch.randint(5, (width,), generator=draw)
    logits_BLV = torch.randn(len(widths), max(widths), 5, generator=draw).double()
    return {"labels": labels_BL, "logits": logits_BLV}


def groups(whole: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{key: value[rows] for key, value in whole.items()} for rows in ([0], [1], [2, 3])]


def labels_mean(b: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(b["logits"].flatten(0, 1), b["labels"].flatten())


def shifted_mean(b: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(b["logits"][:, :-1].flatten(0, 1), b["labels"][:, 1:].flatten())


def rows_mean(b: dict[str, Tensor]) -> Tensor:
    each = [labels_mean({key: value[n : n + 1] for key, value in b.items()}) for n in range(len(b["labels"]))]
    return torch.stack(each).mean()


def measured(loss: Any, whole: dict[str, Tensor], apart: Any = None) -> tuple[str, Explanation]:
    """Return the chosen way to count, and how well it explains the loss."""
    losses = lambda b: {"loss": float(loss(b))}
    ways = ItemCounter().applicable(whole)
    way = choose(losses, whole, groups, {"loss": ways}, ignore_index=-100)["loss"]
    return way, explain(losses, whole, groups, groups(whole) if apart is None else apart, {"loss": ways[way]})


@pytest.mark.parametrize(
    ("loss", "way"),
    [(labels_mean, "labels"), (shifted_mean, "labels after the next-token shift"), (rows_mean, "rows")],
)
def test_the_right_way_to_count_is_found(loss: Any, way: str) -> None:
    chosen, found = measured(loss, batch())
    assert chosen == way
    assert found.differences["loss"] < 1e-12
    assert not found.padding_sensitive
    assert not found.adds_up


@pytest.mark.parametrize(
    ("loss", "way"), [(labels_mean, "labels"), (shifted_mean, "labels after the next-token shift")]
)
@pytest.mark.parametrize("first_ignored", [True, False])
def test_other_labels_distinguish_ways_that_agree_on_the_rows(loss: Any, way: str, first_ignored: bool) -> None:
    whole = batch((5, 5, 5, 5))  # every way of counting gives the same weights
    if first_ignored:
        whole["labels"][:, 0] = -100
    assert measured(loss, whole)[0] == way


def test_a_loss_that_mixes_rows_is_not_explained() -> None:
    def contrastive(b: dict[str, Tensor]) -> Tensor:
        pooled_BV = b["logits"].mean(1)
        return F.cross_entropy(pooled_BV @ pooled_BV.T, torch.arange(len(pooled_BV)))

    assert measured(contrastive, batch())[1].differences["loss"] > 0.01


def test_a_loss_that_depends_on_the_width_is_padding_sensitive() -> None:
    def over_padding(b: dict[str, Tensor]) -> Tensor:
        return b["logits"].logsumexp((1, 2)).mean()

    whole = batch()
    narrow = [{k: v[:, : (3, 5, 7)[n]] for k, v in part.items()} for n, part in enumerate(groups(whole))]
    chosen, found = measured(over_padding, whole, narrow)
    assert found.padding_sensitive
    assert chosen == "rows"
    assert found.differences["loss"] < 1e-12


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


ROWS = [{"x": torch.randn(4, generator=torch.Generator().manual_seed(n)), "y": n % 3} for n in range(8)]


def cross_entropy(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(outputs, batch["y"])


def in_batch(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(outputs @ outputs.T, torch.arange(len(batch["y"])))


def test_the_warning_gives_the_error_also_for_a_count_given_by_the_user() -> None:
    arguments = {"train_data": ROWS, "n_epochs": 1, "validation_split": 0.0, "progress": False}
    arguments |= {"gradient_accumulation_steps": 2}
    with pytest.warns(
        InexactLossWarning, match=r"'loss' over separate micro-batches, weighted by rows, is up to \d+% off"
    ):
        test_fine_tuning(Pooled(), loss_fn=in_batch, **arguments)
    with pytest.warns(InexactLossWarning, match="weighted by count_items"):
        test_fine_tuning(Pooled(), loss_fn=in_batch, count_items=lambda b: len(b["y"]), **arguments)


@pytest.mark.parametrize("counted", [-1, "3", None, float("nan"), {"other": 3}])
def test_an_invalid_count_is_refused(counted: Any) -> None:
    with pytest.raises(SettingsError, match="`count_items` must"):
        test_fine_tuning(
            Pooled(), train_data=ROWS, loss_fn=cross_entropy, count_items=lambda _: counted, n_epochs=1, progress=False
        )


def test_a_loss_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(
        SettingsError, match=r"`loss_fn` or the model must return one number, .* but 'loss' is (?:\(8, 3\)|\(\d, 3\))"
    ):
        test_fine_tuning(Pooled(), train_data=ROWS, loss_fn=lambda outputs, _: outputs, n_epochs=1, progress=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(4))
def test_class_weights_in_a_function_are_measured(seed: int, dtype: torch.dtype) -> None:
    weight = torch.tensor([1.0, 1 / 3, 20.0, 100.0, 0.25], dtype=dtype)
    draw = torch.Generator().manual_seed(seed)
    rows = [
        (torch.randn(4, generator=draw).to(dtype), torch.tensor(n % 2 if n % 20 else 2 + n // 20)) for n in range(60)
    ]
    torch.manual_seed(seed)
    model, loss = nn.Linear(4, 5).to(dtype), lambda outputs, targets: F.cross_entropy(outputs, targets, weight=weight)
    inputs, targets = (torch.stack(column) for column in zip(*rows, strict=True))
    wanted = loss(model(inputs), targets).item()
    result = test_fine_tuning(
        model, train_data=rows, loss_fn=loss, effective_batch_size=60, n_epochs=1, validation_split=0.0, progress=False
    )
    assert result.loss_history == pytest.approx([wanted], rel=2e-6 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("as_table", [False, True])
def test_rare_rows_have_every_value_of_labels_and_flags_and_are_the_shortest(as_table: bool) -> None:
    rows = [{"input_ids": [1] * (2 + n % 3), "labels": [n % 2, 0], "keep": 1} for n in range(60)]
    rows[17]["labels"], rows[40]["labels"], rows[42]["labels"] = [0, 5], [7, 7], [7, 0]
    rows[33]["keep"] = 0
    found = RareRows.of(Rows("train_data", Dataset.from_list(rows) if as_table else rows), -100, LabelKind())
    assert {17, 42, 33} <= set(found.positions)  # row 40 is longer than row 42
    assert 40 not in found.positions
    assert not found.not_looked_at


def test_of_many_tokens_as_labels_only_special_ones_get_rows() -> None:
    rows = Rows("train_data", [{"input_ids": [n, n], "labels": [n, n]} for n in range(100)])
    assert len(RareRows.of(rows, -100, LabelKind()).positions) == 65
    found = RareRows.of(rows, -100, LabelKind(are_tokens=True, special={3, 7})).positions
    assert set(found) >= {3, 7}
    assert len(found) <= 3


def test_the_number_of_label_values_not_measured_is_reported() -> None:
    rows = [(torch.randn(4), torch.tensor(n % 200)) for n in range(200)]
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        test_fine_tuning(
            nn.Linear(4, 200), train_data=rows, loss_fn=nn.CrossEntropyLoss(), n_epochs=1, validation_split=0.0,
            progress=False,
        )  # fmt: skip
    assert (
        "Loss: mean over labels (measured); the check before training did not cover 135 of 200 label values"
        in shown.getvalue()
    )


@pytest.mark.slow
def test_a_class_beyond_the_measured_rows_is_reported_with_its_row() -> None:
    labels = torch.arange(1000) % 100
    labels[17] = 100
    weight = torch.ones(101)
    weight[100] = 50.0
    rows = [(torch.randn(4, generator=torch.Generator().manual_seed(n)), labels[n]) for n in range(1000)]
    words = r"for most rows, but not for all: .* \(row 17: 50 times\).*`nn.CrossEntropyLoss\(weight=…\)`.*`count_items`"
    with pytest.warns(InexactLossWarning, match=words):
        test_fine_tuning(
            nn.Linear(4, 101), train_data=rows, loss_fn=lambda o, y: F.cross_entropy(o, y, weight=weight), n_epochs=1,
            effective_batch_size=500, validation_split=0.0, progress=False,
        )  # fmt: skip


def test_class_weights_of_the_usual_loss_are_counted() -> None:
    draw = torch.Generator().manual_seed(0)
    rows = [(torch.randn(4, generator=draw).double(), torch.tensor(n % 3)) for n in range(8)]
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 9.0, 0.5]).double())
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    inputs, targets = (torch.stack(column) for column in zip(*rows, strict=True))
    wanted = loss(model(inputs), targets).item()
    result = test_fine_tuning(
        model, train_data=rows, loss_fn=loss, batch_size=3, effective_batch_size=8, n_epochs=1, validation_split=0.0,
        progress=False,
    )  # fmt: skip
    assert result.loss_history == pytest.approx([wanted], rel=1e-9)


def test_a_nonfinite_loss_is_reported_before_training() -> None:
    model = Pooled()
    with torch.no_grad():
        model.net.bias[0] = float("nan")
    with pytest.raises(DataError, match="The loss of the first rows of `train_data` is nan before any update"):
        test_fine_tuning(model, train_data=ROWS, loss_fn=cross_entropy, n_epochs=1, progress=False)


def test_class_weights_are_exact_with_their_own_count() -> None:
    weight = torch.tensor([1.0, 5.0, 0.5])
    loss = lambda outputs, b: F.cross_entropy(outputs, b["y"], weight=weight)
    whole = {key: torch.stack([torch.as_tensor(row[key]) for row in ROWS]) for key in ("x", "y")}
    result = test_fine_tuning(
        Pooled(), train_data=ROWS, loss_fn=loss, count_items=lambda b: weight[b["y"]].sum(), batch_size=3,
        effective_batch_size=8, n_epochs=1, validation_split=0.0, progress=False,
    )  # fmt: skip
    assert result.loss_history == pytest.approx([loss(Pooled()(whole["x"]), whole).item()], rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("long", [False, True])
def test_rounding_to_16_bits_does_not_mislead(seed: int, long: bool) -> None:
    head = HEADS["token classification, BERT"]
    torch.manual_seed(seed)
    model = head.model_class(head.config).bfloat16()
    rows = head.rows(8, seed)
    if long:  # many labels per row, and rows that differ little
        lengths = torch.randint(10, 60, (8,)).tolist()
        rows = [{"input_ids": [5] * 60, "labels": [1] * n + [-100] * (60 - n)} for n in lengths]
    assert counted_by(model, rows) == "labels (measured)"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_full_precision_is_temporary() -> None:
    model = HEADS["causal LM, Llama"].model().bfloat16()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.set_float32_matmul_precision("medium")
    try:
        with float32_weights(model):
            assert {p.dtype for p in model.parameters()} == {torch.float32}
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) and value.dtype == after[key].dtype for key, value in before.items())


def test_terms_with_different_means_are_not_taken_for_one_mean() -> None:
    """A loss over masked tokens plus a loss over rows is not a mean over either, whatever the weights."""
    torch.manual_seed(0)
    model = BertForPreTraining(HEADS["masked LM, BERT"].config)
    rows = [{**row, "next_sentence_label": n % 2} for n, row in enumerate(HEADS["masked LM, BERT"].rows())]
    with pytest.warns(InexactLossWarning, match="'loss' over separate micro-batches"):
        test_fine_tuning(
            model, train_data=rows, n_epochs=1, gradient_accumulation_steps=2, validation_split=0.0, progress=False
        )


def test_router_losses_of_micro_batches_cause_a_warning() -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.1,
    )  # fmt: skip
    with pytest.warns(
        InexactLossWarning, match="'aux_loss', 2.7% of the loss, depends on the rows of a batch together"
    ):
        test_fine_tuning(
            MixtralForCausalLM(config), train_data=HEADS["causal LM, Llama"].rows(), n_epochs=1,
            gradient_accumulation_steps=2, validation_split=0.0, router_balance="micro_batch",
            progress=False,
        )  # fmt: skip


@pytest.mark.parametrize("name", ["causal LM, Llama", "token classification, RoBERTa", "seq2seq, BART"])
def test_rows_that_all_have_the_same_loss_do_not_mislead(name: str) -> None:
    head = HEADS[name]
    model = head.model().float()
    with torch.no_grad():  # a head of zeros: every class is as likely as any other
        (model.get_output_embeddings() or model.classifier).weight.zero_()
        if hasattr(model, "classifier"):
            model.classifier.bias.zero_()
    assert (
        counted_by(model, head.rows())
        == ("labels after the next-token shift" if "causal" in name else "labels") + " (measured)"
    )


def test_perturbed_last_weights_are_restored() -> None:
    for head in HEADS.values():
        model = head.model()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with perturb_head(model):
            assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_large_last_weights_get_noise_that_differs_between_rows() -> None:
    model = nn.Linear(50, 25_000, bias=False)
    before = model.weight.detach().clone()
    with perturb_head(model):
        noise_VH = model.weight.detach() - before
        assert noise_VH.std().item() == pytest.approx(3 / 50**0.5, rel=0.01)
        assert len(noise_VH[:, :2].unique(dim=0)) == 25_000
    assert torch.equal(model.weight, before)


def test_one_row_is_enough() -> None:
    head = HEADS["causal LM, Llama"]
    assert counted_by(head.model(), [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}]).startswith(
        "labels after the"
    )


_TWO_LABELS = {"input_ids": [5, 6], "labels": [2, 1]}
_TWO_OF_FOUR = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 2, 1]}


@pytest.mark.parametrize("rows", [[_TWO_LABELS], [{**_TWO_LABELS, "labels": [-100, 1]}, _TWO_OF_FOUR]])
@pytest.mark.parametrize(
    ("name", "way"),
    [("causal LM, Llama", "labels after the next-token shift"), ("token classification, BERT", "labels")],
)
def test_a_few_short_rows_show_whether_labels_are_shifted(name: str, way: str, rows: list[Any]) -> None:
    assert counted_by(HEADS[name].model(), rows) == f"{way} (measured)"


def test_a_plain_modules_next_token_loss_is_known() -> None:
    class Zeros(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(61, 4), nn.Linear(4, 61)
            nn.init.zeros_(self.head.weight)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.embed(tokens))

    assert counted_by(Zeros(), [torch.arange(n) for n in (4, 7, 5)]) == "labels after the next-token shift"


def test_an_undeclared_sum_is_reported() -> None:
    with pytest.warns(
        InexactLossWarning,
        match="The losses of the micro-batches add up to that of one batch, so it is a sum: set `reduction='sum'`",
    ):
        test_fine_tuning(
            Pooled(), train_data=ROWS, loss_fn=lambda o, b: F.cross_entropy(o, b["y"], reduction="sum"), n_epochs=1,
            gradient_accumulation_steps=2,
            validation_split=0.0, progress=False,
        )  # fmt: skip


def counted_by(model: nn.Module, rows: Any) -> str:
    """Return what the loss is a mean over, according to the banner."""
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        test_fine_tuning(model, train_data=rows, n_epochs=1, validation_split=0.0, progress=False)
    return next(line for line in shown.getvalue().splitlines() if line.startswith("Loss: ")).removeprefix(
        "Loss: mean over "
    )
