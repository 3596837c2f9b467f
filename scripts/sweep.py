"""A run for every point of a grid: `python -m ple_jax.experiments.sweep`, and `--help` says the rest."""

import sys

from ple_jax.experiments.sweep import main

if __name__ == "__main__":
    sys.exit(main())
