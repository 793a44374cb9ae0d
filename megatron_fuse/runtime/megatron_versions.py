"""What differs between the versions of Megatron-core that pyproject.toml allows, 0.16 to 0.19, and cannot be written alike for all.

Where one way fits every version there is no branch and nothing here: training/megatron_checkpoints.py does without `save` and `load`,
and model/gpt.py overrides what GPTModel has in all of them. Later versions will take away more of what the project uses, by what
0.19 deprecates: GPTModel, in favour of HybridModel, which concerns model/gpt.py alone; and Megatron's own asynchronous saving, in
favour of nvidia-resiliency-ext, which concerns the imports of training/megatron_checkpoints.py and training/checkpoint.py.
"""

import logging
from typing import Any

_KNOWN_MESSAGES = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not provided",
}


def quiet_known_messages() -> None:
    """Leaves out of the log what 0.19 says of every model and run; whatever else Megatron says stays."""
    for logger in _KNOWN_MESSAGES:
        logging.getLogger(logger).addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_KNOWN_MESSAGES[record.name])


def adopt_learning_rates(state: dict[str, Any], optimizer: Any) -> None:
    """Gives the parameter groups of a loaded optimizer state the bounds of the learning rate that this run has.

    From 0.19 on Megatron finds a group again by `max_lr` and `min_lr` too: without this a run that continues with another --lr, or from
    a checkpoint of an earlier version, finds none. Groups differ in `wd_mult` alone. The trainer sets the rate itself at every step.
    """
    ours = {group["wd_mult"]: group for group in optimizer.param_groups}
    for group in state.get("optimizer", state)["param_groups"]:
        bounds = ours.get(group["wd_mult"], {})
        group.update((key, bounds[key]) for key in ("max_lr", "min_lr") if key in bounds)
