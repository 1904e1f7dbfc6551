"""Fine-tune an encoder-decoder, with a metric of your own on the texts that it generates.

    python recipes/seq2seq.py --config recipes/seq2seq.yaml       # spellings → phonemes, a small T5 from scratch
    python recipes/seq2seq.py --model google-t5/t5-small --train_data EdinburghNLP/xsum --source_prefix "summarize: " \\
        --batch_size 8 --effective_batch_size 128
    python recipes/seq2seq.py --model google-t5/t5-small --train_data train.csv --val_data val.csv \\
        --columns source=question,target=reply --output_dir outputs/mine
    accelerate launch --config_file recipes/two_cpu_processes.yaml recipes/seq2seq.py --config recipes/seq2seq.yaml

It takes any model that `AutoModelForSeq2SeqLM` loads, and files or Hub data sets with a source and a target column.
`ErrorRate` computes the word error rate of the generated texts. A phoneme is a word of a target, so that this is the
phoneme error rate of the packaged pronunciations. The saved model in OUTPUT_DIR/model loads with
`AutoModelForSeq2SeqLM.from_pretrained`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

import ftaccum
import packaged

if TYPE_CHECKING:
    from transformers import EvalPrediction


def main(options: ftaccum.ScriptOptions) -> ftaccum.Result:
    packaged.prepare(*options.data.values())
    loaded = ftaccum.load_task(**options.data)
    arguments = loaded.arguments()
    if "compute_metrics" in arguments:  # there are rows to evaluate
        arguments["compute_metrics"] = ErrorRate(loaded.tokenizer, arguments["compute_metrics"])
    return ftaccum.test_fine_tuning(**arguments, **options.settings)


class ErrorRate:
    """The word error rate, besides the task's own metrics.

    It is the number of words to insert, delete and replace in the generated texts until they equal the targets, divided
    by the number of words of the targets.
    """

    def __init__(self, tokenizer: Any, task_metrics: Any) -> None:
        self.tokenizer = tokenizer
        self.task_metrics = task_metrics

    def __call__(self, evaluated: "EvalPrediction") -> dict[str, float]:
        found, wanted = self._texts(evaluated.predictions), self._texts(evaluated.label_ids)
        errors = sum(distance(one, other) for one, other in zip(found, wanted, strict=True))
        return self.task_metrics(evaluated) | {"error_rate": errors / max(1, sum(map(len, wanted)))}

    def _texts(self, ids: np.ndarray) -> list[list[str]]:
        """Return the words of texts. The ids of shorter texts are filled up with -100."""
        ids = np.where(ids < 0, self.tokenizer.pad_token_id, ids)
        return [text.split() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]


def distance(found: Sequence[str], wanted: Sequence[str]) -> int:
    """Return the smallest number of words to insert, delete or replace that makes both equal (Levenshtein 1965)."""
    before = list(range(len(wanted) + 1))
    for n, word in enumerate(found, 1):
        row = [n]
        for m, other in enumerate(wanted):
            row.append(min(before[m] + (word != other), before[m + 1] + 1, row[m] + 1))
        before = row
    return before[-1]


if __name__ == "__main__":
    ftaccum.run_script(
        main,
        __doc__,
        task="seq2seq",
        model=packaged.LETTERS_T5,
        train_data=packaged.PRONUNCIATIONS_TRAIN,
        val_data=packaged.PRONUNCIATIONS_VAL,
    )
