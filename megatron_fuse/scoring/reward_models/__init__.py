"""Reward models in three published forms behind one interface: a decoder, a head on its last hidden state, a chat format.

Loading is strict: a published score is only worth what its weights are, so nothing stays random and nothing is left over.
docs/reward_models.md says which forms there are and where the facts about them come from.
"""

from megatron_fuse.huggingface.reward_models import load_reward_model_format, reward_model_fingerprint
from megatron_fuse.scoring.reward_models.loading import load_reward_model
from megatron_fuse.scoring.reward_models.reward_model import RewardModel

__all__ = ["RewardModel", "load_reward_model", "load_reward_model_format", "reward_model_fingerprint"]
