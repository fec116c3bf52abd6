"""The doctor: every diagnosis from faked facts, the probes on fake roots and in child processes, this machine for real.

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
from bigbase_jax.doctor import accelerators, checks, machine, stages
from bigbase_jax.doctor.machine import Answer, Gpu, Machine, Package, Smi, Stage

ROOT = pathlib.Path(__file__).parents[1]

# ------------------------------------------------------------------------------------------------------------- fakes

JAX_REQUIRES = (
    "jaxlib<=0.10.2,>=0.10.1",
    "numpy>=2.0",
    'jaxlib<=0.10.2,>=0.10.2; extra == "tpu"',
    'libtpu==0.0.42.*; extra == "tpu"',
)
PLUGIN_REQUIRES = {  # as in the wheels of 0.10.2
    12: (
        "jax-cuda12-pjrt==0.10.2",
        'nvidia-cublas-cu12>=12.1.3.1; sys_platform == "linux" and extra == "with-cuda"',
        'nvidia-cuda-nvcc-cu12>=12.6.85; sys_platform == "linux" and extra == "with-cuda"',
        'nvidia-cudnn-cu12<10.0,>=9.8; sys_platform == "linux" and extra == "with-cuda"',
    ),
    13: (
        "jax-cuda13-pjrt==0.10.2",
        'nvidia-cublas>=13.0.0.19; sys_platform == "linux" and extra == "with-cuda"',
        'nvidia-cuda-nvcc>=13.0.48; sys_platform == "linux" and extra == "with-cuda"',
        'nvidia-cudnn-cu13<10.0,>=9.12.0.46; sys_platform == "linux" and extra == "with-cuda"',
    ),
}
BASE = {
    "bigbase-jax": Package("0.1.0", ("jax>=0.10,<0.13", "flax<0.14,>=0.12", "numpy<3,>=2.0"), ">=3.11"),
    "jax": Package("0.10.2", JAX_REQUIRES),
    "jaxlib": Package("0.10.2", ("numpy>=2.0",)),
    "flax": Package("0.12.8", ("jax>=0.10.0",)),
    "numpy": Package("2.4.6"),
}
CUDA12 = {
    "jax-cuda12-plugin": Package("0.10.2", PLUGIN_REQUIRES[12]),
    "jax-cuda12-pjrt": Package("0.10.2"),
    "nvidia-cublas-cu12": Package("12.6.4.1"),
    "nvidia-cuda-nvcc-cu12": Package("12.6.85"),
    "nvidia-cudnn-cu12": Package("9.14.0.64"),
}
CUDA13 = {
    "jax-cuda13-plugin": Package("0.10.2", PLUGIN_REQUIRES[13]),
    "jax-cuda13-pjrt": Package("0.10.2"),
    "nvidia-cublas": Package("13.2.0.9"),
    "nvidia-cuda-nvcc": Package("13.0.88"),
    "nvidia-cudnn-cu13": Package("9.14.0.64"),
}
DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Thu Feb 22 01:44:30 UTC 2024\nGCC version:  gcc 12"
HEADER = """Tue Nov 24 10:00:00 2026
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI 560.35.03              Driver Version: 560.35.03      CUDA Version: 12.6     |
|-----------------------------------------+------------------------+----------------------+
"""
H100 = Gpu("NVIDIA H100 80GB HBM3", 81559, 12, (9, 0))
CPU = {"platform": "cpu", "kind": "cpu", "memory": None}
GPU = {"platform": "gpu", "kind": "NVIDIA H100 80GB HBM3", "memory": 60 << 30}
TPU = {"platform": "tpu", "kind": "TPU v5 lite", "memory": 16 << 30}


def fake_root(tmp_path, files):
    """A folder with these files, by absolute name; those under /dev are empty."""
    for name, text in files.items():
        path = tmp_path / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def started(*devices, errors=None, log="", **dataset_info):
    """The stages of a child process in which everything went well on these devices."""
    backend = devices[0]["platform"]
    exchanged = {kind: {"wrong": [], "seconds": 1e-3, "bytes_per_second": 1e9} for kind in ("psum", "ppermute")}
    return {
        "import": Stage("done", {"jax": "0.10.2", "loaded": []}),
        "devices": Stage(
            "done",
            {
                "devices": list(devices),
                "backend": backend,
                "processes": 1,
                "errors": errors or {},
                "seconds": 1.0,
                **dataset_info,
            },
            log=log,
        ),
        "collectives": Stage("done", {"count": len(devices), "bytes": 4 << 20, **exchanged}),
        "cache": Stage("done", {"enabled": True, "hits": [False, True], "compile_seconds": [0.5, 0.1]}),
    }


def until(name, stage):
    """The stages of a child process that did not get past ``name``."""
    whole = started(CPU)
    return {**{n: whole[n] for n in list(whole)[: list(whole).index(name)]}, name: stage}


def written(**dataset_info):
    found = {"folder": "runs", "nearest": "/data", "exists": False, "free": 1e12, "files_free": 1000, "versions": {}}
    return Stage("done", {**found, "bytes_per_second": 1e9, **dataset_info})


def kept(**dataset_info):
    return Stage(
        "done", {"folder": "/cache/xla", "exists": True, "writable": True, "size": 10, "files": 2, **dataset_info}
    )


def data(**folders):
    tfds = {"folder": "/tfds", "exists": True, "entries": 1, "prepared": ["mnist/3.0.1"]}
    return Stage("done", {"TFDS_DATA_DIR": tfds, **folders, "seconds": 0.1})


HEALTHY = Machine(
    env={},
    packages={**BASE, **CUDA12},
    smi=Smi(True, "560.35.03", "12.6", (H100,)),
    jax=started(GPU),
    disk={"workdir": written(), "cache": kept(), "data": data()},
    python="3.11.7",
    system="Linux 6.8 x86_64, glibc 2.36",
    cores=8,
    open_files=4096,
    shm=8 << 30,
)
FILES = {
    "/proc/driver/nvidia/version": DRIVER.format("560.35.03"),
    "/dev/nvidia0": "",
    "/etc/os-release": 'NAME="Ubuntu"\nID=ubuntu\n',
    "/proc/meminfo": "MemTotal:       65536000 kB\nMemAvailable:   60000000 kB\n",
    "/proc/mounts": "/dev/sda / ext4 rw 0 0\n/dev/sdb /data xfs rw 0 0\n",
}
PLAIN = dataclasses.replace(HEALTHY, packages=BASE, smi=Smi(), jax=started(CPU))
NO_GPU = {"/proc/driver/nvidia/version": None, "/dev/nvidia0": None}


def judged(tmp_path, base=HEALTHY, files=None, packages=None, env=None, **changes):
    """All checks of a machine that differs from ``base`` in this."""
    files = {name: text for name, text in {**FILES, **(files or {})}.items() if text is not None}
    found = {k: v for k, v in {**base.packages, **(packages or {})}.items() if v is not None}
    changes |= {"packages": found, "env": {**base.env, **(env or {})}}
    return checks.judge(dataclasses.replace(base, root=fake_root(tmp_path, files), **changes))


def wrong(found):
    """What is said to be wrong, without the sentences."""
    assert not [check.text for check in found if "check itself failed" in check.text]
    return [(check.status, check.name, check.fix) for check in found if check.status in ("problem", "warning")]


def sentences(found):
    return " | ".join(check.text for check in found)


@pytest.mark.parametrize(
    ("base", "files"), [(HEALTHY, {}), (PLAIN, NO_GPU)], ids=["an H100 with CUDA 12", "only a processor"]
)
def test_nothing_is_wrong_with_a_healthy_machine(tmp_path, base, files):
    found = judged(tmp_path, base, files)
    assert wrong(found) == []
    names = [check.name for check in found]
    assert names == sorted(names, key=names.index) and {"python", "packages", "devices", "nvidia", "tpu"} <= set(names)
    assert "jax 0.10.2, jaxlib 0.10.2" in sentences(found)


# ------------------------------------------------------------------------------------------------------------ packages


@pytest.mark.parametrize(
    ("changes", "expected", "said"),
    [
        ({"python": "3.10.4"}, [("problem", "python", "python3.12 -m venv .venv")], "needs Python >=3.11"),
        (
            {"packages": {"jax": Package("0.9.1"), "jaxlib": Package("0.9.1"), "flax": Package("0.12.8")}},
            [("problem", "packages", "pip install -e .")],
            "jax 0.9.1 is outside of <0.13,>=0.10",
        ),
        ({"packages": {"numpy": None}}, [("problem", "packages", "pip install -e .")], "numpy is missing"),
        (
            {"packages": {"bigbase-jax": None}},
            [("problem", "packages", "pip install -e .")],
            "bigbase_jax is not installed",
        ),
        (
            {"packages": {"jaxlib": Package("0.10.0")}},
            [("problem", "packages", "pip install 'jaxlib<=0.10.2,>=0.10.1'")],
            "jax 0.10.2: jaxlib 0.10.0 is outside of",
        ),
        (
            {"packages": {"flax": Package("0.12.9", ("jax>=0.11",))}},
            [("warning", "packages", "pip install 'jax>=0.11'")],
            "flax 0.12.9: jax 0.10.2 is outside of >=0.11",
        ),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else None,
)
def test_packages(tmp_path, changes, expected, said):
    found = judged(tmp_path, PLAIN, NO_GPU, **changes)
    assert wrong(found) == expected
    assert said in sentences(found)


def test_a_plugin_of_another_version_is_named_even_if_everything_else_fits(tmp_path):
    packages = {
        "jax-cuda12-plugin": Package("0.10.1", ("jax-cuda12-pjrt==0.10.1", *PLUGIN_REQUIRES[12][1:])),
        "jax-cuda12-pjrt": Package("0.10.1"),
    }
    found = judged(tmp_path, packages=packages, jax=started(CPU))
    assert wrong(found) == [("problem", "plugins", "pip install -e '.[cuda12]'")]
    assert "jax-cuda12-plugin 0.10.1 does not fit jaxlib 0.10.2" in sentences(found)


def test_half_a_plugin(tmp_path):
    found = judged(tmp_path, packages={"jax-cuda12-pjrt": None}, jax=started(CPU))
    assert wrong(found) == [("problem", "plugins", "pip install -e '.[cuda12]'")]
    assert "jax-cuda12-pjrt is missing beside jax-cuda12-plugin 0.10.2" in sentences(found)


@pytest.mark.parametrize(("driver", "keep", "drop"), [("580.65.06", 13, 12), ("560.35.03", 12, 13)])
def test_of_two_plugins_the_one_that_the_driver_can_run_stays(tmp_path, driver, keep, drop):
    smi = Smi(True, driver, "13.0" if keep == 13 else "12.6", (H100,))
    found = judged(tmp_path, packages=CUDA13, smi=smi)
    fixes = [fix for status, name, fix in wrong(found) if name == "plugins"]
    assert len(fixes) == 1
    assert fixes[0].startswith(f"pip uninstall -y jax-cuda{drop}-plugin") and fixes[0].endswith(f"'.[cuda{keep}]'")


def test_frameworks_are_named_and_only_a_loaded_one_is_a_warning(tmp_path):
    found = judged(tmp_path, PLAIN, NO_GPU, packages={"torch": Package("2.13")}, importable=("torch",))
    assert wrong(found) == [] and "installed and not imported: torch 2.13" in sentences(found)
    stages = {**started(CPU), "import": Stage("done", {"loaded": ["tensorflow"]})}
    found = judged(tmp_path, PLAIN, NO_GPU, jax=stages)
    assert [(status, name) for status, name, _ in wrong(found)] == [("warning", "frameworks")]


# -------------------------------------------------------------------------------------------------------------- NVIDIA

NO_PLUGIN = dict.fromkeys(CUDA12)
ON_CPU = {"jax": started(CPU, errors={"cuda": "Unknown backend cuda. Available backends are ['cpu']"})}
V100 = Gpu("Tesla V100-SXM2-16GB", 16384, 3, (7, 0))
K80 = Gpu("Tesla K80", 11441, 3, (3, 7))
B200 = Gpu("NVIDIA B200", 183359, 0, (10, 0))
UBUNTU = "sudo ubuntu-drivers install && sudo reboot"
TO_12 = "pip uninstall -y jax-cuda13-plugin jax-cuda13-pjrt && pip install -e '.[cuda12]'"


@pytest.mark.parametrize(
    ("changes", "expected", "said"),
    [
        pytest.param(
            {"packages": NO_PLUGIN, **ON_CPU},
            [("problem", "nvidia", "pip install -e '.[cuda12]'")],
            "no CUDA plugin and runs on the CPU",
            id="no plugin",
        ),
        pytest.param(
            {"packages": NO_PLUGIN, "smi": Smi(), **ON_CPU},
            [("problem", "nvidia", "pip install -e '.[cuda12]'")],
            "driver 560.35.03, no nvidia-smi",
            id="no plugin, the GPU known from /proc alone",
        ),
        pytest.param(
            {"packages": NO_PLUGIN, "smi": Smi(True, "580.65.06", "13.0", (H100,)), **ON_CPU},
            [("problem", "nvidia", "pip install -e '.[cuda12]'")],
            "would also do for '.[cuda13]'",
            id="no plugin, a new driver",
        ),
        pytest.param(
            {"packages": NO_PLUGIN, "smi": Smi(True, "470.57.02", "11.4", (H100,)), **ON_CPU},
            [("problem", "nvidia", f"{UBUNTU}  # then: pip install -e '.[cuda12]'")],
            "CUDA 12 needs driver 525 or newer, not 470.57.02",
            id="no plugin, a driver for none",
        ),
        pytest.param(
            {"packages": {**NO_PLUGIN, **CUDA13}, **ON_CPU},
            [("problem", "nvidia", TO_12)],
            "the driver 560.35.03 is older than the 580 that CUDA 13 needs; CUDA 12 would do",
            id="CUDA 13 with a driver for 12",
        ),
        pytest.param(
            {"smi": Smi(True, "470.57.02", "11.4", (H100,)), **ON_CPU},
            [("problem", "nvidia", UBUNTU)],
            "older than the 525 that CUDA 12 needs",
            id="a driver too old for 12",
        ),
        pytest.param(
            {"packages": {**NO_PLUGIN, **CUDA13}},
            [],
            "it works all the same (forward compatibility packages)",
            id="an old driver that works is a note",
        ),
        pytest.param(
            {"packages": {**NO_PLUGIN, **CUDA13}, "smi": Smi(True, "580.65.06", "13.0", (V100,)), **ON_CPU},
            [("problem", "nvidia", TO_12)],
            "compute capability 7.0 is too old for CUDA 13, which wants 7.5; CUDA 12 would do",
            id="Volta with CUDA 13",
        ),
        pytest.param(
            {"smi": Smi(True, "560.35.03", "12.6", (K80,)), **ON_CPU},
            [("problem", "nvidia", "export JAX_PLATFORMS=cpu")],
            "compute capability 3.7 is too old for CUDA 12",
            id="Kepler",
        ),
        pytest.param(
            {"packages": {"nvidia-cudnn-cu12": Package("9.1.0.70")}, **ON_CPU},
            [("problem", "nvidia", "pip install -e '.[cuda12]'")],
            "nvidia-cudnn-cu12 9.1.0.70 is outside of <10.0,>=9.8",
            id="an old cuDNN",
        ),
        pytest.param(
            {"packages": {"nvidia-cudnn-cu12": Package("9.10.0.56")}, **ON_CPU},
            [("problem", "nvidia", "pip install -U 'nvidia-cudnn-cu12>=9.10.1,<10'")],
            "cuDNN 9.10.0",
            id="the cuDNN that JAX refuses",
        ),
        pytest.param(
            {
                "packages": {"nvidia-cudnn-cu12": Package("9.8.0.87"), "nvidia-cublas-cu12": Package("12.9.0.13")},
                "smi": Smi(True, "560.35.03", "12.6", (H100, H100)),
                "jax": started(GPU, GPU),
            },
            [("problem", "nvidia", "pip install -U 'nvidia-cudnn-cu12>=9.10.1,<10'")],
            "wrong products on several GPUs",
            id="cuDNN and cuBLAS that compute wrong numbers",
        ),
        pytest.param(
            {"packages": {"nvidia-cublas-cu12": Package("12.9.0.13")}, "smi": Smi(True, "560.35.03", "12.6", (B200,))},
            [("warning", "nvidia", "pip install -e '.[cuda13]' 'nvidia-cublas>=13.2'")],
            "cuBLAS 12.9.0.13 may corrupt data on a NVIDIA B200",
            id="cuBLAS on Blackwell",
        ),
        pytest.param(
            {"packages": {"nvidia-cudnn-cu13": Package("9.12.0.46")}},
            [
                (
                    "warning",
                    "nvidia",
                    "pip uninstall -y nvidia-cudnn-cu13 && pip install --force-reinstall --no-deps"
                    " nvidia-cudnn-cu12==9.14.0.64",
                )
            ],
            "share one folder",
            id="the cuDNN of both",
        ),
        pytest.param(
            {"packages": dict.fromkeys(name for name in CUDA12 if name.startswith("nvidia"))},
            [],
            "takes the system's CUDA and cuDNN >=9.8,<10",
            id="a local CUDA is a note",
        ),
        pytest.param(
            {"env": {"JAX_PLATFORMS": "cpu"}, **ON_CPU},
            [("warning", "nvidia", "unset JAX_PLATFORMS")],
            "JAX_PLATFORMS=cpu keeps JAX from using the GPU",
            id="JAX_PLATFORMS",
        ),
        pytest.param(
            {"env": {"CUDA_VISIBLE_DEVICES": "-1"}, **ON_CPU},
            [("warning", "nvidia", "unset CUDA_VISIBLE_DEVICES")],
            "CUDA_VISIBLE_DEVICES='-1' hides the GPU",
            id="CUDA_VISIBLE_DEVICES",
        ),
        pytest.param(
            {"smi": Smi(True, error="nvidia-smi did not answer within 30 s"), "jax": started(CPU)},
            [
                ("problem", "nvidia", "sudo reboot"),
                ("problem", "nvidia", "pip install --force-reinstall -e '.[cuda12]'"),
            ],
            "the driver hangs",
            id="nvidia-smi hangs",
        ),
        pytest.param(
            {
                "smi": Smi(True, error="Failed to initialize NVML: Driver/library version mismatch"),
                "files": NO_GPU,
                "packages": NO_PLUGIN,
                **ON_CPU,
            },
            [("problem", "nvidia", "sudo reboot"), ("problem", "nvidia", "pip install -e '.[cuda12]'")],
            "its old kernel module is still loaded",
            id="an updated driver without a reboot",
        ),
        pytest.param(
            {
                "smi": Smi(),
                "files": {
                    **NO_GPU,
                    "/sys/bus/pci/devices/0/vendor": "0x10de",
                    "/sys/bus/pci/devices/0/class": "0x030200",
                },
                "packages": NO_PLUGIN,
                **ON_CPU,
            },
            [("warning", "nvidia", UBUNTU)],
            "on the PCI bus, but no NVIDIA driver is loaded",
            id="a card without a driver",
        ),
        pytest.param(
            {"smi": Smi(), "files": {"/dev/nvidia0": None, "/.dockerenv": ""}, **ON_CPU},
            [("problem", "nvidia", "docker run --gpus all IMAGE")],
            "this container was started without the GPU",
            id="a container without --gpus, its host's driver in /proc",
        ),
        pytest.param(
            {"smi": Smi(), "files": {**NO_GPU, "/.dockerenv": ""}, **ON_CPU},
            [("warning", "nvidia", "docker run --gpus all IMAGE  # the NVIDIA Container Toolkit must be installed")],
            "no NVIDIA GPU is visible",
            id="a plugin in a container without a GPU",
        ),
        pytest.param(
            {"smi": Smi(), "files": NO_GPU, **ON_CPU},
            [("warning", "nvidia", "pip uninstall -y jax-cuda12-plugin jax-cuda12-pjrt")],
            "no NVIDIA GPU is visible",
            id="a plugin without a GPU",
        ),
        pytest.param(
            {"smi": Smi(True, "560.35.03", "12.6", (dataclasses.replace(H100, used=40000),))},
            [
                (
                    "warning",
                    "memory",
                    "export XLA_PYTHON_CLIENT_PREALLOCATE=false  # nvidia-smi lists who holds the memory",
                )
            ],
            "JAX takes 75% of a GPU at its start, but GPU 0 has 40,000 of 81,559 MiB in use by others",
            id="others hold the memory",
        ),
        pytest.param(
            {
                "smi": Smi(True, "560.35.03", "12.6", (dataclasses.replace(H100, used=40000),)),
                "env": {"XLA_CLIENT_MEM_FRACTION": ".4"},
            },
            [],
            "JAX takes 40% of a GPU",
            id="a smaller share fits beside others",
        ),
    ],
)
def test_nvidia(tmp_path, changes, expected, said):
    found = judged(tmp_path, **changes)
    assert wrong(found) == expected, sentences(found)
    assert said in sentences(found)


def test_libraries_of_ld_library_path_shadow_those_of_pip_but_the_drivers_do_not(tmp_path):
    old = {"/opt/cuda/lib64/libcudnn.so.8": "", "/opt/cuda/lib64/libcublas.so.11": ""}
    env = {"LD_LIBRARY_PATH": "/usr/local/cuda/compat:/opt/cuda/lib64"}
    log = "CUDA version check failed during initialization. Error: Unable to load cuSPARSE. Is it installed?"
    found = judged(tmp_path, files=old, env=env, jax=started(CPU, log=log))
    assert wrong(found) == [("problem", "nvidia", "unset LD_LIBRARY_PATH")]
    assert "libcublas, libcudnn of /opt/cuda/lib64" in sentences(found)
    assert wrong(judged(tmp_path, files=old, env=env)) == [("warning", "nvidia", "unset LD_LIBRARY_PATH")]  # it works
    compat = {"/usr/local/cuda/compat/libcuda.so.1": ""}
    assert wrong(judged(tmp_path, files=compat, env={"LD_LIBRARY_PATH": "/usr/local/cuda/compat"})) == []


OUTDATED = """jax_plugins.xla_cuda12.initialize() failed
RuntimeError: Outdated cuDNN installation found.
Version JAX was built against: 90800
Minimum supported: 90800
Installed version: 90100
The local installation version must be no lower than 90800.
"""


@pytest.mark.parametrize(
    ("log", "fix", "said"),
    [
        (OUTDATED, "pip install -e '.[cuda12]'", "cuDNN 90100 is older than the 90800 that JAX asks for"),
        (
            "E cuInit failed: CUDA_ERROR_NO_DEVICE: no CUDA-capable device is detected",
            "nvidia-smi -L",
            "finds no device",
        ),
        ("CUDA_ERROR_SYSTEM_NOT_READY: system not yet initialized", "sudo systemctl restart nvidia-fabricmanager", ""),
        ("CUDA driver version is insufficient for CUDA runtime version", "pip install -e '.[cuda12]'", "too old for"),
        (
            "RuntimeError: Unable to load cuFFT. Is it installed?",
            "pip install --force-reinstall -e '.[cuda12]'",
            "cuFFT",
        ),
        ("something unheard of", "pip install --force-reinstall -e '.[cuda12]'", "something unheard of"),
    ],
)
def test_what_jax_says_when_it_falls_back_to_the_cpu_is_understood(tmp_path, log, fix, said):
    found = judged(tmp_path, jax=started(CPU, log=log))
    ((status, name, given),) = wrong(found)
    assert (status, name) == ("problem", "nvidia") and given.startswith(fix)
    assert "JAX runs on the CPU" in sentences(found) and said in sentences(found)


def test_nvidia_smi_is_read(tmp_path):
    def ask(command):
        if command == ["nvidia-smi"]:
            return Answer(0, HEADER)
        if "name,driver" in command[1]:
            return Answer(
                0, "NVIDIA H100 80GB HBM3, 560.35.03, 81559, 12\nNVIDIA H100 80GB HBM3, 560.35.03, 81559, 0\n"
            )
        return Answer(0, "9.0\n9.0\n")

    def old(command):
        known = not command[1:] or "compute_cap" not in command[1]
        return ask(command) if known else Answer(2, 'Field "compute_cap" is not a valid field to query.')

    assert machine.read_smi(ask) == Smi(True, "560.35.03", "12.6", (H100, dataclasses.replace(H100, used=0)))
    assert machine.read_smi(old).gpus[0].capability == ()
    assert machine.read_smi(lambda command: None) == Smi()
    assert machine.read_smi(lambda command: Answer(None)).error == "nvidia-smi did not answer within 30 s"
    broken = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that\n"
    smi = machine.read_smi(lambda command: Answer(9, broken))
    assert smi.found and "communicate" in smi.error and smi.gpus == ()
    card = {"/sys/bus/pci/devices/0/vendor": "0x10de", "/sys/bus/pci/devices/0/class": "0x030000"}
    found = judged(tmp_path, PLAIN, {**NO_GPU, **card}, smi=smi)
    assert [fix.partition("  #")[0] for _, _, fix in wrong(found)] == [
        "sudo modprobe nvidia",
        "pip install -e '.[cuda12]'",
    ]


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (DRIVER.format("535.104.05"), "535.104.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build", "580.65.06"),
        ("", ""),
    ],
)
def test_the_drivers_version_is_read_from_proc(tmp_path, text, version):
    assert Machine(root=fake_root(tmp_path, {"/proc/driver/nvidia/version": text})).driver == version


# ----------------------------------------------------------------------------------------------------------------- TPU


def pci(number, vendor, device):
    return {f"/sys/bus/pci/devices/{number}/{key}": v for key, v in (("vendor", vendor), ("device", device))}


V5E = {**NO_GPU, **pci(0, "0x1ae0", "0x0063"), **pci(1, "0x1ae0", "0x0063"), **pci(2, "0x1ae0", "0x0042")}
LIBTPU = {"libtpu": Package("0.0.42.1")}
BUSY = "sudo lsof -w /dev/accel* /dev/vfio/*"


@pytest.mark.parametrize(
    ("files", "packages", "jax_stages", "env", "expected", "said"),
    [
        pytest.param(V5E, LIBTPU, started(TPU), {}, [], "2 TPU chips (v5e), libtpu 0.0.42.1", id="healthy"),
        pytest.param(
            V5E, {}, started(CPU), {}, [("problem", "pip install -e '.[tpu]'")], "without libtpu", id="no libtpu"
        ),
        pytest.param(
            {**NO_GPU, "/dev/accel0": "", "/dev/accel1": ""},
            {},
            started(CPU),
            {},
            [("problem", "pip install -e '.[tpu]'")],
            "2 TPU chips (TPU) without libtpu",
            id="no libtpu, chips known from /dev alone",
        ),
        pytest.param(
            {**NO_GPU, "/dev/vfio/0": "", "/dev/vfio/vfio": ""},
            {},
            started(CPU),
            {"TPU_WORKER_ID": "0"},
            [("problem", "pip install -e '.[tpu]'")],
            "1 TPU chip (TPU) without libtpu",
            id="no libtpu, vfio on a TPU VM",
        ),
        pytest.param(
            {**NO_GPU, "/dev/vfio/0": "", "/dev/vfio/vfio": ""},
            {},
            started(CPU),
            {},
            [],
            "no TPU found",
            id="other vfio",
        ),
        pytest.param(
            V5E,
            {"libtpu": Package("0.0.11")},
            started(TPU),
            {},
            [("problem", "pip install -e '.[tpu]'")],
            "libtpu 0.0.11 is outside of ==0.0.42.*",
            id="another libtpu",
        ),
        pytest.param(
            NO_GPU,
            LIBTPU,
            started(CPU),
            {},
            [("warning", "pip uninstall -y libtpu libtpu-nightly")],
            "on a machine without a TPU",
            id="libtpu without a TPU",
        ),
        pytest.param(
            V5E,
            LIBTPU,
            started(CPU),
            {"JAX_PLATFORMS": "cpu"},
            [("warning", "unset JAX_PLATFORMS")],
            "keeps JAX from using 2 TPU chips",
            id="JAX_PLATFORMS",
        ),
        pytest.param(
            V5E,
            LIBTPU,
            until(
                "devices",
                Stage(
                    "failed",
                    error="RuntimeError: Unable to initialize backend 'tpu': ABORTED: The TPU is already in use by"
                    " process with pid 2718466. Not attempting to load libtpu.so in this process.",
                ),
            ),
            {},
            [("problem", "kill 2718466")],
            "the process 2718466 holds the TPU",
            id="busy, the holder known",
        ),
        pytest.param(
            V5E,
            LIBTPU,
            until(
                "devices",
                Stage(
                    "failed",
                    error="RuntimeError: Unable to initialize backend 'tpu': UNKNOWN: TPU initialization failed:"
                    " open(/dev/vfio/1): Device or resource busy: Couldn't open iommu group /dev/vfio/1",
                ),
            ),
            {},
            [("problem", BUSY)],
            "another process holds the TPU",
            id="busy",
        ),
        pytest.param(
            V5E,
            LIBTPU,
            started(CPU, errors={"tpu": "Backend 'tpu' failed to initialize: open(/dev/vfio/0): Permission denied"}),
            {},
            [("problem", "ls -l /dev/vfio/0")],
            "this user may not open /dev/vfio/0",
            id="forbidden",
        ),
        pytest.param(
            V5E,
            LIBTPU,
            until("devices", Stage("stuck", error="no answer within 180 s")),
            {},
            [("problem", BUSY)],
            "the other hosts of the slice have not started",
            id="hangs",
        ),
    ],
)
def test_tpu(tmp_path, files, packages, jax_stages, env, expected, said):
    found = judged(tmp_path, PLAIN, files, packages, env, jax=jax_stages)
    assert [(status, fix.partition("  #")[0]) for status, _, fix in wrong(found)] == expected, sentences(found)
    assert said in sentences(found)


def test_huge_pages_are_a_note_on_new_tpus(tmp_path):
    files = {**V5E, "/sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never"}
    found = judged(tmp_path, PLAIN, files, LIBTPU, jax=started(TPU))
    assert wrong(found) == [] and "transparent huge pages are off" in sentences(found)


# ------------------------------------------------------------------------------------- what JAX does, and does not do


@pytest.mark.parametrize(
    ("jax_stages", "env", "name", "fix", "said"),
    [
        pytest.param(
            until("import", Stage("failed", error="ModuleNotFoundError: No module named 'jaxlib.xla_client'")),
            {},
            "jax",
            "pip install --force-reinstall -e .",
            "JAX cannot be imported: the package jaxlib.xla_client is missing",
            id="no jaxlib",
        ),
        pytest.param(
            until(
                "import",
                Stage("failed", error="RuntimeError: jaxlib version 0.11.0 is newer than and incompatible with jax"),
            ),
            {},
            "jax",
            "pip install -e .",
            "do not belong together",
            id="jax and jaxlib",
        ),
        pytest.param(
            until("import", Stage("died", error="killed by SIGILL")),
            {},
            "jax",
            "pip install --force-reinstall -e .",
            "killed by SIGILL",
            id="illegal instruction",
        ),
        pytest.param(
            until("import", Stage("stuck", error="no answer within 120 s")),
            {},
            "jax",
            "pip install --force-reinstall -e .",
            "no answer within 120 s",
            id="the import hangs",
        ),
        pytest.param(
            until("devices", Stage("stuck", error="no answer within 180 s")),
            {},
            "devices",
            "JAX_PLATFORMS=cpu python launch.py --mode=doctor",
            "did not start its devices (no answer within 180 s)",
            id="the devices hang",
        ),
        pytest.param(
            until("devices", Stage("failed", error="AssertionError: ")),
            {"JAX_PLATFORMS": "cuda"},
            "devices",
            "unset JAX_PLATFORMS",
            "nothing that JAX_PLATFORMS=cuda names is here",
            id="a platform that is not here",
        ),
        pytest.param(
            until("devices", Stage("died", error="killed by SIGSEGV", log="a\n*** SIGSEGV in libfoo.so\n")),
            {},
            "devices",
            "JAX_PLATFORMS=cpu python launch.py --mode=doctor",
            "killed by SIGSEGV, last words: *** SIGSEGV in libfoo.so",
            id="the driver crashes",
        ),
        pytest.param(
            until("collectives", Stage("stuck", error="no answer within 120 s")),
            {},
            "collectives",
            "",
            "psum and ppermute over 1 device hang",
            id="a collective hangs",
        ),
        pytest.param(
            {**started(CPU), "cache": Stage("failed", error="XlaRuntimeError: INTERNAL: ptxas not found")},
            {},
            "compile cache",
            "",
            "ptxas not found",
            id="the compiler fails",
        ),
    ],
)
def test_a_jax_that_does_not_work(tmp_path, jax_stages, env, name, fix, said):
    found = judged(tmp_path, PLAIN, NO_GPU, env=env, jax=jax_stages)
    ((status, given_name, given),) = wrong(found)
    assert (status, given_name, given.partition("  #")[0]) == ("problem", name, fix)
    assert said in sentences(found)


def test_a_gpu_whose_start_hangs_is_the_drivers_problem(tmp_path):
    found = judged(tmp_path, jax=until("devices", Stage("stuck", error="no answer within 180 s")))
    assert wrong(found) == [("problem", "devices", "sudo reboot")]


def test_wrong_numbers_of_a_collective_are_a_problem(tmp_path):
    stage = started(GPU, GPU)
    dataset_info = {
        **stage["collectives"].dataset_info,
        "psum": {"wrong": [1], "seconds": 1e-3, "bytes_per_second": 1e9},
    }
    smi = dataclasses.replace(HEALTHY.smi, gpus=(H100, H100))
    found = judged(tmp_path, jax={**stage, "collectives": Stage("done", dataset_info)}, smi=smi)
    assert wrong(found) == [("problem", "collectives", "NCCL_P2P_DISABLE=1 python launch.py --mode=doctor")]
    assert "psum gives wrong numbers on 1 device [1]" in sentences(found)


@pytest.mark.parametrize(
    ("kept_stage", "cache_stage", "status"),
    [
        (kept(writable=False), started(CPU)["cache"], "warning"),
        (Stage("stuck", error="no answer within 20 s"), started(CPU)["cache"], "problem"),
        (kept(), Stage("done", {"enabled": True, "hits": [False, False], "compile_seconds": [1, 1]}), "warning"),
        (kept(), Stage("done", {"enabled": False, "hits": [False, False], "compile_seconds": [1, 1]}), "warning"),
    ],
    ids=["not writable", "hangs", "no hit", "switched off"],
)
def test_a_compile_cache_that_does_not_keep(tmp_path, kept_stage, cache_stage, status):
    disk = {**PLAIN.disk, "cache": kept_stage}
    found = judged(tmp_path, PLAIN, NO_GPU, disk=disk, jax={**started(CPU), "cache": cache_stage})
    assert [(s, name) for s, name, _ in wrong(found)] == [(status, "compile cache")]
    assert wrong(found)[0][2].startswith(("export JAX_COMPILATION_CACHE_DIR=", "unset JAX_ENABLE_COMPILATION_CACHE"))


# ------------------------------------------------------------------------------------------------ memory, disk, limits


@pytest.mark.parametrize(
    ("files", "low", "said"),
    [
        ({"/proc/meminfo": "MemTotal: 8000000 kB\nMemAvailable: 500000 kB\n"}, True, "512 MB available"),
        ({"/sys/fs/cgroup/memory.max": "1073741824"}, True, "this container may use 1.07 GB"),
        ({"/sys/fs/cgroup/memory/memory.limit_in_bytes": "17179869184"}, False, "may use 17.2 GB"),
        ({"/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712"}, False, "host 67.1 GB"),
        ({"/sys/fs/cgroup/memory.max": "max"}, False, "host 67.1 GB"),
    ],
)
def test_memory(tmp_path, files, low, said):
    found = judged(tmp_path, PLAIN, {**NO_GPU, **files})
    assert [name for _, name, _ in wrong(found)] == (["memory"] if low else [])
    assert said in sentences(found)


@pytest.mark.parametrize(
    ("dataset_info", "status", "said"),
    [
        ({}, "ok", "1 GB/s written and synced, 1 TB free, xfs"),
        ({"refused": "Permission denied"}, "problem", "runs cannot be written: Permission denied"),
        ({"refused": "No space left on device"}, "problem", "No space left on device"),
        ({"free": 3e8}, "problem", "too little for checkpoints"),
        ({"files_free": 0}, "problem", "no inode is left"),
        ({"free": 3e9}, "warning", "little room"),
        ({"bytes_per_second": 5e6}, "warning", "so slow"),
        ({"nearest": "/dev/shm"}, "warning", "a memory file system"),
        ({"nearest": "/bucket/runs"}, "warning", "renaming is not atomic"),
        ({"nearest": "/my home/runs"}, "note", "a network file system"),
        ({"nearest": "/databank"}, "note", "lost with the container"),
    ],
)
def test_the_work_folder(tmp_path, dataset_info, status, said):
    mounts = (
        "overlay / overlay rw 0 0\n/dev/sdb /data xfs rw 0 0\ntmpfs /dev/shm tmpfs rw 0 0\n"
        "filer:/export/home /my\\040home nfs4 rw 0 0\nbucket /bucket fuse.gcsfuse rw 0 0\n"
    )
    disk = {**PLAIN.disk, "workdir": written(**dataset_info)}
    found = judged(tmp_path, PLAIN, {**NO_GPU, "/proc/mounts": mounts}, disk=disk)
    ((given, text, fix),) = [(c.status, c.text, c.fix) for c in found if c.name == "work folder"]
    assert given == status and said in text
    assert bool(fix) == (status in ("problem", "warning"))
    assert "filer" not in text


def test_a_disk_that_hangs_is_a_problem(tmp_path):
    found = judged(tmp_path, PLAIN, NO_GPU, disk={"workdir": Stage("stuck", error="no answer within 40 s")})
    assert wrong(found) == [("problem", "work folder", "python launch.py --workdir=DIR  # on another disk")]


def test_a_run_that_began_with_other_versions_is_noted(tmp_path):
    disk = {**PLAIN.disk, "workdir": written(versions={"jax": "0.10.1", "numpy": "2.4.6", "python": "3.11"})}
    found = judged(tmp_path, PLAIN, NO_GPU, disk=disk)
    assert wrong(found) == [] and "began with other versions: jax 0.10.1 -> 0.10.2" in sentences(found)


def test_data_folders(tmp_path):
    gone = {"BIGBASE_DATA": {"folder": "/gone", "exists": False}}
    disk = {**PLAIN.disk, "data": data(**gone)}
    found = judged(tmp_path, PLAIN, NO_GPU, disk=disk, env={"BIGBASE_DATA": "/gone"})
    assert wrong(found) == [("warning", "data", "export BIGBASE_DATA=DIR")]
    assert "1 prepared TFDS data set in /tfds: mnist/3.0.1" in sentences(found)
    cache = {"BIGBASE_CACHE": {"folder": "/locked", "exists": True, "entries": 0, "writable": False, "size": 0}}
    found = judged(tmp_path, PLAIN, NO_GPU, disk={**PLAIN.disk, "data": data(**cache)})
    assert [(status, name) for status, name, _ in wrong(found)] == [("warning", "data")]


def test_limits(tmp_path):
    found = judged(tmp_path, PLAIN, NO_GPU, open_files=256, shm=64 << 20)
    assert wrong(found) == [("warning", "open files", "ulimit -n 4096")]
    smi = dataclasses.replace(HEALTHY.smi, gpus=(H100, H100))
    found = judged(tmp_path, smi=smi, shm=64 << 20, files={"/.dockerenv": ""})
    assert wrong(found) == [("warning", "shared memory", "docker run --shm-size=8g IMAGE")]


def test_settings_are_shown_without_addresses_and_secrets(tmp_path):
    env = {"XLA_FLAGS": "--a=1", "JAX_COORDINATOR_ADDRESS": "10.0.0.7:1", "TPU_WORKER_HOSTNAMES": "w0", "PATH": "/bin"}
    found = judged(tmp_path, PLAIN, NO_GPU, env=env)
    assert [check.text for check in found if check.name == "settings"] == ["XLA_FLAGS=--a=1"]


def test_a_check_that_fails_itself_is_a_warning(tmp_path):
    found = judged(tmp_path, PLAIN, NO_GPU, disk={**PLAIN.disk, "workdir": Stage("done", {})})
    assert [check.status for check in found if "this check itself failed (KeyError: 'folder')" in check.text] == [
        "warning"
    ]


# -------------------------------------------------------------------------------------------------------- the report


def test_the_report_names_no_user_host_or_home():
    words = doctor.private_words({"HOME": "/home/alice", "USER": "alice"})
    host = doctor.socket.gethostname()
    given = {"a": ["/home/alice/runs, /home/alice", "/scratch/alice/x"], "b": "/home/alicia/y /home/bob/z", "c": 3}
    told = {"a": ["~/runs, ~", "/scratch/USER/x"], "b": "/home/USER/y /home/USER/z", "c": 3}
    assert doctor.redacted(given, words) == told
    if len(host) > 3 and host != "localhost":
        assert doctor.redacted(f"worker {host}:8080 said", words) == "worker HOST:8080 said"


def test_the_table_gives_the_command_below_its_sentence():
    rows = [
        {"name": "gpu", "status": "problem", "text": "Broken.", "fix": "mend"},
        {"name": "x", "status": "ok", "text": "y"},
    ]
    assert doctor.table(rows) == [
        "problem  gpu  Broken.",
        "              -> mend",
        "ok       x    y",
        "1 problem, 0 warnings",
    ]


# ---------------------------------------------------------------------------------------------------------- the probes


def python(code):
    return [sys.executable, "-c", code]


LINE = json.dumps({"state": "done", "dataset_info": {"x": 1}, "error": ""})


def test_a_child_that_hangs_is_given_up_in_time():
    code = f"import sys, time; print('noise', file=sys.stderr, flush=True); print({LINE!r}, flush=True); time.sleep(60)"
    began = time.monotonic()
    found = machine.watch(python(code), {"one": 20, "two": 0.5, "three": 20})
    assert time.monotonic() - began < 15
    assert found["one"] == Stage("done", {"x": 1}, log=found["one"].log)
    assert found["two"] == Stage("stuck", error="no answer within 0.5 s", log="noise\n")
    assert "three" not in found


def test_a_child_that_crashes_leaves_its_last_words():
    code = "import os, sys; print('last words', file=sys.stderr, flush=True); os.kill(os.getpid(), 11)"
    found = machine.watch(python(code), {"one": 20})
    assert found == {"one": Stage("died", error="killed by SIGSEGV", log="last words\n")}
    assert machine.watch(python("raise SystemExit(3)"), {"one": 20})["one"].error == "ended with status 3"
    assert machine.watch(["/no/such/program"], {"one": 20})["one"].state == "died"


def test_a_command_is_asked_with_a_limit():
    assert machine.ask(["/no/such/command"]) is None
    assert machine.ask(python("print(1)")) == Answer(0, "1\n", "")
    began = time.monotonic()
    assert machine.ask(python("import time; time.sleep(60)"), 0.3) == Answer(None)
    assert time.monotonic() - began < 10


def test_writing_leaves_nothing_behind(tmp_path):
    found = stages.try_folder(str(tmp_path / "not" / "yet"), megabytes=2)
    assert found["bytes_per_second"] > 0 and found["free"] > 0
    assert found["nearest"] == os.path.realpath(tmp_path) and not found["exists"]
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    assert stages.try_folder(str(tmp_path / "file" / "run"))["refused"] == "Not a directory"
    (tmp_path / "lineage.json").write_text(json.dumps({"versions": {"jax": "0.1"}}))
    assert stages.try_folder(str(tmp_path), megabytes=1)["versions"] == {"jax": "0.1"}


def test_folders_are_measured_and_prepared_data_found(tmp_path):
    assert stages.folder_size(str(tmp_path / "new"))["writable"]
    fake_root(tmp_path, {"mnist/3.0.1/dataset_info.json": "{}", "a/b/1.0.0/dataset_info.json": "{}", "raw/x": "12345"})
    assert stages.folder_size(str(tmp_path / "raw"))["size"] == 5
    found = stages.find_data("TFDS_DATA_DIR", str(tmp_path))
    assert found["prepared"] == ["a/b/1.0.0", "mnist/3.0.1"] and found["entries"] == 3
    assert "prepared" not in stages.find_data("BIGBASE_DATA", str(tmp_path))
    assert stages.find_data("BIGBASE_DATA", str(tmp_path / "gone")) == {
        "folder": str(tmp_path / "gone"),
        "exists": False,
    }


def test_collectives_are_right_here_and_a_broken_one_is_found(monkeypatch):
    found = stages.exchange(elements=100, repeats=1)
    assert found["count"] == jax.local_device_count() == 8
    assert [found[kind]["wrong"] for kind in ("psum", "ppermute")] == [[], []]
    assert found["psum"]["bytes_per_second"] > 0
    monkeypatch.setattr(jax.lax, "ppermute", lambda x, name, perm: x)
    monkeypatch.setattr(jax.lax, "psum", lambda x, name: x * 36 / (jax.lax.axis_index(name) + 1))
    found = stages.exchange(elements=100, repeats=1)
    assert found["ppermute"]["wrong"] == list(range(8))
    assert found["psum"]["wrong"] == list(range(8))


def test_the_known_complaints_are_all_formed_well():
    for _, sentence, fix in accelerators._KNOWN:
        groups = ["x", "y", "z"]
        assert "{" not in sentence.format(*groups) + fix.format(*groups, major=12)


# ------------------------------------------------------------------------------------------------------- for real, here


LAUNCH = ("launch.py", "--mode=doctor")
MODULE = ("-m", "bigbase_jax.doctor")


def start(workdir, program=LAUNCH, **env):
    """The doctor in a process of its own: (report, lines, exit status)."""
    command = [sys.executable, *program, f"--workdir={workdir}"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    *lines, last = done.stdout.splitlines()
    return json.loads(last), lines, done.returncode


def test_this_machine(tmp_path):
    home = tmp_path / "alice"
    home.mkdir()
    env = {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "BIGBASE_DATA": str(home)}
    report, lines, status = start(home / "runs", **env, JAX_COMPILATION_CACHE_DIR=str(home / "xla"))
    assert status == int(report["problems"] > 0)
    assert lines[-1] == f"{report['problems']} problem{'s' * (report['problems'] != 1)}, " + (
        f"{report['warnings']} warning{'s' * (report['warnings'] != 1)}"
    )
    said = {check["name"]: check for check in reversed(report["checks"])}  # the first of each name
    assert said["python"]["text"].startswith(f"Python {sys.version.split()[0]}")
    assert f"jax {jax.__version__}" in said["packages"]["text"] and said["packages"]["status"] == "ok"
    assert said["devices"]["text"].startswith("8 x cpu, backend cpu")
    assert said["collectives"]["text"].startswith("right on 8 devices: psum 4.19 MB in")
    assert "the second compilation hit it" in said["compile cache"]["text"]
    assert report["jax"]["cache"]["hits"] == [False, True]  # the first time in a new folder, and then
    assert "written and synced" in said["work folder"]["text"]
    assert report["disk"]["workdir"]["bytes_per_second"] > 0
    assert said["settings"]["text"].count("JAX_PLATFORMS=cpu") == 1
    assert "~/runs" in said["work folder"]["text"] and "alice" not in "\n".join(lines) + json.dumps(report)
    for check in report["checks"]:
        assert check["status"] in ("ok", "note", "warning", "problem")
        assert (check["status"] in ("warning", "problem")) <= ("fix" in check), check


@pytest.mark.parametrize("program", [LAUNCH, MODULE], ids=["launch.py", "module"])
def test_a_broken_jax_is_reported_and_never_a_traceback(tmp_path, program):
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text(
        "raise ImportError('jaxlib version 9 is newer than and incompatible')"
    )
    report, lines, status = start(tmp_path, program, PYTHONPATH=str(tmp_path))
    assert status == 1 and report["problems"] == 1
    (line,) = [line for line in lines if line.startswith("problem")]
    assert "JAX cannot be imported: jax and jaxlib do not belong together" in line
    assert report["jax"]["import"]["state"] == "failed" and "devices" not in report["jax"]


def test_a_driver_that_hangs_while_jax_starts_is_a_problem_and_not_a_wait(tmp_path):
    plugin = "import time\n\ndef initialize():\n    time.sleep(600)\n"
    fake_root(tmp_path, {"jax_plugins/wedged/__init__.py": plugin})
    folders = {"cache": str(tmp_path / "xla")}
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    found = machine.watch(machine._child("jax", folders), {"import": 60, "devices": 1.5, "collectives": 60}, env)
    assert {name: stage.state for name, stage in found.items()} == {"import": "done", "devices": "stuck"}
    said = judged(tmp_path, jax=found)
    assert wrong(said) == [("problem", "devices", "sudo reboot")]
    assert "JAX did not start its devices (no answer within 1.5 s): the NVIDIA driver hangs" in sentences(said)


def test_a_flag_that_xla_does_not_know_kills_only_the_child(tmp_path):
    report, lines, status = start(tmp_path, XLA_FLAGS="--xla_nonsense=3")
    assert status == 1 and report["problems"] == 1
    i = next(i for i, line in enumerate(lines) if line.startswith("problem"))
    assert "XLA does not know the flag --xla_nonsense=3" in lines[i] and lines[i + 1].endswith("-> unset XLA_FLAGS")


def test_a_mistake_on_its_command_line_is_one_sentence():
    command = [sys.executable, *LAUNCH, "--workdri=x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and "--workdri=x" in done.stderr.splitlines()[-1]


def test_the_doctor_itself_imports_neither_jax_nor_anything_else_of_ours():
    code = "import sys, bigbase_jax.doctor; print([n for n in sys.modules if n.startswith(('jax', 'bigbase', 'flax'))])"
    done = subprocess.run(python(code), cwd=ROOT, capture_output=True, text=True, check=True)
    assert sorted(eval(done.stdout)) == [
        "bigbase_jax",
        "bigbase_jax.doctor",
        "bigbase_jax.doctor.accelerators",
        "bigbase_jax.doctor.checks",
        "bigbase_jax.doctor.machine",
    ]
