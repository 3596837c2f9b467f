"""Commands that start many runs: sweeps over a config, and every method on one task at one budget."""
