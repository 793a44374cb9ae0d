"""An AdamW whose step count survives a Megatron checkpoint.

Megatron-core saves the content of each parameter group and the moments of each parameter. The FusedAdam of
apex and of Transformer Engine keeps `step` in the group. torch's AdamW keeps it beside the moments, where
Megatron drops it without a message. A resumed run would then start its bias correction again. So without
either library this optimizer replaces torch's, on every device.
"""

import torch
from torch.optim.adamw import adamw

from megatron_fuse.runtime.libraries import fused_adam_library


class GroupStepAdamW(torch.optim.Optimizer):
    """torch's AdamW (Loshchilov & Hutter, arXiv 1711.05101) with `step` in the parameter group, as in
    FusedAdam."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, **_: object) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):  # without types, as in torch; Megatron passes no closure
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            # A rank without parameters of the group counts too, so that every rank saves the same step.
            group["step"] = group.get("step", 0) + 1
            if not parameters:
                continue
            for parameter in parameters:
                state = self.state[parameter]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
            done = float(group["step"] - 1)
            # torch.full fills on the device; a copy from the host would wait for the device. adamw adds 1 to
            # each of them.
            steps = torch.full((len(parameters),), done, device=parameters[0].device).unbind()
            # The fused kernel reads and writes every tensor once, and needs no further memory.
            on_gpu = is_on_gpu(parameters[0])
            adamw(
                parameters,
                [p.grad for p in parameters],
                [self.state[p]["exp_avg"] for p in parameters],
                [self.state[p]["exp_avg_sq"] for p in parameters],
                [],
                list(steps),
                foreach=not on_gpu,
                fused=on_gpu,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


def is_on_gpu(parameter: torch.Tensor) -> bool:
    return parameter.is_cuda


def install_group_step_adamw() -> bool:
    """Makes Megatron-core use GroupStepAdamW if it has imported neither Transformer Engine nor apex. Returns
    whether it does.

    Megatron decides at import which Adam it has, and handles `step` accordingly. The flags here say "apex",
    because a `step` in the group is apex's convention.
    """
    if fused_adam_library() is not None:
        return False
    import megatron.core.optimizer as megatron_optimizer
    import megatron.core.optimizer.distrib_optimizer as distributed_optimizer

    megatron_optimizer.Adam = distributed_optimizer.Adam = GroupStepAdamW
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
    distributed_optimizer.HAVE_APEX_OR_TE = True
    distributed_optimizer.USING_APEX_OPTIMIZER = True
    return True
