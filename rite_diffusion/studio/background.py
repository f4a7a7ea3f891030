"""Work that reports by a callback, as an iterator that a page can read and close."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any


class _Closed(Exception):
    """The iterator was closed; raised in the work's next callback, it ends the work."""


def run_with_progress(work: Callable[[Callable[..., None]], Any]) -> Iterator[tuple[str, Any]]:
    """("progress", arguments) for each call of `work`'s callback, then ("result", its result).

    The work runs in a thread of its own. When the iterator is closed, the work ends at its next
    call of the callback. Exceptions of the work are raised here.
    """
    events: SimpleQueue[tuple[Any, ...] | None] = SimpleQueue()
    closed = threading.Event()
    result: Future[Any] = Future()

    def progress(*values: Any) -> None:
        if closed.is_set():
            raise _Closed
        events.put(values)

    def run() -> None:
        try:
            result.set_result(work(progress))
        except BaseException as error:
            result.set_exception(error)
        finally:
            events.put(None)

    threading.Thread(target=run, daemon=True, name="work").start()
    try:
        while (values := events.get()) is not None:
            yield "progress", values
        yield "result", result.result()
    finally:
        closed.set()
