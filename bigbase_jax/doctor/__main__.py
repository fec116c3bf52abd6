"""``python -m bigbase_jax.doctor [--workdir=DIR]``, for when the launcher itself does not start."""

import sys

from bigbase_jax.doctor import main

if __name__ == "__main__":  # also imported like any other module, by the tests
    sys.exit(main(sys.argv))
