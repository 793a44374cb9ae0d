"""Open-ended evaluation: several models answer the same prompts, and judges compare the answers in pairs.

OUTPUT/answers/NAME.jsonl           the generated answers of one model
OUTPUT/scores/REWARD_MODEL.jsonl    the scores of one reward model
OUTPUT/judge_replies.jsonl          the replies of a judge behind a server
OUTPUT/judgements.jsonl             all judgements of the last call, with their grounds
OUTPUT/open_ended.{json,md,html,png}    win rates; the page has answers side by side
"""

from megatron_fuse.evaluation.open_ended.answers import Sampling
from megatron_fuse.evaluation.open_ended.judgements import PAIRS
from megatron_fuse.evaluation.open_ended.participants import Participant, participants_named
from megatron_fuse.evaluation.open_ended.prompts import Prompt, read_prompts
from megatron_fuse.evaluation.open_ended.reward_judge import RewardModels, reward_models_of
from megatron_fuse.evaluation.open_ended.run import Judges, evaluate_open_ended

__all__ = [
    "PAIRS",
    "Judges",
    "Participant",
    "Prompt",
    "RewardModels",
    "Sampling",
    "evaluate_open_ended",
    "participants_named",
    "read_prompts",
    "reward_models_of",
]
