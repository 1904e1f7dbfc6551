"""Fine-tune a chat model on preferences (DPO): for each prompt, an answer to prefer to another one.

    python recipes/preference.py --config recipes/preference.yaml      # packaged model and pairs of answers
    python recipes/preference.py --model Qwen/Qwen2.5-0.5B-Instruct --train_data Intel/orca_dpo_pairs \\
        --prompt question --max_length 1024 --batch_size 2 --effective_batch_size 64
    python recipes/preference.py --train_data pairs.csv --val_data held_out.csv --beta 0.3
    accelerate launch --config_file recipes/two_cpu_processes.yaml recipes/preference.py \\
        --config recipes/preference.yaml

With y the chosen and z the rejected answer to the prompt x, the loss is the mean over pairs of

    − log σ(β · [log π(y|x) − log ρ(y|x) − log π(z|x) + log ρ(z|x)])

where π is the model and ρ the same model before training (Rafailov et al., "Direct preference optimization", 2023,
arXiv:2305.18290). The recipe trains LoRA adapters, so ρ is the model with its adapters disabled: there is no second
model in memory, and ρ runs on the same device in the same precision. This takes one more forward pass without
gradients. A model with dropout of its own would draw it for ρ, too; most language models have none.

It takes any model that `AutoModelForCausalLM` loads and that has a chat template, and files or Hub data sets with three
columns of texts. The packaged pairs prefer answers that ask a question: both answers are real, but the preference is
constructed. The adapters in OUTPUT_DIR/model load with `pipeline("text-generation", model=...)` if peft is installed.
"""

import math
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM

import ftaccum
import packaged

if TYPE_CHECKING:
    from transformers import EvalPrediction


@dataclass
class Options(ftaccum.ModelAndDataOptions):
    """The columns of the pairs, and the loss."""

    prompt: str = field(default="prompt", metadata={"help": "column of the prompts"})
    chosen: str = field(default="chosen", metadata={"help": "column of the preferred answers"})
    rejected: str = field(default="rejected", metadata={"help": "column of the other answers"})
    beta: float = field(default=0.1, metadata={"help": "how strongly the loss keeps the model near the first one"})

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise ValueError(f"`beta` must be a number above 0, but is {self.beta} instead.")


class Preference(ftaccum.ModelWrapper):
    """The DPO loss of a model with adapters.

    Suffixes of shapes: N pairs, L tokens.
    """

    def __init__(self, model: Any, beta: float = 0.1) -> None:
        super().__init__(model)
        self.beta = beta

    def forward(
        self,
        chosen_input_ids: Tensor,
        chosen_attention_mask: Tensor,
        chosen_labels: Tensor,
        rejected_input_ids: Tensor,
        rejected_attention_mask: Tensor,
        rejected_labels: Tensor,
    ) -> dict[str, Tensor]:
        """Return the loss, and the margin of each pair: what the logistic function gets."""
        chosen = (chosen_input_ids, chosen_attention_mask, chosen_labels)
        rejected = (rejected_input_ids, rejected_attention_mask, rejected_labels)
        with torch.no_grad(), self.model.disable_adapter():
            reference_N = self.log_probability(*chosen) - self.log_probability(*rejected)
        margins_N = self.beta * (self.log_probability(*chosen) - self.log_probability(*rejected) - reference_N)
        return {"loss": -F.logsigmoid(margins_N).mean(), "margins": margins_N}

    def log_probability(self, ids_NL: Tensor, mask_NL: Tensor, labels_NL: Tensor) -> Tensor:
        """Return the log-probability of each answer, given its prompt."""
        logits_NLV = self.model(input_ids=ids_NL, attention_mask=mask_NL).logits
        logits_NLV = logits_NLV.to(torch.promote_types(logits_NLV.dtype, torch.float32))  # sums lose digits in 16 bits
        losses_NL = F.cross_entropy(logits_NLV[:, :-1].transpose(1, 2), labels_NL[:, 1:], reduction="none")
        return -losses_NL.sum(1)


def encode(
    rows: Dataset, tokenizer: Any, extra: Options, max_length: int | None, argument: str = "train_data"
) -> Dataset:
    """Return rows of tokens: of the prompt with each answer. The labels of the prompt's tokens are -100.

    An answer is never cut, because its log-probability would be that of another answer. If the longer answer of a pair
    leaves too little room for the prompt, the start of the prompt is cut off; if it leaves none, the pair is skipped.
    `compute_metrics` needs labels of whole rows, too, which are the same in all rows.

    Args:
        max_length: the most tokens of a prompt with its answer; None: as many as the tokenizer accepts.
        argument: the argument that the rows came from, for messages.

    Raises:
        DataError: if no pair is left.
    """
    limit = min(max_length or tokenizer.model_max_length, tokenizer.model_max_length)
    pairs = list(zip(*tokens_of(rows, tokenizer, extra), strict=True))
    rooms = [limit - max(len(chosen), len(rejected)) for _, chosen, rejected in pairs]
    skipped = [room < 1 for room in rooms]
    if all(skipped):
        raise ftaccum.DataError(
            f"Each pair of `{argument}` has an answer of {limit} tokens or more. Raise `max_length`."
        )
    cut = [0 < room < len(prompt) for room, (prompt, *_) in zip(rooms, pairs, strict=True)]
    warn_of_pairs(argument, cut, f"are longer than {limit} tokens. The start of their prompts is cut off.")
    warn_of_pairs(argument, skipped, f"have an answer of {limit} tokens or more and are skipped.")
    encoded = []
    for room, (prompt, *answers) in zip(rooms, pairs, strict=True):
        row: dict[str, Any] = {"labels": 1}
        for side, answer in zip(("chosen", "rejected"), answers, strict=True):
            row[f"{side}_input_ids"] = prompt[-room:] + answer
            row[f"{side}_attention_mask"] = [1] * len(row[f"{side}_input_ids"])
            row[f"{side}_labels"] = [-100] * len(prompt[-room:]) + answer
        if room > 0:
            encoded.append(row)
    return Dataset.from_list(encoded)


def tokens_of(rows: Dataset, tokenizer: Any, extra: Options) -> list[list[list[int]]]:
    """Return the token ids of the prompts, the chosen and the rejected answers, without a limit.

    Raises:
        SettingsError: if the tokenizer has no chat template or no end-of-text token.
    """
    if tokenizer.chat_template is None or tokenizer.eos_token is None:
        raise ftaccum.SettingsError(
            [f"The tokenizer of {extra.model!r} has no chat template or no end-of-text token. Choose a chat model."]
        )
    messages = [[{"role": "user", "content": prompt}] for prompt in rows[extra.prompt]]
    prompts = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    answers = [[text + tokenizer.eos_token for text in rows[column]] for column in (extra.chosen, extra.rejected)]
    return [tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] for texts in (prompts, *answers)]


def warn_of_pairs(argument: str, flagged: list[bool], problem: str) -> None:
    """Warn once, on the first process, with the number of flagged pairs."""
    if any(flagged) and PartialState().is_main_process:
        pairs = f"{sum(flagged)} of {len(flagged)} pairs (the first is row {flagged.index(True)})"
        warnings.warn(f"In `{argument}`, {pairs} {problem}", ftaccum.TextWarning, stacklevel=2)


def preferences(found: "EvalPrediction") -> dict[str, float]:
    """Return the share of pairs whose chosen answer has gained on the other one. A pair without a change is half."""
    margins = np.asarray(found.predictions)
    return {"accuracy": float(((margins > 0) + 0.5 * (margins == 0)).mean()), "margin": float(margins.mean())}


def main(options: ftaccum.ScriptOptions) -> ftaccum.Result:
    extra: Options = options.extra
    packaged.prepare(extra.model, extra.train_data, extra.val_data)
    rows = extra.read((extra.prompt, extra.chosen, extra.rejected))
    model, tokenizer = extra.load(AutoModelForCausalLM)
    length = options.settings["max_length"]
    encoded = {name: encode(each, tokenizer, extra, length, name) for name, each in rows.items()}
    result = ftaccum.test_fine_tuning(
        Preference(model, extra.beta),
        **encoded,
        tokenizer=tokenizer,
        compute_metrics=preferences,
        lora=extra.lora_argument() or True,
        **options.settings,
    )
    if result.metrics:
        accuracy, loss = result.metrics[-1]["accuracy"], result.final_loss
        PartialState().print(
            f"Held-out preferences: {accuracy:.1%}, loss {loss:.3f} ({result.initial_loss:.3f} before)"
        )
    return result


if __name__ == "__main__":
    ftaccum.run_script(
        main,
        __doc__,
        extra=Options,
        model=packaged.SMOLLM,
        train_data=packaged.PREFERENCES_TRAIN,
        val_data=packaged.PREFERENCES_VAL,
    )
