"""Arguments that do not fit are refused by name, with both values."""

import math

import pytest
import torch
from fuse_kernels import sparse_kl_cross_entropy


def bad(**changes):
    """Keyword arguments of a correct call with some replaced."""
    n, k = 3, 2
    arguments = {
        "logits": torch.zeros(n, 7),
        "labels": torch.tensor([0, 6, -100]),
        "teacher_ids": torch.tensor([[0, -1], [6, 2], [-1, -1]]),
        "teacher_logprobs": torch.full((n, k), -1.0),
        "ce_weight": torch.ones(n),
        "kl_weight": torch.ones(n),
    }
    return arguments | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.zeros(7)}, r"logits is \[7\]"),
        ({"logits": torch.zeros(3, 7, dtype=torch.int64)}, "logits is .* torch.int64"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, r"labels is \[4\], but logits of 3 rows need \[3\]"),
        ({"labels": torch.zeros(3)}, "labels is torch.float32, but must be an integer type"),
        ({"labels": torch.tensor([0, 7, 0])}, r"labels\[1\] is 7, but must be -100 or 0 ... 6"),
        ({"labels": torch.tensor([0, -1, 0])}, r"labels\[1\] is -1"),
        ({"teacher_ids": torch.tensor([[0, 1], [2, 9], [0, 1]])}, r"teacher_ids\[1, 1\] is 9"),
        (
            {"teacher_logprobs": torch.zeros(3, 5)},
            r"teacher_logprobs is \[3, 5\], but logits of 3 rows need \[3, 2\]",
        ),
        (
            {"teacher_logprobs": torch.full((3, 2), 0.5)},
            r"teacher_logprobs\[0, 0\] is 0.5, but must be at most 0",
        ),
        ({"teacher_logprobs": torch.full((3, 2), torch.nan)}, r"teacher_logprobs\[0, 0\] is nan"),
        ({"kl_weight": torch.ones(3, 1)}, r"kl_weight is \[3, 1\]"),
        ({"ce_weight": torch.ones(3, device="meta")}, "ce_weight is on meta, but logits is on cpu"),
        ({"vocab_size": 8}, "vocab_size is 8, but the logits have 7 columns on each of 1 rank"),
        ({"vocab_size": 6}, r"labels\[1\] is 6, but must be -100 or 0 ... 5"),
        ({"vocab_start": 7}, "vocab_start is 7"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"softcap": 0.0}, "softcap is 0.0, but must be a finite number above 0, or None for no cap"),
        ({"softcap": math.nan}, "softcap is nan"),
        ({"softcap": math.inf}, "softcap is inf"),
        ({"tail": "drop"}, "tail is 'drop'. Use one of bucket, renormalize, ignore"),
        ({"implementation": "cuda"}, "implementation is 'cuda'. Use one of auto"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments_are_named(changes, message):
    sparse_kl_cross_entropy(**bad())
    with pytest.raises(ValueError, match=message):
        sparse_kl_cross_entropy(**bad(**changes))


@pytest.mark.parametrize(
    ("changes", "interpret", "message"),
    [
        ({}, "0", "logits is on cpu, but the kernels run on CUDA"),
        (
            {"logits": torch.zeros(3, 7, dtype=torch.float64)},
            "1",
            "logits is torch.float64, but the kernels take only bf16",
        ),
    ],
)
def test_triton_is_refused_where_it_cannot_run(changes, interpret, message, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    with pytest.raises(ValueError, match=message):
        sparse_kl_cross_entropy(**bad(**changes), implementation="triton")
