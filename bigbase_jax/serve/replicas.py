"""The application in several replicas behind Ray Serve: what outgrows one machine.

``serve run`` takes ``app``, and the models from the environment, as ``--workdir`` names them:
``BIGBASE_SERVE="pets=/runs/pets reviews=/runs/reviews" serve run bigbase_jax.serve.replicas:app``. In Python,
``deployment(openers, num_replicas=2)`` gives what ``ray.serve.run`` takes.
"""

from __future__ import annotations

import functools
import os
import shlex
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI

from bigbase_jax.core import UserError
from bigbase_jax.runtime import compilation
from bigbase_jax.serve.app import Settings, create
from bigbase_jax.serve.command import names_of
from bigbase_jax.serve.metrics import Metrics
from bigbase_jax.serve.models import Models
from bigbase_jax.serve.served import Served

VARIABLE = "BIGBASE_SERVE"
"""Environment variable: what ``--workdir`` would be, several with blanks between."""


class Replica:
    """All models and the application of them, in a process of Ray's; it takes no request before they are compiled.

    Args:
      openers: what loads each model, as ``Models`` takes it, but with ``metrics`` as an argument by name.
      settings: gives those of the application.
    """

    def __init__(self, openers: Mapping[str, Callable[..., Served]], settings: Callable[[], Settings]):
        compilation.setup()
        self._metrics, self._settings = Metrics(), settings()
        named = {name: functools.partial(opener, metrics=self._metrics) for name, opener in openers.items()}
        self._models = Models(named)
        self._models.load()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create(self._models, self._settings, self._metrics)

    def check_health(self) -> None:
        """Raises where a model does not answer; Ray then starts another replica in the place of this one."""
        if not self._models.ready:
            raise RuntimeError("a model of this replica does not answer")


def deployment(
    openers: Mapping[str, Callable[..., Served]], settings: Callable[[], Settings] = Settings, **options: Any
) -> Any:
    """What ``ray.serve.run`` takes. Rates of keys, limits of queues and metrics are each replica's own.

    Args:
      openers, settings: see ``Replica``; they are pickled.
      options: Ray's, such as ``num_replicas``, ``autoscaling_config`` and ``ray_actor_options``.

    Raises:
      UserError: the extra is missing.
    """
    try:
        from ray import serve
    except ImportError as error:
        raise UserError(f"replicas need the extra: pip install -e '.[serve,ray]' ({error}).") from error
    words = {"name": "bigbase_jax", "max_ongoing_requests": 512, **options}
    return serve.deployment(**words)(serve.ingress()(Replica)).bind(dict(openers), settings)


def app(args: Mapping[str, str] | None = None) -> Any:
    """The models of ``VARIABLE``; ``args`` may have ``replicas`` and ``engine``.

    Raises:
      UserError: it names none.
    """
    args = args or {}
    folders = names_of(shlex.split(os.environ.get(VARIABLE, "")))
    if not folders:
        raise UserError(f"{VARIABLE} names no run; set it to NAME=FOLDER, several with blanks between.")
    engine = args.get("engine", "jax")
    openers = {name: functools.partial(Served.open, name, folder, engine=engine) for name, folder in folders.items()}
    return deployment(openers, num_replicas=int(args.get("replicas", 1)))
