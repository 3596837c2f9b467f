"""Every method on one task: `python -m ple_jax.experiments.compare_quickstart`, and `--help` says the rest."""

import sys

from ple_jax.experiments.compare_quickstart import main

if __name__ == "__main__":
    sys.exit(main())
