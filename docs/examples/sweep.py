"""Learning rate and weight decay: twenty settings, poor ones stopped early."""

from bigbase_jax.sweep import Sweep, choice, log_uniform


def sweep() -> Sweep:
    space = {"optim.learning_rate": log_uniform(1e-4, 1e-1), "optim.weight_decay": choice(0.0, 1e-2)}
    return Sweep(metric="accuracy", space=space, trials=20, sampler="tpe", pruner="asha", seeds=1)
