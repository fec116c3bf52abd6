"""The doctor: every diagnosis from faked facts, the stages in child processes, this machine for real.

``HEALTHY`` is a machine with one H100 on which nothing is wrong; each case changes one thing and names everything that
is then said to be wrong, so that a diagnosis neither stays silent nor drags others along.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import pytest

from bigbase_jax import doctor
from bigbase_jax.doctor import checks, machine, stages
from bigbase_jax.doctor.machine import Machine

ROOT = pathlib.Path(__file__).parents[1]
BASE = {"bigbase-jax": "0.1.0", "jax": "0.10.2", "jaxlib": "0.10.2"}
CUDA12, CUDA13 = ({f"jax-cuda{n}-{part}": "0.10.2" for part in ("plugin", "pjrt")} for n in (12, 13))
DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Thu Feb 22 2024"
FILES = {
    "/proc/driver/nvidia/version": DRIVER.format("560.35.03"),
    "/dev/nvidia0": "",
    "/proc/meminfo": "MemTotal:       65536000 kB\nMemAvailable:   60000000 kB\n",
}
NO_GPU = {"/proc/driver/nvidia/version": None, "/dev/nvidia0": None}
AGAIN = "python launch.py --mode=doctor"


def fake_root(tmp_path, files):
    for name, text in files.items():
        path = tmp_path / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def started(backend="cpu", count=1, **errors):
    """The stages of a machine on which everything went well on these devices."""
    work = {"folder": "runs", "free": 1e12, "rate": 1e9}
    cache = {"folder": "/cache", "free": 1e12, "rate": 1e3}
    return {
        "import": {"jax": "0.10.2"},
        "devices": {"backend": backend, "kinds": [backend.upper()] * count, **errors},
        "collectives": {"wrong": {}},
        "step": {"finite": True, "kept": True},
        "host": {"folders": {"workdir": work, "BIGBASE_CACHE": cache}, "shared": 8e9, "open_files": 4096},
    }


def until(name, error):
    """The stages of a child process that did not get past ``name``."""
    whole = started()
    reached = {n: whole[n] for n in list(whole)[: list(whole).index(name)]}
    return {**reached, name: {"error": error}, "host": whole["host"]}


def host(**changes):
    return {**started(), "host": {**started()["host"], **changes}}


def on_disk(name="workdir", **facts):
    folders = started()["host"]["folders"]
    return host(folders={**folders, name: {**folders.get(name, {}), **facts}})


HEALTHY = Machine(
    versions={**BASE, **CUDA12}, pip=(0, "No broken requirements found."), stages=started("gpu"), env={"HOME": "/"}
)
PLAIN = dataclasses.replace(HEALTHY, versions=BASE, stages=started())


def judged(tmp_path, base=HEALTHY, files=(), versions=(), **changes):
    """All checks of a machine that differs from ``base`` in this."""
    files = {name: text for name, text in {**FILES, **dict(files)}.items() if text is not None}
    found = {name: v for name, v in {**base.versions, **dict(versions)}.items() if v is not None}
    return checks.judge(dataclasses.replace(base, root=fake_root(tmp_path, files), **{"versions": found, **changes}))


def wrong(found):
    """What is said to be wrong, without the sentences and the comments behind commands."""
    assert not [check.text for check in found if "check itself failed" in check.text]
    return [(c.status, c.name, c.fix.partition("  #")[0]) for c in found if c.status in ("problem", "warning")]


def sentences(found):
    return " | ".join(check.text for check in found)


@pytest.mark.parametrize(("base", "files"), [(HEALTHY, {}), (PLAIN, NO_GPU)], ids=["an H100", "only a processor"])
def test_nothing_is_wrong_with_a_healthy_machine(tmp_path, base, files):
    found = judged(tmp_path, base, files)
    assert wrong(found) == [] and [check.name for check in found] == ["packages", "devices", "disk"]


PAGES = "sys/kernel/mm/transparent_hugepage/enabled"
MADVISE = "always [madvise] never"


@pytest.mark.parametrize(
    ("setting", "env", "expected"),
    [
        (MADVISE, {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.top_pad=1"}, ("ok", "")),
        (MADVISE, {"LD_PRELOAD": "libjemalloc.so.2", "MALLOC_CONF": "thp:always,narenas:1"}, ("ok", "")),
        (MADVISE, {"LD_PRELOAD": "libjemalloc.so.2"}, ("note", "unset LD_PRELOAD")),
        ("[always] madvise never", {}, ("ok", "")),
        (MADVISE, {"GLIBC_TUNABLES": ""}, ("note", "unset GLIBC_TUNABLES")),
        (MADVISE, {"MALLOC_ARENA_MAX": "1"}, ("note", "unset MALLOC_ARENA_MAX")),
        ("always madvise [never]", {}, ("note", f"echo madvise | sudo tee /{PAGES}")),
        (MADVISE, {}, None),  # the doctor alone, which is no command that starts anew
    ],
)
def test_huge_pages_are_on_or_it_says_why_not(tmp_path, setting, env, expected):
    found = judged(tmp_path, PLAIN, {**NO_GPU, PAGES: setting}, env=env)
    assert next(((c.status, c.fix) for c in found if c.name == "huge pages"), None) == expected
    assert "huge pages" not in [c.name for c in judged(tmp_path, HEALTHY, {PAGES: setting}, env=env)]


# ------------------------------------------------------------------------------------------------------------ packages

PLUGIN = "pip install -e '.[cuda12]'"


@pytest.mark.parametrize(
    ("changes", "expected", "said"),
    [
        ({"versions": {"bigbase-jax": None}}, ("problem", "packages", "pip install -e ."), "is not installed in"),
        (
            {"pip": (1, "foo 1 has requirement bar<2, but you have bar 3.\njax 0.10.2 requires numpy, which is not")},
            ("problem", "packages", "pip install -e ."),
            "jax 0.10.2 requires numpy",
        ),
        ({"pip": (1, "foo 1 has requirement bar<2.")}, ("warning", "packages", "pip check"), "foo 1 has"),
        ({"pip": (1, "No module named pip")}, None, "did not answer"),
        ({"versions": dict.fromkeys(CUDA12, "0.10.1")}, ("problem", "packages", PLUGIN), "plugin of another version"),
        (
            {"versions": {"jax-cuda12-pjrt": None}},
            ("problem", "packages", PLUGIN),
            "jax-cuda12-plugin 0.10.2, jax-cuda12-pjrt no beside",
        ),
    ],
)
def test_packages(tmp_path, changes, expected, said):
    found = judged(tmp_path, **changes)
    assert wrong(found) == ([expected] if expected else []) and said in sentences(found)


# -------------------------------------------------------------------------------------------------------- accelerators

ON_CPU = {"stages": started(cuda="Unknown backend: 'cuda'. CUDA_ERROR_NO_DEVICE")}
NO_PLUGIN = dict.fromkeys(CUDA12)
UBUNTU = "sudo ubuntu-drivers install && sudo reboot"
TO_12 = "pip uninstall -y jax-cuda13-plugin jax-cuda13-pjrt && pip install --force-reinstall -e '.[cuda12]'"
CARD = {"/sys/bus/pci/devices/0/vendor": "0x10de", "/sys/bus/pci/devices/0/class": "0x030200"}


def driver(version):
    return {"files": {"/proc/driver/nvidia/version": DRIVER.format(version)}}


@pytest.mark.parametrize(
    ("changes", "expected", "said"),
    [
        ({"versions": NO_PLUGIN}, ("problem", PLUGIN), "no CUDA plugin"),
        (
            {"versions": NO_PLUGIN, **driver("for x86_64  580.65.06")},
            ("problem", "pip install -e '.[cuda13]'"),
            "no CUDA plugin",
        ),
        (driver("470.57.02"), ("problem", UBUNTU), "CUDA 12 needs driver 525 or newer, not 470.57.02"),
        ({"versions": {**NO_PLUGIN, **CUDA13}}, ("problem", TO_12), "CUDA 13 needs driver 580 or newer"),
        ({"versions": {**NO_PLUGIN, **CUDA13}, "stages": started("gpu")}, None, "1 x GPU"),
        ({"files": {"/dev/nvidia0": None}}, ("problem", "docker run --gpus all IMAGE"), "no /dev/nvidia0"),
        ({"files": {**NO_GPU, **CARD}, "versions": NO_PLUGIN}, ("problem", UBUNTU), "not none"),
        ({"env": {"JAX_PLATFORMS": "cpu"}}, ("warning", "unset JAX_PLATFORMS"), "JAX_PLATFORMS=cpu keeps JAX from"),
        ({"env": {"CUDA_VISIBLE_DEVICES": "-1"}}, ("warning", "unset CUDA_VISIBLE_DEVICES"), "keeps JAX from using"),
        ({"files": {"/dev/nvidia0": None, "/dev/nvidia3": ""}}, ("problem", "nvidia-smi -L"), "CUDA_ERROR_NO_DEVICE"),
    ],
)
def test_a_gpu_that_is_not_used(tmp_path, changes, expected, said):
    found = judged(tmp_path, **{**ON_CPU, **changes})
    assert wrong(found) == ([(expected[0], "gpu", expected[1])] if expected else [])
    assert said in sentences(found)


@pytest.mark.parametrize(
    ("log", "fix", "said"),
    [
        ("Failed: CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "sudo reboot", "DRIVER_MISMATCH"),
        ("CUDA_ERROR_SYSTEM_NOT_READY: not yet", "sudo systemctl restart nvidia-fabricmanager", "SYSTEM_NOT_READY"),
        (
            "x\nCUDA driver version is insufficient for CUDA runtime version\ny",
            PLUGIN,
            "driver version is insufficient",
        ),
        ("RuntimeError: Unable to load cuSPARSE. Is it installed?", "unset LD_LIBRARY_PATH", "Unable to load cuSPARSE"),
        ("something unheard of", "pip install --force-reinstall -e '.[cuda12]'", "something unheard of"),
    ],
)
def test_what_jax_says_when_it_falls_back_to_the_cpu_is_quoted_with_what_mends_it(tmp_path, log, fix, said):
    found = judged(tmp_path, stages=started(), log=log)
    assert wrong(found) == [("problem", "gpu", fix)]
    assert "JAX runs on the CPU" in sentences(found) and said in sentences(found)


V5E = {**NO_GPU, "/sys/bus/pci/devices/0/vendor": "0x1ae0", "/sys/bus/pci/devices/0/class": "0x120000"}
V5E |= {"/sys/bus/pci/devices/1/vendor": "0x1ae0", "/sys/bus/pci/devices/1/class": "0x020000"}  # its network card
LIBTPU = {"libtpu": "0.0.42.1"}
BUSY = "sudo lsof -w /dev/accel* /dev/vfio/*"


@pytest.mark.parametrize(
    ("files", "versions", "facts", "env", "expected", "said"),
    [
        (V5E, LIBTPU, started("tpu"), {}, [], "1 x TPU"),
        (V5E, {}, started(), {}, [("problem", "pip install -e '.[tpu]'")], "libtpu is not installed"),
        (V5E, LIBTPU, started(), {"JAX_PLATFORMS": "cpu"}, [("warning", "unset JAX_PLATFORMS")], "keeps JAX from"),
        (
            V5E,
            LIBTPU,
            until("devices", "RuntimeError: The TPU is already in use by process with pid 2718466. Not attempting"),
            {},
            [("problem", "kill 2718466")],
            "already in use",
        ),
        (
            V5E,
            LIBTPU,
            until("devices", "RuntimeError: open(/dev/vfio/1): Device or resource busy: Couldn't open iommu group"),
            {},
            [("problem", BUSY)],
            "resource busy",
        ),
        (
            V5E,
            LIBTPU,
            started(tpu="Backend 'tpu' failed to initialize: open(/dev/vfio/0): Permission denied"),
            {},
            [("problem", "ls -l /dev/vfio/0")],
            "Permission denied",
        ),
        (V5E, LIBTPU, until("devices", "no answer within 240 s"), {}, [("problem", BUSY)], "other hosts of the slice"),
    ],
)
def test_tpu(tmp_path, files, versions, facts, env, expected, said):
    found = judged(tmp_path, PLAIN, files, versions, env=env, stages=facts)
    assert [(status, fix) for status, _, fix in wrong(found)] == expected, sentences(found)
    assert said in sentences(found)


# ------------------------------------------------------------------------------------- what JAX does, and does not do


@pytest.mark.parametrize(
    ("name", "error", "changes", "fix", "said"),
    [
        (
            "import",
            "ModuleNotFoundError: No module named 'jaxlib'",
            {},
            "pip install --force-reinstall -e .",
            "named 'jaxlib'",
        ),
        ("import", "killed by SIGILL", {"log": "a\n"}, "pip install --force-reinstall -e .", "killed by SIGILL | a"),
        ("devices", "no answer within 240 s", {}, f"JAX_PLATFORMS=cpu {AGAIN}", "no answer within 240 s"),
        (
            "devices",
            "AssertionError: ",
            {"env": {"JAX_PLATFORMS": "cuda"}},
            "unset JAX_PLATFORMS",
            "JAX_PLATFORMS being cuda",
        ),
        ("devices", "killed by SIGABRT", {"log": "a\nUnknown flags in XLA_FLAGS: --x\nb"}, "unset XLA_FLAGS", ": --x"),
        (
            "collectives",
            "no answer within 240 s",
            {},
            f"NCCL_DEBUG=INFO NCCL_P2P_DISABLE=1 {AGAIN}",
            "psum and ppermute",
        ),
        ("step", "XlaRuntimeError: INTERNAL: ptxas not found", {}, f"JAX_PLATFORMS=cpu {AGAIN}", "ptxas not found"),
    ],
)
def test_a_jax_that_does_not_work(tmp_path, name, error, changes, fix, said):
    found = judged(tmp_path, PLAIN, NO_GPU, stages=until(name, error), **changes)
    assert wrong(found) == [("problem", name, fix)] and said in sentences(found)


def test_a_gpu_whose_start_hangs_is_the_drivers_problem(tmp_path):
    found = judged(tmp_path, stages=until("devices", "no answer within 240 s"))
    assert wrong(found) == [("problem", "devices", "sudo reboot")]


@pytest.mark.parametrize(
    ("name", "facts", "status"),
    [
        ("collectives", {"wrong": {"psum": [1]}}, "problem"),
        ("step", {"finite": False, "kept": True}, "problem"),
        ("step", {"finite": True, "kept": False}, "warning"),
    ],
)
def test_what_jax_computes_or_keeps_wrongly(tmp_path, name, facts, status):
    found = judged(tmp_path, PLAIN, NO_GPU, stages={**started(count=2), name: facts})
    assert [(s, n) for s, n, _ in wrong(found)] == [(status, name)]


# ------------------------------------------------------------------------------------------------ memory, disk, limits


@pytest.mark.parametrize(
    ("files", "low"),
    [
        ({"/proc/meminfo": "MemTotal: 8000000 kB\nMemAvailable: 500000 kB\n"}, True),
        ({"/sys/fs/cgroup/memory.max": "1073741824"}, True),
        ({"/sys/fs/cgroup/memory.max": "max"}, False),
    ],
)
def test_memory(tmp_path, files, low):
    found = judged(tmp_path, PLAIN, {**NO_GPU, **files})
    assert [name for _, name, _ in wrong(found)] == (["memory"] if low else [])


@pytest.mark.parametrize(
    ("facts", "status", "said"),
    [
        ({}, "ok", "runs: 1000 MB/s, 1e+03 GB free"),
        ({"refused": "Permission denied"}, "problem", "cannot be written: Permission denied"),
        ({"refused": "No space left on device"}, "problem", "No space left on device"),
        ({"free": 3e8}, "problem", "too little for checkpoints"),
        ({"free": 3e9}, "warning", "too little for checkpoints"),
        ({"rate": 5e6}, "warning", "so slow"),
    ],
)
def test_the_work_folder(tmp_path, facts, status, said):
    found = judged(tmp_path, PLAIN, NO_GPU, stages=on_disk(**facts))
    ((given, text, fix),) = [(check.status, check.text, check.fix) for check in found if check.name == "disk"]
    assert given == status and said in text and bool(fix) == (status != "ok")


@pytest.mark.parametrize(
    ("facts", "status", "fix"),
    [
        (on_disk("BIGBASE_CACHE", refused="Permission denied"), "warning", "export BIGBASE_CACHE=DIR"),
        ({**started(), "host": {"error": "no answer within 60 s"}}, "problem", "unset BIGBASE_CACHE"),
    ],
)
def test_folders_of_caches(tmp_path, facts, status, fix):
    ((given, name, command),) = wrong(judged(tmp_path, PLAIN, NO_GPU, stages=facts))
    assert (given, name) == (status, "disk") and command.startswith(fix)


def test_limits(tmp_path):
    found = judged(tmp_path, PLAIN, NO_GPU, stages=host(open_files=256, shared=64e6))
    assert wrong(found) == [("warning", "open files", "ulimit -n 4096")]
    found = judged(tmp_path, stages={**started("gpu", 2), "host": host(open_files=-1, shared=64e6)["host"]})
    assert wrong(found) == [("warning", "memory", "docker run --shm-size=8g IMAGE")]


def test_a_check_that_fails_itself_is_a_warning(tmp_path):
    found = judged(tmp_path, PLAIN, NO_GPU, stages={**started(), "host": {}})
    assert [c.status for c in found if "this check itself failed (KeyError: 'folders')" in c.text] == ["warning"]


# -------------------------------------------------------------------------------------- the report, and child processes


def test_the_report_names_no_user_host_home_or_secret():
    hide = doctor.hider({"HOME": "/home/alice", "USER": "alice"})
    assert hide("/home/alice/runs, /home/alice") == "~/runs, ~" and hide("/scratch/alice/x") == "/scratch/USER/x"
    assert hide(json.dumps("a /home/alice\nb")) == json.dumps("a ~\nb")
    assert hide("/home/alicia/y /home/bob/z") == "/home/USER/y /home/USER/z"
    assert hide("XLA_FLAGS=--a JAX_COORDINATOR_ADDRESS=10.0.0.7:1") == "XLA_FLAGS=--a JAX_COORDINATOR_ADDRESS=***"
    host = doctor.socket.gethostname()
    if len(host) > 3 and host != "localhost":
        assert hide(f"worker {host}:8080 said") == "worker HOST:8080 said"


FOLDERS = {"JAX_COMPILATION_CACHE_DIR": "/nowhere"}


def test_a_driver_that_hangs_while_jax_starts_is_a_problem_and_not_a_wait(tmp_path):
    plugin = "import sys, time\n\ndef initialize():\n    print('last words', file=sys.stderr)\n    time.sleep(600)\n"
    fake_root(tmp_path, {"jax_plugins/wedged/__init__.py": plugin})
    began = time.monotonic()
    found, log = machine.attempt(("import", "devices", "step"), FOLDERS, 10, PYTHONPATH=str(tmp_path))
    assert time.monotonic() - began < 60 and "last words" in log
    assert "error" not in found["import"] and found["devices"] == {"error": "no answer within 10 s"} and len(found) == 2


def test_a_driver_that_crashes_leaves_its_last_words(tmp_path):
    crash = "import os, sys\n\ndef initialize():\n    print('bye', file=sys.stderr, flush=True)\n    os.abort()"
    fake_root(tmp_path, {"jax_plugins/broken/__init__.py": crash})
    found, log = machine.attempt(("import", "devices", "step"), FOLDERS, 60, PYTHONPATH=str(tmp_path))
    assert found["devices"] == {"error": "killed by SIGABRT"} and "bye" in log


def test_writing_leaves_nothing_behind(tmp_path):
    def used(**folders):
        return stages.use_host({name: str(folder) for name, folder in folders.items()}, megabytes=1)["folders"]

    found = used(workdir=tmp_path / "not" / "yet", cache=tmp_path)
    assert found["workdir"]["rate"] > 0 and found["workdir"]["free"] > 0 and found["cache"]["free"] > 0
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    assert used(workdir=tmp_path / "file" / "run")["workdir"]["refused"] == "Not a directory"


def test_collectives_are_right_here_and_a_broken_one_is_found(monkeypatch):
    assert stages.exchange({}) == {"wrong": {}} and jax.local_device_count() == 8
    monkeypatch.setattr(jax.lax, "ppermute", lambda x, name, perm: x)
    monkeypatch.setattr(jax.lax, "psum", lambda x, name: x * 36 / (jax.lax.axis_index(name) + 1))
    assert stages.exchange({})["wrong"] == {"psum": list(range(8)), "ppermute": list(range(8))}


LAUNCH = ("launch.py", "--mode=doctor")
MODULE = ("-m", "bigbase_jax.doctor")


def start(workdir, program=LAUNCH, **env):
    """The doctor in a process of its own: (report, lines, exit status)."""
    command = [sys.executable, *program, f"--workdir={workdir}"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=300)
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    *lines, last = done.stdout.splitlines()
    return json.loads(last), lines, done.returncode


def test_this_machine(tmp_path):
    home = tmp_path / "alice"
    home.mkdir()
    env = {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}
    report, lines, status = start(home / "runs", **env, JAX_COMPILATION_CACHE_DIR=str(home / "xla"))
    assert status == int(report["problems"] > 0) and lines[-1].startswith(f"{report['problems']} problem")
    assert lines[0].split() == ["jax:", jax.__version__] and "JAX_PLATFORMS=cpu" in lines  # in JAX's own words
    said = {check["name"]: check["text"] for check in reversed(report["checks"])}  # the first of each name
    assert said["devices"] == "8 x cpu" and said["disk"].startswith("~/runs: ")
    assert report["stages"]["collectives"] == {"wrong": {}}
    assert report["stages"]["step"] == {"finite": True, "kept": True}
    assert "alice" not in "\n".join(lines) + json.dumps(report)
    for check in report["checks"]:
        assert check["status"] in ("ok", "note", "warning", "problem")
        assert (check["status"] in ("warning", "problem")) <= ("fix" in check), check


@pytest.mark.parametrize("program", [LAUNCH, MODULE], ids=["launch.py", "module"])
def test_a_broken_jax_is_reported_and_never_a_traceback(tmp_path, program):
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text("raise ImportError('jaxlib version 9 is incompatible')")
    report, lines, status = start(tmp_path, program, PYTHONPATH=str(tmp_path))
    assert status == 1 and report["problems"] == 1
    (line,) = [line for line in lines if line.startswith("problem")]
    assert "JAX cannot be imported: ImportError: jaxlib version 9 is incompatible" in line
    assert "devices" not in report["stages"]


def test_a_mistake_on_its_command_line_is_one_sentence():
    command = [sys.executable, *LAUNCH, "--workdri=x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and "--workdri=x" in done.stderr.splitlines()[-1]


def test_the_doctor_itself_imports_neither_jax_nor_anything_else_of_ours():
    code = (
        "import sys, bigbase_jax.doctor; print(*sorted(n for n in sys.modules if n.startswith(('jax', 'big', 'flax'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["bigbase_jax", *(f"bigbase_jax.doctor{n}" for n in ("", ".checks", ".machine"))]
