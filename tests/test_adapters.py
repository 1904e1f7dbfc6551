"""LoRA adapters: `lora` trains them exactly, `save` and `ftaccum merge` write them, and bad input is refused."""

import copy
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, TrainerCallback

from chats import save_chat_model
from exactness import windows_of
from ftaccum import CheckpointError, SettingsError, load_task, test_fine_tuning, verify
from ftaccum.runtime.adapters import fully_trained_modules
from ftaccum.tasks.adapter_folder import load_with_base
from ftaccum.training.adapters import head_modules, task_type
from heads import HEADS, Row, all_in_float64, one_batch, relative_error
from interrupted import fine_tuned
from interrupted import model as interrupted_model
from invariance import difference, trained
from running_out import limited
from searching import quick
from task_files import save_rows

LLAMA, BERT = HEADS["causal LM, Llama"], HEADS["sequence classification, BERT"]
SIZES: dict[str, Any] = {"batch_size": 2, "effective_batch_size": 4}
RANDOM = {
    "r": 3,
    "init_lora_weights": False,
}  # otherwise half of the adapters' weights would start at 0, without gradient


def run(model: nn.Module, rows: list[Row], **arguments: Any) -> Any:
    defaults = {"n_epochs": 1, "validation_split": 0.0, "progress": False, "audit": False, "learning_rate": 1e-2}
    return test_fine_tuning(model, train_data=rows, **defaults | SIZES | arguments)


class Initial(TrainerCallback):
    """Keeps a copy of the model before its first update."""

    weights: dict[str, Tensor]

    def on_train_begin(self, *_: Any, model: Any, **__: Any) -> None:
        self.weights = {name: t.clone() for name, t in model.state_dict().items()}


@pytest.mark.parametrize("name", ["causal LM, Llama", "sequence classification, BERT"])
def test_training_adapters_is_exact(name: str) -> None:
    """Compare with PEFT and plain PyTorch, on one big batch per update."""
    head, initial, rate = HEADS[name], Initial(), 0.1
    arguments = {**SIZES, "gradient_clip_norm": None, "lr_scheduler": "constant", "callbacks": [initial]}
    with all_in_float64():
        result = run(
            head.model(), head.rows(), lora=RANDOM | {"lora_alpha": 5}, learning_rate=rate,
            optimizer=lambda groups: torch.optim.SGD(groups, weight_decay=0.0), **arguments,
        )  # fmt: skip
        modules = ["classifier"] if "BERT" in name else None
        config = peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", modules_to_save=modules)
        reference = peft.get_peft_model(head.model(), config)
        reference.load_state_dict(initial.weights)
        trainable = [p for p in reference.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trainable, lr=rate)
        for window in windows_of(head.rows(), **SIZES):
            optimizer.zero_grad()
            reference(**one_batch(window)).loss.backward()
            optimizer.step()
    changes, wanted = (
        {n: t - initial.weights[n] for n, t in m.state_dict().items()} for m in (result.model, reference)
    )
    assert result.optimizer_steps == 3
    assert relative_error(changes, wanted) < 1e-12
    assert sum(bool(change.any()) for change in changes.values()) == len(trainable)


def test_true_is_rank_16_on_all_linear_layers_with_the_head_trained_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    result = run(BERT.model(), BERT.rows(), lora=True, max_updates=1)
    (config,) = result.model.peft_config.values()
    assert (config.r, config.lora_alpha, config.lora_dropout, config.task_type) == (16, 32, 0.0, "SEQ_CLS")
    adapted = [name for name, module in result.model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    assert len(adapted) == 2 * 6 + 1  # six layers in each of two blocks, and the pooler; not the classifier
    assert "Adapters: LoRA, rank 16, alpha 32, dropout 0.0; trained in full: classifier; " in capsys.readouterr().out
    trainable, total = result.model.get_nb_trainable_parameters()
    by_hand = sum(p.numel() for n, p in result.model.named_parameters() if "lora_" in n or "modules_to_save" in n)
    assert trainable == by_hand < total


def test_a_head_that_peft_does_not_know_is_trained_in_full() -> None:
    result = run(HEADS["multiple choice, BERT"].model(), HEADS["multiple choice, BERT"].rows(), lora=True)
    assert fully_trained_modules(result.model) == ["classifier"]
    head = result.model.base_model.model.classifier
    assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)


def test_a_dict_or_a_configuration_of_peft_sets_the_adapters() -> None:
    with_dict = run(LLAMA.model(), LLAMA.rows(), lora={"r": 2, "target_modules": ["q_proj"]}, max_updates=1)
    (config,) = with_dict.model.peft_config.values()
    assert (config.r, config.lora_alpha, set(config.target_modules)) == (2, 32, {"q_proj"})
    given = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    before = copy.deepcopy(given)
    result = run(LLAMA.model(), LLAMA.rows(), lora=given, max_updates=1)
    assert [config.peft_type for config in result.model.peft_config.values()] == ["IA3"]
    assert given == before


@pytest.mark.parametrize(
    ("name", "task", "modules"),
    [
        ("causal LM, GPT-2", "CAUSAL_LM", []),
        ("seq2seq, T5", "SEQ_2_SEQ_LM", []),
        ("sequence classification, DistilBERT", "SEQ_CLS", ["pre_classifier", "classifier"]),
        ("sequence classification, Llama", "SEQ_CLS", ["score"]),
        ("token classification, Llama", "TOKEN_CLS", ["score"]),
        ("question answering, BERT", "QUESTION_ANS", ["qa_outputs"]),
        ("multiple choice, BERT", None, ["classifier"]),
        ("image classification, ViT", None, ["classifier"]),
        ("masked LM, BERT", None, []),
    ],
)
def test_task_and_head_follow_the_model(name: str, task: str | None, modules: list[str]) -> None:
    model = HEADS[name].model()
    assert (task_type(model), head_modules(model)) == (task, modules)


def test_the_seed_of_the_run_decides_the_first_adapters() -> None:
    weights = []
    for state, seed in ((0, 42), (1, 42), (0, 43)):
        torch.manual_seed(state)
        initial = Initial()
        run(BERT.model(), BERT.rows(), lora=True, max_updates=1, callbacks=[initial], random_seed=seed)
        weights.append(next(t for name, t in initial.weights.items() if "lora_A" in name))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


class Linear(nn.Module):
    """A model that is no `PreTrainedModel`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 4), nn.Linear(4, 2)

    def forward(self, points_BD: Tensor) -> Tensor:
        return self.second(self.first(points_BD).tanh())


def test_any_module_can_have_adapters(tmp_path: Path) -> None:
    points = [(torch.randn(2), torch.randint(2, ())) for _ in range(8)]
    arguments: dict[str, Any] = {"loss_fn": nn.CrossEntropyLoss(), "lora": RANDOM, "output_dir": str(tmp_path)}
    result = run(Linear(), points, save="merged", **arguments)
    loaded = Linear()
    loaded.load_state_dict(load_file(tmp_path / "model" / "model.safetensors"))
    x_BD = torch.randn(5, 2)
    torch.testing.assert_close(loaded(x_BD), result.model.eval()(x_BD))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"lora": "all"}, "`lora` must be None, True, a dict .* but is 'all' instead"),
        ({"lora": {"rank": 8}}, "`lora` has the key 'rank', which .* Did you mean `r`?"),
        ({"lora": {"lora_dropuot": 8}}, "`lora` has the key 'lora_dropuot', which .* Did you mean `lora_dropout`?"),
        (
            {"lora": {"target_modules": ["query", "q_proj"]}},
            "`lora` names 'q_proj' in `target_modules`, but .* query, ",
        ),
        (
            {"lora": {"target_modules": ".*q_proj"}},
            "`lora` has `target_modules` '.*q_proj', which matches no module of BertFor.* query, key, value, ",
        ),
        ({"lora": {"modules_to_save": ["lm_head"]}}, "`lora` names 'lm_head' in `modules_to_save`, but BertFor"),
        ({"lora": {"r": 0}}, "`lora` cannot be added to BertForSequenceClassification: .*`?r`? should be a positive"),
        ({"lora": {"lora_dropout": "much"}}, "`lora` (cannot be added|is)"),
        ({"lora": {"layers_to_transform": [0]}}, "`lora` is .*does not accept"),
        ({"save": "merged"}, "`save` is 'merged', but there are no adapters to merge"),
        ({"save": "model", "lora": True}, "`save` must be 'adapter', 'merged' or 'both', but is 'model'"),
    ],
)
def test_bad_input_is_refused_and_leaves_the_model_as_it_was(arguments: dict[str, Any], sentence: str) -> None:
    model = BERT.model()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(SettingsError, match=f"(?s)^{sentence}"):
        run(model, BERT.rows(), **arguments)
    assert [name for name, _ in model.named_modules()] == names
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "peft_config")


def test_a_model_with_adapters_gets_no_others() -> None:
    model = LLAMA.model()
    result = run(model, LLAMA.rows(), lora=True, max_updates=1)
    for adapted in (model, result.model):
        with pytest.raises(SettingsError, match=r"`lora` is given, but `model` has adapters already. Leave"):
            run(adapted, LLAMA.rows(), lora=True)


def test_peft_that_is_missing_or_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.metadata.version
    with monkeypatch.context() as patched:
        patched.setattr("ftaccum.training.adapters.version", lambda name: "0.17.1" if name == "peft" else found(name))
        with pytest.raises(SettingsError, match=r"^`lora` needs peft 0.18 or newer, but 0.17.1 is installed. Run `pip"):
            run(LLAMA.model(), LLAMA.rows(), lora=True)
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "peft" else find(name, *a))
    with pytest.raises(SettingsError, match=r"^`lora` needs the package `peft`, which is not installed. Install it"):
        run(LLAMA.model(), LLAMA.rows(), lora=True)


def test_verify_takes_the_adapters_out_again() -> None:
    model = BERT.model()
    before = {name: (id(p), p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    with all_in_float64():
        found = verify(model, BERT.rows(), lora={"r": 2}, n_splits=1, progress=False, **SIZES)
    assert found.exact
    assert any("trained in full: classifier" in note for note in found.notes)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, (identity, values, requires_grad) in before.items():
        assert (id(after[name]), after[name].requires_grad) == (identity, requires_grad)
        assert torch.equal(after[name], values)
    assert not hasattr(model, "peft_config")


def logits_of(model: nn.Module, rows: list[Row]) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(**one_batch(rows)).logits


def test_both_saves_a_plain_model_and_the_adapters_and_changes_no_bit_in_memory(tmp_path: Path) -> None:
    base, rows = BERT.model(), BERT.rows()
    base.config.id2label = {0: "bad", 1: "fine", 2: "good"}
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base", dtype=torch.float64)
    result = run(base, rows, lora=RANDOM, output_dir=str(tmp_path / "run"), save="both")
    in_memory = {name: t.clone() for name, t in result.model.state_dict().items()}
    assert not any((tmp_path / "run" / "model").glob("adapter*"))
    merged = type(base).from_pretrained(tmp_path / "run" / "model", dtype=torch.float64)
    wanted = logits_of(result.model, rows)
    torch.testing.assert_close(logits_of(merged, rows), wanted, rtol=1e-6, atol=1e-9)
    assert merged.config.id2label == {0: "bad", 1: "fine", 2: "good"}
    fresh = type(base).from_pretrained(tmp_path / "base", dtype=torch.float64)
    adapted = peft.PeftModel.from_pretrained(fresh, tmp_path / "run" / "adapter")
    torch.testing.assert_close(logits_of(adapted, rows), wanted, rtol=1e-6, atol=1e-9)
    result.save_model(tmp_path / "again", merge=True)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "run" / "model" / "model.safetensors"
    ).read_bytes()
    assert all(torch.equal(t, in_memory[name]) for name, t in result.model.state_dict().items())
    # A later run in the folder that saves only the adapters leaves none of an earlier run.
    run(result.model.unload(), rows, lora=RANDOM, output_dir=str(tmp_path / "run"), max_updates=1)
    assert (tmp_path / "run" / "model" / "adapter_config.json").exists()
    assert not (tmp_path / "run" / "adapter").exists()


def test_merging_a_model_without_adapters_is_refused(tmp_path: Path) -> None:
    result = run(BERT.model(), BERT.rows(), max_updates=1)
    with pytest.raises(SettingsError, match="`merge` is True, but the model has no adapters to merge"):
        result.save_model(tmp_path / "model", merge=True)
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": False},
        {"target_modules": ["q_proj", "lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
    ],
)
def test_tied_embeddings_are_merged_where_the_adapters_are(lora: dict[str, Any], tmp_path: Path) -> None:
    config = copy.deepcopy(LLAMA.config)
    config.tie_word_embeddings = True
    rows = LLAMA.rows()
    result = run(LlamaForCausalLM(config).double(), rows, lora=RANDOM | lora, output_dir=str(tmp_path), save="merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
    torch.testing.assert_close(logits_of(loaded, rows), logits_of(result.model, rows), rtol=1e-6, atol=1e-9)
    is_tied = loaded.config.tie_word_embeddings
    assert is_tied == ("modules_to_save" in lora)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")  # PEFT tells that it saves them
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # older versions of PEFT warn about it
@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_embeddings_of_added_tokens_are_trained(tied: bool, tmp_path: Path) -> None:
    model = save_chat_model(tmp_path / "model", tie_word_embeddings=tied)
    rows = save_rows(tmp_path / "rows.jsonl", [{"text": "<call> a"}] * 2)
    loaded = load_task("causal-lm", model, rows, validation_split=0.0, add_tokens="<call>", lora=True)
    before = loaded.model.get_input_embeddings().weight.detach().clone()
    settings = {"lora": True, "learning_rate": 0.1, "audit": False, "output_dir": tmp_path / "run"}
    result = test_fine_tuning(**loaded.arguments(), **settings, **{"n_epochs": 1, "progress": False})
    added = loaded.tokenizer.convert_tokens_to_ids("<call>")
    trained, saved = result.model, load_with_base(tmp_path / "run" / "model")
    for found in (trained, saved):
        weights = [p for p in found.get_input_embeddings().parameters() if p.requires_grad]
        assert (weights[0][added] - before[added]).abs().max() > 0.01
    ids = torch.tensor([[added, 3]])
    assert torch.equal(trained.eval()(input_ids=ids).logits, saved.eval()(input_ids=ids).logits)


def test_running_out_of_memory_changes_no_update_of_adapters() -> None:
    def scarce(model: Any) -> None:
        limited(model.base_model, 2)  # PEFT does not call the hooks of the model itself

    name = "sequence classification, BERT"
    in_plenty, retried = (trained(name, 6, lora=RANDOM, max_updates=2, audit=False, prepare=p) for p in (id, scarce))
    assert retried[1].out_of_memory > 0 == in_plenty[1].out_of_memory
    assert any("lora" in key for key in retried[0])
    assert difference(in_plenty, retried) < 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_audits_of_float32_adapters_allow_for_the_rounding_of_16_bit_weights(dtype: torch.dtype) -> None:
    """Such rounding would look like a model that keeps state."""
    result = run(LLAMA.model().to(dtype), LLAMA.rows(), lora=RANDOM, audit=2, n_epochs=2)
    assert {p.dtype for p in result.model.parameters() if p.requires_grad} == {torch.float32}
    assert len(result.audits) == 3


@pytest.mark.slow
def test_resuming_adapters_with_dropout_changes_no_bit(tmp_path: Path) -> None:
    lora = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.2}
    arguments: dict[str, Any] = {"train_data": BERT.rows(30), "n_epochs": 1, "audit": False}
    whole = fine_tuned(lora=lora, output_dir=str(tmp_path), checkpoint_every=2, keep_checkpoints=9, **arguments)
    there = tmp_path / "checkpoints" / "update-00000002"
    again = fine_tuned(lora=lora, resume=str(there), **arguments)
    assert whole.differences(again) == []
    with pytest.raises(CheckpointError, match=r"`lora` was .*lora_alpha=4.* but is .*lora_alpha=8"):
        fine_tuned(lora=lora | {"lora_alpha": 8}, resume=str(there), **arguments)
    fine_tuned(lora=lora | {"lora_alpha": 8}, resume=str(there), allow_changed=["lora"], **arguments)
    other: Any = interrupted_model()
    nn.init.normal_(other.classifier.weight)  # the head that the trained one replaces
    differences = whole.differences(fine_tuned(other, lora=lora, resume=str(there), **arguments))
    assert differences == ["classifier.original_module.weight"]


def test_a_search_adds_adapters_to_each_new_model() -> None:
    models: list[nn.Module] = []

    def make() -> nn.Module:
        models.append(Linear())
        return models[-1]

    study = quick(model_factory=make, lora={"r": 2}, pruner="none", n_trials=2, n_epochs=1)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE"]
    assert [any("lora" in name for name, _ in model.named_parameters()) for model in models] == [True, True]
    with pytest.raises(SettingsError, match="`lora` has the key 'rank'"):
        quick(model_factory=make, lora={"rank": 2})
    assert len(models) == 2


@pytest.mark.slow
@pytest.mark.processes
def test_two_processes_train_the_same_adapters(two_processes: Callable[..., str], tmp_path: Path) -> None:
    torch.save(trained("causal LM, Llama", 4, lora=RANDOM), tmp_path / "alone.pt")
    printed = two_processes("adapters_of_two.py", str(tmp_path / "alone.pt"), str(tmp_path / "run"))
    found = json.loads(next(line for line in printed.splitlines() if line.startswith("FOUND "))[6:])
    assert found["difference"] < 1e-9
    assert found["files"] == ["adapter", "model"]
