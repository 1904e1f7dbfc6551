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
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, EvalPrediction

import packaged
from ftaccum import (
    ModelAndDataOptions,
    ModelWrapper,
    Result,
    ScriptOptions,
    run_script,
    test_fine_tuning,
    tokenize_columns,
)


@dataclass
class Options(ModelAndDataOptions):
    """The columns of the pairs, and the loss."""

    prompt: str = field(default="prompt", metadata={"help": "column of the prompts"})
    chosen: str = field(default="chosen", metadata={"help": "column of the preferred answers"})
    rejected: str = field(default="rejected", metadata={"help": "column of the other answers"})
    beta: float = field(default=0.1, metadata={"help": "how strongly the loss keeps the model near the first one"})

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise ValueError(f"`beta` must be a number above 0, but is {self.beta} instead.")


class Preference(ModelWrapper):
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
        losses_NL = F.cross_entropy(logits_NLV[:, :-1].transpose(1, 2), labels_NL[:, 1:], reduction="none")
        return -losses_NL.sum(1)


def encode(rows: Dataset, tokenizer: Any, extra: Options, max_length: int | None) -> Dataset:
    """Return rows of tokens: of the prompt with each answer. The labels of the prompt's tokens are -100.

    `compute_metrics` needs labels of whole rows, too, which are the same in all rows.
    """

    def formatted(row: dict[str, str]) -> dict[str, str]:
        message = {"role": "user", "content": row[extra.prompt]}
        prompt = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        end = tokenizer.eos_token
        return {"prompt": prompt, "chosen": row[extra.chosen] + end, "rejected": row[extra.rejected] + end}

    def joined(row: dict[str, list[int]]) -> dict[str, Any]:
        found: dict[str, Any] = {"labels": 1}
        prompt = row["prompt_input_ids"]
        for side in ("chosen", "rejected"):
            answer = row[f"{side}_input_ids"]
            found[f"{side}_input_ids"] = (prompt + answer)[:max_length]
            found[f"{side}_attention_mask"] = [1] * len(found[f"{side}_input_ids"])
            found[f"{side}_labels"] = ([-100] * len(prompt) + answer)[:max_length]
        return found

    texts = Dataset.from_list([formatted(row) for row in rows])
    sides = {name: name for name in texts.column_names}
    tokens = tokenize_columns(texts, tokenizer, sides, max_length=max_length, add_special_tokens=False)
    return Dataset.from_list([joined(row) for row in tokens])


def preferences(found: EvalPrediction) -> dict[str, float]:
    """Return the share of pairs whose chosen answer has gained on the other one. A pair without a change is half."""
    margins = np.asarray(found.predictions)
    return {"accuracy": float(((margins > 0) + 0.5 * (margins == 0)).mean()), "margin": float(margins.mean())}


def main(options: ScriptOptions) -> Result:
    extra: Options = options.extra
    packaged.prepare(extra.model, extra.train_data, extra.val_data)
    rows = extra.read((extra.prompt, extra.chosen, extra.rejected))
    model, tokenizer = extra.load(AutoModelForCausalLM)
    encoded = {name: encode(each, tokenizer, extra, options.settings["max_length"]) for name, each in rows.items()}
    result = test_fine_tuning(
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
    run_script(
        main,
        __doc__,
        extra=Options,
        model=packaged.SMOLLM,
        train_data=packaged.PREFERENCES_TRAIN,
        val_data=packaged.PREFERENCES_VAL,
    )
