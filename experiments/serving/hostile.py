"""Hostile requests over sockets: wrong types, fuzzed bytes, bombs, large and slow bodies, clients that leave.

python experiments/serving/hostile.py RUN --requests=100000 --entry=text

It starts the server of a run, sends, and asks at the end what is left: nothing may have crashed, hang or hold a place.
"""

import argparse
import asyncio
import collections
import json
import pathlib
import random
import re
import subprocess
import sys
import time
import urllib.request

ROOT = pathlib.Path(__file__).parents[2]
PATIENCE, WHOLE = 0.5, 600.0  # seconds that a client waits for an answer that may never come, and for one that must
LEAKS = (b"Traceback", b'File "', b".py", b"/usr/", b"/home/", b"/root/", b"/tmp/")
LEAVES = (
    None,
    True,
    -1,
    0,
    2**70,
    1e308,
    float("nan"),
    "",
    "a",
    "\ud800",
    "\x00",
    "a" * 3000,
    "%s",
    "../../etc/passwd",
)
NAMES = ("inputs", "x", "text", "image", "base64", "name", "shape", "datatype", "data", "parameters", "outputs", "id")
KINDS = (
    "right",
    "json",
    "tensor",
    "bomb",
    "form",
    "file",
    "fuzzed",
    "noise",
    "path",
    "head",
    "large",
    "left",
    "openai",
)
METHODS = ("GET", "POST", "PUT", "DELETE", "BREW", "OPTIONS", "HEAD")
PATHS = (
    "/v1/predict/../../etc/passwd",
    "/v1/predict/%00",
    "/v1/predict/%2e%2e%2f",
    "/" + "a" * 5000,
    "/v1/models/" + "%ff" * 9,
    "//",
    "*",
    "/v2/models/x/versions/%0a/infer",
)
OPENAI = (
    ("/v1/completions", {"prompt": "a b", "max_tokens": 2}),
    ("/v1/completions", {"prompt": "a b", "max_tokens": 500, "stream": True}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}),
    ("/v1/embeddings", {"input": ["a", "b"]}),
)
WORDS = ("prompt", "messages", "input", "max_tokens", "temperature", "top_p", "n", "stop", "logprobs", "seed", "stream")
HEADS = (
    ["x: " + "y" * 70_000],
    [f"x{i}: y" for i in range(3000)],
    ["x-request-timeout: nan"],
    ["x-request-timeout: 1e-9"],
    ["transfer-encoding: chunked"],
    ["content-length: 5"],
    ["expect: 100-continue"],
    ["authorization: Bearer \xff"],
    ["x-request-id: \t" + "a" * 99],
)
PARTS = (b'name="file"; filename="a"', b'name="x"', b'name="\xff\xfe"', b"", b'name="a"; filename="../../a"')


def message(method, path, body=b"", kind="application/json", more=()):
    """A request's bytes."""
    head = [f"{method} {path} HTTP/1.1", "host: a", f"content-type: {kind}", f"content-length: {len(body)}", *more]
    return "\r\n".join([*head, "connection: close", "", ""]).encode("latin-1", "replace") + body


def value(rng, depth=0):
    """Any JSON."""
    kind = rng.random()
    if depth > 3 or kind < 0.5:
        return rng.choice(LEAVES)
    if kind < 0.75:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(NAMES): value(rng, depth + 1) for _ in range(rng.randrange(4))}


def tensor(rng):
    """An input of the Open Inference Protocol, hardly ever a right one."""
    return {
        "name": rng.choice(["x", "text", "image", value(rng)]),
        "shape": rng.choice([[1], [1, 4], [2, 2], [0], [2**31], [-1, 4], value(rng)]),
        "datatype": rng.choice(["FP32", "BYTES", "INT64", "UINT8", "BOOL", value(rng)]),
        "data": rng.choice([[1, 2, 3, 4], [[1, 2, 3, 4]], ["a"], [[1], [2, 3]], value(rng)]),
        **rng.choice([{}, {"parameters": {"binary_data_size": rng.choice([0, 4, -1, 2**40, "1"])}}]),
    }


def bomb(rng):
    """JSON that is short to write and long to read."""
    size, controls, halves = rng.choice([1000, 100_000]), "\\u0000" * 999, "\\ud800" * 99
    texts = ("[" * size, '{"a":' * size, "9" * size, '{"x": 1e999}', f'["{controls}"]', f'"{halves}"')
    return rng.choice(texts).encode()


def form(rng):
    """A multipart form, or nearly."""
    parts = [(rng.choice(PARTS), rng.randbytes(rng.randrange(99))) for _ in range(rng.randrange(5))]
    body = b"".join(b"--b\r\nContent-Disposition: form-data; %b\r\n\r\n%b\r\n" % part for part in parts)
    return body + rng.choice([b"--b--\r\n", b"", b"--b"])


def request(rng, model, right):
    """(What it is, bytes, how many of them are sent before the client leaves; None: all)."""
    predict, infer = f"/v1/predict/{model}", f"/v2/models/{model}/infer"
    kind, good = rng.choice(KINDS), json.dumps(right).encode()
    data = message("POST", predict, good)
    if kind == "json":
        data = message("POST", rng.choice([predict, infer]), json.dumps(value(rng)).encode())
    elif kind == "tensor":
        length = rng.choice([(), (), (f"inference-header-content-length: {rng.choice([0, 1, 99999, 'a', -1])}",)])
        body = json.dumps({"inputs": [tensor(rng) for _ in range(rng.randrange(3))]}).encode()
        data = message("POST", infer, body + rng.randbytes(rng.choice([0, 0, 4])), more=length)
    elif kind == "bomb":
        data = message("POST", rng.choice([predict, infer]), bomb(rng))
    elif kind == "form":
        boundary = rng.choice(["; boundary=b", "; boundary=b", "", "; boundary=" + "b" * 999])
        data = message("POST", predict, form(rng), f"multipart/form-data{boundary}")
    elif kind == "file":
        data = message("POST", predict, rng.randbytes(rng.randrange(2000)), "image/jpeg")
    elif kind == "noise":
        data = rng.randbytes(rng.randrange(1, 500))
    elif kind == "path":
        data = message(rng.choice(METHODS), rng.choice(PATHS), b"{}")
    elif kind == "head":
        data = message("POST", predict, good, more=rng.choice(HEADS))
    elif kind == "openai":
        path, asked = rng.choice(OPENAI)
        asked = {"model": model, **asked, **{rng.choice(WORDS): value(rng) for _ in range(rng.randrange(3))}}
        data = message("POST", path, json.dumps(asked).encode())
    elif kind == "large":
        body = json.dumps({"inputs": [right] * rng.choice([100, 10_000])}).encode()
        data = message("POST", predict, body, more=rng.choice([(), ("x-request-timeout: 0.01",)]))
    elif kind == "fuzzed":
        changed = bytearray(data)
        for _ in range(rng.randrange(1, 6)):
            at = rng.randrange(len(changed))
            changed[at : at + rng.randrange(4)] = rng.randbytes(rng.randrange(4))
        data = bytes(changed)
    return kind, data, rng.randrange(1, len(data) + 1) if kind == "left" else None


async def ask(port, data, sent, slow):
    """The status of the answer; 0: there was none."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        part = data[:sent]
        if slow:
            for byte in range(0, min(len(part), 40), 8):
                writer.write(part[byte : byte + 8])
                await asyncio.sleep(0.01)
            part = part[40:]
        writer.write(part)
        await asyncio.wait_for(writer.drain(), PATIENCE)
        if sent is not None:
            return 0
        answer = await asyncio.wait_for(reader.read(1 << 20), WHOLE if data[-1:] == b"}" else PATIENCE)
        leak = next((word for word in LEAKS if word in answer), None)
        if leak:
            raise AssertionError(f"{data[:300]!r} was told {answer[:600]!r}")
        found = re.match(rb"HTTP/1\.1 (\d+)", answer)
        return int(found[1]) if found else 0
    except (TimeoutError, OSError):
        return 0
    finally:
        writer.close()


async def attack(port, model, right, count, seed=0, at_once=16):
    """How often each kind of request got each status.

    Raises:
      AssertionError: a right request got no answer, something got a 500, or an answer told of what is inside.
    """
    rng, found, numbers = random.Random(seed), collections.Counter(), iter(range(count))

    async def client():
        for _ in numbers:
            kind, data, sent = request(rng, model, right)
            status = await ask(port, data, sent, rng.random() < 0.02)
            found[kind, status] += 1
            assert status != 500, data[:300]
            assert kind != "right" or status == 200, status

    await asyncio.gather(*(client() for _ in range(at_once)))
    return found


def left(text):
    """What ``/metrics`` says is still in progress, besides the request that asks it."""
    names = ("bigbase_inputs_running", "bigbase_queue_rows", "bigbase_requests_running")
    values = [float(line.split()[-1]) for line in text.splitlines() if line.startswith(names)]
    return sum(values) - 1


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--entry", default="text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout_s", type=float, default=20.0, help="more where other jobs may stop this one")
    asked = parser.parse_args()
    command = [sys.executable, "launch.py", "--mode=serve", f"--workdir=run={asked.run}", "--port=0"]
    command.append(f"--timeout_s={asked.timeout_s:g}")
    with open("hostile.log", "w+") as log:
        server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            url = json.loads(server.stdout.readline())["serving"]
            port, began = int(url.rpartition(":")[2]), time.monotonic()

            def told():
                return urllib.request.urlopen(f"{url}/metrics").read().decode()

            def memory():
                return float(re.search(r"^process_resident_memory_bytes (\S+)", told(), re.M)[1]) / 2**20

            found, memories, parts = collections.Counter(), [], 10
            for part in range(parts):
                seed = asked.seed + part
                found += asyncio.run(attack(port, "run", {asked.entry: "a b"}, asked.requests // parts, seed))
                memories.append(round(memory()))
            while left(told()) and time.monotonic() - began < 3600:
                time.sleep(0.1)
            remaining = left(told())
        finally:
            server.terminate()
            status = server.wait()
        log.seek(0)
        traces = sum("Traceback" in line for line in log)
    statuses = collections.Counter()
    for (_, code), number in found.items():
        statuses[code] += number
    result = {"requests": sum(found.values()), "statuses": dict(sorted(statuses.items())), "left": remaining}
    result |= {"tracebacks": traces, "exit_status": status, "memory_mb": memories}
    print(json.dumps({**result, "seconds": round(time.monotonic() - began)}))


if __name__ == "__main__":
    main()
