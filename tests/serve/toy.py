"""A model that is compiled in a moment, and the server of it in this process."""

import contextlib
import dataclasses
import json
import socket
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
from starlette.testclient import TestClient

from bigbase_jax.core import Fields, UserError
from bigbase_jax.inference.predictor import Predictor, Reading
from bigbase_jax.serve import command
from bigbase_jax.serve.app import Settings, create
from bigbase_jax.serve.metrics import Metrics
from bigbase_jax.serve.models import Models
from bigbase_jax.serve.served import Options, Served

WIDTH = 4


class Numbers:
    """Reads rows of four numbers, and files of JSON lines with such."""

    fields = Fields({"x": [("x",), ("numbers",)]})

    def decode(self, given):
        try:
            rows = [json.loads(line) for line in given.splitlines()] if isinstance(given, bytes) else [given]
            return [{"x": np.array(row["x"], np.float32)} for row in rows]
        except (TypeError, ValueError, KeyError, RecursionError) as error:
            raise UserError("'x' holds no numbers.") from error

    def fit(self, example, shapes):
        return example


@dataclasses.dataclass(frozen=True)
class Linear:
    """``y = tanh(x w)``."""

    inputs = ("x",)

    def predict(self, variables, inputs):
        return {"y": jnp.tanh(inputs["x"] @ variables["params"]["w"])}

    def postprocess(self, output, example):
        return {"y": output["y"].tolist(), "sum": float(output["y"].sum())}


def predictor(seed=0, hook=None):
    """``hook`` gets each batch before it is computed, in the thread that computes."""
    w = np.random.default_rng(seed).normal(size=(WIDTH, 3)).astype(np.float32)
    spec = {"x": jax.ShapeDtypeStruct((WIDTH,), np.float32)}
    found = Predictor(Linear(), {"params": {"w": w}}, {}, spec, lambda: Reading(Numbers()))
    if hook is not None:
        compiled = jax.jit(found.task.predict)

        def compute(variables, batch):
            hook(batch["x"])
            return compiled(variables, batch)

        found.compute = compute
    return found


@contextlib.contextmanager
def live(app):
    """A server of ``app`` on a socket of this machine, as the command has it; gives its port."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        server = command.Server(command.config_of(app, 5))
        thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield bound.getsockname()[1]
        server.should_exit = True
        thread.join()


@contextlib.contextmanager
def client(*, settings=None, options=None, load=True, watch=None, trial=None, **models):
    """A client of a server of ``name=predictor``."""
    metrics = Metrics()
    openers = {
        name: lambda name=name, model=model: Served(name, model, options or Options(max_batch=4), metrics=metrics)
        for name, model in (models or {"toy": predictor()}).items()
    }
    served = Models(openers, watch, trial)
    if load:
        served.load()
    with TestClient(create(served, settings or Settings(), metrics), raise_server_exceptions=False) as found:
        found.models, found.metrics = served, metrics
        yield found
    served.close(5)
