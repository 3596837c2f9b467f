"""Many runs by one command: sweeps over a config, and every method on one task at one budget."""
