"""Differences between the versions of Megatron-core that pyproject.toml allows, 0.16 to 0.19.

Only code that cannot be the same for all versions is here. Where one way fits all of them there is no branch:
training/megatron_checkpoints.py does without `save` and `load`, and model/gpt.py overrides only methods that
GPTModel has in all versions.

0.19 deprecates more of what the project uses, so that later versions may remove it:

- GPTModel, in favour of HybridModel. This concerns model/gpt.py alone.
- Megatron's own asynchronous saving, in favour of nvidia-resiliency-ext. This concerns the imports of
  training/megatron_checkpoints.py and training/checkpoint.py.
"""

import logging
from functools import partial
from typing import Any

_KNOWN_MESSAGES = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not "
    "provided",
}


def quiet_known_messages() -> None:
    """Hides the messages that 0.19 logs for every model and run. All other messages of Megatron stay."""
    for logger in _KNOWN_MESSAGES:
        logging.getLogger(logger).addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_KNOWN_MESSAGES[record.name])


def complete_router() -> None:
    """Defines a name that the router of a mixture reads even without Transformer Engine, which has it."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def forget_auxiliary_losses() -> None:
    """Removes the auxiliary losses that Megatron collects for its own log, and their process groups."""
    try:  # from 0.18 on
        from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
    except ImportError:
        from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

        get_moe_layer_wise_logging_tracker().clear()
    else:
        destroy_moe_metrics_tracker()


def submodules_of(spec: Any) -> Any:
    """The submodules of a part of a layer spec. From 0.18 on the MLP is a partial that takes them."""
    return spec.keywords["submodules"] if isinstance(spec, partial) else spec.submodules


def adopt_learning_rates(state: dict[str, Any], optimizer: Any) -> None:
    """Gives the parameter groups of a loaded optimizer state this run's bounds of the learning rate.

    From 0.19 on Megatron also uses `max_lr` and `min_lr` to match the groups of a checkpoint with those of
    the optimizer. Without this function a run with another --lr, or from a checkpoint of an earlier version,
    finds no group. Groups differ in `wd_mult` alone. The trainer itself sets the learning rate at every step.
    """
    groups = {group["wd_mult"]: group for group in optimizer.param_groups}
    # The experts of a mixture have an optimizer of their own. Then the states are numbered.
    for part in state.values() if 0 in state else [state]:
        for group in part.get("optimizer", part)["param_groups"]:
            bounds = groups.get(group["wd_mult"], {})
            group.update((key, bounds[key]) for key in ("max_lr", "min_lr") if key in bounds)
