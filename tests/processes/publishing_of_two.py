"""Upload the model of a run of two processes. The argument is the folder for the outputs."""

import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import huggingface_hub.constants
from accelerate import PartialState
from accelerate.utils import gather_object

import ftaccum.runtime.process_group
import ftaccum.tracking.publishing
from fake_hub import WRITE, fake_hub
from ftaccum import Result, SettingsError
from interrupted import fine_tuned

state, folder = PartialState(cpu=True), sys.argv[1]
assert state.num_processes == 2, "torchrun was to start two"
constants: Any = huggingface_hub.constants
constants.HF_HUB_OFFLINE, constants.HF_TOKEN_PATH = False, "no token"
os.environ.pop("HF_TOKEN", None)


def train(**arguments: Any) -> Result:
    return fine_tuned(max_updates=1, audit=False, output_dir=folder, push_to_hub="anna/model", **arguments).result


with fake_hub() as hub:  # each process has its own, but only the main process may use it
    constants.ENDPOINT = hub.endpoint
    constants.HUGGINGFACE_CO_URL_TEMPLATE = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    try:
        raised = str(train())
    except SettingsError as error:
        raised = str(error)
    assert "nobody is logged in" in raised, raised

    os.environ["HF_TOKEN"] = WRITE
    assert train().unwritten == []
    names = {path.name for path in (Path(folder) / "model").iterdir()}
    found = gather_object([sorted(hub.files.get("anna/model", {}))])
    assert found == [sorted(names), []], found

    assert train(sharding="fsdp2").unwritten == []
    card = (Path(folder) / "model" / "README.md").read_text()
    assert 'AutoModelForSequenceClassification.from_pretrained("anna/model")' in card, card
    assert "| Processes | 2 |" in card, card

    # An upload that takes longer than a collective operation may wait, and fails.
    ftaccum.runtime.process_group._POLL = 0.05
    upload, messages = ftaccum.tracking.publishing.upload_model, []
    broadcast = ftaccum.runtime.process_group.ProcessGroup.broadcast

    def slow_upload(*arguments: Any) -> None:
        messages.clear()
        time.sleep(0.5)
        upload(*arguments)

    def counted(self: Any, value: Any = None) -> Any:
        messages.append(value)
        return broadcast(self, value)

    ftaccum.tracking.publishing.upload_model = slow_upload
    ftaccum.runtime.process_group.ProcessGroup.broadcast = counted  # type: ignore[method-assign]
    hub.refuses_commits = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on the main process, the run warns of the upload
        unwritten = gather_object([train().unwritten])
    assert unwritten[0] == unwritten[1], unwritten
    assert "HTTP 403" in unwritten[0][0], unwritten
    assert not state.is_main_process or len(messages) > 3, messages
state.wait_for_everyone()
