"""The options that name a model, its data and the task. This module does not load torch."""

from dataclasses import dataclass, fields
from functools import partial
from typing import Annotated

from ..fields import Flag, Names, PositiveInt, Rule, Text, one_of, setting
from .reading.options import FileOptions, ReadingOptions

# What `--task` accepts.
TASKS = {
    "text-classification": "ftaccum.tasks.text_classification:TextClassification",
    "token-classification": "ftaccum.tasks.token_classification:TokenClassification",
    "image-classification": "ftaccum.tasks.image_classification:ImageClassification",
    "multiple-choice": "ftaccum.tasks.multiple_choice:MultipleChoice",
    "question-answering": "ftaccum.tasks.question_answering:QuestionAnswering",
    "chat": "ftaccum.tasks.chat:Chat",
    "causal-lm": "ftaccum.tasks.causal_lm:CausalLM",
    "masked-lm": "ftaccum.tasks.masked_lm:MaskedLM",
    "seq2seq": "ftaccum.tasks.seq2seq:Seq2Seq",
}

# The settings of a run that loading a task depends on. `test_fine_tuning` needs those of raw text, too.
TEXT_SETTINGS = ("text_columns", "max_length", "add_eos_token", "preprocessing_num_workers")
LOADING_SETTINGS = (*TEXT_SETTINGS, "random_seed", "validation_split", "lora")

# The tasks that an option belongs to; other options belong to all tasks.
TASK_OPTIONS = {
    "packing": ("causal-lm",),
    "chat_template": ("chat",),
    "mlm_probability": ("masked-lm",),
    "doc_stride": ("question-answering",),
    "problem_type": ("text-classification", "image-classification"),
    "source_prefix": ("seq2seq",),
    "max_target_length": ("seq2seq",),
}

Dtype = Annotated[str, one_of("auto", "float32", "bfloat16", "float16")]

ProblemType = Annotated[str, one_of("single_label_classification", "multi_label_classification", "regression")]

Share = Annotated[
    float,
    Rule(lambda v: isinstance(v, int | float) and not isinstance(v, bool) and 0 < v <= 1, "a number above 0, up to 1"),
]

_data = partial(setting, group="model and data")


@dataclass
class ModelArguments:
    """The options for loading a model."""

    model: Text = _data("", "folder or hub name of the model (required)")
    tokenizer: Text | None = _data(None, "folder or hub name of the tokenizer; none: that of the model")
    attn_implementation: Text | None = _data(
        None, "attention of the model: eager, sdpa, flash_attention_2, …; none: Transformers' choice"
    )
    revision: Text | None = _data(None, "branch, tag or commit of the model on the hub; none: its main branch")
    trust_remote_code: Flag = _data(False, "run Python code that comes with the model; only for authors you trust")
    add_tokens: Names = _data((), "tokens to add to the tokenizer and the model's embeddings, such as <call>,</call>")
    freeze: Names = _data((), "patterns of weights or modules that are not trained, such as *.embeddings,*.layer.[0-3]")


@dataclass
class WeightArguments:
    """The options for the weights of a model."""

    dtype: Dtype = _data("auto", "type of the weights: float32, bfloat16, float16, or auto: as in the checkpoint")
    load_in_4bit: Flag = _data(False, "load linear layers with 4 bits through bitsandbytes; needs lora")
    load_in_8bit: Flag = _data(False, "load linear layers with 8 bits through bitsandbytes; needs lora")


@dataclass
class TrainDataArguments:
    """The options that name training rows."""

    train_data: Text = _data(
        "", "CSV, JSON or Parquet file, folder or hub name[:config]; several separated by commas (required)", "--data"
    )
    max_train_rows: PositiveInt | None = _data(None, "train on at most this many of the first rows; none: on all rows")


@dataclass
class ValDataArguments:
    """The options that name validation rows."""

    val_data: Text | None = _data(None, "validation data, as for train_data; none: validation_split holds out rows")
    max_val_rows: PositiveInt | None = _data(
        None, "validate on at most this many of the first rows of val_data; none: on all rows"
    )


@dataclass
class LanguageModelOptions:
    """Options of the tasks causal-lm, chat, masked-lm and seq2seq."""

    packing: Flag = _data(False, "causal-lm: join the texts and split them into rows of max_length tokens")
    chat_template: Text | None = _data(None, "chat: file of a Jinja chat template; none: that of the tokenizer")
    mlm_probability: Share = _data(0.15, "masked-lm: share of the tokens to predict")
    source_prefix: Text | None = _data(None, "seq2seq: text to put before each source, such as 'summarize: '")
    max_target_length: PositiveInt | None = _data(
        None, "seq2seq: most tokens of a target, and of a generated text; none: 128, or the positions of the model"
    )


@dataclass
class NamedArguments(TrainDataArguments, ModelArguments, LanguageModelOptions, ReadingOptions):
    """A model, and data to train it on."""

    task: Text = _data("text-classification", f"kind of task: {', '.join(TASKS)}")
    columns: Names = _data((), "columns of the data by role, such as label=sentiment; `docs/tasks.md` lists the roles")
    label_column: Text | None = _data(None, "column of the labels; short for columns label=NAME")
    problem_type: ProblemType | None = _data(
        None,
        "kind of labels of text-classification and image-classification: single_label_classification, "
        "multi_label_classification or regression; none: recognized by their type",
    )
    doc_stride: PositiveInt | None = _data(
        None,
        "question-answering: tokens that two windows of a long context share; none: 128, or a quarter of the most "
        "tokens of a row if that is less",
    )


@dataclass
class TrainedArguments(FileOptions):
    """Data to evaluate a trained model on."""

    data: Text = _data("", "CSV, JSON or Parquet file, saved folder or hub name[:config] (required)")
    task: Text | None = _data(None, f"kind of task: {', '.join(TASKS)}; none: that of the run or model")
    columns: Names | None = _data(None, "columns of the data by role, such as label=sentiment; none: those of the run")
    label_column: Text | None = _data(None, "column of the labels; short for columns label=NAME")
    max_new_tokens: PositiveInt | None = _data(
        None, "predict: most tokens of a generated text; none: 256, or for seq2seq max_target_length"
    )
    max_rows: PositiveInt | None = _data(None, "use only this many of the first rows; none: all rows")


@dataclass
class TrainArguments(ValDataArguments, WeightArguments, NamedArguments):
    """A model, and data to train and validate it on."""


def faults_of_val_data(named: ValDataArguments) -> list[str]:
    """Return a sentence if there is a limit on validation rows, but no `val_data`."""
    if named.val_data is not None or named.max_val_rows is None:
        return []
    return [
        f"`max_val_rows` is {named.max_val_rows}, but `val_data` is None. Give `val_data`, or set `max_val_rows` to "
        "None. `validation_split` is the share of the training rows that is held out."
    ]


def faults_of_task_options(named: NamedArguments) -> list[str]:
    """Return a sentence for each option that belongs to other tasks than the chosen one."""
    given = [f.name for f in fields(named) if f.name in TASK_OPTIONS and getattr(named, f.name) != f.default]
    return [
        f"`{name}` is an option of the task {' and '.join(map(repr, TASK_OPTIONS[name]))}, but `task` is "
        f"{named.task!r}. Leave it out, or choose another task."
        for name in given
        if named.task not in TASK_OPTIONS[name]
    ]
