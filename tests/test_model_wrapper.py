"""A `ModelWrapper`: its runs resume as those of other models do, and questions about the model reach the one inside."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ftaccum import CheckpointError, ModelWrapper, test_fine_tuning
from ftaccum.checkpoint.best_weights import weights_of
from ftaccum.checkpoint.compatibility import adapter_identity, model_identity
from ftaccum.objective.perturbation import perturb_head
from ftaccum.runtime.adapters import ModuleTree
from ftaccum.runtime.log import run_logging
from ftaccum.runtime.model_context import model_context
from ftaccum.runtime.model_wrapper import trained_besides
from ftaccum.tracking.model_files import save_model
from ftaccum.training.adapters import faults_of_adapters, quantised_bits
from ftaccum.training.build_identity import software_versions
from ftaccum.training.config import Components
from ftaccum.training.model_parts import head_parameters, layer_depths
from heads import HEADS

BERT, LLAMA = HEADS["sequence classification, BERT"], HEADS["causal LM, Llama"]


class WithTeacher(ModelWrapper):
    """A model, and a frozen one of the same kind, whose logits the first one learns, too."""

    def __init__(self, model: Any, teacher: Any) -> None:
        super().__init__(model)
        self.teacher = teacher.requires_grad_(False).eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Any]:
        found = self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        logits_NC = self.teacher(input_ids=input_ids, attention_mask=attention_mask).logits
        return {"loss": found.loss + (found.logits - logits_NC).pow(2).mean(), "logits": found.logits}


class AroundBase(ModelWrapper):
    """Calls its model."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Any]:
        return {"loss": self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels).loss}


def seeded(seed: int = 0) -> Any:
    made: Any = BERT.model().float()
    torch.manual_seed(seed)
    for weight in made.parameters():
        nn.init.normal_(weight, std=0.05)
    return made


def adapted(seed: int = 0, **options: Any) -> Any:
    made = seeded(seed)
    torch.manual_seed(0)
    return peft.get_peft_model(made, peft.LoraConfig(**{"r": 2, "target_modules": ["query"]} | options))


def run(model: nn.Module, folder: Path, **arguments: Any) -> Any:
    return test_fine_tuning(
        model, train_data=BERT.rows(8), batch_size=2, effective_batch_size=4, learning_rate=0.01,
        lr_scheduler="constant", validation_split=0.0, progress=False, verbosity="quiet", output_dir=str(folder),
        checkpoint_every=1, **arguments,
    )  # fmt: skip


def test_a_wrapper_resumes_to_the_bit_and_refuses_another_model(tmp_path: Path) -> None:
    whole, again = AroundBase(adapted()), AroundBase(adapted())
    run(whole, tmp_path / "whole", max_updates=2)
    run(AroundBase(adapted()), tmp_path / "cut", max_updates=1)
    more: dict[str, Any] = {"max_updates": 2, "allow_changed": ["max_updates"], "resume": "auto"}
    with pytest.raises(CheckpointError, match=r"`lora` was .*lora_alpha=8.* is .*lora_alpha=256"):
        run(AroundBase(adapted(lora_alpha=256)), tmp_path / "cut", **more)
    run(again, tmp_path / "cut", **more)
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], weight, rtol=0, atol=0)
    (folder,) = (tmp_path / "whole" / "checkpoints").glob("update-*")
    saved = set(load_file(folder / "model" / "model.safetensors"))
    assert saved == {name for name, p in whole.named_parameters() if p.requires_grad}
    assert not (folder / "model" / "config.json").exists(), "the names are not those that `from_pretrained` reads"


def test_checkpoints_contain_a_teacher_which_may_change() -> None:
    wrapped = WithTeacher(adapted(), seeded(1))
    left_out = {name for name, p in wrapped.model.named_parameters() if not p.requires_grad}
    assert set(weights_of(wrapped)) == set(dict(wrapped.named_parameters())) - {f"model.{name}" for name in left_out}


def test_adapters_inside_of_any_module_are_part_of_the_identity() -> None:
    model = adapted()
    assert adapter_identity(nn.Sequential(model)) == adapter_identity(AroundBase(model)) == adapter_identity(model)
    assert adapter_identity(AroundBase(seeded())) is None
    assert model_identity(AroundBase(adapted())) != model_identity(AroundBase(adapted(seed=1)))
    assert "peft" in software_versions(AroundBase(model))


def test_a_teacher_with_adapters_or_few_bits_does_not_count_as_the_model() -> None:
    wrapped = WithTeacher(seeded(), adapted())
    assert faults_of_adapters(wrapped, {"r": 2}, "adapter") == []
    wrapped.teacher.is_loaded_in_8bit = True
    assert quantised_bits(wrapped) is None
    wrapped.model.is_loaded_in_4bit = True
    assert quantised_bits(wrapped) == 4


def test_adapters_are_taken_out_of_the_model_inside() -> None:
    wrapped = WithTeacher(seeded(), adapted())
    before, kept = ModuleTree(wrapped), wrapped.teacher.base_model.peft_config
    inner = wrapped.model
    wrapped.model = peft.get_peft_model(inner, peft.LoraConfig(r=2, target_modules=["query"]))
    inner.peft_config = {}  # as older versions of PEFT leave it
    before.restore()
    assert wrapped.model is inner
    assert not hasattr(inner, "peft_config")
    assert wrapped.teacher.base_model.peft_config is kept


def test_parts_of_a_wrapper_are_those_of_the_model_inside() -> None:
    model = seeded()
    deeper: Any = BERT.model_class(type(model.config)(**model.config.to_dict() | {"num_hidden_layers": 5}))
    wrapped = WithTeacher(model, deeper)
    assert {p for p in head_parameters(wrapped) if p.requires_grad} == head_parameters(model)
    depths, alone = layer_depths(wrapped), layer_depths(model)
    assert {p: depth for p, depth in depths.items() if p.requires_grad} == alone


def test_the_check_perturbs_the_head_of_the_model_inside() -> None:
    wrapped = WithTeacher(seeded(), seeded(1))
    before = {name: p.clone() for name, p in wrapped.named_parameters()}
    with perturb_head(wrapped):
        changed = {name for name, p in wrapped.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"model.classifier.weight"}


def test_a_causal_lm_inside_is_padded_on_the_right_and_caches_nothing() -> None:
    wrapped = WithTeacher(LLAMA.model(), LLAMA.model())
    tokenizer = SimpleNamespace(padding_side="left")
    found = Components(wrapped, None, [], None, tokenizer, None, None, "mean", None, None, None)
    assert found.padding_side == "right"
    configs = [wrapped.model.config, wrapped.teacher.config]
    for config in configs:
        config.use_cache = True
    with model_context(wrapped, gradient_checkpointing=False):
        assert [config.use_cache for config in configs] == [False, False]
    assert [config.use_cache for config in configs] == [True, True]


def test_a_model_in_a_wrapper_needs_no_config() -> None:
    assert ModelWrapper(nn.Linear(2, 2)).config is None


class WithProjection(ModelWrapper):
    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.projection = nn.Linear(2, 2)


def test_frozen_modules_stay_in_eval_mode_and_others_do_not() -> None:
    wrapped = WithTeacher(seeded(), seeded(1))
    wrapped.projection, wrapped.dropout = nn.Linear(2, 2), nn.Dropout(0.5)
    wrapped.eval().train()
    modules = (wrapped.model, wrapped.projection, wrapped.dropout, wrapped.teacher)
    assert [module.training for module in modules] == [True, True, True, False]
    wrapped.model.requires_grad_(False)  # adapters may follow
    assert wrapped.train().model.training


def test_trained_weights_that_are_not_saved_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with run_logging(enabled=True):
        save_model(WithProjection(seeded()), None, tmp_path / "with")
        assert "(projection.weight, 2 in all) were trained, but are not saved" in capsys.readouterr().err
    assert trained_besides(WithProjection(seeded())) == ["projection.weight", "projection.bias"]
    assert trained_besides(WithTeacher(seeded(), seeded(1))) == trained_besides(seeded()) == []
