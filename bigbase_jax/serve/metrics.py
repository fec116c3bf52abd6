"""What Prometheus reads at ``/metrics``."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Of one server; names begin with ``bigbase_``."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # memory, processor time and open files
        of: Any = {"registry": registry}
        self.requests = Counter("bigbase_requests", "Requests answered", ["route", "model", "status"], **of)
        self.seconds = Histogram("bigbase_request_seconds", "Of a request", ["route", "model"], buckets=SECONDS, **of)
        self.running = Gauge("bigbase_requests_running", "Requests in progress", **of)
        self.stages = Histogram(
            "bigbase_stage_seconds", "Reading, queue, computing, answer", ["model", "stage"], buckets=SECONDS, **of
        )
        self.rows = Histogram("bigbase_batch_rows", "Rows computed at once", ["model"], buckets=ROWS, **of)
        self.queue = Gauge("bigbase_queue_rows", "Rows that wait to be computed", ["model"], **of)
        self.busy = Gauge("bigbase_inputs_running", "Inputs that are read, wait or are computed", ["model"], **of)
        self.slots = Gauge("bigbase_slots", "Of continuous batching, see Slots.stats", ["model", "what"], **of)
        self.ready = Gauge("bigbase_model_ready", "Whether the model answers", ["model"], **of)
        self.crashes = Counter("bigbase_crashes", "Errors of computing", ["model"], **of)
        self.compared = Counter(
            "bigbase_candidate_compared",
            "Answers of a candidate and of what answers: yes, no, error",
            ["model", "same"],
            **of,
        )
        self.versions = Gauge("bigbase_model_info", "The version that answers", ["model", "version"], **of)
        self._version: dict[str, str] = {}

    def stage(self, model: str, stage: str, seconds: float) -> None:
        """What a part of answering took."""
        self.stages.labels(model, stage).observe(seconds)

    def batch(self, model: str, rows: int, waited: float, seconds: float) -> None:
        """A batch that was computed."""
        self.rows.labels(model).observe(rows)
        self.stage(model, "queue", waited)
        self.stage(model, "compute", seconds)

    def version(self, model: str, version: str) -> None:
        """The version that answers from now on."""
        if (old := self._version.get(model)) is not None:
            self.versions.remove(model, old)
        self._version[model] = version
        self.versions.labels(model, version).set(1)

    def exposition(self) -> bytes:
        """All of them, in Prometheus' format."""
        return generate_latest(self.registry)
