"""Many runs of one recipe that differ in a few of its keys, and the search for the best of them.

A sweep file is Python with one function, ``sweep() -> Sweep``. ``space`` has the words it speaks in; ``study`` keeps
what is known of all trials, in a file or a database, and says who runs which; ``worker`` runs trials one after the
other; ``command`` is what ``python launch.py --config=RECIPE --sweep=FILE`` does.
"""

from bigbase_jax.sweep.space import Sweep, choice, integer, log_uniform, uniform

__all__ = ["Sweep", "choice", "integer", "log_uniform", "uniform"]
