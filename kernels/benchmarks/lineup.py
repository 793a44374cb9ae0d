"""Who takes part in a case."""

from cases import Case
from linear_providers import fused_linear_providers
from providers import Provider, sparse_kl_providers
from shard_providers import shard_providers
from top_k_providers import top_k_providers


def providers_of(case: Case, device: str) -> list[Provider]:
    if case.kernel == "fused_linear":
        return fused_linear_providers()
    if case.kernel == "top_k":
        return top_k_providers(case.k)
    if case.shards > 1:
        return shard_providers(case.shards)
    return sparse_kl_providers(device, case.softcap)
