"""Ctrl-C and SIGTERM as requests to stop after the current step; a second one stops at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

NOTICE = b"\nstopping after this step; once more stops at once\n"


@dataclass
class StopRequest:
    """The signal that has asked to stop, if one has come."""

    signal: int | None = None
    repeated: bool = False  # whether a second signal has come

    def is_set(self) -> bool:
        """Whether a signal has come; raises KeyboardInterrupt after a second one.

        The second one also raises where it arrives, but the code there may catch the exception.
        """
        if self.repeated:
            raise KeyboardInterrupt
        return self.signal is not None


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Catch SIGINT and SIGTERM while the block runs, with a notice on standard error.

    Outside the main thread Python cannot, and the request is never set.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.getsignal(number) for number in signals}

    def first_signal(number: int, _: object) -> None:
        request.signal = number
        for each in signals:
            signal.signal(each, second_signal)
        os.write(2, NOTICE)  # print may be running when the signal comes, and is not reentrant

    def second_signal(number: int, _: object) -> None:
        request.repeated = True
        for each in signals:
            signal.signal(each, previous[each])
        signal.raise_signal(number)

    for number in signals:
        signal.signal(number, first_signal)
    try:
        yield request
    finally:
        for number in signals:
            signal.signal(number, previous[number])
