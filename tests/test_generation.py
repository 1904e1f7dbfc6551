"""Generation at evaluation: token ids as from `model.generate` on each row alone, at any batch size."""

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    EvalPrediction,
)

from evaluated import VAL_ROWS, evaluated
from ftaccum import Accuracy, DataError, SettingsError
from ftaccum.training.generate_rows import generate_rows
from ftaccum.training.generator import Generator
from ftaccum.training.prompts import left_padded
from heads import HEADS, Row, all_in_float64, one_batch

CAUSAL, BART, T5 = "causal LM, Llama", "seq2seq, BART", "seq2seq, T5"
ENDS = list(range(3, 30))
OPTIONS = {"max_new_tokens": 7}
PROMPTS = {name: [row for row in VAL_ROWS[name] if name != CAUSAL or row["labels"][0] == -100] for name in VAL_ROWS}


class EnoughError(Exception):
    """Ends a run before it trains."""


def lively(name: str, model: Any = None) -> Any:
    """Return a model whose texts differ and end at different lengths."""
    model = model or HEADS[name].model()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(6)
    model.generation_config.eos_token_id = ENDS
    model.generation_config.pad_token_id = 0
    return model


def predicted(name: str, *, model: Any = None, **arguments: Any) -> EvalPrediction:
    """Return what `compute_metrics` gets before training."""
    got: list[EvalPrediction] = []

    def enough(prediction: EvalPrediction) -> dict[str, float]:
        got.append(prediction)
        raise EnoughError

    given = {"val_data": PROMPTS[name], "generation_kwargs": OPTIONS, "compute_metrics": enough, **arguments}
    with pytest.raises(EnoughError):
        evaluated(name, model=model or lively(name), verbosity="quiet", **given)
    return got[0]


def one_by_one(model: Any, rows: list[Row], **options: Any) -> list[list[int]]:
    """Return what plain Transformers generates for each row alone, up to its end token."""
    texts = []
    for row in rows:
        ids, n_given = row["input_ids"], 1
        if not model.config.is_encoder_decoder:
            n_labelled = sum(label != -100 for label in row.get("labels", ()))
            ids = ids[: len(ids) - n_labelled]
            n_given = len(ids)
        with torch.no_grad(), all_in_float64():
            out = (
                model.eval()
                .generate(
                    input_ids=torch.tensor([ids]),
                    attention_mask=torch.ones(1, len(ids)).long(),
                    **{**OPTIONS, **options},
                )[0]
                .tolist()
            )
        end = next((n + 1 for n in range(n_given, len(out)) if out[n] in ENDS), len(out))
        texts.append(out[0 if model.config.is_encoder_decoder else n_given : end])
    return texts


def unpadded(ids: np.ndarray) -> list[list[int]]:
    return [row[row != -100].tolist() for row in ids]


def in_batches(model: Any, rows: list[Row], size: int, seed: int = 0, **options: Any) -> list[list[int]]:
    """Return what is generated for rows in collated batches, as an evaluation does."""
    generator = Generator(model.eval(), {**OPTIONS, **options}, seed=seed)
    texts = []
    for start in range(0, len(rows), size):
        numbers = range(start, min(start + size, len(rows)))
        with torch.no_grad(), all_in_float64():
            found = generator(model, one_batch([rows[n] for n in numbers]), numbers, str)
        texts += unpadded(found.numpy())
        assert found.shape[1] == max(map(len, texts[start:]))
    return texts


@pytest.mark.parametrize("name", [CAUSAL, BART, T5])
def test_texts_are_what_the_model_generates_for_each_row_alone(name: str) -> None:
    model, rows = lively(name), PROMPTS[name]
    wanted = one_by_one(model, rows)
    assert all(in_batches(model, rows, size) == wanted for size in (1, 3, 64))
    assert len(set(map(len, wanted))) > 1
    assert len(set(map(tuple, wanted))) > 2


@pytest.mark.parametrize("name", [CAUSAL, BART])
def test_an_evaluation_measures_the_loss_and_generates_each_row_once_in_order(name: str) -> None:
    got: list[EvalPrediction] = []
    rows = PROMPTS[name]
    found = evaluated(
        name, model=lively(name), val_data=rows, generation_kwargs=OPTIONS, eval_batch_size=3, learning_rate=1e-12,
        compute_metrics=lambda prediction: got.append(prediction) or {}, verbosity="quiet",
    )  # fmt: skip
    wanted = one_by_one(lively(name), rows)
    assert unpadded(got[0].predictions) == wanted
    assert unpadded(got[0].label_ids) == [[n for n in row["labels"] if n != -100] for row in rows]
    assert got[0].predictions.shape == (len(rows), max(map(len, wanted)))
    with torch.no_grad(), all_in_float64():
        assert found.initial_loss == pytest.approx(lively(name).eval()(**one_batch(rows)).loss.item(), rel=1e-9)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (CAUSAL, {"num_beams": 3, "length_penalty": 2.0, "max_new_tokens": 5}),
        (CAUSAL, {"repetition_penalty": 3.0, "max_new_tokens": 9}),
        (CAUSAL, {"no_repeat_ngram_size": 2, "min_new_tokens": 4, "max_new_tokens": 9}),
        (BART, {"num_beams": 3, "max_length": 5}),
        (BART, {"encoder_repetition_penalty": 3.0}),
    ],
)
def test_beams_penalties_and_lengths_are_passed_on(name: str, options: dict[str, Any]) -> None:
    model, rows = lively(name), PROMPTS[name]
    wanted = one_by_one(model, rows, **options)
    assert in_batches(model, rows, 5, **options) == wanted != one_by_one(model, rows)


def test_a_model_that_samples_by_its_own_config_is_decoded_greedily_and_keeps_its_config() -> None:
    model = lively(CAUSAL)
    for name, value in {"do_sample": True, "temperature": 0.3, "top_p": 0.5, "max_length": 99, "num_beams": 2}.items():
        setattr(model.generation_config, name, value)
    own, before = model.generation_config, copy.deepcopy(model.generation_config)
    assert in_batches(model, PROMPTS[CAUSAL], 4) == one_by_one(lively(CAUSAL), PROMPTS[CAUSAL])
    assert model.generation_config is own
    assert vars(own) == vars(before)


def test_sampling_follows_the_seed_and_the_row_alone_and_draws_nothing_from_the_run() -> None:
    model, rows = lively(CAUSAL), PROMPTS[CAUSAL]
    states = random.getstate(), torch.get_rng_state()
    first, second, other = (
        in_batches(model, rows, size, seed=seed, do_sample=True, top_k=0) for size, seed in ((1, 1), (5, 1), (5, 2))
    )
    assert first == second != other
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])


def test_training_is_the_same_with_and_without_generation() -> None:
    model = lively(CAUSAL)
    model.model.layers[0].eval()
    runs = [
        evaluated(
            CAUSAL, model=model if options else lively(CAUSAL), val_data=PROMPTS[CAUSAL], compute_metrics=lambda _: {},
            audit=False, max_updates=2, evaluate_every=1, generation_kwargs=options, verbosity="quiet",
            preprocess_logits_for_metrics=None if options else lambda *given: given[1],
        )
        for options in (None, {**OPTIONS, "do_sample": True})
    ]  # fmt: skip
    assert runs[0].train_loss_history == runs[1].train_loss_history
    assert runs[0].val_loss_history == pytest.approx(runs[1].val_loss_history, rel=1e-12)  # other logits are computed
    assert not model.model.layers[0].training


def test_padding_on_the_left_is_avoided_for_models_that_count_positions_from_it() -> None:
    sizes: dict[str, Any] = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    bart = BartConfig(
        d_model=16, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=32, max_position_embeddings=64, **sizes
    )
    prompts = [row["input_ids"] for row in VAL_ROWS[T5]]
    rows = [{"input_ids": ids} for ids in prompts]
    hides = {}
    for name, make in {
        "llama": HEADS[CAUSAL].model,
        "bart": lambda: BartForCausalLM(bart).double(),
    }.items():
        torch.manual_seed(0)
        model = lively("", make())
        assert generate_rows(model, rows, OPTIONS, batch_size=5) == one_by_one(model, rows)
        generator = Generator(model, OPTIONS)
        generator.of_tokens(model, [torch.tensor(ids) for ids in prompts[:2]], [0, 1])
        hides[name] = generator._ignores_padding
    assert hides == {"llama": True, "bart": False}


def test_texts_end_where_the_models_positions_do_whatever_the_other_rows_are() -> None:
    rows = [{"input_ids": [9] * 60}, {"input_ids": [9, 8]}, {"input_ids": [7] * 64}]
    model = lively(CAUSAL)
    model.generation_config.eos_token_id = None
    texts = generate_rows(model, rows, {"max_new_tokens": 10})
    assert list(map(len, texts)) == [4, 10, 1]
    assert texts == [generate_rows(model, [row], {"max_new_tokens": 10})[0] for row in rows]


def test_ngrams_of_padding_are_not_counted() -> None:
    model = lively(CAUSAL)
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 2, "no_repeat_ngram_size": 2}
    rows = [{"input_ids": [52, other]} for other in range(30, 61, 3)] + [{"input_ids": [9] * 6}]
    texts = generate_rows(model, rows, options)
    assert texts == [generate_rows(model, [row], options)[0] for row in rows]
    assert [52, 52] in texts


def test_padding_repeats_a_token_that_a_repetition_penalty_counts_anyway() -> None:
    batch = left_padded([torch.tensor([9, 8]), torch.tensor([5, 6, 7, 5])])
    assert batch["input_ids"].tolist() == [[9, 9, 9, 8], [5, 6, 7, 5]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]


def test_a_start_token_that_is_an_end_token_does_not_end_a_text() -> None:
    model = lively(BART)
    model.generation_config.eos_token_id = model.config.decoder_start_token_id
    texts = generate_rows(model, PROMPTS[BART], OPTIONS)
    assert {text[0] for text in texts} == {model.config.decoder_start_token_id}
    assert {len(text) for text in texts} == {2, 8}


def test_equal_rows_are_sampled_differently() -> None:
    row = PROMPTS[CAUSAL][0]
    texts = generate_rows(lively(CAUSAL), [row] * 5, {**OPTIONS, "do_sample": True, "top_k": 0})
    assert len(set(map(tuple, texts))) > 1


def test_rows_of_one_process_are_sampled_as_among_all_rows() -> None:
    model, options = lively(BART), {**OPTIONS, "do_sample": True, "top_k": 0}
    rows = PROMPTS[BART]
    everyone = generate_rows(model, rows, options, batch_size=4)
    assert generate_rows(model, rows[1::2], options, numbers=range(1, len(rows), 2)) == everyone[1::2]
    assert len({tuple(text) for text in everyone}) > 3


def test_prompts_are_the_same_in_batches_padded_on_the_left() -> None:
    model, rows = lively(CAUSAL), PROMPTS[CAUSAL]
    with torch.no_grad(), all_in_float64():
        found = Generator(model, OPTIONS)(model.eval(), one_batch(rows, left=True), range(len(rows)), str)
    assert unpadded(found.numpy()) == one_by_one(model, rows)


def test_it_generates_with_adapters_and_checkpointing() -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        lively(CAUSAL), peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, r=2, lora_alpha=30)
    )
    wanted = one_by_one(adapted, PROMPTS[CAUSAL])
    found = predicted(CAUSAL, model=adapted, gradient_checkpointing=True)
    assert unpadded(found.predictions) == wanted != one_by_one(lively(CAUSAL), PROMPTS[CAUSAL])


def test_it_generates_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    model, dtypes = lively(CAUSAL).float(), []
    model.model.rotary_emb.double()  # older Transformers multiplies its buffer by positions, which are float64 in tests
    generate = model.generate

    def recorded(**given: Any) -> Any:
        up = model.model.layers[0].mlp.up_proj
        with up.register_forward_hook(lambda _, __, output: dtypes.append(output.dtype)):
            return generate(**given)

    monkeypatch.setattr(model, "generate", recorded)
    found = predicted(CAUSAL, model=model, mixed_precision="bf16").predictions
    assert found.shape[0] == len(PROMPTS[CAUSAL])
    assert set(dtypes) == {torch.bfloat16}


def test_memory_that_runs_out_while_generating_halves_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    model = lively(BART)
    generate = model.generate

    def generate_few(**given: Any) -> torch.Tensor:
        sizes.append(len(given["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("out of memory")
        return generate(**given)

    monkeypatch.setattr(model, "generate", generate_few)
    found = predicted(BART, model=model, eval_batch_size=7)
    assert unpadded(found.predictions) == one_by_one(lively(BART), PROMPTS[BART])
    assert max(sizes) > 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (3, "must be a dict of arguments of `model.generate`, or None, but is 3 instead"),
        ({"max_new_token": 3}, "has 'max_new_token', which is no setting of .*. Did you mean 'max_new_tokens'?"),
        ({"nonsense": 3}, "has 'nonsense', which is no setting of .*. Settings are, for example, max_new_tokens"),
        ({"max_new_tokens": 0}, "is not valid: `max_new_tokens` must be greater than 0, but is 0"),
        (
            {"max_new_tokens": 3, "temperature": 0.5},
            "is not valid: .*`do_sample` is (not set to|set not to set) `True`",
        ),
        ({"max_new_tokens": 65}, "sets 'max_new_tokens' to 65, but the model has only 64 positions. Lower it."),
        ({}, "must have 'max_new_tokens', because the model's generation config names no length"),
        ({"max_length": 9}, "sets 'max_length', which counts the tokens of the prompt .* Give 'max_new_tokens'"),
        ({"max_new_tokens": 3, "min_length": 9}, "sets 'min_length', .* Give 'min_new_tokens'"),
        (
            {"max_new_tokens": 3, "num_return_sequences": 2},
            "sets 'num_return_sequences' to 2, but metrics need one text",
        ),
        ({"max_new_tokens": 3, "output_scores": True}, "sets 'output_scores' to True, but metrics need one text a row"),
        ({"max_new_tokens": 3, "max_time": 2.0}, "sets 'max_time', so texts would depend on the machine"),
    ],
)
def test_unusable_options_are_refused_before_training(options: Any, sentence: str) -> None:
    with pytest.raises(SettingsError, match=f"`generation_kwargs` {sentence}"):
        evaluated(CAUSAL, compute_metrics=lambda _: {}, generation_kwargs=options)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"compute_metrics": None}, "`compute_metrics` is no function, so nothing uses the generated token ids"),
        ({"compute_metrics": Accuracy()}, "`compute_metrics` is no function"),
        ({"preprocess_logits_for_metrics": lambda *_: _}, "`preprocess_logits_for_metrics` changes logits. Leave one"),
        (
            {"model": BertForSequenceClassification(BertConfig(hidden_size=8, num_attention_heads=1, vocab_size=9))},
            "BertForSequenceClassification cannot generate. Load a model with a language-modeling head",
        ),
    ],
)
def test_arguments_that_contradict_generation_are_refused(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SettingsError, match=f"`generation_kwargs` is given, .*{sentence}"):
        evaluated(CAUSAL, **{"compute_metrics": lambda _: {}, "generation_kwargs": OPTIONS, **arguments})


def test_rows_that_a_text_cannot_be_generated_from_are_refused() -> None:
    whole = {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}
    with pytest.raises(DataError, match=r"there are none in 2\. Set the labels of its prompt to -100"):
        in_batches(lively(CAUSAL), [*PROMPTS[CAUSAL][:2], whole], 3)
    packed = [{**row, "position_ids": list(range(len(row["labels"])))} for row in PROMPTS[CAUSAL]]
    for rows, sentence in (
        (packed, r"but a batch also has \['position_ids'\]\. Leave these columns, or `generation_kwargs`, out\."),
        ([{"labels": row["labels"]} for row in packed], r"but a batch has no such tensors of shape \(rows, length\)"),
    ):
        with pytest.raises(SettingsError, match=sentence):
            in_batches(lively(CAUSAL), rows, 3)
    with pytest.raises(DataError, match="There are no tokens to generate from in row 1: its `input_ids` are missing"):
        generate_rows(lively(CAUSAL), [{"input_ids": [4]}, whole], OPTIONS)
