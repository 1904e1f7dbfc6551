"""Measure what pruning gains in a search: the best validation loss against the rows trained on.

    OMP_NUM_THREADS=1 python scripts/bench_search.py                     # 3 seeds; an hour or two on one CPU thread
    python scripts/bench_search.py --seeds 0 --rows 512 --trials 4       # a quick look

The quickstart's task: MiniLM with a new head on film reviews, bf16 autocast, one epoch; k from 1, 2, 4, 8 at a physical
batch of 8, learning rate from 1e-5 to 1e-3. All contenders get the same rows and budget, `--trials` full trials:

- random: random proposals, no pruning;
- pruned: `ftaccum.search` with its defaults, which runs trials until the budget of rows is used up;
- trainer: `Trainer.hyperparameter_search` with its defaults (Optuna's TPE). It evaluates after each epoch, so in a run
  of one epoch it prunes only trials that are already complete.

For each seed, the table has the final loss of random search, and the share of its rows after which the others had
finished an equally good trial. Studies are kept in `--output_dir`; existing trials are not run again.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import optuna
from datasets import Dataset
from optuna import Study
from optuna.trial import FrozenTrial, TrialState
from transformers import Trainer, TrainingArguments

from ftaccum import search
from measuring import DEVICE, machine
from workloads import Workload, movies

BATCH, STEPS, RATES, WARMUP = 8, (1, 2, 4, 8), (1e-5, 1e-3), 0.1
Curve = list[tuple[int, float]]  # rows trained on so far, loss of the trial that finished then
_NEVER = float("inf")


def ours(options: argparse.Namespace, seed: int, task: "Task", name: str, **how: Any) -> Curve:
    folder = Path(options.output_dir) / f"{name}-{seed}"
    budget = options.trials * len(task.train)
    study = None
    n_trials = options.trials
    while study is None or (how.get("pruner") != "none" and rows_of(study) < budget):
        study = search(
            task.new_model, None, task.train, task.val, batch_size=BATCH, accumulation_steps=STEPS, learning_rate=RATES,
            n_epochs=1, warmup_ratio=WARMUP, use_amp=True, seed=seed, n_trials=n_trials,
            planner_costs=(64, 1, 0.0005), output_dir=str(folder), progress=options.progress, **how,
        )  # fmt: skip
        n_trials += 4
    return curve_of(study.get_trials(), lambda trial: trial.user_attrs.get("rows", 0))


def trainers(options: argparse.Namespace, seed: int, task: "Task", name: str) -> Curve:
    storage = f"sqlite:///{(Path(options.output_dir) / f'{name}-{seed}.db').resolve()}"
    study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
    left = options.trials - sum(trial.state.is_finished() for trial in study.get_trials())
    if left > 0:
        arguments = TrainingArguments(
            str(Path(options.output_dir) / f"{name}-{seed}"), num_train_epochs=1, per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=32, eval_strategy="epoch", warmup_steps=WARMUP, weight_decay=0.01, bf16=True,
            seed=seed, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=DEVICE.type == "cpu",
        )  # fmt: skip
        trainer = Trainer(
            args=arguments, train_dataset=task.train, eval_dataset=task.val, data_collator=task.collate,
            model_init=task.new_model,
        )  # fmt: skip
        trainer.hyperparameter_search(
            lambda trial: {
                "gradient_accumulation_steps": trial.suggest_categorical("gradient_accumulation_steps", STEPS),
                "learning_rate": trial.suggest_float("learning_rate", *RATES, log=True),
            },
            compute_objective=lambda metrics: metrics["eval_loss"],
            n_trials=left, direction="minimize", backend="optuna", storage=storage, study_name=name,
            load_if_exists=True, sampler=optuna.samplers.TPESampler(seed=seed),
        )  # fmt: skip
    return curve_of(study.get_trials(), lambda _: len(task.train))


CONTENDERS: dict[str, Callable[..., Curve]] = {
    "random": lambda *job: ours(*job, sampler="random", pruner="none"),
    "pruned": ours,
    "trainer": trainers,
}


class Task:
    """Training and validation rows in an order that depends on the seed, and a factory of new models."""

    def __init__(self, workload: Workload, rows: int, val_rows: int) -> None:
        self._workload = workload
        self.train: Dataset = workload.rows.select(range(rows))
        self.val: Dataset = workload.rows.select(range(rows, rows + val_rows))
        self.collate = workload.collate

    def new_model(self) -> Any:
        return self._workload.new_model()


def rows_of(study: Study) -> int:
    return sum(trial.user_attrs.get("rows", 0) for trial in study.get_trials(deepcopy=False))


def curve_of(trials: list[FrozenTrial], rows_of_trial: Callable[[FrozenTrial], int]) -> Curve:
    curve, rows = Curve(), 0
    for trial in sorted(trials, key=lambda t: t.number):
        rows += rows_of_trial(trial)
        if trial.state == TrialState.COMPLETE and trial.value is not None:
            curve.append((rows, trial.value))
    return curve


def best_within(curve: Curve, budget: int) -> float:
    return min((loss for rows, loss in curve if rows <= budget), default=_NEVER)


def rows_to_reach(curve: Curve, loss: float, budget: int) -> float:
    return next((rows for rows, value in curve if value <= loss and rows <= budget), _NEVER)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--rows", type=int, default=1024, help="training rows of a full trial")
    parser.add_argument("--val_rows", type=int, default=512)
    parser.add_argument("--trials", type=int, default=16, help="budget, in full trials")
    parser.add_argument("--output_dir", default="outputs/bench_search")
    parser.add_argument("--progress", action="store_true")
    options = parser.parse_args()
    Path(options.output_dir).mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    budget = options.trials * options.rows
    shares: dict[str, list[float]] = {name: [] for name in options.contenders if name != "random"}
    lines = []
    for seed in options.seeds:
        task = Task(movies(seed), options.rows, options.val_rows)
        curves = {name: CONTENDERS[name](options, seed, task, name) for name in options.contenders}
        cells = [f"| {seed} "]
        for curve in curves.values():
            finished = sum(rows <= budget for rows, _ in curve)
            cells.append(f"| {best_within(curve, budget):.4f} ({finished} finished) ")
        target = best_within(curves["random"], budget) if "random" in curves else _NEVER
        for name, found in shares.items():
            found.append(rows_to_reach(curves[name], target, budget) / budget)
            cells.append(f"| {found[-1]:.0%} " if found[-1] < _NEVER else "| not reached ")
        lines.append("".join(cells) + "|")
        print(lines[-1], flush=True)
    print(f"\n{machine()}; Optuna {optuna.__version__}\n")
    heads = [*options.contenders, *(f"{name}: rows for random's loss" for name in shares)]
    print("| seed | " + " | ".join(heads) + " |\n" + "| --- " * (len(heads) + 1) + "|")
    print("\n".join(lines))
    for name, found in shares.items():
        print(f"{name}: median share of random's rows {statistics.median(found):.0%}")


if __name__ == "__main__":
    main()
