"""Signals: heard while the main thread waits, one line and the status 130 after Ctrl-C, a terminal that hangs up."""

import fcntl
import hashlib
import os
import pathlib
import pty
import signal
import subprocess
import sys
import termios
import threading
import time

import pytest

from bigbase_jax.runtime import signals

ROOT = pathlib.Path(__file__).parents[1]
WAITS = "__import__('hashlib').pbkdf2_hmac('sha256', b'', b'', 20_000_000)"  # seconds in C, where no handler runs


def test_a_signal_is_heard_while_the_main_thread_waits_and_handled_after():
    handled, heard = [], threading.Event()

    def wait():  # in C, without the lock of the interpreter
        began = time.monotonic()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000)
        return time.monotonic() - began

    before = [signal.getsignal(number) for number in signals.ENDING]
    with signals.caught(
        lambda number, _: handled.append(number), lambda number: heard.set() or handled.append("heard")
    ):
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGHUP)).start()
        assert wait() > 0.2
        assert heard.wait(5)
    assert handled == ["heard", signal.SIGHUP]
    assert [signal.getsignal(number) for number in signals.ENDING] == before


def test_below_nohup_a_hangup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.caught(lambda *_: pytest.fail("it was handled")):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def interrupted(code, times=1, **kwargs):
    """A program that is interrupted once it has said that it is ready: (status, what it said after that)."""
    head = "from bigbase_jax.runtime import signals\nsignals._PATIENCE = 0.2\n"
    head += "ready = lambda: print('ready', flush=True)\n"
    command = [sys.executable, "-c", head + code]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=subprocess.STDOUT, text=True, **kwargs)
    assert process.stdout.readline() == "ready\n"
    for _ in range(times):
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    return process.returncode, said


@pytest.mark.parametrize(
    "code",
    [
        "signals.leave_on_interrupt(); ready()\nwhile True: pass",
        "with signals.interruptible(): ready(); __import__('time').sleep(60)",
        f"with signals.interruptible(): ready(); {WAITS}",
        "try:\n with signals.interruptible():\n  try: ready(); __import__('time').sleep(60)\n"
        "  except KeyboardInterrupt: raise ImportError('no multiarray')\nfinally: print('not reached')",
        "with signals.interruptible(): pass\nready()\nwhile True: pass",
    ],
    ids=["imports", "python", "compiled", "another error", "the end"],
)
def test_an_interrupt_is_one_line_wherever_it_comes(code):
    assert interrupted(code) == (130, "interrupted\n")


def test_an_interrupt_that_is_ignored_stays_ignored():
    code = "signals.leave_on_interrupt()\nwith signals.interruptible(): ready(); __import__('time').sleep(1)\nprint(1)"
    ignore = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)}
    assert interrupted(code, **ignore) == (0, "1\n")


def test_the_second_interrupt_of_a_process_that_does_not_end_ends_it():
    code = f"signals._PATIENCE = 60\nwith signals.interruptible(): ready(); {WAITS}"
    began = time.monotonic()
    assert interrupted(code, times=2) == (130, "interrupted\n")
    assert time.monotonic() - began < 30


def test_an_interrupt_of_the_launcher_while_it_imports_is_one_line():
    command = [sys.executable, str(ROOT / "launch.py"), "--mode=eval", "--workdir=/no/such/run"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while "numpy" not in pathlib.Path(f"/proc/{process.pid}/maps").read_text() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "interrupted\n")


def test_after_a_hangup_what_is_said_to_the_terminal_is_no_error():
    code = (
        "import sys, threading\nfrom bigbase_jax.runtime import signals\ncame = threading.Event()\n"
        "with signals.caught(lambda *_: None, lambda _: came.set()):\n"
        " print('ready', flush=True)\n while not came.wait(0.1): pass\n"
        " print('nobody reads this', flush=True); print('nor this', file=sys.stderr, flush=True)\nsys.exit(129)"
    )
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(slave)
    said = b""
    while b"ready\r\n" not in said:  # all of the line: half a write would fail
        said += os.read(master, 100)
    os.close(master)
    assert process.wait(60) == 129


def test_a_signal_is_heard_by_whom_it_was_meant_for(monkeypatch):
    """Also where who listens changes before the thread has read of it."""
    for _ in range(50):
        first, second = [], []
        with signals.caught(lambda *_: None, first.append):
            os.kill(os.getpid(), signal.SIGTERM)
        with signals.caught(lambda *_: None, second.append):
            os.kill(os.getpid(), signal.SIGHUP)
        assert (first, second) == ([signal.SIGTERM], [signal.SIGHUP])
