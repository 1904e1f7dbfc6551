"""Logits at labelled positions only in compiled models: the gradient of all logits, in a few graphs."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

import ftaccum
from exactness import window_errors
from ftaccum import DataError
from ftaccum.objective.labelled_head import LabelledHead, NeededLogits
from ftaccum.objective.labelled_positions import LabelledPositions
from heads import HEADS, IGNORED, all_in_float64, relative_error
from labelled_heads import choices_of_head
from test_labelled_evaluation import both_ways
from test_labelled_head import CAUSAL, MASKED, SHORT_WAY, SIZES, WAYS, unlabelled

VOCABULARY = 13
NONE, LABELLED = NeededLogits.NONE, NeededLogits.LABELLED


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Compile without a C compiler, and collect the graphs."""
    found: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        found.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch.compiler.reset()
    yield found
    torch.compiler.reset()


class Net(nn.Module):
    """A causal language model without attention."""

    def __init__(self, scale: float = 1.0, widens: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(VOCABULARY, 6), nn.Linear(6, VOCABULARY)
        self.scale, self.widens = scale, widens

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> CausalLMOutput:
        hidden = self.embedding(F.pad(input_ids, (0, 1)) if self.widens else input_ids).tanh()
        logits = self.head(hidden) * self.scale
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        return CausalLMOutput(loss, logits)


def compiled(model: Any) -> tuple[Any, LabelledHead]:
    """Return a compiled model, and its head with logits at labelled positions."""
    model = model.double()
    model.compile(dynamic=True)
    head = LabelledHead(model, model.get_output_embeddings(), LabelledPositions(shifts=True, ignore_index=IGNORED))
    head.gives_logits = getattr(model, "scale", 1.0) == 1.0
    return model, head


def batch_of(n_rows: int, width: int, n_labels: int) -> dict[str, Tensor]:
    """Return random rows with so many labels in all."""
    ids, labels = torch.randint(VOCABULARY, (n_rows, width)), torch.full((n_rows, width), IGNORED)
    places = torch.randperm(n_rows * (width - 1))[:n_labels]
    labels[places // (width - 1), 1 + places % (width - 1)] = 7  # no logits predict the first one of a row
    return {"input_ids": ids, "labels": labels}


def gradient_of(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def check(model: Any, head: LabelledHead, shape: tuple[int, int, int], needs: NeededLogits = NONE) -> Any:
    """Check loss, gradient and logits of random rows; return the outputs."""
    batch = batch_of(*shape)
    loss, outputs = head(lambda given: model(**given), batch, shape[-1], needs)
    found = gradient_of(model, loss)
    with torch.compiler.set_stance("force_eager"):
        own = model(**batch)
    wanted = gradient_of(model, own.loss)
    assert loss.item() == pytest.approx(own.loss.item(), rel=1e-12)
    assert relative_error(found, wanted) < 1e-12
    if needs is LABELLED:
        places = head.positions.places(batch["labels"])
        torch.testing.assert_close(outputs["logits"], own.logits.flatten(0, 1)[places][None])
    return outputs


SHAPES = [(8, 16, 16), (3, 16, 21), (4, 24, 41), (2, 8, 1), (8, 16, 8), (5, 16, 75), (7, 10, 2), (2, 9, 16)]


@pytest.mark.parametrize(
    ("scale", "needs"),
    [
        (1.0, NONE),
        *(pytest.param(*way, marks=pytest.mark.slow) for way in ((1.0, LABELLED), (3.0, NONE), (3.0, LABELLED))),
    ],
)
def test_any_number_of_labels_has_one_graph_and_the_gradient_of_all_logits(
    scale: float, needs: NeededLogits, graphs: list[Any]
) -> None:
    model, head = compiled(Net(scale))
    for shape in SHAPES:
        check(model, head, shape, needs)
    assert len(graphs) == 1
    check(model, head, (1, 16, 15), needs)
    check(model, head, (1, 8, 5), needs)
    assert len(graphs) == 2  # a single row has its own


@pytest.mark.slow
def test_a_graph_computes_the_loss_without_giving_logits_if_nobody_reads_them(graphs: list[Any]) -> None:
    model, head = compiled(Net())
    assert check(model, head, (3, 8, 5)).logits.shape == (1, 0, VOCABULARY)
    assert check(model, head, (3, 8, 5), LABELLED)["logits"].shape == (1, 5, VOCABULARY)
    assert len(graphs) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("graphs")
def test_rows_without_labels_have_no_mean() -> None:
    model, head = compiled(Net())
    batch = batch_of(3, 8, 0)
    loss, _ = head(lambda given: model(**given), batch)
    assert loss.isnan()
    assert model(**batch).loss.isnan()


@pytest.mark.usefixtures("graphs")
def test_other_passes_keep_all_logits() -> None:
    model, head = compiled(Net())
    ids = batch_of(3, 8, 5)["input_ids"]
    for _ in range(2):
        check(model, head, (3, 8, 5))
        assert model(ids).logits.shape == (3, 8, VOCABULARY)


@pytest.mark.parametrize("scale", [1.0, pytest.param(3.0, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("graphs")
def test_graphs_of_passes_before_training_give_the_same_loss(scale: float) -> None:
    """Dynamo does not notice new hooks, so these graphs return all logits."""
    model, head = compiled(Net(scale))
    for width in (8, 10):
        model(input_ids=batch_of(3, width, 5)["input_ids"])
    for needs in (NONE, LABELLED):
        check(model, head, (3, 8, 5), needs)
        check(model, head, (1, 8, 3), needs)


@pytest.mark.slow
@pytest.mark.usefixtures("graphs")
def test_logits_of_another_shape_are_an_error() -> None:
    model, head = compiled(Net(widens=True))
    with pytest.raises(DataError, match=r"\(3, 9, 13\) although 16 positions .* Pass `loss_head='full'`"):
        head(lambda given: model(**given), batch_of(3, 8, 5))


COMPILED: dict[str, Any] = SIZES | {"compile": True}


@pytest.mark.slow
@pytest.mark.parametrize("name", [MASKED, CAUSAL])
@pytest.mark.usefixtures("graphs")
def test_gradients_of_a_compiled_model_equal_those_of_one_batch(name: str) -> None:
    rows = unlabelled(HEADS[name].rows(14), range(5, 8))
    with all_in_float64(), choices_of_head() as choices:
        errors = window_errors(HEADS[name].model(), rows, **COMPILED)
    assert choices == [SHORT_WAY]
    assert max(errors) < 1e-10


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # of older peft
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo, at a graph break
@pytest.mark.parametrize(
    "way", [*("gradient checkpointing", "a scale of logits", "an adapter of the head"), "a balance of experts"]
)
@pytest.mark.usefixtures("graphs")
def test_gradients_of_a_compiled_model_equal_those_of_one_batch_with(way: str) -> None:
    """Equal up to float32's rounding, in which some compiled models compute."""
    model, arguments = WAYS[way]
    with all_in_float64(), choices_of_head() as choices:
        errors = window_errors(model(), HEADS[CAUSAL].rows(), **COMPILED | arguments)
    assert choices == [SHORT_WAY]
    assert max(errors) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", [MASKED, CAUSAL])
@pytest.mark.usefixtures("graphs")
def test_the_validation_of_a_compiled_model_equals_that_of_all_logits(name: str) -> None:
    short, full = both_ways(name, compile=True, compute_metrics=ftaccum.Accuracy())
    assert short.val_loss_history == pytest.approx(full.val_loss_history, rel=1e-6)
    assert short.metrics == full.metrics
