"""A reward belongs to one conversation: no batch, budget, order, company or shared prompt changes it but
by rounding.
"""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModel,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MptConfig,
    OpenAIGPTConfig,
)

from megatron_fuse.errors import UserError
from megatron_fuse.scoring import conversations as scoring
from megatron_fuse.scoring.conversations import score_conversations
from megatron_fuse.scoring.reward_models import RewardModel

VOCAB, POSITIONS, WINDOW = 300, 96, 7
SIZES = {
    "vocab_size": VOCAB,
    "max_position_embeddings": POSITIONS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "mpt": MptConfig(vocab_size=VOCAB, max_seq_len=POSITIONS, d_model=32, n_heads=4, n_layers=2),
    "gpt_neox": GPTNeoXConfig(**SIZES),
    # Learned positions.
    "gpt2": GPT2Config(vocab_size=VOCAB, n_positions=POSITIONS, n_embd=32, n_layer=2, n_head=4),
    # A window shorter than prompts and answers, and fewer heads for keys than for queries, as Mistral has
    # them.
    "mistral": MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=WINDOW),
}
TAKES_NO_CACHE = OpenAIGPTConfig(vocab_size=VOCAB, n_positions=POSITIONS, n_embd=32, n_layer=2, n_head=4)


def make_reward_model(config: object, dtype: torch.dtype = torch.float32) -> RewardModel:
    torch.manual_seed(0)
    backbone, head = AutoModel.from_config(config), torch.nn.Linear(32, 1, bias=False)
    for parameter in (*backbone.parameters(), *head.parameters()):
        if parameter.dim() == 2:  # wide enough that a reward depends on every token
            parameter.data.normal_(std=0.25)
    backbone, head = (module.eval().requires_grad_(False) for module in (backbone.to(dtype), head))
    return RewardModel("reward", backbone, head, chat=None, stop=True, causal=True)


def make_groups(seed: int) -> list[list[np.ndarray]]:
    """Prompts and answers of all lengths: the longest answer behind the shortest prompt, and the other way
    round, as they share a batch; one, two, many and equal answers; an answer that is the beginning of
    another."""
    random = np.random.default_rng(seed)

    def ids(length: int) -> np.ndarray:
        return random.integers(0, VOCAB, length).astype(np.int32)

    def group(prompt: int, *answers: int) -> list[np.ndarray]:
        begin = ids(prompt)
        return [np.concatenate([begin, ids(length)]) for length in answers]

    groups = [
        group(POSITIONS - 3, 1, 3, 2),
        group(5, POSITIONS - 5, 1),
        group(40, 7),
        group(30, 20, 9, 33, 1, 12),
        [],
    ]
    groups += [group(*random.integers(1, 40, random.integers(3, 6)).tolist()) for _ in range(5)]
    same = groups[3][0]
    return [*groups, [same, same], [same, same[:-4], same]]


@torch.inference_mode()
def straight(reward_model: RewardModel, ids: np.ndarray) -> float:
    """One conversation, no padding, no mask, no cache."""
    hidden = reward_model.backbone(input_ids=torch.from_numpy(ids)[None].long()).last_hidden_state
    return float(reward_model.head(hidden[0, -1].float()))


def expected(reward_model: RewardModel, groups: Sequence[Sequence[np.ndarray]]) -> list[list[float]]:
    return [[straight(reward_model, ids) for ids in group] for group in groups]


def assert_close(found: list[np.ndarray], wanted: list[list[float]], tolerance: float = 1e-5) -> None:
    assert [len(rewards) for rewards in found] == [len(rewards) for rewards in wanted]
    np.testing.assert_allclose(np.concatenate(found), np.concatenate(wanted), rtol=0, atol=tolerance)


# 1: every row alone; 200: few rows; 10 000: all at once, the longest prompt beside the longest answer
@pytest.mark.parametrize("batch_tokens", [1, 200, 10_000])
@pytest.mark.parametrize("share_prompts", [True, False])
@pytest.mark.parametrize("family", CONFIGS)
def test_rewards_are_those_of_conversations_read_alone(
    family: str, share_prompts: bool, batch_tokens: int
) -> None:
    reward_model, groups = make_reward_model(CONFIGS[family]), make_groups(seed=1)
    wanted = expected(reward_model, groups)
    assert np.std(np.concatenate(wanted)) > 0.3, "the case tells nothing"
    options = {"batch_tokens": batch_tokens, "share_prompts": share_prompts}
    assert_close(score_conversations(reward_model, groups, **options), wanted)
    order = np.random.default_rng(2).permutation(len(groups))
    turned = score_conversations(reward_model, [groups[number][::-1] for number in order], **options)
    assert_close(turned, [wanted[number][::-1] for number in order])


@pytest.mark.parametrize("family", CONFIGS)
def test_padding_on_either_side_changes_nothing(family: str) -> None:
    reward_model = make_reward_model(CONFIGS[family])
    rows = [ids for group in make_groups(seed=3) for ids in group]
    wanted = [straight(reward_model, ids) for ids in rows]
    with torch.inference_mode():
        for padding in ("left", "right"):
            assert_close([scoring._rewards(reward_model, rows, padding=padding)], [wanted])


@pytest.mark.parametrize("family", CONFIGS)
def test_in_bf16_sharing_costs_no_more_than_bf16_itself(family: str) -> None:
    """Measured over six seeds on these models, whose rewards have a standard deviation of about 1: at most
    0.05 between sharing and not, and 0.11 from fp32. bf16 holds 8 bits."""
    reward_model, groups = make_reward_model(CONFIGS[family], torch.bfloat16), make_groups(seed=4)
    wanted = expected(make_reward_model(CONFIGS[family]), groups)
    shared, plain = (
        score_conversations(reward_model, groups, batch_tokens=1000, share_prompts=share)
        for share in (True, False)
    )
    assert_close(shared, [list(rewards) for rewards in plain], tolerance=0.1)
    assert_close(shared, wanted, tolerance=0.2)


def tokens_read(reward_model: RewardModel, groups: list[list[np.ndarray]], **options: object) -> int:
    """Real tokens that go through the backbone."""
    counts = []

    def count(_: object, __: object, arguments: dict) -> None:
        given = arguments["input_ids"]
        counts.append(int(arguments["attention_mask"][:, -given.shape[1] :].sum()))

    hook = reward_model.backbone.register_forward_pre_hook(count, with_kwargs=True)
    score_conversations(reward_model, groups, batch_tokens=300, **options)
    hook.remove()
    return sum(counts)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_shared_prompt_is_read_once(family: str) -> None:
    reward_model = make_reward_model(CONFIGS[family])
    groups = [[np.arange(60, dtype=np.int32), np.arange(20, 80, dtype=np.int32)]]  # nothing in common
    # 50 of 51, 52 and 53.
    groups += [[np.array([*range(50), 100 + k, *range(k)], np.int32) for k in range(3)]]
    assert tokens_read(reward_model, groups, share_prompts=False) == 60 + 60 + 51 + 52 + 53
    assert tokens_read(reward_model, groups, share_prompts=True) == 60 + 60 + 50 + 1 + 2 + 3


def test_a_model_that_takes_no_cache_reads_everything_plainly() -> None:
    reward_model, groups = make_reward_model(TAKES_NO_CACHE), make_groups(seed=5)
    assert tokens_read(reward_model, groups, share_prompts=True) == sum(
        len(ids) for group in groups for ids in group
    )
    assert_close(score_conversations(reward_model, groups, batch_tokens=300), expected(reward_model, groups))


def test_nothing_to_score_is_no_error() -> None:
    reward_model = make_reward_model(CONFIGS["llama"])
    assert score_conversations(reward_model, [], batch_tokens=100) == []
    assert [len(rewards) for rewards in score_conversations(reward_model, [[], []], batch_tokens=100)] == [
        0,
        0,
    ]


def test_ids_that_the_reward_model_does_not_have_are_refused() -> None:
    reward_model = make_reward_model(CONFIGS["llama"])
    with pytest.raises(
        UserError,
        match=rf"reward_models\.reward: the tokenizer has the id {VOCAB}, but the model knows only {VOCAB} "
        r"ids",
    ):
        score_conversations(reward_model, [[np.array([1, VOCAB], np.int32)]], batch_tokens=100)


@given(
    lengths=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40)), max_size=20),
    batch_tokens=st.integers(1, 400),
    limited=st.booleans(),
)
def test_prompts_that_are_read_together_fit_budget_and_model(
    lengths: list[tuple[int, int]], batch_tokens: int, limited: bool
) -> None:
    prompts = np.array([prompt for prompt, _ in lengths], np.int64)
    longest = prompts + np.array([rest for _, rest in lengths], np.int64)
    limit = 100 if limited else None
    batches = scoring._prompt_batches(prompts, longest, batch_tokens, limit)
    assert sorted(group for batch in batches for group in batch) == list(range(len(lengths)))
    for batch in batches:
        width = prompts[batch].max()
        assert len(batch) == 1 or len(batch) * width <= batch_tokens
        assert limit is None or width + (longest - prompts)[batch].max() <= limit


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=2, max_size=4))
def test_what_is_shared_is_common_to_all_and_leaves_something_of_each(rows: list[list[int]]) -> None:
    group = [np.array(row, np.int32) for row in rows]
    length = scoring._prompt_length(group)
    assert length < min(len(ids) for ids in group)
    assert all((ids[:length] == group[0][:length]).all() for ids in group)
    common = next(
        (n for n, tokens in enumerate(zip(*rows, strict=False)) if len(set(tokens)) > 1),
        min(map(len, rows)) - 1,
    )
    assert length in (0, common)
