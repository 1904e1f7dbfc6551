"""Generates token ids for rows, the same for a row in whatever batch it is."""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from ..data.batches import take, trimmed
from ..data.tokenize import most_tokens
from ..errors import DataError, SettingsError
from ..objective.item_counts import IGNORE_INDEX, Batch, rows_of
from ..objective.model_forward import accepted_arguments, is_label
from ..runtime.adapters import base_of
from ..runtime.model_context import computes_in_16_bits, run_eagerly
from ..runtime.model_traits import is_encoder_decoder
from ..runtime.state_guards import preserve_rng, seed_all
from ..runtime.temporary_attribute import temporary_attribute
from .generation_config import end_tokens, generation_config
from .left_padding import ignores_left_padding
from .prompts import left_padded, prompt_of

# Options that look at the tokens of the prompt or the encoder, and so at their padding. A repetition penalty does, too,
# but `left_padded` pads with tokens that it penalizes anyway.
_LOOK_AT_PADDING = ("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty")
_WITHOUT_EFFECT = (None, 0, 1.0)
_OF_TEXT = {"input_ids", "attention_mask"}

NameOf = Callable[[int], str]


class Generator:
    """Generates token ids with the current weights of a model.

    The tokens of a row do not depend on the other rows of its batch: rows whose padding would matter, and rows that
    draw random numbers, are generated alone.
    """

    def __init__(
        self,
        model: Any,
        options: Mapping[str, Any],
        *,
        tokenizer: Any = None,
        pad_token_id: int | None = None,
        ignore_index: int = IGNORE_INDEX,
        seed: int = 0,
    ) -> None:
        """Args:
            model: the unwrapped model.
            options: arguments of `model.generate`, such as `max_new_tokens`. Without others, decoding is greedy.
            tokenizer: finds the `stop_strings`, if the options have any.
            ignore_index: the label of tokens that are no answer.
            seed: seeds the sampling of each row, together with its number.

        Raises:
            SettingsError: if the model cannot generate, or an option is invalid.
        """
        self.config = generation_config(model, options, pad_token_id)
        self._tokenizer, self._ignore_index, self._seed = tokenizer, ignore_index, seed
        self._limit = most_tokens(None, model.config, model)
        looks = any(getattr(self.config, name, None) not in _WITHOUT_EFFECT for name in _LOOK_AT_PADDING)
        self._alone = bool(self.config.do_sample) or looks
        self._ignores_padding: bool | None = None  # on the left; None: not measured yet

    def __call__(self, model: Any, batch: Batch, rows: Sequence[int], name_of: NameOf) -> Tensor:
        """Return the generated tokens of each row, with shape (rows, longest), padded with -100.

        A text ends with its end token, if it was generated. Texts of a decoder-only model begin after the prompt; those
        of an encoder-decoder begin with its start token, as `model.generate` returns them.

        Args:
            batch: a collated batch on the device of the model.
            rows: the numbers of its rows.
            name_of: returns the name of a row in messages.

        Raises:
            DataError: if a row of a decoder-only model has no prompt. It names the row.
            SettingsError: if the batch is not of a form that a text can be generated from.
        """
        if not isinstance(batch, Mapping):
            raise SettingsError(["`generation_kwargs` needs rows that are dicts of columns, such as 'input_ids'."])
        inputs = {name: value for name, value in batch.items() if not is_label(name)}
        accepted = accepted_arguments(model)
        inputs = {name: value for name, value in inputs.items() if accepted is None or name in accepted}
        if is_encoder_decoder(model):
            return self._from_encoder(model, inputs, rows)
        return self._continue_all(model, self._prompts(batch, inputs, rows, name_of), rows)

    def of_tokens(self, model: Any, starts: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
        """Return the tokens that the model generates from token ids: the prompts, or the inputs of the encoder.

        Args:
            starts: the token ids of each row, at least one, on the device of the model.
            rows: the numbers of the rows, which seed sampling.
        """
        if not is_encoder_decoder(model):
            return self._continue_all(model, starts, rows)
        pad = torch.nn.utils.rnn.pad_sequence
        masks = [torch.ones_like(start) for start in starts]
        ids_BL = pad(list(starts), batch_first=True, padding_value=self.config.pad_token_id or 0)
        return self._from_encoder(model, {"input_ids": ids_BL, "attention_mask": pad(masks, batch_first=True)}, rows)

    def _continue_all(self, model: Any, prompts: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
        """Return the tokens that a decoder-only model generates after each prompt, padded with -100."""
        alone = [self._alone or self._is_near_limit(prompt) for prompt in prompts]
        together = [n for n, is_alone in enumerate(alone) if not is_alone]
        if len(together) > 1 and not self._pads(model, prompts[together[0]]):
            together = []
        texts: dict[int, Tensor] = {}
        if together:
            found = self._continue(model, [prompts[n] for n in together], rows[together[0]])
            texts |= zip(together, found, strict=True)
        for n in (n for n in range(len(prompts)) if n not in texts):
            texts[n] = self._continue(model, [prompts[n]], rows[n])[0]
        return self._padded([self._ended(texts[n], 0) for n in range(len(prompts))])

    def _continue(self, model: Any, prompts: Sequence[Tensor], row: int) -> Tensor:
        batch, config = left_padded(prompts), self.config
        if self._is_near_limit(prompts[0]):
            assert self._limit is not None
            config = copy.deepcopy(config)
            config.max_new_tokens = max(1, self._limit - len(prompts[0]))
        return self._generate(model, batch, config, row)[:, batch["input_ids"].shape[1] :]

    def _from_encoder(self, model: Any, inputs: Mapping[str, Any], rows: Sequence[int]) -> Tensor:
        inputs = {name: value for name, value in inputs.items() if not name.startswith("decoder_")}
        if self._alone:
            singles = (trimmed(take(inputs, [n])) for n in range(len(rows)))
            texts = [self._generate(model, each, self.config, row)[0] for each, row in zip(singles, rows, strict=True)]
        else:
            texts = list(self._generate(model, inputs, self.config, rows[0]))
        return self._padded([self._ended(text, 1) for text in texts])

    def _generate(self, model: Any, inputs: Mapping[str, Any], config: GenerationConfig, row: int) -> Tensor:
        """Run `model.generate`, and leave the model's own config and the random generators unchanged."""
        more = {} if config.stop_strings is None else {"tokenizer": self._tokenizer}
        # `generate` takes what is None in its argument from the model's own config.
        with preserve_rng(), temporary_attribute(base_of(model), "generation_config", config), run_eagerly(model):
            if config.do_sample:
                seed_all(self._seed, row)
            # Processes with sharded weights wait for each other by other means.
            return model.generate(**inputs, generation_config=config, synced_gpus=False, **more)

    def _prompts(
        self, batch: Mapping[str, Any], inputs: Mapping[str, Any], rows: Sequence[int], name_of: NameOf
    ) -> list[Tensor]:
        """Return the prompts of a batch for a decoder-only model."""
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        others = sorted(inputs.keys() - _OF_TEXT)
        if not isinstance(ids, Tensor) or ids.ndim != 2 or others or (mask is not None and mask.shape != ids.shape):
            has = f"also has {others}" if others else "has no such tensors of shape (rows, length)"
            raise SettingsError(
                [
                    "`generation_kwargs` continues prompts of a decoder-only model, which it reads from 'input_ids', "
                    f"'attention_mask' and 'labels', but a batch {has}. Leave these columns, or `generation_kwargs`, "
                    "out."
                ]
            )
        labels = batch.get("labels")
        prompts = [
            prompt_of(
                ids[n],
                None if labels is None else labels[n],
                None if mask is None else mask[n],
                self._ignore_index,
            )
            for n in range(rows_of(batch))
        ]
        for row, prompt in zip(rows, prompts, strict=True):
            if not len(prompt):
                raise DataError(
                    f"`generation_kwargs` continues the tokens before the first label, but there are none in "
                    f"{name_of(row)}. Set the labels of its prompt to -100, or leave out `generation_kwargs`."
                )
        return prompts

    def _is_near_limit(self, prompt: Tensor) -> bool:
        """Return whether the model has too few positions for a prompt and the longest text after it."""
        return self._limit is not None and len(prompt) + (self.config.max_new_tokens or 0) > self._limit

    def _pads(self, model: Any, prompt: Tensor) -> bool:
        """Return whether prompts of unequal lengths can be padded. The first call measures it."""
        if self._ignores_padding is None:
            generate, in_16_bits = partial(self._generate, model, row=0), computes_in_16_bits(model)
            self._ignores_padding = ignores_left_padding(generate, prompt, self.config, in_16_bits=in_16_bits)
        return self._ignores_padding

    def _ended(self, text: Tensor, start: int) -> Tensor:
        """Return a text up to its first end token, or without the padding at its end.

        Args:
            start: the number of tokens at the start that are no part of the text. One of them may be an end token.
        """
        ids = text.tolist()
        ends = end_tokens(self.config)
        end = next((n + 1 for n in range(start, len(ids)) if ids[n] in ends), None)
        if end is None:
            end = len(ids)
            while end > start and ids[end - 1] == self.config.pad_token_id:
                end -= 1
        return text[:end]

    @staticmethod
    def _padded(texts: list[Tensor]) -> Tensor:
        padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=IGNORE_INDEX)
        return padded if padded.shape[1] else padded.new_full((len(texts), 1), IGNORE_INDEX)
