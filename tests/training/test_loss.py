"""What of a token's loss reaches its gradient, whatever Megatron divides it by."""

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_upstream_gradient_is_exactly_one(dtype: torch.dtype) -> None:
    """The loss kernels multiply a gradient again where it is not. 1 / 41 times 41 is not 1 in fp32."""
    from megatron_fuse.training.batches import MicroBatch
    from megatron_fuse.training.loss import make_forward_step

    tokens = torch.zeros(1, 5, dtype=torch.int64)
    batch = MicroBatch(tokens, tokens, None, mode=torch.tensor([0]), source=torch.tensor([0]))
    for micro_batches in range(1, 300):
        losses = torch.rand(6, 1, 5, dtype=dtype, requires_grad=True)
        step = make_forward_step(micro_batches=micro_batches, sources=1)
        output, loss_function = step(iter([batch]), lambda *_, losses=losses, **__: losses)  # type: ignore[arg-type, list-item]
        loss, _ = loss_function(output)
        loss /= micro_batches  # as megatron.core.pipeline_parallel.schedules does
        loss.backward()
        assert (losses.grad[0] == 1).all(), micro_batches  # type: ignore[index]
        torch.testing.assert_close(loss.detach(), losses[0].sum().detach())
