"""Several processes on one machine: the results of one, everything once, and together to the end or to a last step."""

import json
import os
import pathlib
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types

import jax
import numpy as np
import pytest
import yaml
from jax._src import clusters
from look import EPOCHS, SIZES, B, look
from orbax.checkpoint import v1 as ocp
from test_launch import ROOT, launch, start

from bigbase_jax.core import UserError
from bigbase_jax.runtime import distributed
from bigbase_jax.runtime.distributed import Place, find_place

TINY = "--config=configs/catdog.py:tiny"
TINIER = "--config=configs/catdog_mlp.py:tiny"  # where what it learns does not matter
SHORT = ("--config.train.writers=()", "--config.data.cache_limit_gb=0")
LONG = (*SHORT, "--config.train.steps=400", "--config.train.checkpoint_every=4", "--config.train.eval_every=400")


def rows(workdir, kind):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


# ------------------------------------------------------------------------------------------------------- finding places

ENVIRONMENTS = (
    "SLURM_",
    "OMPI_",
    "KUBERNETES_",
    "JOB_COMPLETION_INDEX",
    "TPU_",
    "MEGASCALE_",
    "JAX_COORDINATOR",
    "CUDA_",
)
SLURM = {
    "SLURM_JOB_ID": "5",
    "SLURM_STEP_NODELIST": "node[007-010]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_RANK": "7",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}


@pytest.fixture
def environment(monkeypatch):
    """Sets variables after removing those of any cluster the tests may run on."""
    for name in list(os.environ):
        if name.startswith(ENVIRONMENTS):
            monkeypatch.delenv(name)

    def set_(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, None),
        (SLURM, Place("node007:61445", 4, 2)),
        ({**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_LOCALID": "1"}, Place("node007:61445", 4, 2, [1])),
        (
            {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": "1"},
            Place("node007:61445", 4, 2),
        ),
        ({**SLURM, "JAX_COORDINATOR_PORT": "1234"}, Place("node007:1234", 4, 2)),
        ({"SLURM_JOB_ID": "5", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),  # a batch script without srun
        (OPEN_MPI, Place("10.96.0.1:62624", 8, 7, [3])),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, Place("10.96.0.1:62624", 8, 7)),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a notebook's pod
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, None),  # no TPU here
    ],
)
def test_the_environment_says_where_a_process_is(environment, variables, place):
    environment(variables)
    assert find_place() == place


def test_a_tpu_pod_is_found_by_its_worker_names(environment, monkeypatch):
    one_slice = {"MEGASCALE_COORDINATOR_ADDRESS": "", "MEGASCALE_NUM_SLICES": "1", "MEGASCALE_SLICE_ID": "0"}
    environment({"TPU_WORKER_HOSTNAMES": "t0,t1,t2,t3", "TPU_WORKER_ID": "3", "TPU_SKIP_MDS_QUERY": "1", **one_slice})
    monkeypatch.setattr(clusters.cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(clusters.cloud_tpu_cluster.socket, "gethostbyname", lambda name: "10.0.0.1")
    assert find_place() == Place("t0:8482", 4, 3)
    environment({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"})  # one host with its TPU
    assert find_place() is None


def test_a_pod_of_an_indexed_job_asks_kubernetes(environment, monkeypatch):
    environment(POD)
    answers = {
        "is_env_present": lambda: True,
        "get_process_count": lambda: 3,
        "get_coordinator_address": lambda timeout_secs, override_coordinator_port: "job-0.svc:55527",
    }
    for name, answer in answers.items():
        monkeypatch.setattr(clusters.K8sCluster, name, answer)
    assert find_place() == Place("job-0.svc:55527", 3, 1)


def start_file(name):
    """The documents of a file of experiments/start."""
    return list(yaml.safe_load_all((ROOT / "experiments" / "start" / name).read_text()))


def as_object(value):
    """Nested mappings as objects whose attributes are named as the kubernetes package names them."""
    if isinstance(value, dict):
        names = {re.sub("[A-Z]", lambda m: "_" + m[0].lower(), key): as_object(x) for key, x in value.items()}
        return types.SimpleNamespace(**names)
    return value


def test_the_job_for_kubernetes_is_what_is_asked_for(environment, monkeypatch):
    """JAX's own detector, on a stand-in for the cluster that holds what kubernetes.yaml describes."""
    documents = {document["kind"]: document for document in start_file("kubernetes.yaml")}
    job, service = documents["Job"], documents["Service"]
    allowed = [
        (kind, verb) for rule in documents["Role"]["rules"] for kind in rule["resources"] for verb in rule["verbs"]
    ]
    pod = as_object({"metadata": {"name": "bigbase-1"}, "spec": job["spec"]["template"]["spec"]})
    pod.metadata.labels = {"job-name": job["metadata"]["name"]}
    pod.metadata.owner_references = [types.SimpleNamespace(controller=True, kind="Job")]
    asked = as_object(job)
    asked.metadata.labels = {}

    def answer(kind, verb, value):
        assert (kind, verb) in allowed
        return value

    core = types.SimpleNamespace(
        list_namespaced_pod=lambda namespace, field_selector: answer("pods", "list", as_object({"items": [pod]})),
        list_namespaced_service=lambda namespace: answer("services", "list", as_object({"items": [service]})),
    )
    batch = types.SimpleNamespace(read_namespaced_job=lambda name, namespace: answer("jobs", "get", asked))
    package = types.ModuleType("kubernetes")
    package.config = types.SimpleNamespace(load_incluster_config=lambda: None)
    exceptions = types.SimpleNamespace(ApiException=LookupError)
    package.client = types.SimpleNamespace(CoreV1Api=lambda: core, BatchV1Api=lambda: batch, exceptions=exceptions)
    monkeypatch.setitem(sys.modules, "kubernetes", package)
    monkeypatch.setattr(clusters.K8sCluster, "_namespace", lambda: "default")
    monkeypatch.setattr(clusters.k8s_cluster.socket, "gethostbyname", lambda name: "10.0.0.1")
    environment({**POD, "HOSTNAME": "bigbase-1"})

    assert find_place() == Place("bigbase-0.bigbase:55527", job["spec"]["parallelism"], 1)
    assert job["spec"]["completionMode"] == "Indexed" and job["spec"]["completions"] == job["spec"]["parallelism"]
    assert (
        service["spec"]["selector"] == {"job-name": job["metadata"]["name"]} and service["spec"]["clusterIP"] == "None"
    )
    assert documents["RoleBinding"]["subjects"][0]["name"] == pod.spec.service_account_name
    assert documents["ServiceAccount"]["metadata"]["name"] == pod.spec.service_account_name


@pytest.mark.parametrize("name", ["kubernetes.yaml", "jobset_tpu.yaml"])
def test_what_kubernetes_runs_is_a_command_of_ours_and_a_mistake_in_it_is_final(name):
    job = next(document for document in start_file(name) if document["kind"] in ("Job", "JobSet"))["spec"]
    if "replicatedJobs" in job:
        job = job["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    python, script, *flags = pod["containers"][0]["command"]
    assert (python, script) == ("python", "launch.py")
    assert (ROOT / flags[0].removeprefix("--config=")).is_file() and flags[1].startswith("--workdir=/shared/")
    assert job["podFailurePolicy"]["rules"] == [{"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2]}}]
    assert pod["restartPolicy"] == "Never"  # which such a policy needs


@pytest.mark.parametrize(("status", "repeated"), [(0, False), (2, False), (75, True), (137, True), (143, True)])
def test_the_slurm_script_repeats_what_may_be_repeated(tmp_path, status, repeated):
    """With stand-ins for srun and scontrol; srun is told by the script how many processes to start, and where."""
    for name, body in (("srun", f'echo "srun $*"; exit {status}'), ("scontrol", 'echo "scontrol $*"')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "5"}
    script = ROOT / "experiments" / "start" / "slurm.sh"
    done = subprocess.run(["bash", str(script), "--config=c.py"], env=env, capture_output=True, text=True)
    assert done.returncode == status
    assert "python launch.py --config=c.py" in done.stdout.splitlines()[0]
    assert ("scontrol requeue 5" in done.stdout) == repeated
    assert "--ntasks-per-node=1" in script.read_text() and "--signal=TERM@" in script.read_text()


def test_the_tpu_script_starts_the_command_on_all_workers(tmp_path):
    (tmp_path / "gcloud").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "gcloud").chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "TPU": "t", "ZONE": "z"}
    script = ROOT / "experiments" / "start" / "tpu_pod.sh"
    done = subprocess.run([str(script), "--config=c.py", "--workdir=/a b"], env=env, capture_output=True, text=True)
    *_, worker, command = done.stdout.splitlines()
    assert worker == "--worker=all" and "python3 launch.py --config=c.py --workdir=/a\\ b" in command


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        (POD, "pip install 'jax[k8s]'"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "give --coordinator=HOST:PORT"),
        ({**SLURM, "SLURM_NTASKS": "many"}, "Slurm does not say where the other processes are"),
    ],
)
def test_a_cluster_that_says_too_little_is_one_sentence(environment, monkeypatch, variables, sentence):
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    environment(variables)
    with pytest.raises(UserError) as error:
        find_place()
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("10.0.0.1:8476", None, 1), "there is no --num_processes=N"),
        ((None, 2, None), "there is no --coordinator=HOST:PORT and no --process_id=I"),
        (("10.0.0.1", 2, 1), "is not HOST:PORT"),
        (("10.0.0.1:8476", 2, 2), "--process_id=2 is not one of the 2 from 0 to 1"),
        (("10.0.0.1:8476", 0, 0), "--num_processes=0 is no number"),
    ],
)
def test_flags_that_do_not_fit_are_one_sentence(environment, flags, sentence):
    with pytest.raises(UserError, match=sentence):
        find_place(*flags)


def test_flags_come_before_the_environment(environment):
    environment(SLURM)
    assert find_place("10.0.0.1:8476", 2, 1) == Place("10.0.0.1:8476", 2, 1)
    assert find_place(num_processes=1) is None


def test_spawn_needs_a_number_that_divides_the_devices(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    with pytest.raises(UserError, match="the 8 simulated devices of XLA_FLAGS do not divide"):
        distributed.spawn(3)
    with pytest.raises(UserError, match="at least 1"):
        distributed.spawn(0)


# ------------------------------------------------------------------------------------------------ stopping and watching


class Store:
    """JAX's key-value store, in memory."""

    def __init__(self):
        self.values, self.lock = {}, threading.Lock()

    def key_value_set(self, key, value, allow_overwrite):
        with self.lock:
            if key in self.values and not allow_overwrite:
                raise RuntimeError("ALREADY_EXISTS")
            self.values[key] = value

    def key_value_dir_get(self, prefix):
        time.sleep(random.random() / 1000)
        with self.lock:
            return [(key, value) for key, value in self.values.items() if key.startswith(prefix)]


@pytest.mark.parametrize("seed", range(10))
def test_all_stop_after_the_same_step_however_far_some_run_ahead(monkeypatch, seed):
    """Threads in the place of processes; no step ends before all have begun one at most three before, as on devices."""
    monkeypatch.setattr(distributed, "_TICK", 0.01)
    store, count, total = Store(), 5, 10_000
    groups = [distributed._Group(store, i, count, lost_after=60) for i in range(count)]
    chance, began, last = random.Random(seed), [0] * count, [0] * count
    asking = {chance.randrange(count): chance.randrange(5, 60) for _ in range(2)}

    def loop(index):
        pace = random.Random(100 * seed + index)
        for step in range(1, total):
            began[index] = step
            while min(began) < step - 3:
                time.sleep(1e-4)
            time.sleep(pace.random() * 2e-3)
            if asking.get(index) == step:
                groups[index].asked = signal.SIGTERM
            if groups[index].ends(step):
                last[index] = step
                began[index] = total
                return

    threads = [threading.Thread(target=loop, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for group in groups:
        group._over.set()
    assert len(set(last)) == 1 and min(asking.values()) <= last[0] < total
    assert {group.signal for group in groups} == {signal.SIGTERM}


def test_alone_the_loop_ends_after_the_step_in_progress():
    before = signal.getsignal(signal.SIGTERM)
    with distributed.Watch(None) as watch:
        assert not watch.ends(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert watch.ends(2) and watch.signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_said_at_once_and_an_interrupt_after_it_interrupts(monkeypatch, first):
    said = queue.SimpleQueue()
    monkeypatch.setattr(distributed.signals, "interrupted", lambda: said.put("interrupted"))
    with distributed.Watch(None, tell=said.put) as watch:
        os.kill(os.getpid(), first)
        assert said.get(timeout=30).startswith(f"{first.name}: the run stops after this step, with a checkpoint")
        assert watch.ends(1) and watch.signal == first
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        assert said.get(timeout=30) == "interrupted"


def test_a_step_that_stalls_is_named_once_with_all_stacks(capfd):
    def somewhere_else():
        time.sleep(1.5)

    thread = threading.Thread(target=somewhere_else)
    thread.start()
    with distributed.Watch(0.4, start=6) as watch:
        watch.ends(7)
        time.sleep(1.2)
        watch.ends(8)
    thread.join()
    said = capfd.readouterr().err
    assert said.count("has taken") == 1 and "step 8 has taken" in said
    assert "somewhere_else" in said and "test_a_step_that_stalls_is_named_once" in said


def test_what_is_not_a_step_may_take_its_time(capfd):
    with distributed.Watch(0.2) as watch:
        watch.ends(1)
        with watch.pause():
            time.sleep(0.8)
        watch.ends(2)
    with distributed.Watch(None):
        time.sleep(0.3)
    assert not capfd.readouterr().err


# -------------------------------------------------------------------------------------------- batches of real processes


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """What each of four processes of two devices sees, and the folder that they share."""
    folder = tmp_path_factory.mktemp("four")
    (folder / "text.csv").write_text("text,label\n" + "".join(f"word {i},{i % 2}\n" for i in range(40)))
    flags = "--xla_force_host_platform_device_count=2"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "look.py"), f"127.0.0.1:{free_port()}", "4"]
    processes = [subprocess.Popen([*command, str(i), str(folder)], env=env) for i in range(4)]
    assert [process.wait(timeout=200) for process in processes] == [0] * 4
    return [{**json.loads((folder / f"{i}.json").read_text()), "folder": folder} for i in range(4)]


def free_port():
    with distributed.socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize("kind", ["kept", "checked"])
def test_one_process_reads_the_examples_and_the_others_find_them(four, kind):
    folder = four[0]["folder"]
    counts = {log.name: log.read_text().splitlines() for log in (folder / kind).glob("*.log")}
    sampled = 16 if kind == "kept" else 0  # to see how large a cache would be
    (reads,) = counts.values()
    assert len(reads) == 30 + sampled and set(map(int, reads)) == set(range(30))
    assert sum(len(seen["said"]) for seen in four) == 1
    assert not list((folder / "cache").glob("lock-*")) and not list((folder / "cache").glob("tmp-*"))


def test_every_example_is_used_once_per_epoch_over_all_processes(four):
    used = [pair for seen in four for pair in seen["used"]]
    assert sorted(position for position, _ in used) == list(range(EPOCHS * SIZES["train"]))
    epochs = np.array([example for _, example in sorted(used)]).reshape(EPOCHS, -1)
    for epoch in epochs:
        assert sorted(epoch) == list(range(SIZES["train"]))
    assert (epochs[0] != epochs[1]).any()
    assert sorted(used) == sorted(look(devices=1)["used"])


def test_an_evaluation_with_uneven_shards_is_exact_and_the_same_in_all_processes(four):
    assert 0 < SIZES["test"] % B <= B - 2  # in the last batch, the last process has nothing but padding
    alone = look(devices=1)
    assert alone["metrics"]["error"] > 0.1
    for seen in four:
        assert seen["examples"]["index"] == list(range(SIZES["test"]))
        for name, values in alone["examples"].items():
            np.testing.assert_allclose(seen["examples"][name], values, rtol=1e-5)
        assert seen["metrics"] == four[0]["metrics"] == pytest.approx(alone["metrics"], rel=1e-5)


# ----------------------------------------------------------------------------------------------- runs of real processes


def child(parent, index):
    """The process id of process ``index`` of a command with --spawn."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for pid in (p.name for p in pathlib.Path("/proc").iterdir() if p.name.isdigit()):
            try:
                variables = pathlib.Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                parent_of = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
            except OSError:
                continue
            place = next((v for v in variables if v.startswith(b"BIGBASE_SPAWNED=")), b"")
            if int(parent_of) == parent and place.endswith(f" {index}".encode()):
                return int(pid)
        time.sleep(0.1)
    raise AssertionError(f"there is no process {index} of {parent}")


PACED = """
import time
import launch
from bigbase_jax.data.pipeline import Batches
take = Batches.__next__
Batches.__next__ = lambda self: (time.sleep(0.2), take(self))[1]
launch.run()
"""


def disturb(folder, command, index, number, after="step 6/"):
    """Sends process ``index`` a signal once ``after`` was said; returns (exit status, stdout, stderr, seconds).

    Steps take 0.2 s and more, so that the run does not end before the signal has come everywhere.
    """
    (folder / "paced.py").write_text(PACED)
    env = {**os.environ, "XLA_FLAGS": "", "BIGBASE_PLAIN": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(folder / "paced.py"), *command]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True)
    said = []
    try:
        for line in process.stderr:
            said.append(line)
            if after in line:
                break
        os.kill(child(process.pid, index), number)
        began = time.monotonic()
        out, err = process.communicate(timeout=200)
    finally:
        process.kill()  # its processes end when they notice
    return process.returncode, out, "".join(said) + err, time.monotonic() - began


def arrays(workdir):
    """The newest checkpoint: its step, and all arrays as bytes, whatever devices they were on."""
    newest = max((p for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    saved = ocp.metadata(newest).metadata
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for name, x in saved.items()}
    loaded = ocp.load(newest, shapes)
    return newest.name, {name: (str(x.dtype), np.asarray(x).tobytes()) for name, x in loaded.items()}


def errors(err):
    return [line for line in err.splitlines() if "error: " in line]


@pytest.fixture(scope="module")
def spawned(tmp_path_factory):
    """A finished run of two processes: (workdir, result, stdout, stderr)."""
    workdir = tmp_path_factory.mktemp("runs") / "two"
    return workdir, *launch(TINY, f"--workdir={workdir}", *SHORT, "--config.train.log_every=1", "--spawn=2")


def test_two_processes_learn_what_one_learns(spawned, tmp_path):
    workdir, result, _, err = spawned
    assert "2 x cpu" in err and "2 processes" in err
    alone, _, _ = launch(TINY, f"--workdir={tmp_path / 'one'}", *SHORT, "--config.train.log_every=1")
    one, two = rows(tmp_path / "one", "train"), rows(workdir, "train")
    assert [row["step"] for row in two] == list(range(1, 9)) == [row["step"] for row in one]
    np.testing.assert_allclose([row["loss"] for row in two], [row["loss"] for row in one], rtol=1e-3)
    assert result["loss"] == pytest.approx(alone["loss"], rel=1e-3)


@pytest.mark.slow
def test_two_processes_learn_from_a_teacher_what_one_learns(spawned, tmp_path):
    every = "--config.train.log_every=1"
    command = ("--config=configs/distil.py:tiny", f"--config.teacher={spawned[0]}", every, *SHORT)
    found = [
        launch(*command, f"--workdir={tmp_path / name}", *how)[0]
        for name, how in (("one", ()), ("two", ("--spawn=2",)))
    ]
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-3)
    one, two = (rows(tmp_path / name, "train") for name in ("one", "two"))
    np.testing.assert_allclose([row["soft"] for row in two], [row["soft"] for row in one], rtol=1e-3)
    assert min(row["soft"] for row in one) > 0


def test_everything_is_written_and_said_once(spawned):
    workdir, result, out, err = spawned
    assert json.loads(out) == result and len(out.splitlines()) == 1
    evaluations = rows(workdir, "eval")
    assert [row["step"] for row in evaluations] == [4, 8] and len(rows(workdir, "compile")) == 1
    lines = [line for line in err.splitlines() if "Gloo" not in line]
    assert all(line.startswith("[0] ") for line in lines)
    assert sum("report: " in line for line in lines) == 1
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["4", "8"]
    assert not list(workdir.rglob("*tmp*"))
    lineage = json.loads((workdir / "lineage.json").read_text())
    assert lineage["devices"]["processes"] == 2 and len(lineage["starts"]) == 1
    assert "--spawn=2" in lineage["command"] and "coordinator" not in lineage["command"]


def test_a_checkpoint_of_two_processes_is_evaluated_by_one_and_by_two(spawned):
    workdir, result, _, _ = spawned
    alone, _, _ = launch("--mode=eval", f"--workdir={workdir}")
    assert alone["confusion_matrix"] == result["confusion_matrix"]
    assert alone["loss"] == pytest.approx(result["loss"], rel=1e-5)


def test_sigterm_to_one_stops_all_after_the_same_step_with_a_checkpoint(tmp_path):
    command = (TINIER, f"--workdir={tmp_path / 'run'}", *LONG, "--spawn=2")
    status, out, err, _ = disturb(tmp_path, command, 1, signal.SIGTERM)
    assert status == 128 + signal.SIGTERM, err
    stopped = json.loads(out.splitlines()[-1])
    assert stopped["signal"] == signal.SIGTERM and stopped["step"] >= 6
    assert arrays(tmp_path / "run")[0] == str(stopped["step"])
    assert not errors(err) and f"stopped by SIGTERM after step {stopped['step']}" in err


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_the_others_say_who_was_lost_and_end(tmp_path, victim):
    command = (TINIER, f"--workdir={tmp_path / 'run'}", *LONG, "--spawn=2", "--lost_after=4")
    status, out, err, seconds = disturb(tmp_path, command, victim, signal.SIGKILL)
    (sentence,) = errors(err)
    assert sentence.startswith(f"[{1 - victim}] error: process {victim} on {distributed.socket.gethostname()} was lost")
    assert 0 < int(sentence.partition("after step ")[2].split()[0]) <= 20
    assert status == 128 + signal.SIGKILL and not out
    assert "Traceback" not in err and "stack trace" not in err
    assert seconds < 60


def test_a_mistake_that_all_make_is_said_once(tmp_path):
    _, out, err = launch(TINIER, f"--workdir={tmp_path / 'run'}", "--config.data.batch_size=15", "--spawn=2", status=2)
    assert len(errors(err)) == 1 and "does not divide over 2 devices; use 14 or 16" in errors(err)[0]
    assert not out


def test_processes_that_do_not_come_are_one_sentence(tmp_path):
    port = free_port()
    code = (
        "from bigbase_jax.runtime import distributed\n"
        f"with distributed.joined(distributed.Place('127.0.0.1:{port}', 2, 0), within=4): pass"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    listening = set()
    while process.poll() is None:
        listening |= set(addresses(port))
        time.sleep(0.1)
    assert process.returncode == distributed.LOST
    (line,) = process.stderr.read().splitlines()
    assert "after 4 s not all of the 2 processes have come" in line
    assert listening and listening <= {"0100007F", "0000000000000000FFFF00000100007F"}, "it listens to the network"


def addresses(port):
    """Where something of this machine listens on a port, as the kernel writes it."""
    for name in ("tcp", "tcp6"):
        for line in pathlib.Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            address, _, at = local.partition(":")
            if state == "0A" and int(at, 16) == port:
                yield address


# -------------------------------------------------------------------------------------------------- slow ones


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1, 3])
def test_a_run_of_four_that_was_killed_and_stopped_ends_with_the_same_bits(tmp_path, victim):
    def command(name):
        steps = ("--config.train.steps=40", "--config.train.checkpoint_every=4", "--config.train.eval_every=20")
        return TINY, f"--workdir={tmp_path / name}", *SHORT, *steps, "--spawn=4", "--lost_after=5"

    result, _, _ = launch(*command("undisturbed"))
    status, _, err, _ = disturb(tmp_path, command("run"), victim, signal.SIGKILL, after="step 10/")
    assert status == 128 + signal.SIGKILL
    assert len(errors(err)) == 3 and all(f"process {victim} on" in line for line in errors(err))
    status, out, err, _ = disturb(tmp_path, command("run"), victim, signal.SIGTERM, after="step 16/")
    assert status == 128 + signal.SIGTERM, err
    assert 10 <= json.loads(out.splitlines()[-1])["step"] < 40
    assert launch(*command("run"))[0] == result
    assert arrays(tmp_path / "run") == arrays(tmp_path / "undisturbed")
    steps = [row["step"] for row in rows(tmp_path / "run", "train")]
    assert steps == sorted(set(steps))


@pytest.mark.slow
def test_parameters_spread_over_processes_are_saved_gone_on_with_and_evaluated_by_one(tmp_path):
    spread = ("--config.train.mesh.fsdp=2", "--config.train.mesh.data=1", "--config.train.checkpoint_every=2")
    command = (TINIER, f"--workdir={tmp_path / 'run'}", *SHORT, *spread, "--spawn=2")
    result, _, _ = launch(*command)
    newest, before = arrays(tmp_path / "run")
    assert "fsdp" in (tmp_path / "run" / "checkpoints" / newest / "state" / "_sharding").read_text()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / newest)
    assert launch(*command)[0] == result
    assert arrays(tmp_path / "run") == (newest, before)
    alone, _, _ = launch("--mode=eval", f"--workdir={tmp_path / 'run'}")
    assert alone["loss"] == pytest.approx(result["loss"], rel=1e-5)


@pytest.mark.slow
def test_processes_whose_command_is_gone_end_too(tmp_path):
    process = start(TINIER, f"--workdir={tmp_path / 'run'}", *LONG, "--spawn=2")
    for line in process.stderr:
        if "step 6/" in line:
            break
    children = [child(process.pid, index) for index in range(2)]
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 30
    while any(pathlib.Path(f"/proc/{pid}").exists() for pid in children):
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.slow
def test_a_process_that_hangs_is_lost_and_the_watchdog_shows_where_the_others_wait(tmp_path):
    more = ("--spawn=2", "--lost_after=20", "--config.train.watchdog=6")
    process = start(TINIER, f"--workdir={tmp_path / 'run'}", *LONG, *more)
    for line in process.stderr:
        if "step 6/" in line:
            break
    hung = child(process.pid, 1)
    os.kill(hung, signal.SIGSTOP)
    out, err = process.communicate(timeout=200)
    assert process.returncode == distributed.LOST and not out
    assert err.count("(config.train.watchdog)") == 1 and "train.py" in err
    assert "process 1 on" in errors(err)[0] and "nothing was heard from it for 2" in errors(err)[0]


@pytest.mark.slow
def test_a_mistake_of_one_process_ends_all(tmp_path):
    """Process 1 alone cannot read its data: it keeps its traceback or sentence, the others say whose it was."""
    script = tmp_path / "run.py"
    script.write_text(
        "import os\n"
        "from bigbase_jax.data.pipeline import Batches\n"
        "take = Batches.__next__\n"
        "def fail(self):\n"
        "    fail.calls += 1\n"
        "    if fail.calls == 8 and os.environ.get('BIGBASE_SPAWNED', '').endswith(' 1'):\n"
        "        raise ZeroDivisionError('only here')\n"
        "    return take(self)\n"
        "fail.calls = 0\n"
        "Batches.__next__ = fail\n"
        "import launch\n"
        "launch.run()\n"
    )
    command = [sys.executable, str(script), TINIER, f"--workdir={tmp_path / 'run'}", *LONG, "--spawn=2"]
    env = {**os.environ, "XLA_FLAGS": "", "BIGBASE_PLAIN": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    (sentence,) = errors(done.stderr)
    assert sentence.startswith("[0] error: process 1 on") and "ZeroDivisionError: only here" in sentence
    assert done.stderr.count("Traceback") == 1 and "[1] Traceback" in done.stderr


@pytest.mark.slow
def test_a_run_folder_that_is_not_shared_is_one_sentence(tmp_path):
    address = f"127.0.0.1:{free_port()}"
    processes = []
    for index in range(2):
        place = (f"--coordinator={address}", "--num_processes=2", f"--process_id={index}")
        processes.append(start(TINIER, f"--workdir={tmp_path / str(index)}", *SHORT, *place))
    said = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert "must be on storage that all hosts share" in said[1].splitlines()[-1]
    assert "process 1 on" in said[0].splitlines()[-1]


@pytest.mark.slow
def test_a_damaged_checkpoint_is_left_by_all_for_the_one_before_it(tmp_path):
    steps = ("--config.train.steps=12", "--config.train.checkpoint_every=4", "--config.train.eval_every=12")
    command = (TINIER, f"--workdir={tmp_path / 'run'}", *SHORT, *steps, "--spawn=2")
    result, _, _ = launch(*command)
    before = arrays(tmp_path / "run")
    for file in (tmp_path / "run" / "checkpoints" / before[0] / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    again, _, err = launch(*command)
    assert err.count("cannot be read") == 1
    assert again == result and arrays(tmp_path / "run") == before
