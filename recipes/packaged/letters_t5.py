"""A small T5 with random weights that turns letters into phonemes, for training from scratch."""

from typing import Any

from .files import CACHE, complete_path
from .pronunciations import PHONEMES

LETTERS_T5 = CACHE / "letters-t5"
PATHS = (LETTERS_T5,)

_PAD, _END, _UNKNOWN = "<pad>", "</s>", "<unk>"
_LETTERS = "'abcdefghijklmnopqrstuvwxyz"


def prepare() -> None:
    """Prepare a T5 of one million parameters, and its tokenizer."""
    from transformers import T5Config, T5ForConditionalGeneration, set_seed

    tokenizer = letter_tokenizer()
    set_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=3,
        num_heads=4,
        dropout_rate=0.0,  # one epoch of these words does not overfit
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    with complete_path(LETTERS_T5) as half_done:
        T5ForConditionalGeneration(config).save_pretrained(half_done)
        tokenizer.save_pretrained(half_done)


def letter_tokenizer() -> Any:
    """Return a fast tokenizer with a token for each small letter and for each phoneme, which is in capitals."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens = [_PAD, _END, _UNKNOWN, *_LETTERS, *PHONEMES.split()]
    words = Tokenizer(models.WordLevel({token: n for n, token in enumerate(tokens)}, unk_token=_UNKNOWN))
    single = pre_tokenizers.Split(Regex("[^A-Z]"), behavior="isolated")
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), single])
    words.post_processor = processors.TemplateProcessing(
        single=f"$A {_END}", special_tokens=[(_END, tokens.index(_END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=_PAD, eos_token=_END, unk_token=_UNKNOWN, model_max_length=64
    )
