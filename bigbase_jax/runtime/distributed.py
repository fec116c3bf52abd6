"""Several processes, on one host or many: joining them, stopping together, noticing a loss; and a watchdog for steps.

JAX runs one program in all processes, and process 0 hosts a small key-value store that all of them reach. On it, a
thread in each process reports its step every second ("beat") and reads the few things all must know ("news"):

- a signal that one of them got, so that all stop after the same step;
- the end of one of them, or its silence, so that the others say who it was and end too, instead of waiting for ever in
  a collective operation that nobody answers.

Process 0 alone reads all beats: the traffic grows with the number of processes, not with its square.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

import jax

from bigbase_jax.core import UserError
from bigbase_jax.runtime import redact, signals

LOST = os.EX_TEMPFAIL
"""Exit status where another process was lost: the same command may be tried again."""
_TICK = 1.0  # seconds between beats
_SPAWNED = "BIGBASE_SPAWNED"  # tells a process of ``spawn`` its place
_DEVICES = re.compile(r"--xla_force_host_platform_device_count=(\d+)")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process is among the others.

    Attributes:
      coordinator: HOST:PORT of process 0, where the others find it.
      count: how many processes there are.
      index: which this is.
      devices: which of the host's accelerators are its own; None: all that it sees.
    """

    coordinator: str
    count: int
    index: int
    devices: list[int] | None = None


# ------------------------------------------------------------------------------------------------------- finding places


def find_place(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> Place | None:
    """The place that the flags, ``spawn``, or else SLURM, Open MPI, Kubernetes or Cloud TPU give this process.

    Nothing is waited for, and no network is asked, on a machine that is none of these.

    Returns:
      None: it is alone, as it also is with ``num_processes=1``.

    Raises:
      UserError: flags that do not fit together, or a cluster that does not say where the others are.
    """
    if _SPAWNED in os.environ:
        address, count, index = os.environ[_SPAWNED].split()
        return Place(address, int(count), int(index))
    given = {"--coordinator=HOST:PORT": coordinator, "--num_processes=N": num_processes, "--process_id=I": process_id}
    if all(value is None for value in given.values()):
        return _detected()
    if num_processes is not None and num_processes < 1:
        raise UserError(f"--num_processes={num_processes} is no number of processes; it must be at least 1.")
    if num_processes == 1 and not process_id:
        return None
    missing = [flag for flag, value in given.items() if value is None]
    if coordinator is None or num_processes is None or process_id is None:
        raise UserError(f"{', '.join(given)} go together; there is no {' and no '.join(missing)}.")
    if not re.fullmatch(r"\S+:\d+", coordinator):
        raise UserError(f"--coordinator={coordinator} is not HOST:PORT, as in --coordinator=10.0.0.1:8476.")
    if not 0 <= process_id < num_processes:
        raise UserError(f"--process_id={process_id} is not one of the {num_processes} from 0 to {num_processes - 1}.")
    return Place(coordinator, num_processes, process_id)


def _detected() -> Place | None:
    """The place that JAX's own detectors find; asked only where the environment says that there may be others."""
    from jax._src import clusters  # JAX's public entry joins at once, and cannot tell whether there is anything to join

    by_hand = "give --coordinator=HOST:PORT, --num_processes=N and --process_id=I, or --num_processes=1 to be alone."
    in_job = "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a missing kubernetes package; said below, where it matters
        for detector in clusters.ClusterEnv._cluster_types:
            if detector is clusters.K8sCluster and not in_job:
                continue  # a pod that no indexed Job numbers, such as a notebook, is alone
            try:
                if detector.opt_in_only_method or not detector.is_env_present():
                    continue
                count = detector.get_process_count()
                if count == 1:
                    return None
                port = os.environ.get("JAX_COORDINATOR_PORT")
                address = detector.get_coordinator_address(timeout_secs=300, override_coordinator_port=port)
                return Place(address, count, detector.get_process_id(), _own_devices(detector))
            except Exception as error:
                name = detector.__name__.removesuffix("Cluster")
                said = " ".join(str(error).split())
                raise UserError(f"{name} does not say where the other processes are ({said}); {by_hand}") from error
    if in_job:
        raise UserError(
            "this is a pod of an indexed Job, but the package that asks Kubernetes for the others is not installed; "
            f"pip install 'jax[k8s]', or {by_hand}"
        )
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        raise UserError(f"this Open MPI does not say where process 0 is (versions up to 4 do); {by_hand}")
    return None


def _own_devices(detector: Any) -> list[int] | None:
    """One accelerator for each process where a scheduler puts several on a host, unless it hides the others anyway.

    JAX gives every process of SLURM and Open MPI a single one, which would leave the rest of a host with one process
    idle.
    """
    local = detector.get_local_process_id()
    here = os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") or os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    alone = re.fullmatch(r"1(\(x\d+\))?", here)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    hidden = visible and "," not in visible
    return None if local is None or alone or hidden else [local]


# -------------------------------------------------------------------------------------------------------------- joining


@contextlib.contextmanager
def joined(place: Place | None, lost_after: float = 30.0, within: float = 300.0) -> Iterator[None]:
    """Around everything that touches devices: joins the others, and ends with them.

    Inside, ``sys.stdout`` is process 0's alone. Whatever ends one process inside the block ends all of them: an error
    is said once, and the process leaves without the clean-up in which JAX would wait for the others.

    Args:
      place: of this process; None: it is alone, and nothing is done.
      lost_after: seconds without a beat after which a process is lost.
      within: seconds in which all have to join.
    """
    global _group
    if place is None:
        yield
        return
    _keep_stdout_for_results(place.index == 0)
    relay = _Relay(place.coordinator) if place.index else None
    store = _meet(place, relay, lost_after, within)
    _group = _Group(store, place.index, place.count, lost_after, relay.broken if relay else None)
    try:
        yield
    except UserError as error:
        _group.fail(str(error), 2, f"error: {error}")
    except KeyboardInterrupt:
        signals.interrupted()
        _group.fail("interrupted", 128 + signal.SIGINT, "")
    except BaseException as error:
        _group.await_verdict()
        first = (str(error).strip() or "no message").splitlines()[0]
        _group.fail(f"{type(error).__name__}: {first}", 1, traceback.format_exc())
    _group.close()
    _group = None
    jax.distributed.shutdown()


def _meet(place: Place, relay: _Relay | None, lost_after: float, within: float) -> Any:
    """Joins the others; returns JAX's client of the key-value store that process 0 hosts."""
    from jax._src.distributed import global_state  # the store has no public name

    sentence = (
        f"error: after {within:.0f} s not all of the {place.count} processes have come to {place.coordinator}; start "
        "the same command on every host, or give --num_processes=1 to be alone."
    )
    late = threading.Timer(within, _exit, (sentence, LOST))  # ahead of XLA's, which ends the process with a stack trace
    late.daemon = True
    late.start()
    os.environ["no_grpc_proxy"] = "127.0.0.1"  # noqa: SIM112  # all that XLA connects to below
    for name in ("jax_check_proxy_envs", "jax_enable_preemption_service"):  # the second takes SIGTERM for itself
        with contextlib.suppress(AttributeError):
            jax.config.update(name, False)
    jax.distributed.initialize(
        relay.address if relay else f"127.0.0.1:{place.coordinator.rpartition(':')[2]}",
        place.count,
        place.index,
        local_device_ids=place.devices,
        coordinator_bind_address=place.coordinator if place.coordinator.startswith("127.") else None,
        cluster_detection_method="deactivate",
        initialization_timeout=int(within) + 60,
        heartbeat_timeout_seconds=int(4 * lost_after) + 60,  # XLA's verdict would be a stack trace, too
    )
    late.cancel()
    if relay:
        relay.joined.set()
    return global_state.client


def _exit(sentence: str, status: int) -> NoReturn:
    """Says ``sentence`` and ends this process at once: JAX's own end would wait for the other processes."""
    with contextlib.suppress(OSError, ValueError):  # nobody reads any more
        if sentence:
            print(redact.hide(sentence), file=sys.stderr)
        if sys.stderr.isatty():
            sys.stderr.write("\x1b[?25h")  # the cursor, which a progress bar hides
        sys.stderr.flush()
        sys.stdout.flush()
    os._exit(status)


def about_to_end() -> None:
    """Before what a process still does after an error that ends all: the end of another one does not cut it short."""
    if _group is not None:
        _group.failed.set()


class _Group:
    """This process's part in the group: two threads, which go on whatever the main thread waits for.

    Keys in the store, all below ``bigbase/``:
      ``beat/I``: {"host", "step", "count"} of process I, rewritten every second; ``news/first`` that of process 0;
      ``news/stop``: the number of a signal; ``stop/I``: the last step that process I ended before it heard of it;
      ``news/end``: {"by", "mistake", "sentence", "status"}, written once; ``gone/I``: process I has read it.
    """

    def __init__(self, store: Any, index: int, count: int, lost_after: float, broken: threading.Event | None = None):
        """Starts the threads; ``broken`` says that the connection to process 0, which hosts ``store``, broke off."""
        self.index, self.count, self.asked = index, count, 0
        self.step: int | None = None  # the last that ended here
        self.signal: int | None = None  # that all stop for
        self.failed = threading.Event()  # the main thread is about to end all
        self._store, self._lost_after = store, lost_after
        self._broken = broken or threading.Event()
        self._stop_at: int | None = None
        self._deciding = False
        self._changed = threading.Condition()
        self._over, self._speaking = threading.Event(), threading.Lock()
        self._awake = self._heard = 0.0  # seconds of running (a stopped process counts none), now and at the last news
        self._beats: dict[int, tuple[dict[str, Any], float]] = {}  # of each process: its newest, and when it came
        self._beaten = 0
        self._parent = os.getppid() if _SPAWNED in os.environ else None
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._talk, self._judge)]
        for thread in self._threads:
            thread.start()

    # ------------------------------------------------------------------------------------------------- main thread

    def ends(self, step: int) -> bool:
        """Notes that ``step`` has ended here; True: all processes stop after it.

        The step is agreed, not guessed: when a process hears of the signal, its main thread is held here until all have
        written which step they ended last; all stop after the one that follows the largest. No process has ended that
        one yet, since each passes here first, and each can reach it, since none is held before the others have caught
        up. It costs nothing in steps without a signal, and assumes nothing of how far processes run ahead.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._deciding)
            self.step = step
            return self._stop_at is not None and step >= self._stop_at

    def fail(self, mistake: str, status: int, told: str) -> NoReturn:
        """Ends all processes and tells why; of several that make the same mistake the first alone does."""
        self.failed.set()
        mistake = redact.hide(mistake)  # others will say it, who may not know what is secret
        sentence = f"error: {self._name(self.index)} ended{self._after(self.step)}: {mistake}"
        try:
            end = self._claim({"by": self.index, "mistake": mistake, "sentence": sentence, "status": status})
        except RuntimeError:  # process 0 is gone, as ``_judge`` is about to say
            time.sleep(self._lost_after + 10 * _TICK)
            end = {"by": self.index, "status": status}
        if end["by"] != self.index:
            told = "" if end["mistake"] == mistake else end["sentence"]
        self._leave(told, end["status"])

    def await_verdict(self) -> None:
        """After an error that a loss elsewhere may have caused: returns when all others were heard from since.

        Does not return if one was lost: ``_judge`` or ``_obey`` ends the process then.
        """
        before: dict[str, str] | None = None
        for _ in range(int(self._lost_after / _TICK) + 10):
            with contextlib.suppress(RuntimeError):
                now = self._get("beat")
                before = before or now
                if len(now) == self.count and all(now[key] != before.get(key) for key in now):
                    return
            time.sleep(_TICK)

    def close(self) -> None:
        """Waits until all processes are here, then parts from them. A process that is lost until then is noticed."""
        self._store.wait_at_barrier("bigbase/end", 24 * 3600 * 1000)
        self._over.set()
        for thread in self._threads:
            thread.join()

    # ------------------------------------------------------------------------------------------------- threads

    def _talk(self) -> None:
        """Beats, and reads the news."""
        while not self._over.wait(_TICK / 10 if self._deciding else _TICK):
            with contextlib.suppress(RuntimeError):  # no answer; ``_judge`` counts the seconds
                self._beat()
                news = self._get("news")
                self._heard = self._awake
                if "first" in news:
                    self._note(0, news["first"])
                if "stop" in news:
                    self._agree(int(news["stop"]))
                if "end" in news:
                    self._obey(json.loads(news["end"]))

    def _beat(self) -> None:
        self._beaten += 1
        beat = json.dumps({"host": socket.gethostname(), "step": self.step, "count": self._beaten})
        self._set(f"beat/{self.index}", beat)
        if self.asked:
            self._set("news/stop", str(self.asked))
        if self.index == 0:
            self._set("news/first", beat)
            beats = self._get("beat")
            for index in range(1, self.count):
                self._note(index, beats.get(str(index), "{}"))
                if self._awake - self._beats[index][1] > self._lost_after:
                    self._lost(index)

    def _note(self, index: int, reported: str) -> None:
        beat = json.loads(reported)
        if index not in self._beats or self._beats[index][0] != beat:
            self._beats[index] = beat, self._awake

    def _agree(self, number: int) -> None:
        """One move towards the step after which all stop; see ``ends``."""
        if self._stop_at is not None:
            return
        with self._changed:
            self._deciding = True
        self._set(f"stop/{self.index}", str(self.step or 0))
        last = self._get("stop")
        if len(last) == self.count:
            with self._changed:
                self.signal, self._stop_at = number, max(map(int, last.values())) + 1
                self._deciding = False
                self._changed.notify_all()

    def _obey(self, end: dict[str, Any]) -> None:
        """Leaves because another process ends, unless the main thread is about to say so itself."""
        if end["by"] != self.index and not self.failed.wait(3 * _TICK):
            self._leave(end["sentence"], end["status"])

    def _judge(self) -> None:
        """Notices that process 0, which hosts the store, is gone or silent: it is the one that cannot tell."""
        last = time.monotonic()
        while not self._over.wait(_TICK / 2):
            now = time.monotonic()
            self._awake += min(now - last, 2 * _TICK)
            last = now
            if self._parent is not None and os.getppid() != self._parent:
                self._leave("error: the command that started this process is gone.", LOST, tell=False)
            if self.index and (self._broken.is_set() or self._awake - self._heard > self._lost_after):
                self._lost(0)

    def _lost(self, index: int) -> None:
        beat, when = self._beats.get(index, ({}, self._awake))
        silence = f"nothing was heard from it for {self._awake - when:.0f} s"
        if index == 0 and self._broken.is_set():
            silence = "its connection broke off"
        sentence = (
            f"error: {self._name(index, beat.get('host'))} was lost{self._after(beat.get('step'))} ({silence}); "
            "the same command goes on from the last checkpoint."
        )
        if index:
            end = {"by": self.index, "mistake": "", "sentence": sentence, "status": LOST}
            with contextlib.suppress(RuntimeError):
                sentence = self._claim(end)["sentence"]
        self._leave(sentence, LOST, tell=bool(index), without=index)

    def _leave(self, sentence: str, status: int, tell: bool = True, without: int = -1) -> NoReturn:
        """Says ``sentence`` and exits; process 0 only when the others have read why, or after some seconds."""
        if not self._speaking.acquire(blocking=False):
            time.sleep(60)  # another thread is leaving
        if tell:
            farewell = threading.Thread(target=self._farewell, args=(without,), daemon=True)
            farewell.start()
            farewell.join(10 * _TICK)
        _exit(sentence, status)

    def _farewell(self, without: int) -> None:
        with contextlib.suppress(RuntimeError):
            self._set(f"gone/{self.index}", "")
            while self.index == 0 and len(self._get("gone").keys() | {str(without), "0"} - {"-1"}) < self.count:
                time.sleep(_TICK / 10)

    # ------------------------------------------------------------------------------------------------- the store

    def _set(self, key: str, value: str) -> None:
        self._store.key_value_set(f"bigbase/{key}", value, allow_overwrite=True)

    def _get(self, folder: str) -> dict[str, str]:
        found = self._store.key_value_dir_get(f"bigbase/{folder}/")
        return {key.rpartition("/")[2]: value for key, value in found}

    def _claim(self, end: dict[str, Any]) -> dict[str, Any]:
        """Writes ``news/end`` unless there is one; returns the one that is there."""
        with contextlib.suppress(RuntimeError):
            self._store.key_value_set("bigbase/news/end", json.dumps(end), allow_overwrite=False)
        return json.loads(self._get("news")["end"])

    def _name(self, index: int, host: str | None = None) -> str:
        host = host or (socket.gethostname() if index == self.index else None)
        return f"process {index}" + (f" on {host}" if host else "")

    def _after(self, step: int | None) -> str:
        return " before the first step" if step is None else f" after step {step}"


_group: _Group | None = None  # of this process, while there is one


class _Relay:
    """Carries this process's connections to process 0, and keeps this end open when that one breaks off.

    XLA's client aborts the process with a stack trace at the moment that process 0 closes the connection. Behind the
    relay it sees a silence instead, and there is time to say in one sentence who was lost.

    Attributes:
      address: HOST:PORT to connect to instead of process 0's.
      joined: set by the user, once all have joined; until then, connections may come and go.
      broken: a connection broke off at process 0's end after that.
    """

    def __init__(self, coordinator: str):
        host, _, port = coordinator.rpartition(":")
        self._coordinator = host.strip("[]"), int(port)
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = "{}:{}".format(*self._server.getsockname())
        self.joined, self.broken = threading.Event(), threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, _ = self._server.accept()
            threading.Thread(target=self._connect, args=(near,), daemon=True).start()

    def _connect(self, near: socket.socket) -> None:
        try:
            far = socket.create_connection(self._coordinator, timeout=10)
        except OSError:  # process 0 has not started yet; the client tries again
            near.close()
            return
        far.settimeout(None)
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        parted = threading.Event()  # by this process itself

        def outward() -> None:
            self._carry(near, far)
            parted.set()
            with contextlib.suppress(OSError):
                far.shutdown(socket.SHUT_RDWR)

        threading.Thread(target=outward, daemon=True).start()
        self._carry(far, near)
        if not self.joined.is_set():  # an earlier start of process 0 has ended; the client tries again
            near.shutdown(socket.SHUT_RDWR)
        elif not parted.is_set():
            self.broken.set()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)


def _keep_stdout_for_results(first: bool) -> None:
    """Leaves standard output to process 0's ``print``; what C++ libraries write there (gloo does) goes to stderr."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w") if first else open(os.devnull, "w")  # noqa: SIM115
    os.dup2(2, 1)


# ---------------------------------------------------------------------------------------------------- around the loop


class Watch:
    """Around the training loop: collects signals to stop for, and reports steps that take too long.

    SIGTERM (preemption), SIGINT and SIGHUP end the loop after a step, in all processes after the same one, even if only
    one of them got it; a SIGINT after that interrupts at once. A step that takes longer than ``stall_after`` is named
    on stderr, with the stacks of all threads, once.

    Args:
      stall_after: seconds; None: steps may take for ever.
      start: the last step before the loop.
      tell: says at once that a signal has come.

    Attributes:
      signal: the number of the signal that ended the loop, the same in all processes; None: no signal did.
    """

    def __init__(self, stall_after: float | None, start: int = 0, tell: Callable[[str], None] | None = None):
        self._stall_after, self._step, self._tell = stall_after, start, tell
        self._received: list[int] = []
        self._heard = False
        self._pauses = 0
        self._over = threading.Event()
        self._caught = signals.caught(self._receive, self._hear)
        self.signal: int | None = None

    def __enter__(self) -> Watch:
        self._caught.__enter__()
        if _group is not None:
            _group.step = self._step
        if self._stall_after is not None:
            threading.Thread(target=self._guard, args=(self._stall_after,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._caught.__exit__(None, None, None)

    def ends(self, step: int) -> bool:
        """Notes that ``step`` has ended; whether the loop ends with it because of a signal."""
        self._step = step
        if _group is None:
            self.signal = next(iter(self._received), None)
        elif _group.ends(step):
            self.signal = _group.signal
        return self.signal is not None

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Around what is not a step: evaluations and checkpoints take the time they take."""
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._received:
            raise KeyboardInterrupt
        self._received.append(number)
        if _group is not None:
            _group.asked = number

    def _hear(self, number: int) -> None:
        if self._heard and number == signal.SIGINT:
            signals.interrupted()
        elif not self._heard and self._tell is not None:
            again = "; Ctrl-C again stops it at once, without" if number == signal.SIGINT else ""
            self._tell(f"{signal.Signals(number).name}: the run stops after this step, with a checkpoint{again}")
        self._heard = True

    def _guard(self, stall_after: float) -> None:
        tick = min(1.0, stall_after / 4)
        step, waited = self._step, 0.0  # in ticks of this thread, so that a stopped process does not count
        while not self._over.wait(tick):
            if step != self._step or self._pauses:
                step, waited = self._step, 0.0
                continue
            waited += tick
            if waited >= stall_after > waited - tick:
                told = f"step {step + 1} has taken {waited:.0f} s (config.train.watchdog); the stacks of all threads:"
                print(told, file=sys.__stderr__, flush=True)
                faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)


# ------------------------------------------------------------------------------------------------------------- spawning


def spawn(count: int, lost_after: float = 30.0) -> int | None:
    """Runs the command that this process was started with as ``count`` processes on this machine's CPU, to try it out.

    Simulated devices (``--xla_force_host_platform_device_count`` in ``XLA_FLAGS``) are divided among them. Standard
    output is that of process 0; the lines of standard error begin with ``[I]``. Signals go to all. When one has failed,
    the others have the time to say so before they are stopped.

    Returns:
      The exit status of the first that failed, or 0; None: this process is itself one of them.

    Raises:
      UserError: the devices do not divide.
    """
    if _SPAWNED in os.environ:
        return None
    if count < 1:
        raise UserError(f"--spawn={count} is no number of processes; it must be at least 1.")
    flags = os.environ.get("XLA_FLAGS", "")
    for devices in map(int, _DEVICES.findall(flags)):
        if devices % count:
            raise UserError(f"--spawn={count}: the {devices} simulated devices of XLA_FLAGS do not divide over it.")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = "{}:{}".format(*server.getsockname())
    share = _DEVICES.sub(lambda m: m[0].replace(m[1], str(int(m[1]) // count)), flags)
    children: list[subprocess.Popen] = []
    pumps = []
    command, arguments = redact.child([sys.executable, *sys.argv])

    def forward(number: int, _: FrameType | None) -> None:
        for child in children:
            child.send_signal(number)

    with signals.caught(forward):
        for index in range(count):
            place = {_SPAWNED: f"{address} {count} {index}", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": share}
            child = subprocess.Popen(
                command,
                env={**os.environ, **arguments, **place},
                stdin=subprocess.DEVNULL,
                stdout=None if index == 0 else subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                process_group=0,  # else the terminal's Ctrl-C would reach them twice
            )
            children.append(child)
            pumps.append(threading.Thread(target=_pump, args=(child.stderr, f"[{index}] "), daemon=True))
            pumps[-1].start()
        status = _first_failure(children, lost_after + 30)
    for pump in pumps:
        pump.join()
    return status


def _first_failure(children: list[subprocess.Popen], patience: float) -> int:
    """Waits for all; ``patience`` seconds after the first has failed those that are left are killed."""
    status, deadline = 0, float("inf")
    while running := [child for child in children if child.poll() is None]:
        if not status:
            status = next((child.returncode for child in children if child.returncode), 0)
            deadline = time.monotonic() + patience if status else deadline
        if time.monotonic() > deadline:
            for child in running:
                child.kill()
        time.sleep(0.05)
    status = status or next((child.returncode for child in children if child.returncode), 0)
    return status if status >= 0 else 128 - status


def _pump(stream: Any, prefix: str) -> None:
    for line in stream:
        sys.stderr.write(prefix + line.decode(errors="replace"))
        sys.stderr.flush()
