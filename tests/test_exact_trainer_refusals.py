"""What `exact` refuses, each with a sentence, and what it reports as inexact."""

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, Trainer

from ftaccum import InexactLossError, InexactLossWarning, SettingsError, exact
from ftaccum.bridges.trainer.trainer_support import known_as_inexact
from heads import HEADS, PAD, one_batch
from trainers import Listed, arguments, gradients, window_errors

CLASSIFIER = HEADS["sequence classification, BERT"]


def made(trainer_class: Any, folder: Path, **given: Any) -> Any:
    return trainer_class(
        model=CLASSIFIER.model(), args=arguments(str(folder), **given), train_dataset=Listed(CLASSIFIER.rows()),
        data_collator=one_batch,
    )  # fmt: skip


# ---- Classes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [int, nn.Linear, "Trainer"])
def test_other_classes_are_refused(given: Any) -> None:
    with pytest.raises(
        SettingsError, match=r"takes the class `Trainer` or a subclass of it, but got .*exact\(Trainer\)\("
    ):
        exact(given)


def test_a_trainer_object_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"takes the class `Trainer`.* but got an instance of Trainer"):
        exact(made(Trainer, tmp_path))


def test_an_exact_class_is_not_made_exact_again() -> None:
    with pytest.raises(SettingsError, match="Trainer is exact already"):
        exact(exact(Trainer))


def test_a_trainer_that_makes_its_batches_during_training_is_refused() -> None:
    class Generating(Trainer):
        def _prepare_inputs(self, inputs: Any) -> Any:
            return super()._prepare_inputs(inputs)

    with pytest.raises(SettingsError, match="Generating makes its batches during training"):
        exact(Generating)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_grpo_is_refused() -> None:
    from trl import GRPOTrainer

    with pytest.raises(SettingsError, match="GRPOTrainer makes its batches during training"):
        exact(GRPOTrainer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"planner": "yes"}, "`planner` must be True or False, but is 'yes'"),
        ({"count_items": 3}, "`count_items` must be a function or None, but is 3"),
        ({"on_inexact": "raise"}, "`on_inexact` must be 'error', 'warn' or 'ignore', but is 'raise'"),
        ({"audit": -1}, "`audit` must be True, False or a positive integer, but is -1"),
        ({"audit": 0}, "`audit` must be True, False or a positive integer, but is 0"),
        ({"audit": "always"}, "`audit` must be .* but is 'always'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        exact(**options)
    with pytest.raises(SettingsError, match=message):
        exact(Trainer, **options)


def test_all_wrong_options_are_named_at_once() -> None:
    with pytest.raises(SettingsError, match=r"(?s)`planner`.*`audit`"):
        exact(planner=1, audit=None)  # type: ignore[call-overload]


# ---- Subclasses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["compute_loss", "get_batch_samples"])
def test_a_subclass_that_changes_the_weighting_is_refused(name: str) -> None:
    with pytest.raises(SettingsError, match=rf"`Mine\.{name}` would run outside of the weighting"):
        type("Mine", (exact(Trainer),), {name: lambda self, *_, **__: None})  # noqa: ARG005


def test_a_subclass_of_a_subclass_is_checked_as_well() -> None:
    class Mine(exact(Trainer)):  # type: ignore[misc]
        pass

    with pytest.raises(SettingsError, match=r"`Below\.compute_loss` would run outside of the weighting"):
        type("Below", (Mine,), {"compute_loss": lambda self, *_, **__: None})  # noqa: ARG005


class WithoutCount(Trainer):
    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:  # noqa: ARG002
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        self.accelerator.backward(loss)
        return loss.detach()


class WithoutLoss(Trainer):
    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:  # noqa: ARG002
        loss = model(**inputs).loss
        self.accelerator.backward(loss)
        return loss.detach()


class Twice(Trainer):
    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        super().training_step(model, dict(inputs), num_items_in_batch)
        return super().training_step(model, dict(inputs), num_items_in_batch)


class Above(exact(Trainer)):  # type: ignore[misc]
    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:  # noqa: ARG002
        return super().training_step(model, inputs)


@pytest.mark.parametrize("trainer_class", [exact(WithoutCount), exact(WithoutLoss), exact(Twice), Above])
def test_a_training_step_that_does_not_use_the_weighted_loss_once_is_refused(trainer_class: Any) -> None:
    with pytest.raises(RuntimeError, match=r"`training_step` must call `self\.compute_loss\(.* once"):
        gradients(trainer_class, CLASSIFIER.model(), CLASSIFIER.rows())


class HandsOn(Trainer):
    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        return loss.detach()


class HandsOnAbove(exact(Trainer)):  # type: ignore[misc]
    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        return super().training_step(model, inputs, num_items_in_batch)


@pytest.mark.parametrize("trainer_class", [exact(HandsOn), HandsOnAbove])
def test_a_training_step_that_hands_the_count_on_is_exact(trainer_class: Any) -> None:
    gradient, loss = window_errors(trainer_class, CLASSIFIER.model(), CLASSIFIER.rows(), size=4)
    assert max(gradient) < 1e-10
    assert max(loss) < 1e-6


class NeedsCount(Trainer):
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        loss = outputs.loss * len(inputs["labels"]) / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


class AsksCount(NeedsCount):
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch.clamp(min=1))


@pytest.mark.parametrize("trainer_class", [NeedsCount, AsksCount])
def test_a_compute_loss_that_needs_a_count_is_refused(trainer_class: Any) -> None:
    with pytest.raises(SettingsError, match=r"cannot be called without `num_items_in_batch`.*return the mean over"):
        gradients(exact(trainer_class), CLASSIFIER.model(), CLASSIFIER.rows())


# ---- Configurations --------------------------------------------------------------------------------------------------


def test_data_parallel_is_refused(tmp_path: Path) -> None:
    class OnTwoDevices(Trainer):
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            self.args._n_gpu = 2

    with pytest.raises(SettingsError, match=r"runs in DataParallel, which averages over unequal parts.*torchrun"):
        made(exact(OnTwoDevices), tmp_path)


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("is_deepspeed_enabled", "DeepSpeed"),
        ("is_fsdp_enabled", "FSDP"),
        ("is_fsdp_xla_enabled", "FSDP"),
    ],
)
def test_sharded_training_is_refused(tmp_path: Path, flag: str, name: str) -> None:
    class Sharded(Trainer):
        def __init__(self, *args: Any, **keywords: Any) -> None:
            super().__init__(*args, **keywords)
            setattr(self, flag, True)

    with pytest.raises(SettingsError, match=f"The model uses {name}, but `exact` has only been shown to be exact if"):
        made(exact(Sharded), tmp_path)


def test_other_parallelism_is_refused(tmp_path: Path) -> None:
    class Parallel(Trainer):
        def __init__(self, *args: Any, **keywords: Any) -> None:
            super().__init__(*args, **keywords)
            self.accelerator = SimpleNamespace(parallelism_config=object(), num_processes=1)

    with pytest.raises(SettingsError, match="The model uses tensor, context or sequence parallelism"):
        made(exact(Parallel), tmp_path)


def test_uneven_batches_of_several_processes_are_refused(tmp_path: Path) -> None:
    class Uneven(Trainer):
        def __init__(self, *args: Any, **keywords: Any) -> None:
            super().__init__(*args, **keywords)
            self.accelerator = SimpleNamespace(num_processes=2, even_batches=False)

    with pytest.raises(
        SettingsError, match=r"`accelerator_config\.even_batches` is False.*wait for each other forever"
    ):
        made(exact(Uneven), tmp_path)


def test_everything_that_a_trainer_cannot_do_is_named_at_once(tmp_path: Path) -> None:
    class Faulty(Trainer):
        def __init__(self, *args: Any, **keywords: Any) -> None:
            super().__init__(*args, **keywords)
            self.is_fsdp_enabled = True
            self.accelerator = SimpleNamespace(num_processes=2, even_batches=False)
            self.model = nn.Sequential(self.model, nn.SyncBatchNorm(3))

    with pytest.raises(SettingsError, match="FSDP") as raised:
        made(exact(Faulty), tmp_path)
    fsdp, norms, even = raised.value.faults
    assert "The model uses FSDP" in fsdp
    assert "SyncBatchNorm layers" in norms
    assert "`accelerator_config.even_batches` is False" in even


def test_a_model_in_data_parallel_is_named_once(tmp_path: Path) -> None:
    class OnTwoDevices(Trainer):
        def __init__(self, *args: Any, **keywords: Any) -> None:
            super().__init__(*args, **keywords)
            self.args._n_gpu = 2
            self.model = nn.DataParallel(self.model)

    with pytest.raises(SettingsError, match="runs in DataParallel") as raised:
        made(exact(OnTwoDevices), tmp_path)
    assert len(raised.value.faults) == 1


# ---- Inexact losses --------------------------------------------------------------------------------------------------


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.norm = nn.Embedding(61, 6), nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, input_ids: Any, labels: Any = None, attention_mask: Any = None) -> Any:  # noqa: ARG002
        logits = self.head(self.norm(self.embedding(input_ids[:, 0])))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def contrasted(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:  # noqa: ARG001
    """Compare the rows of a batch with each other."""
    similarity = outputs["logits"] @ outputs["logits"].T
    return nn.functional.cross_entropy(similarity, torch.arange(len(similarity)))


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.1,
        pad_token_id=PAD,
    )  # fmt: skip
    config._experts_implementation = "eager"  # the grouped products do not support float64
    return MixtralForCausalLM(config).double()


INEXACT: dict[str, tuple[Any, str, dict[str, Any], str]] = {
    "batch norm": (Normed, "sequence classification, BERT", {}, "In train mode, .*'norm' mixes the rows of a batch"),
    "a router": (mixtral, "causal LM, Llama", {}, "depends on the rows of a batch together.*mixture of experts"),
    "a comparison of rows": (
        CLASSIFIER.model,
        "sequence classification, BERT",
        {"compute_loss_func": contrasted},
        "not a mean over items that can be counted",
    ),
}


def trained(case: str, **options: Any) -> None:
    make_model, head, parts, _ = INEXACT[case]
    gradients(exact(**options)(Trainer), make_model(), HEADS[head].rows(8), parts=parts)


@pytest.mark.parametrize("case", INEXACT)
def test_an_inexact_loss_is_reported_before_training(case: str) -> None:
    with pytest.warns(InexactLossWarning, match=INEXACT[case][3]):
        trained(case, audit=False)


def test_a_loss_that_sorts_rows_is_known_as_inexact() -> None:
    """It is exact as long as a model ranks rows as its reference does, and so is not found by measuring."""
    for kinds, is_inexact in ((["sigmoid", "aot"], True), ("aot", True), (["sigmoid"], False), ("sigmoid", False)):
        trainer = SimpleNamespace(args=SimpleNamespace(loss_type=kinds))
        assert any("'aot'" in sentence for sentence in known_as_inexact(trainer)) == is_inexact
    assert not known_as_inexact(SimpleNamespace(args=SimpleNamespace()))


@pytest.mark.parametrize("case", INEXACT)
def test_an_inexact_loss_is_an_error_on_demand(case: str) -> None:
    with pytest.raises(InexactLossError, match=INEXACT[case][3]):
        trained(case, on_inexact="error")


def test_an_inexact_loss_is_not_reported_if_it_is_to_be_ignored() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained("a comparison of rows", on_inexact="ignore", audit=False)


def test_measuring_leaves_the_statistics_of_a_batch_norm_as_they_are() -> None:
    """With one micro-batch per update, they are those of an unchanged Trainer."""
    ours, theirs = Normed(), Normed()
    given = {"gradient_accumulation_steps": 1}
    gradients(exact(on_inexact="ignore", audit=False)(Trainer), ours, CLASSIFIER.rows(8), **given)
    gradients(Trainer, theirs, CLASSIFIER.rows(8), **given)
    assert ours.norm.num_batches_tracked == theirs.norm.num_batches_tracked == 4
    assert torch.allclose(ours.norm.running_mean, theirs.norm.running_mean, rtol=1e-6)
