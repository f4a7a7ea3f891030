"""Ctrl-C and SIGTERM as a wish to stop after the current step; a second one stops at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class StopRequest:
    """The signal that asked to stop, once one has."""

    signal: int | None = None

    def is_set(self) -> bool:
        """Whether a signal has come."""
        return self.signal is not None


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Collect SIGINT and SIGTERM while the block runs; outside the main thread signals pass by."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.getsignal(number) for number in signals}

    def ask(number: int, _: object) -> None:
        request.signal = number
        for each in signals:
            signal.signal(each, previous[each])

    for number in signals:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        for number in signals:
            signal.signal(number, previous[number])
