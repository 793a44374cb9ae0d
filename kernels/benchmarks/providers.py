"""What others do to learn from a sparse teacher, each as it is usually written, and ours.

Every loss takes logits [n, v], labels [n], teacher_ids [n, k], teacher_logprobs [n, k], ce_weight [n],
kl_weight [n] and the
temperature T, and returns [n]:  ce_weight * -log q_1[label] + kl_weight * sum p log(p / q_T),  q_T =
                                 softmax(logits / T).
The sum goes over the stored entries alone (our tail "ignore"), the form that they all have; "ours, bucket"
adds our tail.
"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from fuse_kernels import sparse_kl_cross_entropy
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Provider:
    name: str
    # [n], or a scalar where the rows cannot be had. Of top_k: ids, logits [n, k], log-sum-exps [n, 2],
    # label_logits [n]
    loss: Callable[..., Tensor]
    # The same loss, densely, of fp64 arguments; for top_k there is one for all.
    exact: Callable[..., Tensor] | None
    absent: str = ""  # why it cannot run here
    main_grad: bool = False  # adds the weight's gradient to weight.main_grad and returns a sparse zero for it


def sparse_kl_providers(device: str, softcap: float | None = None) -> list[Provider]:
    """softcap: of the logits. Ours takes it as an option; the others get logits that torch has capped."""
    capped = functools.partial(after_cap, softcap)
    fused = functools.partial(ours, softcap=softcap)
    exact, liger_absent = (
        functools.partial(fused, tail="ignore", implementation="reference"),
        absent("liger_kernel"),
    )
    if not liger_absent and device != "cuda":
        liger_absent = "Liger's cross entropy runs on a GPU only"
    return [
        Provider("ours", functools.partial(fused, tail="ignore"), exact),
        Provider(
            "ours, bucket", functools.partial(fused, tail="bucket"), functools.partial(exact, tail="bucket")
        ),
        Provider("dense eager", capped(dense), exact),
        Provider("dense torch.compile", compiled(capped(dense)), exact),
        Provider("sparse autograd", capped(sparse_autograd), exact),
        Provider("chunked top-k", capped(chunked_top_k), exact),
        Provider("liger CE + sparse KL", capped(liger_ce_and_sparse_kl), exact, liger_absent),
    ]


def after_cap(softcap: float | None, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The loss of soft-capped logits; the loss itself without a cap."""
    if softcap is None:
        return loss
    return lambda logits, *rest: loss(softcap * torch.tanh(logits.float() / softcap), *rest)


def absent(package: str) -> str:
    return "" if importlib.util.find_spec(package) else f"{package} is not installed"


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compiles at the first call, for its shapes alone and without what was compiled before: graphs are
    limited in number.
    """

    @functools.cache
    def ready() -> Callable[..., Tensor]:
        torch.compiler.reset()
        return torch.compile(function, dynamic=False)

    return lambda *arguments: ready()(*arguments)


def fitting_implementation(tensor: Tensor) -> str:
    return "triton" if tensor.is_cuda else "torch"


def ours(
    logits,
    labels,
    teacher_ids,
    teacher_logprobs,
    ce_weight,
    kl_weight,
    temperature,
    *,
    tail,
    implementation=None,
    **options,
):
    return sparse_kl_cross_entropy(
        logits,
        labels,
        teacher_ids,
        teacher_logprobs,
        ce_weight=ce_weight,
        kl_weight=kl_weight,
        temperature=temperature,
        tail=tail,
        implementation=implementation or fitting_implementation(logits),
        **options,
    ).loss


def dense(logits, labels, teacher_ids, teacher_logprobs, ce_weight, kl_weight, temperature):
    """A teacher tensor of the logits' size and two log-softmaxes."""
    z = logits.float()
    teacher = torch.zeros_like(z).scatter_add(1, teacher_ids, teacher_logprobs.exp())
    kl = F.kl_div((z / temperature).log_softmax(-1), teacher, reduction="none").sum(-1)
    return ce_weight * F.cross_entropy(z, labels, reduction="none") + kl_weight * kl


def sparse_autograd(logits, labels, teacher_ids, teacher_logprobs, ce_weight, kl_weight, temperature):
    """Two log-softmaxes, read at the label and at the teacher's ids; autograd does the rest."""
    z = logits.float()
    label_logprobs = z.log_softmax(-1).gather(1, labels[:, None])
    logprobs = (z / temperature).log_softmax(-1).gather(1, teacher_ids)
    return _weighted(label_logprobs, logprobs, teacher_logprobs, ce_weight, kl_weight)


def chunked_top_k(logits, labels, teacher_ids, teacher_logprobs, ce_weight, kl_weight, temperature):
    """As NeMo-RL: gathered log-probabilities whose backward softmaxes each chunk of tokens again, once per
    temperature.
    """
    chunk = chunk_tokens(len(logits))
    label_logprobs = _ChunkedLogprobs.apply(logits, labels[:, None], 1.0, chunk)
    logprobs = _ChunkedLogprobs.apply(logits, teacher_ids, temperature, chunk)
    return _weighted(label_logprobs, logprobs, teacher_logprobs, ce_weight, kl_weight)


def liger_ce_and_sparse_kl(logits, labels, teacher_ids, teacher_logprobs, ce_weight, kl_weight, temperature):
    """Liger has no sparse KL: its fused cross entropy, and the KL through autograd.

    The KL comes first because Liger's forward writes its gradient over the logits; a log-softmax keeps only
    its result.
    """
    from liger_kernel.transformers.functional import liger_cross_entropy

    logprobs = (logits.float() / temperature).log_softmax(-1).gather(1, teacher_ids)
    ce = liger_cross_entropy(logits, labels, reduction="none")
    return _weighted(-ce[:, None], logprobs, teacher_logprobs, ce_weight, kl_weight)


def chunk_tokens(n: int) -> int:
    """Tokens of a chunk, for all that work in chunks: 1024, the usual default, or an eighth of a smaller
    batch.
    """
    return min(1024, -(-n // 8))


def _weighted(label_logprobs, logprobs, teacher_logprobs, ce_weight, kl_weight):
    """label_logprobs [n, 1] at T = 1, logprobs [n, k] of the student at the teacher's ids."""
    kl = (teacher_logprobs.exp() * (teacher_logprobs - logprobs)).sum(-1)
    return kl_weight * kl - ce_weight * label_logprobs[:, 0]


class _ChunkedLogprobs(torch.autograd.Function):
    """log_softmax(logits / T) at ids [n, m], in fp32, with fp32 copies of one chunk of tokens at a time."""

    @staticmethod
    def forward(ctx, logits, ids, temperature, chunk):
        ctx.save_for_backward(logits, ids)
        ctx.temperature, ctx.chunk = temperature, chunk
        parts = zip(logits.split(chunk), ids.split(chunk), strict=True)
        return torch.cat(
            [(z.float() / temperature).log_softmax(-1).gather(1, columns) for z, columns in parts]
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        logits, ids = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        parts = zip(*(t.split(ctx.chunk) for t in (logits, ids, upstream, gradient)), strict=True)
        for z, columns, up, out in parts:
            softmax = (z.float() / ctx.temperature).softmax(-1)
            out.copy_(
                softmax.mul_(-up.sum(1, keepdim=True)).scatter_add_(1, columns, up).div_(ctx.temperature)
            )
        return gradient, None, None, None
