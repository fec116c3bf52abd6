"""BentoML's server of a run's exported graph, for texts; for load.py. The model of RUN is computed as peer.py does."""

import os
import sys

import bentoml

sys.path.append(os.path.dirname(__file__))


@bentoml.service(workers=1, threads=2)
class Run:
    """Reads, computes and answers in one of two threads of its own."""

    def __init__(self):
        from peer import by_onnxruntime

        from bigbase_jax.inference.predictor import Predictor

        self._predictor, self._compute = Predictor.open(os.environ["RUN"]), by_onnxruntime(os.environ["RUN"], 1)

    @bentoml.api(route="/v1/predict/run")
    def predict(self, text: str) -> dict:
        """The answers to a text."""
        examples = self._predictor.examples({"text": text})
        found = [(example, self._compute(example)) for example in examples]
        return {"answers": self._predictor.said(found)}
