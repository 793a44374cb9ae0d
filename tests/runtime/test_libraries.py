"""Libraries count as there if Megatron-core could import them, whatever lies on the path under their names."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_models import save_model

_CHECK = """
import json, sys
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


def run_with(packages: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    """_CHECK, with empty packages of these names on the path."""
    for package in packages:
        (directory / package).mkdir()
        (directory / package / "__init__.py").write_text('__version__ = "2.9.0"\n')
    model = save_model(directory / "model", "llama")
    path = os.pathsep.join([str(directory), *sys.path])
    command = [sys.executable, "-W", "ignore", "-c", _CHECK, model]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)


def test_another_package_of_the_name_apex_is_not_used(tmp_path: Path) -> None:
    done = run_with(["apex"], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == '[null, "GroupStepAdamW", "local", ["RMSNorm"], [1, 8]]'


@pytest.mark.parametrize(
    "packages", [["transformer_engine"], ["transformer_engine", "transformer_engine/pytorch"]], ids=" ".join
)
def test_a_transformer_engine_that_megatron_cannot_import_is_named(packages: list[str], tmp_path: Path) -> None:
    """Installed without its torch part, or with one that is broken."""
    done = run_with(packages, tmp_path)
    assert "UserError: Megatron-core cannot be imported (" in done.stderr, done.stderr[-3000:]
    assert "transformer_engine.pytorch" in done.stderr and "install all of it" in done.stderr
