"""How many layers each pipeline stage has, also where the number of stages does not divide them."""

from dataclasses import dataclass

from megatron_fuse.errors import UserError
from megatron_fuse.recipe.model_parallel import ParallelOptions


@dataclass(frozen=True)
class PipelineSplit:
    """What a recipe says of the stages; by Megatron's names.

    first, last: layers of the first and of the last stage. None: as the other options give.
    embedding, loss: whether the embedding and the output layer with the loss count as one layer each.
    """

    first: int | None = None
    last: int | None = None
    embedding: bool = False
    loss: bool = False


EVEN = PipelineSplit()


def stated_split(parallel: ParallelOptions) -> PipelineSplit:
    """What a recipe's section `parallel` says of the stages."""
    return PipelineSplit(
        first=parallel.num_layers_in_first_pipeline_stage,
        last=parallel.num_layers_in_last_pipeline_stage,
        embedding=parallel.account_for_embedding_in_pipeline_split,
        loss=parallel.account_for_loss_in_pipeline_split,
    )


def layers_of_stages(layers: int, stages: int, split: PipelineSplit = EVEN) -> tuple[int, ...]:
    """[stages]: the layers of each stage. All stages but the first and the last have the same number.

    If nothing is stated, these two get what the stages between them leave: 61 layers over 4 stages are 15,
    16, 16 and 14. Megatron has no other forms. Raises UserError, which names the options, if a stage would
    be without a layer, or if the stages between cannot share what is left.
    """
    if stages == 1:
        return (layers,)
    if split.first is None and split.last is None:
        return _balanced(layers, stages, split)
    stated = [count for count in (split.first, split.last) if count is not None]
    others, rest = stages - len(stated), layers - sum(stated)
    if others == 0:
        between = 0
        possible = rest == 0
    else:
        between, remainder = divmod(rest, others)
        possible = between >= 1 and remainder == 0
    if not possible:
        raise UserError(
            f"--num-layers-in-first-pipeline-stage {split.first} and --num-layers-in-last-pipeline-stage "
            f"{split.last} leave {rest} of {layers} layers, which {others} other stages cannot share evenly. "
            "Choose other numbers, or leave both out."
        )
    first, last = split.first or between, split.last or between
    return (first, *[between] * (stages - 2), last)


def _balanced(layers: int, stages: int, split: PipelineSplit) -> tuple[int, ...]:
    """The split whose longest stage is the shortest."""
    if stages > layers:
        raise UserError(
            f"--pipeline-model-parallel-size {stages} is more than the {layers} layers of the model. Choose "
            f"a size of at most {layers}."
        )
    between = -(-(layers + split.embedding + split.loss) // stages)
    while (rest := layers - between * (stages - 2)) < 2:  # both ends need a layer
        between -= 1
    # Both ends get as many layers, with the embedding and the loss counted; the first gets an odd one.
    first = min(max((rest + split.loss - split.embedding + 1) // 2, 1), rest - 1)
    return (first, *[between] * (stages - 2), rest - first)
