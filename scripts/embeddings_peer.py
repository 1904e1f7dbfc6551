"""Train the task of scripts/compare_embeddings.py with sentence-transformers, in a Python that has no ftaccum.

.venv-peers/bin/python scripts/embeddings_peer.py TASK.json RESULT.json
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from torch.utils.data import SequentialSampler

from embeddings_task import Clock, Outcome, Task, memory, without_dropout


class Observed(SentenceTransformerTrainer):
    """A trainer that keeps the loss of each update, which logs would round."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self.losses: list[float] = []

    def compute_loss(self, *given: Any, **options: Any) -> Any:
        loss = super().compute_loss(*given, **options)
        self.losses.append((loss[0] if isinstance(loss, tuple) else loss).item())
        return loss


def in_order(dataset: Any, batch_size: int, drop_last: bool, **_: Any) -> DefaultBatchSampler:
    return DefaultBatchSampler(SequentialSampler(dataset), batch_size=batch_size, drop_last=drop_last)


def train(task: Task) -> Outcome:
    model = SentenceTransformer(task.model, device="cpu")
    model.max_seq_length = task.max_length
    without_dropout(model)
    loss = CachedMultipleNegativesRankingLoss(model, scale=task.scale, mini_batch_size=task.batch_size)
    anchors, positives = zip(*(task.train[n] for window in task.windows for n in window), strict=True)
    rows = Dataset.from_dict({"anchor": list(anchors), "positive": list(positives)})
    clock, before = Clock(), memory().now
    with TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            folder, num_train_epochs=1, per_device_train_batch_size=task.effective_batch_size,
            learning_rate=task.learning_rate, warmup_steps=task.warmup_steps, weight_decay=task.weight_decay,
            max_grad_norm=task.clip, optim="adamw_torch_fused", seed=task.seed, use_cpu=True, save_strategy="no",
            logging_strategy="no", report_to=[], disable_tqdm=True, batch_sampler=in_order,
        )  # fmt: skip
        trainer = Observed(model, arguments, train_dataset=rows, loss=loss, callbacks=[clock])
        trainer.train()
    peak = memory().peak
    model.eval()
    held_out = [
        model.encode([pair[side] for pair in task.val], batch_size=task.batch_size, convert_to_numpy=True)
        for side in (0, 1)
    ]
    return Outcome(
        trainer.losses, clock.seconds(), clock.cpu_seconds(), before, peak, [side.tolist() for side in held_out]
    )


if __name__ == "__main__":
    task = Task(**json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(vars(train(task))))
