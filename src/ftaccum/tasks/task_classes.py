"""The class of each task."""

from importlib import import_module

from .arguments import TASKS
from .task import Task


def task_class(name: str) -> type[Task]:
    """Return the class of a task, which is one of `TASKS`."""
    module, _, class_name = TASKS[name].partition(":")
    found: type[Task] = getattr(import_module(module), class_name)
    return found
