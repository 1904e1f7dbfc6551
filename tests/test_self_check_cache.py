"""The cache of the self-check: which verdicts it keeps, which it measures again, and that no change stays hidden."""

import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ftaccum import InexactLossWarning, test_fine_tuning, verify
from ftaccum.objective import self_check_key, short_check, whole_rows
from ftaccum.objective.self_check_cache import Verdict, VerdictCache
from ftaccum.training import build_cache

CODE = """
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import TokenClassifierOutput

class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 3)

    def forward(self, input_ids, labels=None):
        logits = self.head(self.embed(input_ids).tanh())
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return TokenClassifierOutput(loss=loss, logits=logits)

SMOOTH = 0.0

def loss_fn(outputs, batch):
    return F.cross_entropy(outputs.logits.flatten(0, 1), batch["labels"].flatten(), label_smoothing=SMOOTH)

def closed_over(weight):
    return lambda outputs, batch: weight * loss_fn(outputs, batch)
"""
LANGUAGE_MODEL = CODE.replace(
    "    def forward(", "    def get_output_embeddings(self):\n        return self.head\n\n    def forward("
)
CONFIRMED = "The rows confirm the cached verdict"


def rows(labels: int = 3) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(0)
    lengths = (3, 4, 6, 7, 9, 11)
    return [{"input_ids": torch.randint(20, (n,), generator=draw), "labels": torch.arange(n) % labels} for n in lengths]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Return a function that installs code as a package, and loads it anew."""
    folder = tmp_path / "site"
    (folder / "taggers").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(folder))
    found = self_check_key._library_folders()
    monkeypatch.setattr(self_check_key, "_library_folders", lambda: (*found, str(folder)))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def install(code: str) -> Any:
        (folder / "taggers" / "__init__.py").write_text(code)
        sys.modules.pop("taggers", None)
        importlib.invalidate_caches()
        return importlib.import_module("taggers")

    return install


@pytest.fixture
def confirms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., bool]:
    """Return a function that trains, and returns whether the verdict came from the cache."""
    said: list[str] = []
    monkeypatch.setattr("ftaccum.objective.self_check.logger", SimpleNamespace(debug=said.append))

    def run(package: Any, train_data: Any = None, **arguments: Any) -> bool:
        said.clear()
        torch.manual_seed(0)
        test_fine_tuning(
            package.Tagger(), train_data=train_data or rows(), n_epochs=1, validation_split=0.0, progress=False,
            gradient_accumulation_steps=2, batch_size=2, max_updates=1,
            **{"self_check_cache": str(tmp_path / "verdicts"), "audit": False, **arguments},
        )  # fmt: skip
        return any(each.startswith(CONFIRMED) for each in said)

    return run


def test_a_second_run_confirms_the_verdict(installed: Any, confirms: Any, tmp_path: Path) -> None:
    package = installed(CODE)
    assert not confirms(package)
    assert confirms(package)
    assert confirms(installed(CODE)), "the same code, loaded anew"
    assert len(list((tmp_path / "verdicts").iterdir())) == 1
    assert not confirms(package, self_check_cache=False)


@pytest.mark.parametrize(("audit", "compares"), [(True, False), (3, False), (False, True)])
def test_the_confirmation_compares_gradients_if_no_audit_does(
    audit: bool | int, compares: bool, installed: Any, confirms: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, compared = installed(CODE), []
    confirms(package, audit=audit)
    agree = short_check._gradients_agree
    monkeypatch.setattr(short_check, "_gradients_agree", lambda *given: compared.append(1) or agree(*given))
    assert confirms(package, audit=audit)
    assert bool(compared) == compares


def test_edits_of_forward_the_loss_and_the_data_are_measured_again(installed: Any, confirms: Any) -> None:
    package = installed(CODE)
    assert [confirms(package), confirms(package)] == [False, True]
    assert not confirms(package, rows(labels=2))
    assert [confirms(package, loss_fn=package.loss_fn) for _ in range(2)] == [False, True]
    package.SMOOTH = 0.1
    assert not confirms(package, loss_fn=package.loss_fn), "a global that the loss reads"
    assert [confirms(package, loss_fn=package.closed_over(w)) for w in (1.0, 1.0, 2.0)] == [False, True, False]
    forward = package.Tagger.forward
    package.Tagger.forward = lambda self, input_ids, labels=None: forward(self, input_ids, labels)
    assert not confirms(package), "replaced while the program runs, by code that is not installed"
    edited = installed(CODE.replace(".tanh()", ".sigmoid()"))
    assert not confirms(edited)
    assert not confirms(edited, loss_fn=installed(CODE.replace("=SMOOTH", "=SMOOTH + 0.1")).loss_fn)


def test_code_that_is_not_installed_and_hooks_are_never_cached(installed: Any, confirms: Any) -> None:
    package = installed(CODE)

    class Here(package.Tagger):  # type: ignore[name-defined]
        pass

    class Hooked:
        @staticmethod
        def Tagger() -> nn.Module:  # noqa: N802
            model = package.Tagger()
            model.embed.register_forward_hook(lambda *_: None)
            return model

    for kind in (type("Local", (), {"Tagger": Here}), Hooked):
        assert [confirms(kind), confirms(kind)] == [False, False]
    assert [confirms(package, loss_fn=lambda outputs, batch: package.loss_fn(outputs, batch)) for _ in "ab"] == [
        False,
        False,
    ]


def partly_labelled() -> list[dict[str, Any]]:
    return [{**row, "labels": row["labels"].where(row["labels"] != 1, -100)} for row in rows()]


def test_a_second_run_confirms_labelled_positions_without_comparing_them_anew(
    installed: Any, confirms: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = installed(LANGUAGE_MODEL)
    assert not confirms(package, partly_labelled())
    monkeypatch.setattr("ftaccum.training.build_objective.find_labelled_head", lambda *_: pytest.fail("compared anew"))
    said: list[str] = []
    monkeypatch.setattr("ftaccum.training.build_objective.logger", SimpleNamespace(debug=said.append))
    assert confirms(package, partly_labelled())
    assert said == ["Logits are computed at labelled positions only."]


def test_labelled_positions_that_give_another_loss_are_not_confirmed(
    installed: Any, confirms: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = installed(LANGUAGE_MODEL.replace("labels.flatten())", "labels.flatten(), label_smoothing=0.1)", 1))
    assert [confirms(package, partly_labelled()) for _ in range(2)] == [False, True]
    find = VerdictCache.find
    monkeypatch.setattr(VerdictCache, "find", lambda cache: replace(find(cache), at_labels=True))
    assert not confirms(package, partly_labelled())


@pytest.mark.parametrize("way", ["rows", "elements of nothing"])
def test_a_wrong_verdict_is_not_confirmed(
    way: str, installed: Any, confirms: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = installed(CODE)
    monkeypatch.setattr(VerdictCache, "find", lambda _: Verdict(way, True, False, 100))
    assert not confirms(package)


def test_a_loss_that_is_not_exact_is_not_kept(installed: Any, confirms: Any, tmp_path: Path) -> None:
    package = installed(CODE.replace("labels.flatten())", "labels.flatten()) + 0.01 * logits.mean().square()"))
    with pytest.warns(InexactLossWarning, match="not a mean over items"):
        confirms(package)
    assert not (tmp_path / "verdicts").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b"\xff\x00", b"[" * 5000, b'{"version": 1}',
        b'{"version": 2, "way": "labels", "measured": true, "shifts": false, "longest": 3}',
        b'{"version": 3, "way": "labels", "measured": true, "shifts": false, "longest": 3, "at_labels": true, '
        b'"gives_logits": true}',
        b'{"version": 4, "way": "labels", "measured": true, "shifts": false, "longest": 3, "at_labels": true, '
        b'"gives_logits": true, "whole": ""}',
        b'{"version": 1, "way": ["labels"], "measured": true, "shifts": false, "longest": 3}',
        b'{"version": 1, "way": "labels", "measured": 1, "shifts": false, "longest": 3}',
    ],
)  # fmt: skip
def test_a_broken_entry_is_ignored(content: bytes, tmp_path: Path) -> None:
    cache = VerdictCache(tmp_path, "entry")
    (tmp_path / "entry.json").write_bytes(content)
    assert cache.find() is None
    verdict = Verdict("labels", True, False, 3)
    cache.keep(verdict)
    assert cache.find() == verdict


def test_a_folder_that_cannot_be_written_to_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    VerdictCache(tmp_path / "file", "entry").keep(Verdict("labels", True, False, 3))


def test_whole_rows_are_measured_again_if_they_are_others(
    installed: Any, confirms: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut rows have the same labels in both data sets."""
    package, measured = installed(CODE), list[int]()
    real = whole_rows._explains
    monkeypatch.setattr(whole_rows, "_explains", lambda *args: (measured.append(1), real(*args))[1])
    long = [{name: value.repeat(n + 4) for name, value in row.items()} for n, row in enumerate(rows() * 2)]
    other = [row | {"input_ids": row["input_ids"].flip(0)} for row in long]
    counts = []
    for data in (long, long, other, other, long):
        confirms(package, data, audit=True)
        counts.append(len(measured))
    assert counts == [1, 1, 2, 2, 3]


def test_rare_values_that_the_loss_weights_are_measured_again(installed: Any, confirms: Any) -> None:
    weighted = CODE.replace("labels=None):", "labels=None, w=None):").replace(
        "F.cross_entropy(logits.flatten(0, 1), labels.flatten())",
        "(F.cross_entropy(logits.transpose(1, 2), labels, reduction='none').mean(1) * w).sum() / w.sum()",
    )
    package = installed(weighted)
    n_rows = [row | {"input_ids": row["input_ids"][:3], "labels": row["labels"][:3]} for row in rows() * 6]
    plain = [{**row, "w": 1.0} for row in n_rows]
    assert [confirms(package, plain) for _ in range(2)] == [False, True]
    with_rare = [{**row, "w": 5.0 if n == 20 else 1.0} for n, row in enumerate(n_rows)]
    assert not confirms(package, with_rare, on_inexact="ignore")


def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert build_cache._default_folder() is None


def test_verify_measures_everything(installed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def find(_: VerdictCache) -> Verdict | None:
        raise AssertionError("verify looked into the cache")

    monkeypatch.setattr(VerdictCache, "find", find)
    assert verify(installed(CODE).Tagger(), rows(), batch_size=2, progress=False).splits
