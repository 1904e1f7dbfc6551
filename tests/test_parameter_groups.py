"""Parameter groups: rates by layer, head and pattern, and what is refused."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    PreTrainedModel,
)

from ftaccum import SettingsError, test_fine_tuning
from ftaccum.arguments import parse_settings
from ftaccum.settings.recipe import Recipe
from ftaccum.training.model_parts import layer_depths
from ftaccum.training.optimizer import make_optimizer
from ftaccum.training.parameter_groups import parameter_groups
from heads import HEADS, all_in_float64, one_batch
from silent_errors.rates import distance

RATE, DECAY = 1e-2, 0.5
N_LAYERS = 2  # of every model here


def rates_of(model: nn.Module, **settings: Any) -> dict[str, tuple[float, float]]:
    """Return learning rate and weight decay of each trainable parameter in the optimizer, by name."""
    recipe, _ = parse_settings({"learning_rate": RATE, **settings})
    optimizer = make_optimizer(model, None, recipe, ())
    found = {p: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in optimizer.param_groups)
    return {name: found[p] for name, p in model.named_parameters() if p.requires_grad}


def expected_depth(name: str, layer: str, embeddings: str) -> int:
    if found := re.search(rf"{layer}\.(\d+)\.", name):
        return N_LAYERS - int(found[1])
    return N_LAYERS + 1 if re.search(embeddings, name) else 0


@pytest.mark.parametrize(
    ("head", "layer", "embeddings"),
    [
        ("sequence classification, BERT", r"encoder\.layer", "embeddings"),
        ("causal LM, Llama", r"model\.layers", "embed_tokens"),
        ("causal LM, GPT-2", r"transformer\.h", r"wte|wpe"),
        ("seq2seq, T5", r"(?:encoder|decoder)\.block", "shared"),
        ("seq2seq, BART", r"(?:encoder|decoder)\.layers", r"shared|embed_"),
        ("image classification, ViT", r"(?:encoder\.layer|vit\.layers)", "embeddings"),
    ],
)
def test_the_rate_falls_from_layer_to_layer(head: str, layer: str, embeddings: str) -> None:
    model = HEADS[head].model()
    rates = rates_of(model, layerwise_lr_decay=DECAY)
    expected = {name: RATE * DECAY ** expected_depth(name, layer, embeddings) for name in rates}
    assert {name: rate for name, (rate, _) in rates.items()} == pytest.approx(expected)
    assert set(expected.values()) == {RATE, RATE / 2, RATE / 4, RATE / 8}


def test_two_stacks_of_layers_have_embeddings_of_their_own() -> None:
    size = {
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 8
    }  # fmt: skip
    text = CLIPTextConfig(vocab_size=11, max_position_embeddings=8, bos_token_id=1, eos_token_id=2, **size)
    vision = CLIPVisionConfig(image_size=8, patch_size=4, **size)
    model = AutoModel.from_config(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict()))
    depths = layer_depths(model)
    found = {name: depths[p][0] for name, p in model.named_parameters() if name != "logit_scale"}
    assert found == {name: expected_depth(name, r"encoder\.layers", "embeddings|pre_layrnorm") for name in found}


class Experts(nn.Module):
    """A model of two layers with five experts each, whose head is registered first, and an embedding last."""

    base_model_prefix = "base"

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 2)
        self.base = nn.Module()
        self.base.first = nn.Linear(2, 2)
        self.base.layers = nn.ModuleList(nn.ModuleList(nn.Linear(2, 2) for _ in range(5)) for _ in range(2))
        self.base.embedding = nn.Embedding(3, 2)


def test_lists_inside_a_layer_are_no_layers() -> None:
    rates = rates_of(Experts(), layerwise_lr_decay=DECAY)
    factors = {"head": 1, "base.layers.1": 1 / 2, "base.layers.0": 1 / 4, "base.first": 1 / 8, "base.embedding": 1 / 8}
    expected = {name: RATE * next(f for part, f in factors.items() if name.startswith(part)) for name in rates}
    assert {name: rate for name, (rate, _) in rates.items()} == pytest.approx(expected)


def test_the_head_has_its_own_rate() -> None:
    model = HEADS["sequence classification, BERT"].model()
    rates = rates_of(model, head_learning_rate=0.3, layerwise_lr_decay=DECAY)
    assert {name for name, (rate, _) in rates.items() if rate == 0.3} == {"classifier.weight", "classifier.bias"}
    assert [rates[f"classifier.{name}"][1] for name in ("weight", "bias")] == [0.01, 0.0]
    assert rates["bert.pooler.dense.weight"][0] == RATE


def test_the_first_pattern_that_matches_counts() -> None:
    model = HEADS["sequence classification, BERT"].model()
    groups = [
        {"pattern": r"layer\.1\..*bias", "weight_decay": 0.2},
        {"pattern": r"layer\.1\.", "lr": 0.5},
        {"pattern": "pooler|classifier", "lr": 0.25, "weight_decay": 0.0},
    ]
    rates = rates_of(model, optimizer_groups=groups, head_learning_rate=0.3)
    top = "bert.encoder.layer.1.attention.self.query"
    assert rates[f"{top}.bias"] == (RATE, 0.2)
    assert rates[f"{top}.weight"] == (0.5, 0.01)
    assert rates["bert.encoder.layer.1.output.LayerNorm.weight"] == (0.5, 0.0)
    assert rates["classifier.weight"] == rates["bert.pooler.dense.bias"] == (0.25, 0.0)
    assert rates["bert.encoder.layer.0.output.dense.weight"] == (RATE, 0.01)


def test_groups_may_be_a_dict_or_json() -> None:
    groups = [{"pattern": "pooler", "lr": 0.5}, {"pattern": "bias", "weight_decay": 0.1}]
    as_dict = '{"pooler": {"lr": 0.5}, "bias": {"weight_decay": 0.1}}'
    for given in (groups, as_dict, {"pooler": {"lr": 0.5}, "bias": {"weight_decay": 0.1}}):
        assert parse_settings({"optimizer_groups": given})[0].optimizer_groups == groups


def plain_rates(model: nn.Module) -> list[dict[str, Any]]:
    """Return a group per parameter, with rates written by hand."""
    groups = []
    for name, p in model.named_parameters():
        rate = RATE * 0.9 ** expected_depth(name, r"(?:encoder\.layer|model\.layers)", "embed")
        decay = 0.1 if p.ndim >= 2 else 0.0
        if name.startswith(("classifier", "lm_head")):
            rate = 3 * RATE
        if "key" in name or "k_proj" in name:
            rate, decay = 2 * RATE, 0.3
        groups.append({"params": [p], "lr": rate, "weight_decay": decay})
    return groups


@pytest.mark.parametrize("head", ["sequence classification, BERT", "causal LM, Llama"])
def test_training_with_groups_and_a_schedule_equals_a_plain_loop(head: str) -> None:
    model, rows = HEADS[head].model(), HEADS[head].rows()
    start, reference = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = AdamW(plain_rates(reference), betas=(0.8, 0.9))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [0.0, 1.0, 0.5, 0.0][step])
    with all_in_float64():
        for _ in range(3):
            optimizer.zero_grad()
            reference.train()
            reference(**one_batch(rows)).loss.backward()
            optimizer.step()
            schedule.step()
        test_fine_tuning(
            model, train_data=rows, n_epochs=3, batch_size=2, effective_batch_size=len(rows), validation_split=0.0,
            learning_rate=RATE, weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.9, layerwise_lr_decay=0.9,
            head_learning_rate=3 * RATE, optimizer_groups={"key|k_proj": {"lr": 2 * RATE, "weight_decay": 0.3}},
            warmup_steps=1, gradient_clip_norm=None, progress=False,
        )  # fmt: skip
    assert distance(model, reference, start) < 1e-9


def test_the_rates_of_groups_follow_one_schedule(capsys: pytest.CaptureFixture[str]) -> None:
    model = HEADS["sequence classification, BERT"].model()
    rows = HEADS["sequence classification, BERT"].rows()
    made: list[SGD] = []
    result = test_fine_tuning(
        model, train_data=rows, n_epochs=2, batch_size=9, validation_split=0.0, learning_rate=RATE, progress=False,
        optimizer=lambda groups: made.append(SGD(groups)) or made[0], layerwise_lr_decay=DECAY, head_learning_rate=0.3,
        optimizer_groups={"key": {"lr": 0.7}},
    )  # fmt: skip
    assert result.lr_history == [RATE, RATE / 2]
    assert [group["lr"] for group in made[0].param_groups] == pytest.approx(
        [RATE, RATE, RATE / 2, RATE / 2, RATE / 4, RATE / 4, RATE / 8, RATE / 8, 0.3, 0.3, 0.7, 0.7]
    )
    shown = capsys.readouterr().out
    n_parameters = {
        "embeddings": sum(p.numel() for p in model.bert.embeddings.parameters()),
        "layers": sum(p.numel() for n, p in model.bert.encoder.named_parameters() if "key" not in n),
        "`key`": 2 * (16 * 16 + 16),
    }
    assert "Optimizer: SGD, learning rate 0.00125 to 0.7, weight decay 0.01 and 0\nParameter groups (12):\n" in shown
    assert f"  layers: {n_parameters['layers']:,} parameters, learning rate 0.0025 to 0.005, weight" in shown
    assert f"  embeddings: {n_parameters['embeddings']:,} parameters, learning rate 0.00125, weight" in shown
    assert f"  `key`: {n_parameters['`key`']:,} parameters, learning rate 0.7, weight decay 0.01 and 0\n" in shown
    assert "  head: 51 parameters, learning rate 0.3, weight decay 0.01 and 0\n" in shown


BASE: Callable[[], PreTrainedModel] = lambda: HEADS["sequence classification, BERT"].model().bert


@pytest.mark.parametrize(
    ("make", "settings", "words"),
    [
        (lambda: nn.Linear(2, 2), {"layerwise_lr_decay": 0.9}, "0.9, but Linear has no `nn.ModuleList`"),
        (lambda: nn.Linear(2, 2), {"head_learning_rate": 0.1}, "Linear has no trainable parameters outside its base"),
        (BASE, {"head_learning_rate": 0.1}, "BertModel has no trainable parameters outside its base model"),
        (HEADS["causal LM, GPT-2"].model, {"head_learning_rate": 0.1}, "GPT2LMHeadModel has no trainable parameters"),
        (BASE, {"optimizer_groups": {"encoder.layr": {"lr": 1.0}}},
         r"'encoder\.layr', which is found in no name .* Similar names are 'encoder\.layer\.0\."),
        (BASE, {"optimizer_groups": {"^zzz$": {"lr": 1.0}}}, "The names are, for example, 'embeddings"),
        (BASE, {"optimizer_groups": {"bias": {"lr": 1.0}, "key.bias": {"lr": 2.0}}},
         r"'key\.bias', but earlier patterns already match all of its parameters, such as"),
    ],
)  # fmt: skip
def test_a_setting_that_finds_no_parameters_is_refused(
    make: Callable[[], nn.Module], settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(SettingsError, match=words):
        rates_of(make(), **settings)


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ("{'bias': 1}", r"but is \"\{'bias': 1\}\" instead\. This is not JSON text\. It means"),
        ([], "must be a list of groups, such as"),
        ([{"pattern": "bias", "learning_rate": 1}], "Group 1 has the unknown key 'learning_rate'; it may have"),
        ([{"pattern": "a", "lr": 1}, {"lr": 1}], "Group 2 needs a 'pattern'"),
        ({"(": {"lr": 1}}, r"The pattern '\(' is no regular expression"),
        ({"bias": {}}, "The group of 'bias' sets neither 'lr' nor 'weight_decay'"),
        ({"bias": {"lr": 0}}, "The 'lr' of 'bias' must be a positive number"),
        ({"bias": {"weight_decay": "1"}}, "The 'weight_decay' of 'bias' must be a non-negative number"),
        ([1], "Group 1 is no dict"),
        ({"bias": 1}, "must be a list of groups"),
    ],
)
def test_groups_of_another_form_are_refused(groups: Any, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        parse_settings({"optimizer_groups": groups})


@pytest.mark.parametrize("decay", [0, 1.1, "0.9", True])
def test_the_decay_is_a_factor(decay: Any) -> None:
    with pytest.raises(SettingsError, match="`layerwise_lr_decay` must be a factor above 0 and up to 1"):
        parse_settings({"layerwise_lr_decay": decay})


def test_an_optimizer_with_groups_or_rates_of_its_own_contradicts_rates_by_part() -> None:
    model, rows = HEADS["sequence classification, BERT"].model(), HEADS["sequence classification, BERT"].rows()
    settings = {"layerwise_lr_decay": 0.9, "head_learning_rate": 0.1, "optimizer_groups": {"bias": {"lr": 1}}}
    for name, value in settings.items():
        arguments: dict[str, Any] = {"train_data": rows, "progress": False, name: value}
        with pytest.raises(SettingsError, match=f"`{name}` is given, but `optimizer` is an instance"):
            test_fine_tuning(model, optimizer=SGD(model.parameters(), lr=0.1), **arguments)
        with pytest.raises(SettingsError, match=r"`learning_rate` is 5e-05, but SGD was made with `lr=0\.1`"):
            test_fine_tuning(model, optimizer=lambda groups: SGD(groups, lr=0.1), **arguments)


def test_the_usual_groups_are_matrices_and_the_rest() -> None:
    model = HEADS["sequence classification, BERT"].model()
    one, two = parameter_groups(model, Recipe())
    assert {p.ndim for p in one.params} == {2}
    assert {p.ndim for p in two.params} == {1}
    assert (one.weight_decay, two.weight_decay) == (0.01, 0.0)
