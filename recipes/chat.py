"""Fine-tune a chat model on conversations with LoRA. The loss is that of the answers alone.

    python recipes/chat.py --config recipes/chat.yaml                     # packaged model, some packaged conversations
    python recipes/chat.py --model HuggingFaceTB/SmolLM2-360M-Instruct --train_data trl-lib/Capybara --lora \\
        --max_length 2048 --batch_size 2 --effective_batch_size 64
    python recipes/chat.py --train_data train.jsonl --val_data val.jsonl --lora --save merged --output_dir outputs/mine
    accelerate launch --config_file recipes/two_cpu_processes.yaml recipes/chat.py --config recipes/chat.yaml

It takes any model that `AutoModelForCausalLM` loads and that has a chat template and a fast tokenizer, and files or Hub
data sets with a column of conversations, each a list of {"role": ..., "content": ...}. The saved model in
OUTPUT_DIR/model loads with `pipeline("text-generation", model=...)`: adapters with `peft` installed, and with
`--save merged` or without `--lora` a plain model.
"""

import math

from accelerate import PartialState

import ftaccum
import packaged


def main(options: ftaccum.ScriptOptions) -> ftaccum.Result:
    packaged.prepare(*options.data.values())
    loaded = ftaccum.load_task(**options.data)
    result = ftaccum.test_fine_tuning(**loaded.arguments(), **options.settings)
    if result.val_loss_history:
        before, after = math.exp(result.initial_loss), math.exp(result.val_loss_history[-1])
        PartialState().print(f"Held-out perplexity of the answers: {before:.1f} before, {after:.1f} after")
    return result


if __name__ == "__main__":
    ftaccum.run_script(
        main,
        __doc__,
        task="chat",
        model=packaged.SMOLLM,
        train_data=packaged.CHATS_TRAIN,
        val_data=packaged.CHATS_VAL,
    )
