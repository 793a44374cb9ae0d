"""The optional libraries that Megatron-core uses, by its own flags: a package of that name may be another
one, or incomplete."""

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_fuse.errors import UserError


@contextmanager
def importing_megatron() -> Iterator[None]:
    """Raises UserError if Megatron-core cannot be imported within the block, for example if an optional
    library is incomplete."""
    try:
        yield
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"Megatron-core cannot be imported ({type(error).__name__}: {error}). If the message names "
            "Transformer Engine or apex, install all of it for this version of torch, or remove it "
            "(docs/install.md)."
        ) from error


def has_transformer_engine() -> bool:
    """Whether Megatron-core has imported Transformer Engine in all modules that build a model."""
    from megatron.core.extensions import transformer_engine
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer import transformer_block

    return all(module.HAVE_TE for module in (transformer_engine, gpt_layer_specs, transformer_block))


def fused_adam_library() -> str | None:
    """Name of the library whose FusedAdam Megatron-core uses, None if there is none."""
    from megatron.core.optimizer import Adam

    package = Adam.__module__.partition(".")[0]
    return package if package in ("transformer_engine", "apex") else None


def has_gradient_accumulation_fusion() -> bool:
    """Whether Megatron-core has apex's kernel, which adds a weight's gradient to the fp32 buffer within the
    matrix product."""
    from megatron.core.tensor_parallel import layers

    return layers._grad_accum_fusion_available
