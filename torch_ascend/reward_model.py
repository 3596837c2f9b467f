"""Sequence classifiers (reward models, sentiment classifiers) of transformers, behind `ple_jax.rewards.model`.

Its twin is `ple_jax/backend/reward_model.py`.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging as transformers_logging

from ple_jax.core import together
from ple_jax.core.batches import round_up
from ple_jax.core.errors import UserError
from ple_jax.models import hub
from torch_ascend import device as devices
from torch_ascend import sharding

# what some of them were saved with, and no classifier without it in its class uses
_HARMLESS = re.compile(r"(^|\.)(pooler|lm_head)\.")
# they mix all positions, padding too; and a batch of an encoder-decoder must have as many EOS in every row
ALONE = ("canine", "convbert", "fnet", "funnel", "mobilebert", "nystromformer", "xlnet")


def classifier(
    folder: Path, *, dtype: str, rows: int, device: str = "auto", source: tuple[str, str | None] | None = None
) -> Callable[[Sequence[Sequence[int]]], Float32[np.ndarray, "n labels"]]:
    """Loads a sequence classifier from a Hugging Face folder, and puts its weights on every process's device.

    Where the processes are JAX's, of which torch knows nothing, this one alone has the classifier.

    Args:
        folder: config.json and safetensors of a ...ForSequenceClassification that transformers has.
        dtype: float32 or bfloat16, of weights and activations.
        rows: the most rows of one call.
        device: auto, cpu, cuda or npu.
        source: path or hub id, and revision, that the folder is from: another process may have to fetch it.

    Returns:
        A function from rows of token ids to the logits of every label: those that transformers gives for every row by
        itself, without padding.

    Raises:
        UserError: there is no such device, the checkpoint is damaged, or its weights are not those of the classifier.
    """
    if together.size() != sharding.world().size:
        return _Classifier(_load(folder, dtype), devices.resolve(device)).logits
    return _make(folder, source, dtype, device).classify


@together.together
def _make(folder: Path, source: tuple[str, str | None] | None, dtype: str, device: str) -> "_Classifier":
    return together.shared(_Classifier(_load(hub.here(folder, source), dtype), devices.resolve(device)))


class _Classifier:
    """A sequence classifier in one process; all processes classify the rows of a call together."""

    def __init__(self, model: PreTrainedModel, device: torch.device):
        self.model, self.device = model.to(device), device
        self.alone = model.config.is_encoder_decoder or model.config.model_type in ALONE
        self.settings = model.config.get_text_config()
        self.stated_pad = self.settings.pad_token_id

    @together.together
    def classify(self, ids: Sequence[Sequence[int]]) -> Float32[np.ndarray, "n labels"]:
        return self.logits(ids)

    def logits(self, ids: Sequence[Sequence[int]]) -> Float32[np.ndarray, "n labels"]:
        """Returns the logits of the rows of torch's processes, all of which are in this call."""
        world = sharding.world()
        count = round_up(len(ids), sharding.row_multiple(world))
        rows = [*ids, *[ids[0]] * (count - len(ids))][sharding.own_rows(world, count)]
        width = max(map(len, ids))  # of all processes' rows: how many they are should not change a digit
        own = torch.cat([self._logits([row], len(row)) for row in rows]) if self.alone else self._logits(rows, width)
        return sharding.gather(world, own)[: len(ids)].numpy()

    @torch.no_grad()
    def _logits(self, ids: Sequence[Sequence[int]], width: int) -> Float32[torch.Tensor, "n labels"]:
        pad = self.stated_pad
        if pad is None or pad < 0:
            # decoders read the last token that is not the padding token: without one, it must be none that ends a row
            last = {row[-1] for row in ids}
            self.settings.pad_token_id = pad = next(token for token in range(len(last) + 1) if token not in last)
        tokens = torch.tensor([[*row, *[pad] * (width - len(row))] for row in ids], device=self.device)
        lengths = torch.tensor([[len(row)] for row in ids], device=self.device)
        mask = (torch.arange(width, device=self.device) < lengths).long()
        return self.model(input_ids=tokens, attention_mask=mask).logits.float()


transformers_logging.disable_progress_bar()  # one of every process, in the middle of ours


def _load(folder: Path, dtype: str) -> PreTrainedModel:
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are named below
            output_loading_info=True,
        )
    except Exception as error:  # configs and weights are read by many libraries, which raise what they like
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"reward model {folder} cannot be loaded ({reason}); copy or download the folder again") from error
    for names, what in (
        (info["missing_keys"], "lack"),
        ([name for name, *_ in info["mismatched_keys"]], "have another shape of"),
        ([name for name in info["unexpected_keys"] if not _HARMLESS.search(name)], "have, beside those of the model,"),
    ):
        if names:  # transformers draws what it does not find at random
            raise UserError(
                f"the weights in {folder} {what} {', '.join(sorted(names)[:5])}: they are not those of a"
                f" {type(model).__name__}; take a checkpoint that was saved as one, with its head"
            )
    model.config.use_cache = False  # nothing is generated
    return model.eval()
