"""Libraries count as there if Megatron-core could import them, whatever lies on the path under their
names.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_models import save_model

from megatron_fuse.experiments.fork_server import Commands

_CHECK = """
import json, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from unittest.mock import patch
import torch
from megatron_fuse.runtime import start_runtime, fused_adam_library
start_runtime()
from megatron_fuse.model.architecture import read_architecture
from megatron_fuse.model.config import resolve_transformer_impl, transformer_config
from megatron_fuse.model.gpt import build_model
import megatron.core.optimizer as optimizer
architecture = read_architecture(Path(sys.argv[1]))
with patch.object(torch.cuda, "is_available", lambda: True):
    chosen = resolve_transformer_impl("auto")
model = build_model(architecture, transformer_config(architecture))
logits = model(torch.zeros(1, 8, dtype=torch.long), None, None)
norms = sorted({type(m).__name__ for m in model.modules() if "norm" in type(m).__name__.lower()})
print(json.dumps([fused_adam_library(), optimizer.Adam.__name__, chosen, norms, list(logits.shape)[:2]]))
"""


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """Scripts as forks of a process that has torch and transformers, and nothing of Megatron-core."""
    path = os.pathsep.join(sys.path)
    environment = os.environ | {"PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    with Commands(tmp_path_factory.mktemp("commands"), environment) as commands:
        yield commands


def run_with(packages: list[str], directory: Path, commands: Commands) -> tuple[int, str]:
    """Exit code and output of _CHECK, with empty packages of these names first on the path."""
    for package in packages:
        (directory / package).mkdir()
        (directory / package / "__init__.py").write_text('__version__ = "2.9.0"\n')
    model = save_model(directory / "model", "llama")
    script, log = directory / "check.py", directory / "log.txt"
    script.write_text(_CHECK)
    code = commands.run([sys.executable, str(script), str(model), str(directory)], log)
    return code, log.read_text()


def test_another_package_of_the_name_apex_is_not_used(tmp_path: Path, commands: Commands) -> None:
    code, output = run_with(["apex"], tmp_path, commands)
    assert code == 0, output[-3000:]
    assert output.splitlines()[-1] == '[null, "GroupStepAdamW", "local", ["RMSNorm"], [1, 8]]'


@pytest.mark.parametrize(
    "packages", [["transformer_engine"], ["transformer_engine", "transformer_engine/pytorch"]], ids=" ".join
)
def test_a_transformer_engine_that_megatron_cannot_import_is_named(
    packages: list[str], tmp_path: Path, commands: Commands
) -> None:
    """Installed without its torch part, or with one that is broken."""
    code, output = run_with(packages, tmp_path, commands)
    assert code != 0 and "UserError: Megatron-core cannot be imported (" in output, output[-3000:]
    assert "transformer_engine.pytorch" in output and "install all of it" in output
