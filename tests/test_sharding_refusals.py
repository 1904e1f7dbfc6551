"""Models, optimizers and settings that cannot be sharded, and models that are sharded already."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.optim import SGD, AdamW, SparseAdam

from ftaccum import DataError, ModelWrapper, SettingsError, test_fine_tuning
from ftaccum.apps.run_arguments import default_arguments
from ftaccum.runtime.gradients.sharded import ShardedGradients
from ftaccum.runtime.process_group import SINGLE, ProcessGroup
from ftaccum.runtime.sharding.optimizer_check import check_optimizer
from ftaccum.runtime.sharding.options import ShardingOptions
from ftaccum.settings.runtime import Runtime
from ftaccum.training.build_sharding import check_sharding
from ftaccum.training.config import RunConfig
from heads import HEADS
from sharding import needs_sharding

HEAD = HEADS["sequence classification, BERT"]


def faults(model: nn.Module | None = None, save: str = "adapter", **components: Any) -> list[str]:
    """Return the messages that refuse to shard a model with these components."""
    arguments = default_arguments() | {"model": model or HEAD.model(), "train_data": HEAD.rows(4)} | components
    config, runtime = RunConfig.from_arguments(arguments), Runtime(save=save)
    parts, recipe = config.components, config.recipe
    check_sharding(parts, recipe, runtime, None)  # whole copies are not checked
    try:
        check_sharding(parts, recipe, runtime, ShardingOptions())
    except SettingsError as error:
        return list(error.faults)
    return []


def test_optimizers_by_name_that_fail_on_shards_are_refused() -> None:
    (fault,) = faults(optimizer="adafactor")
    assert fault.startswith("`optimizer` is 'adafactor', which cannot step on sharded weights. Use 'adamw', 'sgd'")
    assert faults(optimizer="muon") == []


def with_attribute(name: str, value: Any) -> nn.Module:
    model = HEAD.model()
    setattr(model, name, value)
    return model


def with_adapters() -> nn.Module:
    return get_peft_model(HEAD.model(), LoraConfig(target_modules="all-linear"))


def with_a_sparse_table() -> nn.Module:
    model = HEAD.model()
    model.bert.embeddings.word_embeddings.sparse = True
    return model


def with_a_hook(kind: str) -> nn.Module:
    model = HEAD.model()
    getattr(model.classifier.weight, kind)(lambda _: None)
    return model


def trained(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    return optimizer


def test_models_and_optimizers_that_can_be_sharded() -> None:
    model = with_attribute("hf_device_map", {"": 0})
    for optimizer in (None, AdamW, partial(SGD, lr=0.1), SGD(model.parameters(), lr=0.1)):
        assert faults(model, optimizer=optimizer) == []
    assert faults(with_adapters()) == []


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (
            partial(with_attribute, "is_quantized", True),
            "`model` has weights that are quantized, which FSDP2 cannot sh",
        ),
        (
            lambda: ModelWrapper(with_attribute("is_quantized", True)),
            "`model` has weights that are quantized, which FSDP2 cannot sh",
        ),
        (
            partial(with_attribute, "hf_device_map", {"bert": 0, "classifier": "cpu"}),
            "`model` is spread over the devices 0, cpu by `device_map`, but each process must shard the whole model",
        ),
        (
            with_a_sparse_table,
            "`model` has embedding tables with sparse gradients (bert.embeddings.word_embeddings), which FSDP2 does",
        ),
        (
            partial(with_a_hook, "register_hook"),
            "`model` has weights with hooks on their gradients (classifier.weight), which sharded weights would lose.",
        ),
        (
            partial(with_a_hook, "register_post_accumulate_grad_hook"),
            "`model` has weights with hooks on their gradients (classifier.weight), which sharded weights would lose.",
        ),
    ],
)
def test_a_model_that_cannot_be_sharded_is_refused(model: Callable[[], nn.Module], expected: str) -> None:
    (fault,) = faults(model())
    assert fault.startswith(expected)


def test_weights_of_few_bits_are_refused() -> None:
    model = with_adapters()
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
    (fault,) = faults(model)
    assert fault == (
        "`model` has weights of 4 bits, which FSDP2 cannot shard. Load it in 16 bits (`dtype='bfloat16'`), or train a "
        "whole copy on each process (`sharding='off'`)."
    )


@pytest.mark.parametrize("save", ["merged", "both"])
def test_merging_the_adapters_of_a_sharded_model_is_refused(save: str) -> None:
    expected = (
        f"`save` is {save!r}, but the adapters of a sharded model cannot be merged. Leave `save` out, and run `ft"
    )
    for message in (faults(with_adapters(), save), faults(save=save, lora=True)):
        assert len(message) == 1
        assert message[0].startswith(expected)


def test_an_optimizer_that_has_trained_is_refused() -> None:
    model = HEAD.model()
    (fault,) = faults(model, optimizer=trained(AdamW(model.parameters())))
    assert fault.startswith("`optimizer` (AdamW) has trained before, and its state belongs to whole weights.")


def test_the_state_of_an_inner_optimizer_is_found() -> None:
    model = HEAD.model()
    outer = SGD(model.parameters(), lr=0.1)
    outer.inner = trained(AdamW(model.parameters()))  # type: ignore[attr-defined]
    assert len(faults(model, optimizer=outer)) == 1


@pytest.mark.parametrize("optimizer", [SparseAdam, partial(SparseAdam, lr=0.1), None])
def test_sparse_adam_is_refused(optimizer: Any) -> None:
    model = HEAD.model()
    (fault,) = faults(model, optimizer=optimizer or SparseAdam(model.parameters()))
    assert fault.startswith("`optimizer` is SparseAdam, which takes sparse gradients only")


def test_the_page_on_launching_quotes_the_messages() -> None:
    quantized = with_adapters()
    quantized.is_loaded_in_4bit = True  # type: ignore[assignment]
    spread, tables = (
        with_attribute("hf_device_map", {"a": 0, "b": 1}),
        nn.ModuleDict({"embeddings": nn.Embedding(2, 2)}),
    )
    tables["embeddings"].sparse = True  # type: ignore[assignment]
    optimizer = trained(AdamW(HEAD.model().parameters()))
    found = [
        *(faults(quantized) + faults(spread) + faults(tables) + faults(with_adapters(), "merged")),
        *faults(with_a_hook("register_hook")),
        *(faults(optimizer=SparseAdam) + faults(optimizer=optimizer)),
    ]
    page = (Path(__file__).parents[1] / "docs" / "launching.md").read_text(encoding="utf-8")
    assert len(found) == 7
    assert [message for message in found if f"| {message} |" not in page] == []


@pytest.fixture
def mesh() -> Iterator[Any]:
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_a_model_that_is_sharded_already_is_refused(mesh: Any) -> None:
    model = HEAD.model()
    layer = model.classifier
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Replicate()]))
    with pytest.raises(
        SettingsError, match=r"`model` has weights that are divided among processes already \(DTensor\)."
    ):
        test_fine_tuning(model, train_data=HEAD.rows(4))


@pytest.mark.parametrize("environment", [{}, {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}])
def test_weights_that_only_another_process_has_name_the_option(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    model = HEAD.model()
    model.classifier.to("meta")
    with pytest.raises(SettingsError, match="`model` has weights on the meta device") as raised:
        test_fine_tuning(model, train_data=HEAD.rows(4))
    hint = "The launcher asks for `fsdp_cpu_ram_efficient_loading`, with which only one process of a machine gets the w"
    assert (hint in str(raised.value)) == bool(environment)


class HoldingItsOwn(torch.optim.Optimizer):
    """An optimizer whose step changes the weights of a list of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), {"lr": 0.1})
        self.held = list(model.parameters())

    def step(self, closure: Any = None) -> None:  # noqa: ARG002
        for p in self.held:
            if p.grad is not None:
                p.data -= self.param_groups[0]["lr"] * p.grad


@pytest.mark.usefixtures("mesh")
def test_an_optimizer_that_steps_on_weights_outside_of_its_groups_is_refused() -> None:
    with pytest.raises(SettingsError, match="HoldingItsOwn does not change the weights in its `param_groups`"):
        check_optimizer(HoldingItsOwn(HEAD.model()), torch.device("cpu"), SINGLE)
    check_optimizer(SGD(HEAD.model().parameters(), lr=0.1), torch.device("cpu"), SINGLE)


@needs_sharding
@pytest.mark.usefixtures("mesh")
def test_a_loss_that_uses_a_weight_as_it_was_before_sharding_is_refused() -> None:
    model = nn.Linear(2, 2)
    kept, own = model.weight, nn.Parameter(torch.ones(2))
    strategy = ShardedGradients(SGD([*model.parameters(), own], lr=0.1), ShardingOptions(), ProcessGroup(1), list)
    strategy.shard(model, torch.device("cpu"))
    (model(torch.ones(1, 2)) * own).sum().backward()
    assert own.grad is not None
    with pytest.raises(SettingsError, match="the loss uses a whole copy of the weight `weight`"):
        (kept * own).sum().backward()
    strategy.close()


class OtherReachesAll(ProcessGroup):
    """Stands for two processes: this one, and one whose loss depends on both units of a model."""

    def any_of(self, flags: Any) -> list[bool]:
        own = list(flags)
        others = (True, True, False, False) if len(own) == 4 else [False] * len(own)
        return [flag or other for flag, other in zip(own, others, strict=True)]


@needs_sharding
@pytest.mark.usefixtures("mesh")
def test_a_loss_that_depends_on_a_block_on_some_processes_only_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = SGD(model.parameters(), lr=0.1)
    strategy = ShardedGradients(optimizer, ShardingOptions(), OtherReachesAll(1), lambda: ["0", "1"])
    strategy.shard(model, torch.device("cpu"))
    first = []
    model[0].register_forward_hook(lambda _, __, output: first.append(output))
    for finds_all in (True, False):
        strategy.begin_pass(is_last=True, counts=True)
        whole = model(torch.ones(1, 2)).sum()
        loss = whole if finds_all else first[-1].sum() + 0 * whole.detach()
        if finds_all:
            strategy.check_backward(loss)
            loss.backward()
        else:
            with pytest.raises(DataError, match="The loss depends on the output of `1` on some processes, but not on"):
                strategy.check_backward(loss)
    strategy.close()


class Collecting(nn.Module):
    """A block that adds a number to a list among its arguments, as some models collect parts of the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, hidden_BD: torch.Tensor, collected: list[torch.Tensor]) -> torch.Tensor:
        hidden_BD = self.layer(hidden_BD)
        collected.append(hidden_BD.sum())
        return hidden_BD


class CollectingTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Collecting(), Collecting()])

    def forward(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        collected: list[torch.Tensor] = []
        for block in self.blocks:
            hidden_BD = block(hidden_BD, collected)
        return hidden_BD.sum() + sum(collected)


@needs_sharding
@pytest.mark.usefixtures("mesh")
def test_a_block_that_changes_a_list_among_its_arguments_is_refused() -> None:
    model = CollectingTwice()
    optimizer = SGD(model.parameters(), lr=0.1)
    strategy = ShardedGradients(optimizer, ShardingOptions(), ProcessGroup(1), lambda: ["blocks.0", "blocks.1"])
    strategy.shard(model, torch.device("cpu"))
    with torch.no_grad():
        model(torch.ones(1, 2))  # without gradients, nothing is copied
    strategy.begin_pass(is_last=True, counts=True)
    with pytest.raises(DataError, match=r"`blocks\.1` changes a list or a dictionary among its arguments"):
        model(torch.ones(1, 2))
    strategy.close()
