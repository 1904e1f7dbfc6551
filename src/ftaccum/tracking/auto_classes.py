"""The classes of Transformers and PEFT that load a saved model, and the tasks of these models."""

from dataclasses import dataclass

from transformers.models.auto import modeling_auto


@dataclass(frozen=True)
class AutoClass:
    """An auto class of Transformers.

    Attributes:
        name: its name.
        mapping: the name of Transformers' table of the classes that it loads.
        task: the task of these models on the hub; None if the hub decides, as between translation and summarization.
        peft_task: PEFT's name of the task, if PEFT can load adapters together with their base model.
    """

    name: str
    mapping: str
    task: str | None
    peft_task: str | None = None

    @property
    def with_adapters(self) -> str | None:
        """The name of the class of PEFT that loads adapters and their base model, if there is one."""
        return None if self.peft_task is None else self.name.replace("AutoModel", "AutoPeftModel")


# If a class is in several of Transformers' tables, the first one counts.
AUTO_CLASSES = tuple(
    AutoClass(f"AutoModelFor{name}", f"MODEL_FOR_{table}_MAPPING_NAMES", task, *peft_task)
    for name, table, task, *peft_task in (
        ("SequenceClassification", "SEQUENCE_CLASSIFICATION", "text-classification", "SEQ_CLS"),
        ("TokenClassification", "TOKEN_CLASSIFICATION", "token-classification", "TOKEN_CLS"),
        ("QuestionAnswering", "QUESTION_ANSWERING", "question-answering", "QUESTION_ANS"),
        ("MultipleChoice", "MULTIPLE_CHOICE", "multiple-choice"),
        ("Seq2SeqLM", "SEQ_TO_SEQ_CAUSAL_LM", None, "SEQ_2_SEQ_LM"),
        ("ImageTextToText", "IMAGE_TEXT_TO_TEXT", "image-text-to-text"),
        ("CausalLM", "CAUSAL_LM", "text-generation", "CAUSAL_LM"),
        ("MaskedLM", "MASKED_LM", "fill-mask"),
        ("ImageClassification", "IMAGE_CLASSIFICATION", "image-classification"),
        ("AudioClassification", "AUDIO_CLASSIFICATION", "audio-classification"),
        ("ObjectDetection", "OBJECT_DETECTION", "object-detection"),
        ("SemanticSegmentation", "SEMANTIC_SEGMENTATION", "image-segmentation"),
        ("SpeechSeq2Seq", "SPEECH_SEQ_2_SEQ", "automatic-speech-recognition"),
        ("CTC", "CTC", "automatic-speech-recognition"),
    )
)


def auto_class_named(name: str) -> AutoClass | None:
    """Return the auto class that loads models of the class with this name; None if there is none."""
    for auto_class in AUTO_CLASSES:
        loaded = getattr(modeling_auto, auto_class.mapping).values()
        if any(name == each or (isinstance(each, tuple) and name in each) for each in loaded):
            return auto_class
    return None


def auto_class_of_adapters(peft_task: str | None) -> AutoClass | None:
    """Return the auto class that loads the base model of adapters, given PEFT's name of their task; None if unknown."""
    return next((each for each in AUTO_CLASSES if each.peft_task is not None and each.peft_task == peft_task), None)
