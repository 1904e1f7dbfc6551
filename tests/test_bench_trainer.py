"""The benchmark of trainers (`scripts/bench_trainer.py`): its contenders do equal work, and its ratios."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from heads import relative_error
from jobs import Job
from measuring import quiet
from partly_labelled import _n_targets
from peers import CONTENDERS, _padded, why_left_out
from trainer_runs import Timing, counted, timed
from trainer_tables import STEADY, WHOLE, times
from workloads import Workload

WAYS = ["trainer", "trainer-rebalance", "sft", "sft-checkpointed", "sft-packed", "ours", "ours-tokens"]

pytestmark = pytest.mark.filterwarnings("ignore")


def job(n_rows: int, tokenizer: Any = None) -> Job:
    """Return a job of ragged rows, labelled from the third token on, in updates of 8."""
    ids = [list(range(4, 9 + n)) for n in range(n_rows)]
    columns = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}
    rows = Dataset.from_dict({**columns, "labels": [[-100, -100, *row[2:]] for row in ids]})
    torch.manual_seed(0)
    return Job(Workload("tiny", _model(), rows, _padded, _n_targets, 1, tokenizer=tokenizer), rows, 4, 2, 0, "no")


def _model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 54, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, pad_token_id=0))


def _tokenizer() -> Any:
    return pytest.importorskip("preferences", reason="TRL is not installed", exc_type=ImportError).tokenizer()


def update(name: str, given: Job) -> dict[str, torch.Tensor]:
    """Return how much a run changes each weight."""
    model = given.workload.new_model()
    with quiet(0):
        CONTENDERS[name](model, given)
    before = dict(given.workload.model.named_parameters())
    return {key: (weight - before[key]).detach() for key, weight in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("name", WAYS)
def test_contenders_make_the_same_update_from_the_same_rows(name: str) -> None:
    one = job(8, _tokenizer() if name.startswith("sft") else None)
    assert relative_error(update(name, one), update("bare", one)) < 1e-2  # AdamW divides by tiny gradients


@pytest.mark.slow
def test_self_checks_and_audits_are_timed_and_not_counted() -> None:
    two = job(16)
    run, count = timed(CONTENDERS["ours"], two), counted(CONTENDERS["ours"], two)
    assert run.updates == two.updates
    assert 0 < run.self_check < run.before
    assert 0 < run.audits < run.before - run.self_check
    assert run.steady_audits == 0, "only the first update is audited"
    assert count.tokens == sum(map(len, two.rows["input_ids"]))


def test_ratios_of_the_whole_call_and_of_the_steady_state_are_apart() -> None:
    def run(before: float, seconds: float, steady: float) -> Timing:
        return Timing(before, seconds, steady, 3, 0.0, 0.0, 0.0)

    rounds = [{"trainer": run(0.0, 8.0, 3.0), "ours": run(1.0, 3.0, 1.0)}]
    assert WHOLE.ratios(rounds, "trainer", "ours") == [2.0]
    assert STEADY.ratios(rounds, "trainer", "ours") == [3.0]
    *_, last = times(rounds)
    assert last == "| **ftaccum** | 4.00 | 2.00 (2.00–2.00) | 1.00 | 3.00 (3.00–3.00) |"


def test_a_contender_for_chats_is_left_out_elsewhere() -> None:
    movies = Workload("movies", None, Dataset.from_dict({}), _padded, len, 1)
    assert why_left_out("sft", movies)
    assert why_left_out("ours", movies) is None
