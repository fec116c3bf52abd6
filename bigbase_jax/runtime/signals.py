"""Signals that ask a process to end: heard at once, whatever the main thread waits for; Ctrl-C never shows a traceback.

Python runs a signal's handler in the main thread, and not before that returns from a compilation or a step. So a thread
hears of the signal too, through the file descriptor of ``signal.set_wakeup_fd``, and says so.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PATIENCE = 5.0  # seconds for the main thread to come to an end after an interrupt

_hears: Callable[[int], None] | None = None
_ear = _end = -1
_listener: threading.Thread | None = None
_caught_up = threading.Event()
_saying = threading.RLock()
_said = False


def leave(*_: Any) -> NoReturn:
    """A handler of SIGINT that ends the process on the spot."""
    interrupted()
    os._exit(128 + signal.SIGINT)


def leave_on_interrupt() -> None:
    """Makes Ctrl-C one line, and the status 130, while modules are imported."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored
        signal.signal(signal.SIGINT, leave)


def interrupted() -> None:
    """Says, once, that the process was interrupted, and gives its main thread some seconds to end."""
    global _said
    with _saying:  # who comes second may end the process, but not before it is said
        if _said:
            return
        _said = True
        with contextlib.suppress(OSError):
            os.write(2, b"\x1b[?25h\ninterrupted\n" if os.isatty(2) else b"interrupted\n")  # a bar hides the cursor
    timer = threading.Timer(_PATIENCE, os._exit, (128 + signal.SIGINT,))
    timer.daemon = True
    timer.start()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Inside, Ctrl-C raises KeyboardInterrupt; the process says so at once and ends with the status 130, also where the
    interrupt has become another error on its way, and where the main thread does not come to an end."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        yield
        return

    handled, heard = [], []

    def handle(number: int, _: Any) -> NoReturn:
        handled.append(number)
        raise KeyboardInterrupt

    def hear(number: int) -> None:
        if number == signal.SIGINT:
            heard.append(number)
            interrupted()
            if len(heard) > 1:
                os._exit(128 + number)

    signal.signal(signal.SIGINT, handle)
    _listen(hear)
    try:
        yield
    except BaseException as error:
        if handled or isinstance(error, KeyboardInterrupt):
            interrupted()
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
            os._exit(128 + signal.SIGINT)
        raise
    finally:
        signal.signal(signal.SIGINT, leave)


@contextlib.contextmanager
def caught(handle: Callable[[int, Any], None], hear: Callable[[int], None] | None = None) -> Iterator[None]:
    """Inside, signals do not end the process.

    Args:
      handle: their handler, which the main thread calls as soon as it can. SIGHUP stays ignored below nohup.
      hear: gets their numbers at once, in another thread.
    """
    chosen = [n for n in ENDING if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in chosen}
    terminals = [number for number in (1, 2) if os.isatty(number)]

    def heard(number: int) -> None:
        deadline = time.monotonic() + 2.0  # the signal may come a moment before the terminal goes
        while number == signal.SIGHUP and any(map(os.isatty, terminals)) and time.monotonic() < deadline:
            time.sleep(0.02)
        for terminal in terminals:
            if not os.isatty(terminal):  # what is said to it would be an error
                os.dup2(os.open(os.devnull, os.O_WRONLY), terminal)
        if hear is not None:
            hear(number)

    outside = _listen(heard)
    try:
        yield
    finally:
        _listen(outside)
        for number, handler in before.items():
            signal.signal(number, handler)


def _listen(hear: Callable[[int], None] | None) -> Callable[[int], None] | None:
    """From now on ``hear`` gets the numbers of signals that this process handles; returns who got them before, and has
    had all that came until now."""
    global _hears, _ear, _end, _listener
    if _listener is not None and _listener.is_alive():  # which it is not after a fork
        _caught_up.clear()
        os.write(_end, b"\0")
        _caught_up.wait(1)
    before, _hears = _hears, hear
    if _ear < 0:
        _ear, _end = os.pipe()
        os.set_blocking(_end, False)
        signal.set_wakeup_fd(_end, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1) and None)
        _listener = threading.Thread(target=_hear, daemon=True)
        _listener.start()
    return before


def _hear() -> None:
    while number := os.read(_ear, 1):
        if number[0] == 0:
            _caught_up.set()
        elif _hears is not None and number[0] in ENDING:
            with contextlib.suppress(Exception):
                _hears(number[0])
