"""An AdamW whose step count survives a Megatron checkpoint.

Megatron-core saves what a parameter group holds and the moments of each parameter. Apex's and Transformer Engine's FusedAdam
keep `step` in the group; torch's AdamW keeps it beside the moments, where Megatron drops it without a word, so that a resumed
run starts its bias correction afresh. Without either library, this optimizer takes torch's place on every device.
"""

import torch
from torch.optim.adamw import adamw

from megatron_fuse.runtime.libraries import fused_adam_library


class GroupStepAdamW(torch.optim.Optimizer):
    """torch's AdamW (Loshchilov & Hutter, arXiv 1711.05101) with `step` held in the parameter group, as FusedAdam holds it."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, **_: object) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):  # without types, as in torch's own; Megatron gives no closure
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            # Counted also where this rank holds none of the group's parameters, so that every rank saves the same step.
            group["step"] = group.get("step", 0) + 1
            if not parameters:
                continue
            for parameter in parameters:
                state = self.state[parameter]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
            done = float(group["step"] - 1)
            # A fill on the device: a copy from the host would wait for it. adamw counts each of them up.
            steps = torch.full((len(parameters),), done, device=parameters[0].device).unbind()
            # The fused kernel reads and writes everything once, and holds nothing beside.
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
    """Makes Megatron-core use GroupStepAdamW if it has imported neither Transformer Engine nor apex; says whether it did.

    Megatron decides at import which Adam it has, and treats `step` by that decision: the flags say "apex" because the group
    step is apex's convention.
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
