"""The backends: where they are."""


BACKENDS = {"jax": "ple_jax.backend.backend", "torch": "torch_ascend.backend"}  # --backend and the module behind it
TOPOLOGIES = {"jax": "ple_jax.planning.topology", "torch": "torch_ascend.topology"}  # and the one behind --topology
