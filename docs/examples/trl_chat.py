"""Fine-tune a chat model on the column `messages` of a JSON-lines file, using TRL's SFTTrainer."""

import argparse

from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--train_data", default="chats.jsonl")
parser.add_argument("--output_dir", default="outputs/trl")
parser.add_argument("--use_cpu", action="store_true")
options = parser.parse_args()

arguments = SFTConfig(
    output_dir=options.output_dir,
    chat_template_path="chatml.jinja",
    assistant_only_loss=True,
    max_length=1024,
    num_train_epochs=1,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=8,
    learning_rate=2e-5,
    lr_scheduler_type="cosine",
    warmup_steps=0.1,
    bf16=True,
    use_cpu=options.use_cpu,
    report_to="none",
)
rows = load_dataset("json", data_files=options.train_data, split="train")
trainer = SFTTrainer(options.model, args=arguments, train_dataset=rows)
trainer.train()
trainer.save_model()
