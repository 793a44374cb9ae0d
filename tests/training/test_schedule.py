"""The schedule is a pure function of consumed samples, and every epoch shows every example once, in a
curriculum's order.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fuse.errors import UserError
from megatron_fuse.recipe import PRESETS, ModeWeights, Phase, Ramp
from megatron_fuse.training.batches import phase_weights
from megatron_fuse.training.schedule import Schedule


def walk(schedule: Schedule) -> list:
    steps, consumed = [], 0
    while (step := schedule.step(consumed)) is not None:
        steps.append(step)
        consumed = step.consumed_samples
    return steps


# 1: batches of one; 7 and 32 leave short last batches; 100 is larger than the data, one step spans several
# epochs
@pytest.mark.parametrize("batch", [1, 7, 32, 100])
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_phase_shows_every_example_as_often_as_it_has_epochs(preset: str, batch: int) -> None:
    schedule = Schedule(tuple(PRESETS[preset]), examples=45, global_batch_size=batch, seed=5)
    steps = walk(schedule)
    assert [step.iteration for step in steps] == list(range(schedule.total_steps))
    assert steps[-1].consumed_samples == schedule.total_samples == 45 * sum(p.epochs for p in PRESETS[preset])
    for index, phase in enumerate(PRESETS[preset]):
        mine = [step for step in steps if step.phase_index == index]
        seen = np.concatenate([step.examples for step in mine])
        assert len(mine) == -(-45 * phase.epochs // batch)
        assert [step.ends_phase for step in mine] == [False] * (len(mine) - 1) + [True]
        for epoch in seen.reshape(phase.epochs, 45):
            assert sorted(epoch) == list(range(45))


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_a_part_of_an_epoch_shows_its_share_of_the_examples(batch: int) -> None:
    learned = ModeWeights(weight=1)
    phases = tuple(Phase(name=str(n), epochs=n, training=learned) for n in (0.3, 1.7, 0.001, 2))
    steps = walk(schedule := Schedule(phases, examples=45, global_batch_size=batch, seed=5))
    seen = [np.concatenate([step.examples for step in steps if step.phase_index == n]) for n in range(4)]
    assert [len(examples) for examples in seen] == [14, 76, 1, 90] and schedule.total_samples == 181
    assert all(step.progress <= 1 for step in steps) and sum(step.ends_phase for step in steps) == 4
    first, rest = seen[1][:45], seen[1][45:]
    assert len(set(seen[0])) == 14 and sorted(first) == list(range(45)) and len(set(rest)) == 31
    assert seen[0].tolist() != first[:14].tolist(), "another order than the epoch before"


def test_steps_of_the_paper() -> None:
    # ceil(N / B) + ceil(2 N / B), at 100k examples in batches of 128
    assert Schedule(tuple(PRESETS["profuser"]), 100_000, 128, seed=1).total_steps == 782 + 1563


def test_a_step_depends_on_nothing_but_consumed_samples() -> None:
    schedule = Schedule(tuple(PRESETS["profuser"]), examples=45, global_batch_size=7, seed=5)
    for step in reversed(walk(schedule)):
        again = Schedule(tuple(PRESETS["profuser"]), 45, 7, seed=5).step(
            step.consumed_samples - len(step.examples)
        )
        assert again is not None and (again.examples == step.examples).all() and again.phase == step.phase


def order_of_epochs(preset: str, seed: int, batch: int) -> list[tuple[int, ...]]:
    """Examples of each epoch of the run, in the order in which they are seen."""
    steps = walk(Schedule(tuple(PRESETS[preset]), examples=45, global_batch_size=batch, seed=seed))
    return [
        tuple(epoch) for epoch in np.concatenate([step.examples for step in steps]).reshape(-1, 45).tolist()
    ]


# Batches that divide an epoch, do not, and span several: none moves an example to another place in the order.
@pytest.mark.parametrize("batch", [1, 7, 45, 100])
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_the_order_is_a_function_of_seed_and_epoch_alone(preset: str, batch: int) -> None:
    assert order_of_epochs(preset, seed=5, batch=batch) == order_of_epochs("profuser", seed=5, batch=13)


def test_epochs_and_seeds_differ_in_order() -> None:
    orders = [order for seed in (1, 2) for order in order_of_epochs("csft", seed, 45)]
    assert len(set(orders)) == 6


def epochs_of(schedule: Schedule) -> np.ndarray:
    """[epochs, examples] in the order in which they are seen."""
    return np.concatenate([step.examples for step in walk(schedule)]).reshape(-1, schedule.examples)


ranks_of_examples = st.lists(st.integers(0, 4), min_size=1, max_size=40).map(np.array)  # many are equal


@given(
    ranks=ranks_of_examples,
    batch=st.integers(1, 50),
    seed=st.integers(0, 9),
    preset=st.sampled_from(sorted(PRESETS)),
)
def test_a_curriculum_sorts_every_epoch_as_drawn(
    ranks: np.ndarray, batch: int, seed: int, preset: str
) -> None:
    phases = tuple(PRESETS[preset])
    drawn = epochs_of(Schedule(phases, len(ranks), batch, seed))
    for epoch, as_drawn in zip(
        epochs_of(Schedule(phases, len(ranks), batch, seed, ranks)), drawn, strict=True
    ):
        # Lower ranks first, and within a rank the order in which the shuffled epoch has them.
        expected = [example for rank in range(5) for example in as_drawn if ranks[example] == rank]
        assert epoch.tolist() == expected


@given(ranks=ranks_of_examples, batch=st.integers(1, 50))
def test_a_curriculum_is_a_function_of_consumed_samples_alone(ranks: np.ndarray, batch: int) -> None:
    phases = tuple(PRESETS["profuser"])
    for step in reversed(walk(Schedule(phases, len(ranks), batch, 5, ranks))):
        again = Schedule(phases, len(ranks), batch, 5, ranks.copy()).step(
            step.consumed_samples - len(step.examples)
        )
        assert again is not None and (again.examples == step.examples).all()


def test_equal_ranks_are_shuffled_anew_in_every_epoch() -> None:
    ranks = np.arange(45) // 15
    epochs = epochs_of(Schedule(tuple(PRESETS["profuser"]), 45, 7, 5, ranks))
    assert (ranks[epochs] == np.sort(ranks)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == len(epochs)


def test_another_batch_size_cannot_take_over_in_the_middle() -> None:
    with pytest.raises(UserError, match="global-batch-size"):
        Schedule(tuple(PRESETS["csft"]), examples=45, global_batch_size=8, seed=1).step(7)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_a_ramp_goes_from_end_to_end_over_its_phase(shape: str) -> None:
    ramp = Ramp(from_=2.0, to=0.5, shape=shape)
    phases = (
        Phase(name="first", epochs=1, inference=ModeWeights(weight=1, lambda_=0.1)),
        Phase(
            name="second",
            epochs=2,
            inference=ModeWeights(weight=ramp, lambda_=1),
            training=ModeWeights(weight=1),
        ),
    )
    schedule, consumed, seen = Schedule(phases, 30, 7, seed=1), 0, []
    while step := schedule.step(consumed):
        consumed = step.consumed_samples
        seen.append((step.phase.name, phase_weights(step.phase, progress=step.progress, kl_factor=4)))
    weights = [of["inference"] for name, of in seen if name == "second"]
    assert all(of == {"inference": (1, 0.4)} for name, of in seen if name == "first")
    assert weights[0] == (2.0, 8.0) and weights[-1] == (0.5, 2.0)
    assert [w for w, _ in weights] == sorted((w for w, _ in weights), reverse=True) and len(weights) == 9
    middle = weights[len(weights) // 2][0]
    assert middle == pytest.approx(1.25)  # both shapes are half way in the middle
    assert (weights[1][0] > 2 - 1.5 / 8) is (shape == "cosine")


def test_a_ramp_that_touches_0_keeps_its_mode_and_one_that_stays_there_does_not() -> None:
    def phase(**ends: float) -> Phase:
        ramp = Ramp(**{"from": ends["start"], "to": ends["end"]})
        return Phase(
            name="p",
            epochs=1,
            inference=ModeWeights(weight=ramp, lambda_=0.5),
            training=ModeWeights(weight=1),
        )

    assert phase_weights(phase(start=0, end=1), progress=0, kl_factor=1) == {
        "inference": (0, 0),
        "training": (1, 0),
    }
    assert set(phase_weights(phase(start=0, end=0), progress=0, kl_factor=1)) == {"training"}
    assert not phase(start=0, end=0).inference.needs_teacher and phase(start=0, end=1).inference.needs_teacher


@pytest.mark.parametrize("ramp", [{"from": 1}, {"from": -1, "to": 0}, {"from": 1, "to": 0, "shape": "sine"}])
def test_what_is_no_ramp_is_refused(ramp: dict) -> None:
    with pytest.raises(ValueError, match=r"weight"):
        Phase.model_validate({"name": "p", "epochs": 1, "training": {"weight": ramp}})
