"""The list of all messages (`scripts/messages.py`): it finds them all, and none has a private word."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from messages import OTHER, Message, find_messages
from structure import Module, modules

SCRIPT = Path(__file__).parents[1] / "scripts" / "messages.py"
PRIVATE = re.compile(r"ghost|shaken|nudged|\bmend|rehears|headroom", re.IGNORECASE)


@functools.cache
def messages() -> list[Message]:
    return find_messages(modules())


def found(beginning: str) -> Message:
    """Return the only message with this beginning."""
    (message,) = (message for message in messages() if message.text.startswith(beginning))
    return message


@pytest.mark.parametrize(
    ("beginning", "kind", "trigger"),
    [
        ("`⟨argument⟩` has no column ⟨name⟩ to read", "DataError", "name not in table.column_names"),
        (
            "`planner_costs` is given",
            "SettingsError",
            "runtime.planner_costs is not None and (not runtime.planner)",
        ),
        ("The plot ⟨name⟩ could not be drawn", "OutputWarning", "except Exception"),
        ("Skipped ⟨path⟩, which cannot be read: ⟨error⟩", "log warning", "except OSError"),
        ("number of warm-up updates", "help text", "always, in Recipe.warmup_steps"),
    ],
)
def test_messages_have_a_kind_and_a_trigger(beginning: str, kind: str, trigger: str) -> None:
    message = found(beginning)
    assert (message.kind, message.trigger) == (kind, trigger)


def listed(source: str) -> list[tuple[str, str, str]]:
    messages = find_messages([Module("module", source, ast.parse(source))])
    return [(message.kind, message.trigger, message.text) for message in messages]


def test_texts_are_followed_through_names() -> None:
    source = '''
def explain(x):
    """Return a sentence."""
    if x < 0:
        return f"It is {x:.2f}."

def check(x):
    if fault := explain(x):
        raise ValueError("Wrong: " + fault)
'''
    assert listed(source) == [
        ("ValueError", "x < 0", "It is ⟨x⟩."),
        ("ValueError", "(fault := explain(x))", "Wrong: ⟨fault⟩"),
    ]


def test_long_texts_with_no_known_path_to_a_user_are_listed() -> None:
    assert listed('A, B = "a few words only", "few words"') == [(OTHER, "always, in (A, B)", "a few words only")]


def test_no_message_has_a_private_word() -> None:
    assert [message for message in messages() if PRIVATE.search(message.text)] == []


@pytest.mark.slow
def test_the_script_prints_one_module() -> None:
    command = [sys.executable, SCRIPT, "--module", "apps.yaml"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.startswith("=== apps.yaml\n\napps.yaml:")
    assert printed.count("===") == 1
