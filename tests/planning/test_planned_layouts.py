"""The layout that is proposed fits, stays with the recipe where it can, and changes as little as it must."""

from dataclasses import replace

import pytest

from megatron_fuse.errors import UserError
from megatron_fuse.planning.durations import (
    MIXTURE_SHARE,
    PACKED_SHARE,
    Layout,
    TrainingWork,
    answering_seconds,
    reading_seconds,
    training_seconds,
)
from megatron_fuse.planning.gpus import GPUS, Cluster, parse_cluster
from megatron_fuse.planning.layouts import (
    Choice,
    choose,
    in_process_layouts,
    megatron_layouts,
    server_layouts,
)
from megatron_fuse.planning.memory import Need, reading_need
from megatron_fuse.planning.rates import assumed_rates
from megatron_fuse.planning.sizes import ModelSize
from megatron_fuse.recipe import make_recipe

CLUSTER = parse_cluster("8xH100-80", 2)
RATES = assumed_rates(CLUSTER.gpu)


def model_of(billions: float, *, layers: int = 80, key_value_heads: int = 8) -> ModelSize:
    return ModelSize(
        parameters=int(billions * 1e9),
        multiplied=0.97 * billions * 1e9,
        embedding=10**9,
        head=10**9,
        layers=layers,
        hidden_size=8192,
        ffn_width=28672,
        heads=64,
        key_value_heads=key_value_heads,
        head_dim=128,
        vocab_size=128256,
    )


def seconds_of(size: ModelSize, layout: Layout, **changed: float) -> float:
    amounts = {"tokens": 1e7, "mean_length": 500, "logits": 5e6, "shards": 1600, "batch_tokens": 8192}
    return reading_seconds(size, "bf16", layout, RATES, **{**amounts, **changed})  # type: ignore[arg-type]


def chosen(size: ModelSize, layouts: list[Layout], batch_tokens: int = 8192) -> Choice:
    def cost(layout: Layout, tokens: int) -> tuple[Need, float]:
        chunked = layout.backend == "megatron"
        need = reading_need(
            size,
            "bf16",
            batch_tokens=tokens,
            logits=tokens / 2,
            tensor=layout.tensor,
            pipeline=layout.pipeline,
            chunked=chunked,
        )
        return need, seconds_of(size, layout)

    return choose(layouts, batch_tokens, 1000, CLUSTER, cost)


def test_a_cluster_is_read() -> None:
    assert parse_cluster("8xH100-80", 4) == Cluster(GPUS["H100-80"], 8, 4)
    assert parse_cluster("l40s-48") == Cluster(GPUS["L40S-48"], 1, 1)
    assert parse_cluster("2xA100-40").gpus == 2


@pytest.mark.parametrize("text", ["8xH100", "H100-80x8", "0xH100-80", "8 H100-80", "", "x"])
def test_an_unknown_cluster_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"The GPUs are A100-40, A100-80, H100-80"):
        parse_cluster(text)


def test_a_model_that_fits_one_gpu_stays_in_process() -> None:
    size = model_of(7)
    layouts = in_process_layouts(CLUSTER) + megatron_layouts(CLUSTER, size)
    choice = chosen(size, layouts)
    assert (choice.layout, choice.batch_tokens, choice.fits) == (Layout("hf", replicas=16), 8192, True)


def test_a_batch_that_does_not_fit_becomes_smaller_before_the_model_is_divided() -> None:
    size = model_of(30)
    layouts = in_process_layouts(CLUSTER) + megatron_layouts(CLUSTER, size)
    choice = chosen(size, layouts, batch_tokens=2**20)
    assert choice.fits and choice.layout == layouts[0] and choice.batch_tokens < 2**20
    # Twice as many tokens would not fit.
    need = reading_need(size, "bf16", batch_tokens=2 * choice.batch_tokens, logits=choice.batch_tokens)
    assert not need.fits(CLUSTER.gpu.memory)


def test_a_model_that_fits_no_gpu_is_divided_by_megatron() -> None:
    size = model_of(70)
    layouts = in_process_layouts(CLUSTER) + megatron_layouts(CLUSTER, size)
    choice = chosen(size, layouts)
    assert choice.fits and choice.layout.backend == "megatron"
    assert choice.layout.gpus_of_replica * choice.layout.replicas == CLUSTER.gpus
    # device_map would fit too, but lets all GPUs of a process but one wait.
    divided = chosen(size, in_process_layouts(CLUSTER))
    assert divided.fits and divided.seconds > 1.5 * choice.seconds


def test_a_model_that_fits_nowhere_is_said_not_to_fit() -> None:
    size = model_of(2000)
    choice = chosen(size, in_process_layouts(CLUSTER) + megatron_layouts(CLUSTER, size))
    assert not choice.fits and choice.need.total > CLUSTER.gpu.memory


def test_layouts_divide_heads_layers_and_gpus() -> None:
    size = model_of(70, layers=80, key_value_heads=2)
    for layout in megatron_layouts(CLUSTER, size):
        assert size.heads % layout.tensor == size.key_value_heads % layout.tensor == 0
        assert size.layers % layout.pipeline == 0 and layout.tensor <= CLUSTER.per_node
        assert layout.gpus_of_replica * layout.replicas == CLUSTER.gpus
    for layout in in_process_layouts(CLUSTER) + server_layouts(CLUSTER, size):
        assert layout.gpus_of_replica * layout.replicas <= CLUSTER.gpus


def test_twice_the_text_takes_twice_the_time_and_idle_replicas_do_not_help() -> None:
    size, alone = model_of(7), Layout("hf", replicas=1)
    once = seconds_of(size, alone)
    assert seconds_of(size, alone, tokens=2e7, logits=1e7) == pytest.approx(2 * once)
    assert seconds_of(size, Layout("hf", replicas=16)) == pytest.approx(once / 16)
    # Three shards over sixteen processes: as fast as over three.
    few = seconds_of(size, Layout("hf", replicas=16), shards=3)
    assert few == pytest.approx(seconds_of(size, Layout("hf", replicas=3), shards=3))
    # A pipeline waits while it fills and drains.
    piped = seconds_of(size, Layout("megatron", 1, 4, 1), shards=1, batch_tokens=10**7)
    assert piped == pytest.approx(once)


def test_decoding_takes_as_long_as_the_slowest_of_its_parts() -> None:
    amounts = {"answers": 1000, "prompt": 0.0, "answer": 100.0, "shards": 1}

    def seconds(size: ModelSize, layout: Layout, rows: int) -> float:
        return answering_seconds(size, "bf16", layout, RATES, rows=rows, **amounts)  # type: ignore[arg-type]

    # Starting the kernels of 80 layers takes longer than reading 14 GB: more rows are free.
    small, alone = model_of(7), Layout("hf")
    assert seconds(small, alone, 8) == pytest.approx(2 * seconds(small, alone, 16), rel=1e-3)
    # A server starts them at once, and then reads the weights, over four GPUs in a fourth of the time.
    large = model_of(70)
    one, four = (seconds(large, Layout("server", tensor), 1) for tensor in (1, 4))
    assert one == pytest.approx(4 * four, rel=0.01)


def test_the_training_of_a_mixture_sends_tokens_to_experts_and_few_gradients() -> None:
    """Eight ranks of one node, alone and with the experts over all of them; by hand."""
    size = replace(
        model_of(30), expert_parameters=29 * 10**9, experts_per_token=8, hidden_size=2048, multiplied=3e9
    )
    cluster = parse_cluster("8xH100-80")
    work = TrainingWork(tokens=1e7, mean_length=500, steps=100)

    def seconds(experts: int) -> float:
        sections = {
            "workdir": "runs/x",
            "target": {"model": "x"},
            "sources": {"a": {"model": "x"}},
            "data": {"path": "x.jsonl"},
            "schedule": {"preset": "csft"},
            "training": {"packing": True},
            "parallel": {"expert_model_parallel_size": experts},
        }
        return training_seconds(make_recipe(sections), size, work, cluster, RATES)

    positions = 1e7 / PACKED_SHARE
    computing = 3 * size.forward_flops(positions, 500, positions) / (RATES.training * MIXTURE_SHARE * 8)
    whole = 100 * 8 * 30e9 * 7 / 8 / RATES.link
    assert seconds(1) == pytest.approx(computing + whole, rel=1e-3)
    # Each rank alone holds its experts: no gradients of them are sent, but tokens, in bf16.
    of_others = 100 * 8 * 1e9 * 7 / 8 / RATES.link
    dispatched = 4 * size.layers * positions / 8 * 8 * 2048 * 2 * 7 / 8 / RATES.link
    assert seconds(8) == pytest.approx(computing + of_others + dispatched, rel=1e-3)
