"""Requests per second and latencies of servers of one model, ours and others', in turn on the same cores.

python experiments/serving/load.py RUN --pictures='PATTERN' [--closed=1,16] [--rates=20,40,80] [--goal_ms=100]
python experiments/serving/load.py RUN --texts=FILE ...                    the first column of each line
python experiments/serving/load.py FOLDER --decoder --closed=1,16   of transformers, or a run that was exported

``--closed``: so many clients, each of which asks again when it has its answer. ``--rates``: requests per second that
come independently of each other (Poisson) and of the answers; their latency counts from when each was due, and the
largest rate is told at which 99 of 100 are answered within ``--goal_ms``. All servers are up, and take turns; one JSON
line for each measurement, with the server's core-milliseconds for a request (of a model that writes, for a token), and
its memory at the end. ``--servers`` is a pattern of names, as ours.
"""

import argparse
import asyncio
import collections
import contextlib
import glob
import json
import os
import pathlib
import random
import re
import socket
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SLOW = 30.0  # seconds that an answer is waited for after the last request was due


# ------------------------------------------------------------------------------------------------------------- servers


def commands(asked):
    """What starts each server, by name: words after Python's, where PORT is its port."""
    serve = ["launch.py", "--mode=serve", f"--workdir=run={asked.run}", "--port=PORT", *asked.flag]
    peer = [str(HERE / "peer.py")]
    found = {"ours, jax": serve, "ours, onnxruntime": [*serve, "--engine=onnxruntime"]}
    if asked.before:
        found |= {f"{name}, before": words for name, words in found.items()}
    if asked.decoder:
        for threads in (1, 2):
            words = [*peer, "generate", asked.run, "--port=PORT", f"--threads={threads}"]
            found[f"transformers, {threads} threads"] = words
        if asked.gguf:
            found["llama.cpp"] = [str(HERE / "llama.py"), asked.gguf, "PORT"]
        return found
    if asked.bentoml:
        found["BentoML, onnxruntime"] = ["-m", "bentoml", "serve", "bento:Run", f"--working-dir={HERE}", "--port=PORT"]
    for engine in ("onnxruntime", "torch"):
        for threads, at_once in ((2, 0), (2, 1), (1, 2)):
            words = [engine, asked.run, "--port=PORT", f"--threads={threads}", f"--at_once={at_once}"]
            found[f"FastAPI, {engine}, {threads} threads, {at_once or 'all'} at once"] = [*peer, *words]
    return found


@contextlib.contextmanager
def running(asked):
    """(process, port) of each server by name, while inside."""
    servers = {}
    try:
        for name, words in commands(asked).items():
            if not re.search(asked.servers, name):
                continue
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            python = {"llama.cpp": asked.llama, "BentoML, onnxruntime": asked.bentoml}.get(name, sys.executable)
            words = [python, *(word.replace("PORT", str(port)) for word in words)]
            log = (
                subprocess.DEVNULL if asked.log is None else os.open(asked.log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
            )
            root = asked.before if name.endswith("before") else str(ROOT)
            environment = {**os.environ, "PYTHONPATH": root, "RUN": asked.run}
            process = subprocess.Popen(words, cwd=root, env=environment, stdout=log, stderr=log)
            servers[name] = process, port
        yield servers
    finally:
        for process, _ in servers.values():
            process.terminate()
        for process, _ in servers.values():
            process.wait()


# ------------------------------------------------------------------------------------------------------------- clients


class Client:
    """A connection that is kept, and opened again where the server has closed it."""

    def __init__(self, port):
        self._port, self._writer = port, None

    async def ask(self, message):
        """(status, body) of the answer."""
        for again in (True, False):
            fresh = self._writer is None
            if fresh:
                self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
            try:
                self._writer.write(message)
                head = await self._reader.readuntil(b"\r\n\r\n")
                length = int(re.search(rb"(?i)content-length: (\d+)", head)[1])
                return int(head[9:12]), await self._reader.readexactly(length)
            except (OSError, asyncio.IncompleteReadError):
                self.close()
                if fresh or not again:
                    raise

    def close(self):
        if self._writer is not None:
            self._writer.close()
        self._writer = None


def message(path, body, kind):
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def closed(port, messages, clients, seconds, seed):
    """Latencies, statuses, seconds, bodies: each client asks when it has its answer."""
    rng, times, statuses, bodies = random.Random(seed), [], collections.Counter(), []
    end = time.perf_counter() + seconds

    async def one():
        client = Client(port)
        while (began := time.perf_counter()) < end:
            status, body = await client.ask(rng.choice(messages))
            times.append(time.perf_counter() - began)
            statuses[status] += 1
            bodies.append(body)
        client.close()

    began = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(clients)))
    return times, statuses, time.perf_counter() - began, bodies


async def poisson(port, messages, rate, seconds, seed):
    """The same for requests that come by themselves; one that is not answered in time has an endless latency."""
    rng, times, statuses, bodies = random.Random(seed), [], collections.Counter(), []
    free, tasks, due = [], [], time.perf_counter()
    end = due + seconds

    async def one(due, sent):
        client = free.pop() if free else Client(port)
        try:
            status, body = await asyncio.wait_for(client.ask(sent), end + SLOW - time.perf_counter())
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            status, body = 0, b""
            client.close()
        times.append(time.perf_counter() - due if status == 200 else float("inf"))
        statuses[status] += 1
        bodies.append(body)
        free.append(client)

    while (due := due + rng.expovariate(rate)) < end:
        if (wait := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.ensure_future(one(due, rng.choice(messages))))
    await asyncio.gather(*tasks)
    for client in free:
        client.close()
    return times, statuses, time.perf_counter() - (end - seconds), bodies


# ---------------------------------------------------------------------------------------------------------------- main


def asking(asked):
    """The requests."""
    if asked.decoder:
        rng = random.Random(0)
        words = {"model": "run", "max_tokens": asked.tokens, "temperature": 0, "ignore_eos": True}
        bodies = [{**words, "prompt": [rng.randrange(asked.vocab) for _ in range(asked.prompt)]} for _ in range(64)]
        return [message("/v1/completions", json.dumps(body).encode(), "application/json") for body in bodies]
    path = "/v1/predict/run"
    if asked.texts:
        with open(asked.texts) as file:
            texts = [line.rstrip("\n").split("\t")[0] for line in file][:512]
        return [message(path, json.dumps({"text": text}).encode(), "application/json") for text in texts]
    files = sorted(glob.glob(asked.pictures))[:64]
    return [message(path, pathlib.Path(name).read_bytes(), "application/octet-stream") for name in files]


def core_seconds(pid):
    """Of a process and those that it has started and that are alive."""
    with open(f"/proc/{pid}/stat") as file:
        used = sum(map(int, file.read().rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")
    children = [pathlib.Path(path).read_text().split() for path in glob.glob(f"/proc/{pid}/task/*/children")]
    return used + sum(core_seconds(child) for each in children for child in each)


async def told(server, how, load, answers, process):
    """A line of what is measured."""
    before = core_seconds(process.pid)
    times, statuses, seconds, bodies = await answers
    used = core_seconds(process.pid) - before
    ok = sorted(x for x in times if x < float("inf"))
    line = {"server": server, how: load, "asked": len(times), "refused": len(times) - statuses[200]}
    line |= {"per_second": round(statuses[200] / seconds, 1), "core_ms": round(1e3 * used / max(statuses[200], 1), 2)}
    if len(ok) > 1:
        whole = [*ok, *[10 * SLOW] * (len(times) - len(ok))]
        cut = statistics.quantiles(whole, n=100, method="inclusive")
        line |= {"p50_ms": round(1e3 * cut[49], 1), "p99_ms": round(1e3 * cut[98], 1)}
    tokens = [json.loads(body)["usage"]["completion_tokens"] for body in bodies if b'"usage"' in body]
    if tokens:
        line["tokens_per_second"] = round(sum(tokens) / seconds, 1)
        line["core_ms"] = round(1e3 * used / sum(tokens), 2)  # of a token
    with open(f"/proc/{process.pid}/status") as file:
        line["memory_mb"] = int(re.search(r"VmRSS:\s+(\d+)", file.read())[1]) // 1024
    print(json.dumps(line), flush=True)
    return line


async def measured(asked, servers):
    messages, largest = asking(asked), {}
    answers = {}
    for name, (process, port) in servers.items():
        deadline = time.monotonic() + 300
        while True:  # until it answers: what it says is kept, to see that all say the same
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                status, body = await Client(port).ask(messages[0])
                if status == 200:
                    answers[name] = body
                    break
            assert process.poll() is None and time.monotonic() < deadline, f"{name} does not answer"
            await asyncio.sleep(0.1)
    if not asked.decoder:
        said = {name: json.loads(body)["answers"][0] for name, body in answers.items()}
        assert len({str(x["label"]) for x in said.values()}) == 1, said
        chances = [x["probability"] for x in said.values()]
        assert max(chances) - min(chances) < 1e-3, said
    for _, port in servers.values():
        await closed(port, messages, 16, asked.seconds / 4, 0)  # warms up
    for turn in range(asked.rounds):
        for clients in asked.closed:
            for name, (process, port) in servers.items():
                answers = closed(port, messages, clients, asked.seconds, turn)
                await told(name, "clients", clients, answers, process)
        for rate in asked.rates:
            for name, (process, port) in servers.items():
                if largest.get((name, turn), (0, True))[1]:  # beyond what it can do it is not asked
                    answers = poisson(port, messages, rate, asked.seconds, turn)
                    line = await told(name, "rate", rate, answers, process)
                    fits = not line["refused"] and line["p99_ms"] <= asked.goal_ms
                    largest[name, turn] = (rate if fits else largest.get((name, turn), (0,))[0], fits)
    for (name, _), (rate, _) in largest.items():
        print(json.dumps({"server": name, "largest_rate": rate, "goal_ms": asked.goal_ms}), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(x) for x in text.split(",") if x]  # noqa: E731
    parser.add_argument("run")
    parser.add_argument("--pictures")
    parser.add_argument("--texts")
    parser.add_argument("--decoder", action="store_true")
    parser.add_argument("--gguf", help="a file for llama.cpp's server")
    parser.add_argument("--llama", help="the Python that has xllamacpp, of which that server is")
    parser.add_argument("--bentoml", help="the Python that has BentoML, whose server of texts is measured too")
    parser.add_argument("--before", help="another tree of this project, whose server takes its turns too")
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--closed", type=numbers, default=[])
    parser.add_argument("--rates", type=numbers, default=[])
    parser.add_argument("--goal_ms", type=float, default=100.0)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--servers", default="")
    parser.add_argument("--flag", action="append", default=[], help="of ours, as --flag=--max_batch=16")
    parser.add_argument("--log", help="a file for what servers print")
    asked = parser.parse_args()
    with running(asked) as servers:
        asyncio.run(measured(asked, servers))


if __name__ == "__main__":
    main()
