"""A recipe that reports by calling a listener, as an iterator that a page can follow and close."""

import threading
from collections.abc import Callable, Iterator
from queue import Queue
from typing import Any

from rite_diffusion.types import RiteError


class _Closed(Exception):
    """The iterator was closed: what listens ends the work with it."""


def followed(work: Callable[[Callable[..., None]], Any]) -> Iterator[tuple[str, Any]]:
    """("heard", arguments) of each call of the listener that `work` is given, and ("made", result).

    The work runs in a thread of its own and ends at its next report when the iterator is closed.
    A RiteError of the work is raised here.
    """
    told: Queue[tuple[str, Any]] = Queue()
    closed = threading.Event()

    def listen(*values: Any) -> None:
        if closed.is_set():
            raise _Closed
        told.put(("heard", values))

    def run() -> None:
        try:
            told.put(("made", work(listen)))
        except RiteError as error:
            told.put(("fault", error))
        except _Closed:
            pass
        finally:
            told.put(("end", None))

    threading.Thread(target=run, daemon=True, name="recipe").start()
    try:
        while (item := told.get())[0] != "end":
            if item[0] == "fault":
                raise item[1]
            yield item
    finally:
        closed.set()
