"""Uploads of trained models to a hub, which a server on this machine stands for."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers import BertForSequenceClassification, BertTokenizerFast

from fake_hub import READ, WRITE, FakeHub, fake_hub
from ftaccum import OutputWarning, Result, SettingsError, search, test_fine_tuning
from ftaccum.apps.cli import main
from ftaccum.rules.repository import is_repository_name
from ftaccum.runtime.log import run_logging
from ftaccum.tracking.hub import check_hub, upload_model
from ftaccum.training.preflight import faults_before_loading
from heads import HEADS

CLASSIFIER = HEADS["sequence classification, BERT"]
AFTERWARDS = "leave `push_to_hub` out and upload the model after the run: `hf upload anna/model FOLDER --private`."


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """Run the server, logged in as its user anna."""
    with fake_hub() as server:
        address = f"{server.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.setenv("HF_TOKEN", WRITE)
        yield server


class Unreadable:
    """Rows that must not be read."""

    def __len__(self) -> int:
        raise AssertionError("the data were read")

    __getitem__ = __iter__ = __len__


def train(folder: Path, **arguments: Any) -> Result:
    given = {"train_data": CLASSIFIER.rows(6), "push_to_hub": "anna/model", **arguments}
    return test_fine_tuning(
        CLASSIFIER.model().float(), output_dir=str(folder), validation_split=0.0, n_epochs=1, batch_size=2,
        audit=False, verbosity="quiet", **given,
    )  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_trained_model_is_uploaded_to_a_new_private_repository(hub: FakeHub, tmp_path: Path) -> None:
    result = train(tmp_path / "out")
    assert result.unwritten == []
    assert hub.files == {"anna/model": contents(tmp_path / "out" / "model")}
    assert {"config.json", "model.safetensors"} <= hub.files["anna/model"].keys()
    assert hub.private == {"anna/model": True}


def test_a_name_without_a_user_is_a_repository_of_the_one_who_is_logged_in(hub: FakeHub) -> None:
    assert check_hub("model") == "anna/model"
    assert hub.private == {"anna/model": True}


def test_an_upload_replaces_old_weights_and_leaves_other_files(hub: FakeHub, tmp_path: Path) -> None:
    hub.private["anna/model"] = False
    hub.files["anna/model"] = {
        "model-00001-of-00002.safetensors": b"old", "model.safetensors.index.json": b"old", "config.json": b"old",
        "README.md": b"by anna", "adapter_config.json": b"old",
    }  # fmt: skip
    train(tmp_path / "out")
    assert hub.files["anna/model"] == contents(tmp_path / "out" / "model") | {"README.md": b"by anna"}
    assert hub.private == {"anna/model": False}


@pytest.mark.parametrize(
    ("token", "name", "message"),
    [
        (
            None,
            "anna/model",
            "`push_to_hub` is 'anna/model', but nobody is logged in to the hub on this machine. Log in with "
            "`hf auth login`, or set HF_TOKEN to a token with write access.",
        ),
        (
            "hf_expired",
            "anna/model",
            "`push_to_hub` is 'anna/model', but the hub does not accept the token (HTTP 401: Invalid user token. "
            "The token from HF_TOKEN environment variable is invalid. Note that HF_TOKEN takes precedence over "
            "`hf auth login`). Log in with `hf auth login`, or set HF_TOKEN to a token with write access.",
        ),
        (
            READ,
            "anna/old",
            "`push_to_hub` is 'anna/old', but your token cannot write there (HTTP 403: You have no write access). "
            "Use a token with write access to it, and the name of a repository of yours or of an organization that "
            "you can write to.",
        ),
        (
            WRITE,
            "berta/old",
            "`push_to_hub` is 'berta/old', but your token cannot write there (HTTP 403: You have no write access). "
            "Use a token with write access to it, and the name of a repository of yours or of an organization that "
            "you can write to.",
        ),
        (WRITE, "berta/new", "'berta/new', but your token cannot write there (HTTP 403: You don't have the rights"),
    ],
)
def test_who_cannot_write_to_the_repository_is_told_before_data_are_read(
    token: str | None, name: str, message: str, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.files |= {"anna/old": {}, "berta/old": {}}
    monkeypatch.delenv("HF_TOKEN")
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(SettingsError) as refused:
        train(tmp_path / "out", push_to_hub=name, train_data=Unreadable())
    assert len(refused.value.faults) == 1
    assert message in str(refused.value)
    assert not any("commit" in asked for asked in hub.asked)


def test_a_hub_that_does_not_answer_is_reported_before_data_are_read(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = "http://127.0.0.1:9"  # nothing listens there
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", closed)
    with pytest.raises(SettingsError) as refused:
        train(tmp_path / "out", train_data=Unreadable())
    start, _, rest = str(refused.value).partition(" (ConnectError: ")
    assert start == f"`push_to_hub` is 'anna/model', but {closed} does not answer"
    assert rest.endswith(f"). Check the network, or {AFTERWARDS}")

    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
    monkeypatch.setattr("ftaccum.tracking.hub._PATIENCE", 0.0)
    with pytest.raises(SettingsError, match=r"does not answer \(not within 0 s\)\. Check the network, or leave"):
        check_hub("anna/model")


def test_offline_mode_is_respected(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SettingsError) as refused:
        train(tmp_path / "out", train_data=Unreadable())
    assert str(refused.value) == (
        "`push_to_hub` is 'anna/model', but the hub is in offline mode: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set. "
        f"Unset it, or {AFTERWARDS}"
    )
    assert hub.asked == []


def test_a_failed_upload_keeps_the_model_and_is_tried_again_by_resuming(hub: FakeHub, tmp_path: Path) -> None:
    hub.refuses_commits = True
    with pytest.warns(OutputWarning) as warned:
        result = train(tmp_path / "my out")
    folder = tmp_path / "my out" / "model"
    assert result.unwritten == [str(warned[0].message)] == [
        "The model was not uploaded to 'anna/model': HTTP 403: You have no write access. To upload it, run "
        f"`hf upload anna/model '{folder}'`."
    ]  # fmt: skip
    assert result.model is not None
    assert Result.load(tmp_path / "my out") == result
    assert {"config.json", "model.safetensors"} <= contents(folder).keys()
    assert hub.files == {"anna/model": {}}

    hub.refuses_commits = False
    again = train(tmp_path / "my out", resume="auto")
    assert again.unwritten == []
    assert again.loss_history == result.loss_history
    assert hub.files == {"anna/model": contents(folder)}


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("error", "why"),
    [(RuntimeError("disk\ngone"), "RuntimeError: disk"), (KeyboardInterrupt(), "Ctrl-C stopped it")],
)
def test_no_error_of_an_upload_ends_the_run(
    error: BaseException, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr("ftaccum.tracking.publishing.upload_model", fails)
    with pytest.warns(OutputWarning, match=f"was not uploaded to 'anna/model': {why}. To upload it, run"):
        assert train(tmp_path).model is not None


def test_a_model_that_could_not_be_saved_is_not_uploaded(hub: FakeHub, tmp_path: Path) -> None:
    class Unsaved(nn.Linear):
        def save_pretrained(self, _: Path) -> None:
            raise RuntimeError("not made to be saved")

    with pytest.warns(OutputWarning) as warned:
        test_fine_tuning(
            Unsaved(4, 3), train_data=[(torch.ones(4), n % 3) for n in range(6)], loss_fn=nn.CrossEntropyLoss(),
            validation_split=0.0, n_epochs=1, output_dir=str(tmp_path), push_to_hub="anna/model", audit=False,
            verbosity="quiet",
        )  # fmt: skip
    assert str(warned[-1].message) == (
        "The model was not uploaded to 'anna/model': some outputs of the run could not be written. To upload it, run "
        "`hf upload anna/model FOLDER`."
    )
    assert hub.files == {"anna/model": {}}


def test_a_card_replaces_only_one_that_nobody_has_edited(
    hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def upload(name: str, rate: float) -> bytes:
        train(tmp_path / name, max_updates=1, learning_rate=rate)
        return (tmp_path / name / "model" / "README.md").read_bytes()

    files = hub.files.setdefault("anna/model", {})
    first = upload("first", 1e-3)
    assert files["README.md"] == first
    second = upload("second", 1e-4)
    assert files["README.md"] == second != first
    files["README.md"] = second.replace(b"# model", b"# My model")
    capsys.readouterr()
    with run_logging(enabled=True):
        upload_model(tmp_path / "first" / "model", "anna/model")
    assert files["README.md"].count(b"# My model") == 1
    assert (
        "'anna/model' has a README.md that was written or edited by hand. It stays as it is; the model card of this "
        f"run is '{tmp_path}/first/model/README.md'."
    ) in capsys.readouterr().err


def test_a_card_that_the_hub_refuses_costs_no_upload(
    hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.refuses_cards = True
    with run_logging(enabled=True):
        assert train(tmp_path / "out").unwritten == []
    shown = capsys.readouterr().err
    start = "The hub refuses the metadata of the model card, so README.md is not uploaded: "
    assert re.search(f"{start}.*no such task .*Correct '{tmp_path}/out/model/README.md', and upload it with", shown)
    assert contents(tmp_path / "out" / "model").keys() - hub.files["anna/model"].keys() == {"README.md"}


def test_only_the_card_of_the_uploaded_folder_names_the_repository(hub: FakeHub, tmp_path: Path) -> None:
    train(tmp_path / "out", lora=True, save="both", max_updates=1)
    assert b'from_pretrained("anna/model")' in hub.files["anna/model"]["README.md"]
    assert b'from_pretrained(base, "adapter")' in (tmp_path / "out" / "adapter" / "README.md").read_bytes()


def test_the_card_of_adapters_of_a_local_model_is_uploaded(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    CLASSIFIER.model().float().save_pretrained("base")
    model = BertForSequenceClassification.from_pretrained("base")
    test_fine_tuning(
        model, train_data=CLASSIFIER.rows(6), lora=True, output_dir="out", push_to_hub="anna/model",
        validation_split=0.0, n_epochs=1, max_updates=1, audit=False, verbosity="quiet",
    )  # fmt: skip
    card = hub.files["anna/model"]["README.md"].decode()
    assert 'PeftModel.from_pretrained(base, "anna/model")' in card
    assert "base_model" not in card


def test_the_card_of_peft_for_adapters_of_a_local_model_is_not_uploaded(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "base").mkdir(parents=True)
    check_hub("anna/model")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "README.md").write_text("base_model: ./base")  # the hub refuses such a name
    for base, uploaded in (("./base", False), (str(tmp_path), False), ("models/base", False), ("anna/base", True)):
        hub.files["anna/model"].clear()
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
        upload_model(tmp_path / "adapter", "anna/model")
        assert ("README.md" in hub.files["anna/model"]) is uploaded


def test_the_command_line_checks_the_hub_before_it_loads_anything(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    words = ["train", "--model", "no-such-model", "--train_data", "no-such-data", "--push_to_hub", "anna/model"]
    assert main([*words, "--output_dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("ftaccum train: `push_to_hub` is 'anna/model', but nobody is logged in")
    given = {"push_to_hub": "anna/model", "output_dir": str(tmp_path)}
    assert faults_before_loading(given, looks_at_files=False) == []
    assert hub.asked == []


@pytest.mark.slow
def test_commands_without_an_output_folder_upload_the_model_from_their_own(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    CLASSIFIER.model().float().save_pretrained("base")
    Path("vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\ngood\nbad\n")
    BertTokenizerFast(vocab="vocab.txt", model_max_length=8).save_pretrained("base")
    Path("rows.csv").write_text("text,label\n" + "good,1\nbad,0\n" * 8)
    words = ["--model", "base", "--train_data", "rows.csv", "--n_epochs", "1", "--verbosity", "quiet", "--push_to_hub"]
    assert main(["train", *words, "anna/one"]) == 0
    (folder,) = Path("outputs").iterdir()
    assert hub.files["anna/one"] == contents(folder / "model")
    assert "tokenizer.json" in hub.files["anna/one"]
    assert main(["preview", *words, "anna/two"]) == 0
    assert "anna/two" not in hub.files
    assert main(["search", *words, "anna/two", "--n_trials", "1", "--accumulation_steps", "1", "--refit"]) == 0
    assert hub.files["anna/two"] == contents(Path("outputs/search/best/model"))


@pytest.mark.slow
@pytest.mark.processes
def test_on_several_processes_the_main_one_uploads_and_all_agree(
    tmp_path: Path, two_processes: Callable[..., str]
) -> None:
    two_processes("publishing_of_two.py", str(tmp_path))


def searched(folder: Path, **arguments: Any) -> None:
    search(
        lambda: CLASSIFIER.model().float(), train_data=CLASSIFIER.rows(8), val_data=CLASSIFIER.rows(4),
        push_to_hub="anna/model", output_dir=str(folder), batch_size=2, n_epochs=1, n_trials=1,
        accumulation_steps=(1,), progress=False, verbosity="quiet", **arguments,
    )  # fmt: skip


def test_a_search_without_a_model_to_upload_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"`push_to_hub` is 'anna/model', but `refit` is False, and the trials"):
        searched(tmp_path)


def test_a_search_checks_the_hub_before_its_first_trial(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(SettingsError, match="nobody is logged in"):
        searched(tmp_path, refit=True)
    assert not (tmp_path / "trials").exists()
    assert hub.asked == []


@pytest.mark.slow
def test_a_search_uploads_only_the_model_that_it_trains_again(hub: FakeHub, tmp_path: Path) -> None:
    searched(tmp_path, refit=True)
    assert hub.files == {"anna/model": contents(tmp_path / "best" / "model")}
    assert sum("commit" in asked for asked in hub.asked) == 1


@pytest.mark.parametrize(
    "name", ["", "a/b/c", "/model", "anna/", "-anna/model", "a--b", "a..b", "x.git", "a b", "a\n", "a" * 97, True]
)
def test_bad_names_of_repositories_are_refused(name: Any, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="`push_to_hub` must be the name of a repository on the Hugging Face Hub"):
        train(tmp_path, push_to_hub=name)


def test_names_that_the_hub_allows_are_allowed() -> None:
    for name in ("anna/model", "model", "A.b-c_d/E.f-g_1", "a/b", "a" * 96):
        validate_repo_id(name)
        assert is_repository_name(name)
    assert not is_repository_name("a" * 97)


def test_an_upload_needs_a_folder_that_keeps_the_model() -> None:
    with pytest.raises(SettingsError, match="but `output_dir` is None, so a failed upload would lose the model"):
        test_fine_tuning(CLASSIFIER.model(), train_data=CLASSIFIER.rows(6), push_to_hub="anna/model")
