"""The modules that only an extra of the package installs (pyproject.toml), and the error if one is missing."""

import importlib.util

from ple_jax.core.errors import UserError

MODULES = {  # extra -> what is imported of it
    "jax": ("jax", "flax", "optax", "orbax", "qwix"),
    "torch": ("torch",),
    "trl": ("trl", "peft", "accelerate", "datasets"),
    "data": ("datasets", "pyarrow"),
    "eval": ("scipy", "sacrebleu", "rouge_score"),
    "vader": ("vaderSentiment",),
    "toxicity": ("profanity_check",),
    "json_schema": ("jsonschema",),
    "harness": ("lm_eval",),
}
_MORE = {"jax": ", on a GPU 'ple_jax[cuda]', on a TPU 'ple_jax[tpu]'", "torch": ", on Ascend 'ple_jax[ascend]'"}


def need(extra: str, what: str, *modules: str) -> None:
    """Raises a UserError if a module that `what` needs is not installed; imports nothing.

    Args:
      extra: the extra that installs it, by its name in pyproject.toml.
      what: the beginning of the error's sentence: "--backend=jax", "reward 'vader'".
      modules: those of the extra that are needed; all of them if none is named.
    """
    for module in modules or MODULES[extra]:
        if importlib.util.find_spec(module) is None:
            raise UserError(
                f"{what} needs {module}, which is not installed: pip install 'ple_jax[{extra}]'{_MORE.get(extra, '')}"
            )
