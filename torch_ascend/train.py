"""The training step, and `TorchBackend`, the only holder of state. The twin of `ple_jax.backend.train`."""



# ---------------------------------------------------------------- log-probabilities of response tokens




# ---------------------------------------------------------------- the packed row [prompt | response 1 | ... | response K]




# ---------------------------------------------------------------- the backend




# ---------------------------------------------------------------- from a config


