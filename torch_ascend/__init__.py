"""The PyTorch backend for Ascend devices; this version has the JAX backend only."""
