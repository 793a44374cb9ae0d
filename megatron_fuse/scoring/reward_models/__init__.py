"""Reward models of three published forms behind one interface: a decoder, a head on its last hidden state,
and a chat format.

Loading is strict: no weight of the model stays random, and no tensor of the files is left over. Otherwise the
scores would not be those of the published model. docs/reward_models.md describes the forms and names the
sources of the facts about them.
"""

from megatron_fuse.huggingface.reward_models import load_reward_model_format, reward_model_fingerprint
from megatron_fuse.scoring.reward_models.loading import load_reward_model
from megatron_fuse.scoring.reward_models.reward_model import RewardFormat, RewardModel

__all__ = [
    "RewardFormat",
    "RewardModel",
    "load_reward_model",
    "load_reward_model_format",
    "reward_model_fingerprint",
]
