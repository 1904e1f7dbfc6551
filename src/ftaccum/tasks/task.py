"""What a task is: which columns it reads, which head it trains, how rows become tokens, and how it is evaluated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from datasets import Dataset
from transformers import AutoTokenizer

from ..errors import refuse
from ..settings.recipe import Recipe
from ..tracking.selection import Criterion
from .arguments import NamedArguments, faults_of_task_options
from .columns import Role, named_columns


@dataclass(frozen=True)
class EncodingOptions:
    """How rows become tokens.

    Attributes:
        text_columns: the setting of this name.
        max_length: the most tokens of a row; None: as many as the model and the tokenizer accept.
        n_processes: the number of processes that tokenize; with 1, this process does.
        add_eos_token: the setting of this name.
    """

    text_columns: Sequence[str] | None = None
    max_length: int | None = None
    n_processes: int = 1
    add_eos_token: bool = True


class Task:
    """A kind of task. Subclasses define what its rows, its head and its metrics are.

    Attributes:
        roles: what the task reads, by the names that `columns` uses.
        model_class: the auto class with its head.
        processor_class: the auto class that reads the inputs.
        metrics: the names of its metrics, which `metric_for_best` may name.
        targets: the roles that a prediction does without.
        reads_text: whether `test_fine_tuning` tokenizes its rows, and shows which columns it reads.
        streams: whether it can train on a stream of rows.
    """

    roles: ClassVar[Mapping[str, Role]] = {}
    model_class: ClassVar[Any] = None
    processor_class: ClassVar[Any] = AutoTokenizer
    metrics: tuple[str, ...] = ()
    reads_text: ClassVar[bool] = False
    streams: ClassVar[bool] = False
    targets: ClassVar[tuple[str, ...]] = ("label",)

    def __init__(self, named: NamedArguments) -> None:
        """Args:
            named: the options of the command line.

        Raises:
            SettingsError: if an option does not fit the task.
        """
        refuse(faults_of_task_options(named))
        self.named = named
        self.given = named_columns(named, self.roles)

    def check(self, recipe: Recipe) -> None:
        """Raise SettingsError if the settings of a run do not fit the task. Nothing is loaded yet."""
        if self.metrics:
            Criterion.of_settings(recipe.metric_for_best, recipe.greater_is_better).check(self.metrics)

    def read_config(self, config: Any) -> None:
        """Learn what the labels are from the config of a trained model, instead of from the training rows."""

    def head(self, train: Dataset) -> dict[str, Any]:  # noqa: ARG002
        """Return the arguments of `from_pretrained` that define the head, such as the names of the classes.

        Args:
            train: the training rows, with the columns named by their roles.

        Raises:
            DataError: if the labels do not fit the task.
        """
        return {}

    def encode(self, rows: Dataset, argument: str, processor: Any, model: Any, options: EncodingOptions) -> Dataset:  # noqa: ARG002
        """Return the rows as the model takes them, or as raw text for `test_fine_tuning`.

        Args:
            rows: rows with the columns named by their roles.
            argument: the argument that names the rows, for messages.

        Raises:
            DataError: if a row cannot be encoded. It names the row.
        """
        return rows

    def hold_out(self, rows: Dataset, encoded: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset | None]:  # noqa: ARG002
        """Return the encoded rows to train on, and those to validate on if the task holds them out; the run does else.

        A task whose `encode` makes several rows of one must hold out all of these together.

        Args:
            rows: the rows before `encode`.
            share: the share of the rows to hold out.
            seed: the seed that decides which.
        """
        return encoded, None

    def training_arguments(self, processor: Any, model: Any) -> dict[str, Any]:  # noqa: ARG002
        """Return further arguments of `test_fine_tuning`, such as `data_collator`."""
        return {}

    def evaluation_arguments(self, processor: Any, model: Any) -> dict[str, Any]:  # noqa: ARG002
        """Return the arguments of `test_fine_tuning` that compute metrics. They need validation rows."""
        return {}

    def encode_inputs(self, rows: Dataset, processor: Any, model: Any, options: EncodingOptions) -> Dataset:
        """Return rows to predict, without what is predicted, as the model takes them.

        Raises:
            DataError: as in `encode`.
        """
        return self.encode(rows, "data", processor, model, options)

    def prediction_arguments(self, processor: Any, model: Any, max_new_tokens: int | None) -> dict[str, Any]:  # noqa: ARG002
        """Return the arguments of `test_fine_tuning` that decide what is predicted.

        Args:
            max_new_tokens: the most tokens of a generated text; None for the task's own limit.
        """
        return self.evaluation_arguments(processor, model)

    def predicted_columns(self, predictions: Any, rows: Dataset, processor: Any, model: Any) -> dict[str, list[Any]]:
        """Return the columns that `ftaccum predict` writes, with one value for each row, in the order of the rows.

        Args:
            predictions: what `compute_metrics` gets as `predictions`, of all rows.
            rows: the rows, with the columns named by their roles, before `encode`.
        """
        raise NotImplementedError
