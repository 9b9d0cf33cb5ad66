"""How a run is stopped: the first Ctrl-C or signal waits for the iteration, a second one acts."""

import contextlib
import signal
import threading
from collections.abc import Iterator


class StopRequest:
    """Holds the signal that asked a run to stop after its current iteration, or None."""

    def __init__(self) -> None:
        self.signal: int | None = None


@contextlib.contextmanager
def stop_signal(stop: StopRequest) -> Iterator[None]:
    """Store the first SIGINT, SIGTERM or SIGHUP in ``stop``; a second one acts as usual."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Windows has no SIGHUP.
    numbers = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")]
    handlers = {number: signal.getsignal(number) for number in numbers if number is not None}
    # Signals that are ignored stay ignored: shells ignore SIGINT for background processes, and
    # nohup ignores SIGHUP.
    handlers = {number: old for number, old in handlers.items() if old != signal.SIG_IGN}

    def request(number: int, _frame: object) -> None:
        stop.signal = number
        signal.signal(number, handlers[signal.Signals(number)])

    try:
        for number in handlers:
            signal.signal(number, request)
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
