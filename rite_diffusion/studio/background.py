"""A recipe that reports by calling a listener, as an iterator that a page can follow and close."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any


class _Closed(Exception):
    """The iterator was closed: what listens ends the work with it."""


def followed(work: Callable[[Callable[..., None]], Any]) -> Iterator[tuple[str, Any]]:
    """("progress", arguments) of each call of the callback of `work`, then ("made", result).

    The work runs in a thread of its own and ends at its next report when the iterator is closed.
    What it raises is raised here.
    """
    told: SimpleQueue[tuple[Any, ...] | None] = SimpleQueue()
    closed = threading.Event()
    result: Future[Any] = Future()

    def progress(*values: Any) -> None:
        if closed.is_set():
            raise _Closed
        told.put(values)

    def run() -> None:
        try:
            result.set_result(work(progress))
        except BaseException as error:
            result.set_exception(error)
        finally:
            told.put(None)

    threading.Thread(target=run, daemon=True, name="recipe").start()
    try:
        while (values := told.get()) is not None:
            yield "progress", values
        yield "made", result.result()
    finally:
        closed.set()
