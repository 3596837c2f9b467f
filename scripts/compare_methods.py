"""Every method on one task: `python -m ple_jax.experiments.compare_methods`, and `--help` says the rest."""

import sys

from ple_jax.experiments.compare_methods import main

if __name__ == "__main__":
    sys.exit(main())
