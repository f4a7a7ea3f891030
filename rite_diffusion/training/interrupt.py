"""Ctrl-C and SIGTERM as a wish to stop after the current step; a second one stops at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

NOTICE = b"\nstopping after this step; once more stops at once\n"


@dataclass
class StopRequest:
    """The signal that asked to stop, once one has."""

    signal: int | None = None
    insisted: bool = False  # whether a second signal has come

    def is_set(self) -> bool:
        """Whether a signal has come; KeyboardInterrupt after a second one.

        That one raises wherever it comes, and code that happens to run there may swallow it.
        """
        if self.insisted:
            raise KeyboardInterrupt
        return self.signal is not None


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Collect SIGINT and SIGTERM while the block runs, and say on standard error what comes now.

    Outside the main thread signals pass by.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.getsignal(number) for number in signals}

    def ask(number: int, _: object) -> None:
        request.signal = number
        for each in signals:
            signal.signal(each, insist)
        os.write(2, NOTICE)  # print is not for signal handlers: the signal may have come within one

    def insist(number: int, _: object) -> None:
        request.insisted = True
        for each in signals:
            signal.signal(each, previous[each])
        signal.raise_signal(number)

    for number in signals:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        for number in signals:
            signal.signal(number, previous[number])
