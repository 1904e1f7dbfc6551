"""Call a function in a thread of its own."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def start_thread(function: Callable[[], T]) -> Future[T]:
    """Call a function in a new thread, and return the future of its result.

    Unlike the threads of an executor, this one does not keep the process from exiting.
    """
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future
