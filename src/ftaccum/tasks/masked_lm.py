"""Prediction of masked tokens in plain text."""

from typing import Any

from transformers import AutoModelForMaskedLM, DataCollatorForLanguageModeling

from ..errors import refuse
from .plain_text import PlainText
from .task import EncodingOptions
from .token_accuracy import TokenAccuracy, accuracy_arguments


class MaskedLM(PlainText):
    """Prediction of masked tokens in plain text.

    Each batch masks other tokens. Of the tokens to predict, 80% are replaced by the mask token, 10% by a random token
    and 10% by none (Devlin et al. 2019, BERT, appendix A.1).
    """

    model_class = AutoModelForMaskedLM
    metrics = TokenAccuracy.NAMES

    def encode(self, rows: Any, argument: str, processor: Any, model: Any, options: EncodingOptions) -> Any:
        missing = getattr(processor, "mask_token", None) is None
        refuse(
            [
                f"`task` is 'masked-lm', but the tokenizer of {self.named.model!r} has no mask token. Choose a model "
                "such as BERT or RoBERTa, or the task 'causal-lm'."
            ]
            if missing
            else []
        )
        return super().encode(rows, argument, processor, model, options)

    def training_arguments(self, processor: Any, model: Any) -> dict[str, Any]:  # noqa: ARG002
        masks = DataCollatorForLanguageModeling(processor, mlm_probability=self.named.mlm_probability)
        return {"data_collator": masks}

    def evaluation_arguments(self, processor: Any, model: Any) -> dict[str, Any]:  # noqa: ARG002
        return accuracy_arguments(next_token=False)
