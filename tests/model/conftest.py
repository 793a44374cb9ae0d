from pathlib import Path

import pytest
import small_targets


@pytest.fixture(scope="session")
def small_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory with config and weights for every name in small_targets.NAMES."""
    root = tmp_path_factory.mktemp("targets")
    return {name: small_targets.save_small_model(name, root / name) for name in small_targets.NAMES}
