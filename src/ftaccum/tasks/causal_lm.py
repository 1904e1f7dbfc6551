"""Next-token prediction on plain text."""

from transformers import AutoModelForCausalLM

from .task import Task


class CausalLM(Task):
    """Next-token prediction on plain text, with an end-of-text token after each row."""

    reads_text = streams = True
    model_class = AutoModelForCausalLM
