"""The table of `--plan`: the artifacts with their states, and rough costs in time and disk space."""

import time

import torch

from megatron_fuse.errors import UserError
from megatron_fuse.pipeline.estimates import estimate_amounts
from megatron_fuse.pipeline.idle_processes import idle_line
from megatron_fuse.pipeline.stages import steps
from megatron_fuse.progress import readable_seconds
from megatron_fuse.responses import backend_of
from megatron_fuse.selection.summary import rule_lines
from megatron_fuse.stages import Context
from megatron_fuse.text_safety import say
from megatron_fuse.training.advice import loss_advice

# The forward pass of a transformer reaches about this share of the rate of a bare matrix product; only for
# estimates.
_EFFICIENCY = 0.5


def print_plan(context: Context, processes: int) -> None:
    """Prints the artifacts of a recipe with their states and costs.

    processes: the number that the user will start. Raises UserError, after the table, with the errors of all
    artifacts.
    """
    recipe, amounts, rate = context.recipe, estimate_amounts(context), measured_flops_per_second()
    say(
        f"{recipe.workdir}: {amounts.examples:,} examples, about {amounts.prompt_tokens:,.0f} tokens of "
        f"prompts and {amounts.response_tokens:,.0f} of ground truth; rough estimates, one process"
    )
    if any(backend_of(recipe, name) == "hf" for name in recipe.answering):
        most = recipe.responses.max_new_tokens
        say(
            f"answers are taken to be as long as the ground truth, about {amounts.answer_tokens:,.0f} tokens "
            f"a model; with responses.max_new_tokens = {most} they have {most * amounts.examples:,} at most"
        )
    idle = idle_line(recipe, amounts.examples, processes)
    for line in [*([idle] if idle else []), *rule_lines(recipe), *loss_advice(recipe)]:
        say(line)
    say(f"{'artifact':<48} {'state':<16} {'disk':>10} {'time':>10}")
    refusals = []
    for work in (work for works in steps(recipe).values() for work in works):
        disk = time_left = ""
        try:
            state = work.state(context)
            # work.flops reads the weights, and raises UserError if they are damaged.
            if state == "to do" or "shards" in state:
                disk = readable_bytes(work.disk(recipe, amounts))
                time_left = readable_seconds(work.flops(context, amounts) / rate)
        except UserError as refusal:
            state = "refused"
            refusals.append(str(refusal))
        say(f"{work.label(recipe):<48} {state:<16} {disk:>10} {time_left:>10}")
    if refusals:
        raise UserError("\n       ".join(dict.fromkeys(refusals)))


def readable_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def measured_flops_per_second(size: int = 1024, repeats: int = 4) -> float:
    """Estimated operations per second of a transformer here: the rate of a matrix product times a share.

    size: rows of the square matrices. repeats: number of timed products.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    (matrix @ matrix).sum().item()
    start = time.perf_counter()
    for _ in range(repeats):
        product = matrix @ matrix
    product.sum().item()
    return _EFFICIENCY * repeats * 2 * size**3 / (time.perf_counter() - start)
