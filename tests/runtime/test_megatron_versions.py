"""What differs between Megatron-core's versions, with stand-ins for what the installed version does not
have.
"""

import logging
from functools import partial
from types import SimpleNamespace

import pytest

from megatron_fuse.runtime.megatron_versions import adopt_learning_rates, quiet_known_messages, submodules_of

GROUPS = [
    {"wd_mult": 1.0, "lr_mult": 1.0, "max_lr": 1e-4, "min_lr": 1e-6},
    {"wd_mult": 0.0, "lr_mult": 1.0, "max_lr": 2e-4, "min_lr": 2e-6},
]


def groups_without_bounds() -> list[dict[str, float]]:
    """As Megatron-core 0.16 saves them."""
    return [{"wd_mult": group["wd_mult"], "lr_mult": 1.0, "step": 7} for group in GROUPS]


@pytest.mark.parametrize("nested", [False, True], ids=["fp32", "distributed"])
@pytest.mark.parametrize(
    "saved", [{}, {"max_lr": 1.0, "min_lr": None}], ids=["without bounds", "of another lr"]
)
def test_a_loaded_group_has_the_bounds_of_this_run(saved, nested) -> None:  # type: ignore[no-untyped-def]
    """In whatever order the groups were saved, and with their state as it was."""
    groups = [group | saved for group in reversed(groups_without_bounds())]
    state = {"param_groups": groups}
    adopt_learning_rates({"optimizer": state} if nested else state, SimpleNamespace(param_groups=GROUPS))
    assert groups == [group | {"step": 7} for group in reversed(GROUPS)]


def test_bounds_that_this_version_does_not_have_are_not_added() -> None:
    groups = groups_without_bounds()
    adopt_learning_rates({"param_groups": groups}, SimpleNamespace(param_groups=groups_without_bounds()))
    assert groups == groups_without_bounds()


def test_known_messages_alone_are_left_out(caplog) -> None:  # type: ignore[no-untyped-def]
    logger = logging.getLogger("megatron.core.models.gpt.gpt_model")
    for _ in range(2):
        quiet_known_messages()
    assert len(set(logger.filters)) == len(logger.filters)
    logger.warning("GPTModel IS DEPRECATED. Use %s", "HybridModel")
    logger.warning("the loss is %s", "high")
    logging.getLogger("megatron.core").warning("GPTModel IS DEPRECATED, says another")
    assert caplog.messages == ["the loss is high", "GPTModel IS DEPRECATED, says another"]


@pytest.mark.parametrize("is_partial", [False, True], ids=["0.16 and 0.17", "from 0.18 on"])
def test_the_submodules_of_a_part_are_found_in_both_forms(is_partial: bool) -> None:
    parts = SimpleNamespace(linear_fc2=None)
    spec = partial(SimpleNamespace, submodules=parts) if is_partial else SimpleNamespace(submodules=parts)
    assert submodules_of(spec) is parts
