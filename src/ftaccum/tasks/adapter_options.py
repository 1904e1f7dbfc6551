"""The options of adapters on the command line."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from ..arguments import find_faults, read_settings
from ..errors import refuse
from ..fields import Flag, Fraction, Names, Positive, PositiveInt, setting

_adapters = partial(setting, group="adapters")


@dataclass
class AdapterOptions:
    """The options of adapters. Each of them turns `lora` on."""

    lora: Flag = _adapters(False, "train LoRA adapters instead of the model's weights; needs peft")
    lora_r: PositiveInt | None = _adapters(None, "rank of the adapters; lora_alpha stays 32 unless given; none: 16")
    lora_alpha: Positive | None = _adapters(
        None, "scale of the adapters; their output is multiplied by lora_alpha / lora_r; none: 32"
    )
    lora_dropout: Fraction | None = _adapters(None, "dropout before the adapters; none: 0")
    lora_targets: Names | None = _adapters(
        None,
        "layers that get adapters, by the ends of their names (q_proj,v_proj); none: all-linear, all linear layers",
    )
    lora_dora: Flag = _adapters(False, "DoRA: train magnitude and direction of the weights separately")
    modules_to_save: Names | None = _adapters(
        None, "modules to train in full, besides the head of a classifier (embed_tokens,lm_head)"
    )

    def lora_argument(self) -> dict[str, Any] | None:
        """Return the argument `lora` of `test_fine_tuning`: a dict, or None if no option asks for adapters.

        Raises:
            SettingsError: if an option breaks its rule.
        """
        options = read_settings(AdapterOptions, vars(self))
        refuse(find_faults(options))
        given: dict[str, Any] = {
            "r": options.lora_r,
            "lora_alpha": options.lora_alpha,
            "lora_dropout": options.lora_dropout,
            "target_modules": _targets(options.lora_targets),
            "use_dora": options.lora_dora or None,
            "modules_to_save": None if options.modules_to_save is None else list(options.modules_to_save),
        }
        given = {name: value for name, value in given.items() if value is not None}
        return given if options.lora or given else None


def _targets(names: Any) -> Any:
    return "all-linear" if names is not None and list(names) == ["all-linear"] else names
