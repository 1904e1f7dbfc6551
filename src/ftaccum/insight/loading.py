"""The code on a model card that loads the saved model."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from .markdown import code
from .run_metadata import Named

# Inputs of the pipelines that read text. Other tasks have no pipeline, or none for a text.
_INPUTS = {
    "text-classification": '"Replace this with your text."',
    "token-classification": '"Replace this with your text."',
    "text-generation": '"Replace this with your text", max_new_tokens=20',
    "fill-mask": 'f"Replace this with your {pipe.tokenizer.mask_token}."',
}
_CHAT = '[{"role": "user", "content": "Replace this with your question."}], max_new_tokens=20'
_PIPELINES = {*_INPUTS, "image-classification"}
_LISTED = 20  # labels; more than these are left to the configuration


@dataclass(frozen=True)
class SavedModel:
    """What a folder contains, for the code that loads it.

    Attributes:
        kind: "transformers" for a model of Transformers, "peft" for adapters, "own" for another class that has
            `from_pretrained`, "torch" for weights only.
        class_name: the class of the model; for adapters, of their base model.
        loader: the class of Transformers that loads it; None if that is a class of the user.
        task: the task on the hub, such as "text-classification"; None if unknown.
        processor: the class of Transformers that loads the tokenizer or image processor; None if there is none.
        has_chat_template: whether the tokenizer has a chat template.
        classes: the names of the labels by number; empty if the model is no classifier, or if nobody has named them.
        labels: the same, if the head of the base model may have others.
        base: the base model of adapters, if it has a name.
        adapter: the kind of adapters, such as "lora"; empty if there are none.
        auto_peft: the class of PEFT that loads adapters and base model, if there is one.
    """

    kind: str
    class_name: str
    loader: str | None = None
    task: str | None = None
    processor: str | None = None
    has_chat_template: bool = False
    labels: Mapping[int, str] | None = None
    classes: Mapping[int, str] = field(default_factory=dict)
    base: Named | None = None
    adapter: str = ""
    auto_peft: str | None = None

    @property
    def library(self) -> str | None:
        """The library on the hub that loads the folder, if there is one."""
        return self.kind if self.kind in ("transformers", "peft") else None


def loading_section(saved: SavedModel, place: str, *, is_repository: bool) -> str:
    """Return the section that shows how to load the model.

    Args:
        place: the name of the folder, or of the repository.
        is_repository: whether it is a repository on the hub.
    """
    if saved.kind == "torch":
        return _of_weights(saved, place, is_repository=is_repository)
    stands = f"`{place}` stands for this folder: give its path, or the name of its repository on the hub."
    lead = "" if is_repository else stands
    if saved.kind == "peft":
        lead = f"These are adapters. {_of_base(saved.base)} {lead}".rstrip()
        code = _adapters(saved, place)
    else:
        code = _plain(saved, place)
    return "\n\n".join(part for part in (lead, _block(code)) if part)


def _plain(saved: SavedModel, place: str) -> list[str]:
    if saved.task in _PIPELINES and saved.loader is not None and saved.processor is not None:
        return _pipeline(saved, place)
    return [
        *_imports(saved.loader, saved.processor),
        *_own_class(saved),
        "",
        f'model = {saved.loader or saved.class_name}.from_pretrained("{place}")',
        *_processor(saved, place),
    ]


def _pipeline(saved: SavedModel, place: str) -> list[str]:
    given = _CHAT if saved.has_chat_template else _INPUTS.get(saved.task or "")
    call = [f"print(pipe({given}))"] if given else []
    return ["from transformers import pipeline", "", f'pipe = pipeline("{saved.task}", model="{place}")', *call]


def _adapters(saved: SavedModel, place: str) -> list[str]:
    labels = "".join(f", {name}" for name in _label_arguments(saved.labels))
    if saved.auto_peft is not None and saved.base is not None and saved.base.on_hub:
        return [
            f"from peft import {saved.auto_peft}",
            *_imports(saved.processor),
            "",
            f'model = {saved.auto_peft}.from_pretrained("{place}"{labels})',
            *_processor(saved, place),
        ]
    given = [] if saved.base is None else [_base(saved, saved.base, labels)]
    return [
        "from peft import PeftModel",
        *_imports(saved.loader if saved.base else None, saved.processor),
        *(_own_class(saved) if saved.base else []),
        "",
        *given,
        f'model = PeftModel.from_pretrained(base, "{place}")',
        *_processor(saved, place),
    ]


def _base(saved: SavedModel, base: Named, labels: str) -> str:
    return f'base = {saved.loader or saved.class_name}.from_pretrained("{base.name}"{labels})'


def _of_base(base: Named | None) -> str:
    if base is None:
        return "Build the base model `base` as for training, and load them into it."
    if base.on_hub:
        return f"They are loaded with their base model, {code(base.name)}."
    return f"They need their base model, the folder {code(base.name)}: give its path."


def _label_arguments(labels: Mapping[int, str] | None) -> list[str]:
    """Return the arguments that give the base model a head with the labels of the adapters."""
    if not labels:
        return []
    generic = all(name == f"LABEL_{number}" for number, name in labels.items())
    given = f"num_labels={len(labels)}" if generic or len(labels) > _LISTED else f"id2label={dict(labels)!r}"
    return [given, "ignore_mismatched_sizes=True"]  # the adapters have the head


def _imports(*names: str | None) -> list[str]:
    """Return the line that imports from Transformers, if any name is known."""
    known = sorted(name for name in names if name)
    return [f"from transformers import {', '.join(known)}"] if known else []


def _own_class(saved: SavedModel) -> list[str]:
    """Return a comment on a class that only the user has."""
    if saved.loader is not None:
        return []
    return [f"# `{saved.class_name}` is the class of the model in the program that trained it."]


def _processor(saved: SavedModel, place: str) -> list[str]:
    if saved.processor is None:
        return []
    variable = "tokenizer" if saved.processor == "AutoTokenizer" else "processor"
    return [f'{variable} = {saved.processor}.from_pretrained("{place}")']


def _of_weights(saved: SavedModel, place: str, *, is_repository: bool) -> str:
    lead = (
        f"The folder has the weights of the module `{saved.class_name}`. Build `model` as for training, and load them."
    )
    if not is_repository:
        code = ["from safetensors.torch import load_model", "", f'load_model(model, "{place}/model.safetensors")']
        return f"{lead} `{place}` stands for this folder.\n\n{_block(code)}"
    code = [
        "from huggingface_hub import hf_hub_download",
        "from safetensors.torch import load_model",
        "",
        f'load_model(model, hf_hub_download("{place}", "model.safetensors"))',
    ]
    return f"{lead}\n\n{_block(code)}"


def _block(lines: list[str]) -> str:
    return "\n".join(["```python", *lines, "```"])
