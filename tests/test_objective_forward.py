"""Finding the loss: in a model's outputs, from the user's function, or as the next-token loss."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftaccum.errors import DataError, SettingsError
from ftaccum.objective.aux_losses import factors_of, has_parts
from ftaccum.objective.model_forward import ModelForward, accepted_arguments, is_label
from ftaccum.objective.own_loss import logits_of

IDS = torch.tensor([[1, 2, 3, 4], [4, 3, 0, 1]])


def number(tensor: Tensor) -> float:
    """Return a tensor, which may have a graph, as a float."""
    return tensor.item()


class Named(nn.Module):
    """A module that returns its arguments by name."""

    def forward(self, input_ids: Tensor, labels: Any = None) -> dict[str, Any]:
        return {"loss": None if labels is None else labels.double().mean(), "logits": input_ids.double()[..., None]}


class Embedding(nn.Module):
    """A model that returns next-token logits for a vocabulary of five tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(5, 5).double()

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids)


def test_the_models_own_loss_is_read_and_unknown_columns_are_left_out() -> None:
    batch = {"input_ids": IDS, "labels": IDS, "extra": IDS}
    forward = ModelForward(Named(), batch, None)
    means, outputs = forward(Named(), batch)
    assert (forward.is_own, forward.counted_by, forward.modules, forward.parts) == (True, None, [], ())
    assert number(means["loss"]) == IDS.double().mean()
    assert outputs["logits"].shape == (2, 4, 1)


def test_labels_are_withheld_from_the_model_if_the_user_gives_a_loss() -> None:
    batch = {"input_ids": IDS, "labels": IDS}
    loss_fn = nn.Identity()
    forward = ModelForward(
        Named(), batch, lambda outputs, given: given["labels"].double().sum() + outputs["logits"].sum()
    )
    means, outputs = forward(Named(), batch)
    assert outputs["loss"] is None
    assert number(means["loss"]) == 2 * IDS.sum()
    assert not forward.is_own
    assert ModelForward(Named(), batch, loss_fn).modules == [loss_fn]


def test_an_encoder_decoder_gets_labels_even_if_the_user_gives_a_loss() -> None:
    model, batch = Named(), {"input_ids": IDS, "labels": IDS}
    model.config = SimpleNamespace(is_encoder_decoder=True)  # type: ignore[assignment]
    forward = ModelForward(model, batch, lambda outputs, _: outputs["loss"])
    assert number(forward(model, batch)[0]["loss"]) == IDS.double().mean()


def test_a_pair_is_inputs_and_targets() -> None:
    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs * targets).sum()

    class Product(nn.Module):
        def forward(self, a: Tensor, b: float = 2.0) -> Tensor:
            return a * b

    a, targets = torch.ones(3), torch.tensor([1.0, 2.0, 3.0])
    for inputs, wanted in [(a, 12.0), ((a, 5.0), 30.0), ([a, 5.0], 30.0), ({"a": a, "b": 7.0}, 42.0)]:
        batch = (inputs, targets)
        forward = ModelForward(Product(), batch, loss_fn)
        assert number(forward(Product(), batch)[0]["loss"]) == wanted


def test_the_next_token_loss_is_the_mean_over_shifted_labels() -> None:
    labels = torch.tensor([[1, 2, -100, 4], [4, 3, 0, -100]])
    model, batch = Embedding(), {"input_ids": IDS, "labels": labels}
    forward = ModelForward(model, batch, None, token_ids=True)
    found = forward(model, batch)[0]["loss"]
    logp = model(IDS).detach().log_softmax(-1)
    counted = [(0, 0, 2), (0, 2, 4), (1, 0, 3), (1, 1, 0)]  # row, position, next label
    wanted = -sum(number(logp[row, at, label]) for row, at, label in counted) / 4
    assert number(found) == pytest.approx(wanted, rel=1e-14)
    assert forward.counted_by == "labels after the next-token shift"
    assert not forward.is_own


def test_the_next_token_loss_of_sixteen_bits_is_computed_in_float32() -> None:
    batch = {"input_ids": IDS, "labels": IDS}
    model = Embedding().to(torch.bfloat16)
    found = ModelForward(model, batch, None, token_ids=True)(model, batch)[0]["loss"]
    assert found.dtype == torch.float32
    logits = model(IDS)[:, :-1].flatten(0, 1).float()
    assert number(found) == number(F.cross_entropy(logits, IDS[:, 1:].flatten()))


@pytest.mark.parametrize("shape", [(2, 4), (2, 3, 5), (1, 4, 5)])
def test_logits_of_another_shape_give_no_next_token_loss(shape: tuple[int, ...]) -> None:
    class Wrong(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:  # noqa: ARG002
            return torch.zeros(shape)

    batch = {"input_ids": IDS, "labels": IDS}
    with pytest.raises(DataError, match=r"logits of shape \(rows, length, vocabulary\), but returns"):
        ModelForward(Wrong(), batch, None, token_ids=True)(Wrong(), batch)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([{"a": 1}, {"a": 2}], "returns a list of 2 dicts instead"),
        ([], r"gives \(inputs, targets\) tuples, but `loss_fn` is None"),
        ((IDS, IDS), r"gives \(inputs, targets\) tuples, but `loss_fn` is None"),
        ({"input_ids": IDS}, "no label column"),
        ({"input_ids": IDS, "label_of_row": IDS}, r"label columns \['label_of_row'\] that forward does not take"),
    ],
)
def test_a_model_and_rows_without_a_loss_are_an_error(batch: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ModelForward(Named(), batch, None)


@pytest.mark.parametrize(
    ("found", "message"),
    [(torch.ones(2), r"'loss' is \(2,\)"), (1.0, "'loss' is float"), (None, "The loss 'loss' is None")],
)
def test_a_loss_that_is_not_a_number_is_an_error(found: Any, message: str) -> None:
    batch = {"input_ids": IDS, "labels": IDS}
    with pytest.raises(SettingsError, match=message):
        ModelForward(Named(), batch, lambda _, __: found)(Named(), batch)


def test_a_loss_of_one_number_is_a_scalar() -> None:
    batch = {"input_ids": IDS, "labels": IDS}
    means, _ = ModelForward(Named(), batch, lambda _, __: {"a": torch.ones(1, 1), "b": torch.tensor(2.0)})(
        Named(), batch
    )
    assert {term: (mean.shape, number(mean)) for term, mean in means.items()} == {"a": ((), 1.0), "b": ((), 2.0)}


@pytest.mark.parametrize(
    "outputs",
    [
        {"loss": torch.tensor(3.0)},
        SimpleNamespace(loss=torch.tensor(3.0)),
        (torch.tensor(3.0), torch.ones(2)),
        [torch.ones(2), torch.tensor([3.0])],
    ],
)
def test_a_models_own_loss_is_found_in_outputs_of_any_kind(outputs: Any) -> None:
    class Fixed(nn.Module):
        def forward(self, labels: Tensor) -> Any:  # noqa: ARG002
            return outputs

    batch = {"labels": IDS}
    assert number(ModelForward(Fixed(), batch, None)(Fixed(), batch)[0]["loss"]) == 3.0


@pytest.mark.parametrize("outputs", [{"logits": torch.ones(2)}, SimpleNamespace(logits=1), (torch.ones(2), "text")])
def test_outputs_without_a_loss_are_an_error(outputs: Any) -> None:
    class Fixed(nn.Module):
        def forward(self, labels: Tensor) -> Any:  # noqa: ARG002
            return outputs

    batch = {"labels": IDS}
    with pytest.raises(DataError, match="was given labels and returned no loss"):
        ModelForward(Fixed(), batch, None)(Fixed(), batch)


def test_logits_are_found_in_outputs_of_any_kind() -> None:
    logits, other = torch.ones(2, 3), torch.zeros(5)
    assert logits_of(logits) is logits
    assert logits_of({"other": other, "logits": logits}) is logits
    assert logits_of({"loss": other, "scale": torch.tensor(1.0), "scores": logits}) is logits
    assert logits_of((torch.tensor(1.0), "text", logits, other)) is logits
    with pytest.raises(DataError, match="hold no logits"):
        logits_of({"loss": other})


def test_classes_are_read_off_the_logits_without_labels() -> None:
    class Classifier(nn.Module):
        def __init__(self, shape: tuple[int, ...]) -> None:
            super().__init__()
            self.shape = shape

        def forward(self, input_ids: Tensor, labels: Any = None) -> Any:  # noqa: ARG002
            assert labels is None
            return {"logits": torch.zeros(self.shape)}

    def classes(shape: tuple[int, ...], labels: Tensor, ids: Tensor = IDS) -> int | None:
        batch = {"input_ids": ids, "labels": labels}
        return ModelForward(Classifier(shape), batch, None).n_classes(Classifier(shape), batch)

    assert classes((2, 3), torch.tensor([0, 1])) == 3
    assert classes((2, 4, 2), IDS) == 2
    assert classes((2, 1), torch.tensor([0, 1])) is None, "one logit is no choice"
    assert classes((3, 3), torch.tensor([0, 1])) is None, "logits of other rows"
    assert classes((2, 3), torch.tensor([0.0, 1.0])) is None, "targets that are no class numbers"
    choices = torch.ones(2, 3, 4, dtype=torch.long)
    assert classes((2, 3), torch.tensor([0, 1]), choices) is None, "choices of a row"
    assert classes((2, 3), torch.tensor([0, 1]), torch.ones(2, 3, 4, 5)) == 3


def test_classes_of_pairs_and_of_models_that_need_labels() -> None:
    linear = nn.Linear(4, 3)
    pair = (torch.zeros(2, 4), torch.tensor([0, 1]))
    forward = ModelForward(linear, pair, nn.CrossEntropyLoss())
    assert forward.n_classes(linear, pair) == 3
    assert forward.n_classes(linear, (torch.zeros(2, 4), torch.zeros(2))) is None

    class Needs(nn.Module):
        def forward(self, input_ids: Tensor, labels: Tensor) -> Any:  # noqa: ARG002
            return {"logits": torch.zeros(2, 3)}

    batch = {"input_ids": IDS, "labels": torch.tensor([0, 1])}
    assert ModelForward(Needs(), batch, None).n_classes(Needs(), batch) is None


def test_accepted_arguments_of_a_module() -> None:
    class TakesAny(nn.Module):
        def forward(self, a: Tensor, **more: Any) -> None: ...

    class TakesSome(nn.Module):
        def forward(self, a: Tensor, /, b: Tensor, *rest: Tensor, c: int = 1) -> None: ...

    class Adapter(nn.Module):
        def get_base_model(self) -> nn.Module:
            return TakesSome()

    assert accepted_arguments(TakesAny()) is None
    assert accepted_arguments(TakesSome()) == {"b", "c"}
    assert accepted_arguments(Adapter()) == {"b", "c"}


def test_columns_that_are_targets() -> None:
    names = ["labels", "label", "next_sentence_label", "start_positions", "end_positions", "input_ids", "position_ids"]
    assert [is_label(name) for name in names] == [True] * 5 + [False] * 2


def outputs_of(x: Tensor, learnt: Tensor) -> dict[str, Any]:
    main, balance, z = x.sum(), (x**2).sum(), (x**3).sum()
    return {
        "loss": main + 0.5 * balance - 2.0 * z + learnt * z * 0, "balance": balance, "z": z,
        "logits": x, "unused": x.mean(), "fixed": torch.tensor(1.0), "count": torch.tensor(3),
    }  # fmt: skip


def test_factors_of_added_losses_are_the_slopes_of_the_loss() -> None:
    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    found = factors_of(outputs_of(x, torch.tensor(1.0)), "loss")
    assert found == {"balance": 0.5, "z": -2.0}
    assert x.grad is None


def test_a_factor_that_depends_on_the_weights_is_nan() -> None:
    x, learnt = torch.ones(2, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    balance = (x**2).sum()
    found = factors_of({"loss": x.sum() + learnt * balance, "balance": balance}, "loss")
    assert list(found) == ["balance"]
    assert found["balance"] != found["balance"]


def test_an_output_computed_from_another_is_not_counted_twice() -> None:
    x = torch.ones(2, requires_grad=True)
    balance = (x**2).sum()
    scaled = 4.0 * balance
    outputs = {"loss": x.sum() + scaled, "scaled": scaled, "balance": balance, "again": balance}
    assert factors_of(outputs, "loss") == {"again": 4.0}
    assert factors_of({"loss": x.sum(), "same": outputs["loss"]}, "loss") == {}


def test_a_loss_without_a_graph_has_no_parts() -> None:
    x = torch.ones(2)
    assert factors_of({"loss": x.sum(), "balance": x.mean()}, "loss") == {}


def test_outputs_may_have_parts_where_they_hold_other_numbers() -> None:
    loss = torch.tensor(1.0)
    assert has_parts({"loss": loss, "balance": torch.tensor(2.0)}, "loss")
    assert not has_parts({"loss": loss, "logits": torch.ones(2), "n": torch.tensor(2)}, "loss")
    assert not has_parts((loss, torch.tensor(2.0)), "loss")


class Router(nn.Module):
    """A model whose loss is the sum of two means. Its outputs name one of them, except in eval mode."""

    def __init__(self, factor: float = 0.25) -> None:
        super().__init__()
        self.weight, self.factor = nn.Parameter(torch.tensor(2.0, dtype=torch.float64)), factor

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        balance = (self.weight * x).sum()
        loss = (self.weight * labels).sum()
        if not self.training:
            return {"loss": loss}
        return {"loss": loss + self.factor * balance, "balance": balance}


def test_added_losses_become_terms_that_sum_to_the_loss() -> None:
    model, batch = Router(), {"x": torch.tensor([8.0]), "labels": torch.tensor([3.0])}
    forward = ModelForward(model, batch, None)
    assert forward.may_have_parts(model(**batch))
    with torch.no_grad():
        forward.take_apart(model, [batch, {"x": torch.tensor([1.0]), "labels": torch.tensor([2.0])}])
    assert (forward.factors, forward.parts) == ({"balance": 0.25}, ("balance",))
    assert {term: number(mean) for term, mean in forward(model, batch)[0].items()} == {"loss": 6.0, "balance": 4.0}
    in_eval = forward(model.eval(), batch)[0]
    assert {term: number(mean) for term, mean in in_eval.items()} == {"loss": 6.0, "balance": 0.0}


def test_a_factor_that_changes_from_batch_to_batch_is_left_in_the_loss() -> None:
    class Odd(Router):
        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            self.factor = float(labels)
            return super().forward(x, labels)

    model = Odd()
    batches = [{"x": torch.tensor([8.0]), "labels": torch.tensor(float(n))} for n in (3, 2)]
    forward = ModelForward(model, batches[0], None)
    forward.take_apart(model, batches)
    assert forward.factors == {}


def settled(model: nn.Module, several: Any, one: Any) -> Any:
    """Return the loss of `one` after `several` decided which output is the loss."""
    forward = ModelForward(model, one, None)
    forward.settle_outputs(model, lambda: several)
    return forward(model, one)[0]["loss"]


class Returns(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.names = nn.Linear(2, 1).double(), names

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        prediction = self.linear(x)[:, 0]
        penalty = prediction.square().mean()
        found = {
            "prediction": prediction, "squeezed": prediction.squeeze(), "penalty": penalty,
            "metric": prediction.detach().mean(), "loss": (prediction - labels).square().mean(),
        }  # fmt: skip
        found["total"] = found["loss"] + penalty
        return tuple(found[name] for name in self.names)


@pytest.mark.parametrize(
    "names",
    [("loss", "prediction"), ("prediction", "loss"), ("squeezed", "loss"), ("metric", "prediction", "loss"),
     ("loss", "metric"), ("penalty", "total"), ("total", "penalty"), ("loss", "loss")],
)  # fmt: skip
def test_several_rows_decide_which_output_is_the_loss(names: tuple[str, ...]) -> None:
    model = Returns(*names)
    several = {"x": torch.eye(2).double(), "labels": torch.ones(2).double()}
    one = {"x": several["x"][:1], "labels": several["labels"][:1]}
    wanted = dict(zip(names, model(**one), strict=True))
    assert number(settled(model, several, one)) == number(wanted.get("loss", wanted.get("total")))


def test_two_numbers_that_do_not_depend_on_each_other_are_an_error() -> None:
    batch = {"x": torch.eye(2).double(), "labels": torch.ones(2).double()}
    with pytest.raises(SettingsError, match=r"at positions 1, 2 of its outputs, .* names it `loss`"):
        settled(Returns("prediction", "penalty", "loss"), batch, batch)


def test_a_place_may_differ_between_train_mode_and_eval_mode() -> None:
    class Model(Returns):
        def forward(self, x: Tensor, labels: Tensor) -> Any:
            outputs = super().forward(x, labels)
            return outputs if self.training else outputs[::-1]

    model = Model("penalty", "prediction", "total")
    batch = {"x": torch.eye(2).double(), "labels": torch.ones(2).double()}
    forward = ModelForward(model, batch, None)
    forward.settle_outputs(model, lambda: batch)
    for mode in (model.train(), model.eval()):
        total = mode(**batch)[2 if mode.training else 0]
        assert number(forward(mode, batch)[0]["loss"]) == number(total)


def test_an_output_that_is_a_number_is_the_loss() -> None:
    class Bare(Returns):
        def forward(self, x: Tensor, labels: Tensor) -> Any:
            return super().forward(x, labels)[0]

    batch = {"x": torch.eye(2).double(), "labels": torch.ones(2).double()}
    model = Bare("loss")
    assert number(settled(model, batch, batch)) == number(model(**batch))
