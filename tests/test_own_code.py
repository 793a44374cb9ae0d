"""Python code that comes with a model runs where the user allows it by name; nothing ever asks at the
terminal.
"""

import ast
import io
import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_models import save_model

from megatron_fuse.errors import UserError
from megatron_fuse.evaluation import Settings, harness
from megatron_fuse.huggingface.formats import load_format
from megatron_fuse.huggingface.loading import load_causal_lm
from megatron_fuse.merging import Merge, merge_models
from megatron_fuse.model.architecture import read_architecture
from megatron_fuse.recipe import AnsweringOptions, ModelOptions, RewardModelOptions
from megatron_fuse.scoring.reference import _load_encoder
from megatron_fuse.scoring.reward_models.loading import load_reward_model
from megatron_fuse.tokenization import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]

OWN_CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Path({marker!r}).write_text("the code of the model was run")

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

class OwnTokenizerFast(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


@pytest.fixture
def model(tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that only its own code can load, and a user who types `y` to every question."""
    directory = save_model(tmp_path / "own", "llama")
    (directory / "own.py").write_text(OWN_CODE.format(marker=str(marker)))
    classes = {"AutoModelForCausalLM": "OwnForCausalLM", "AutoModel": "OwnForCausalLM"}
    classes |= {"AutoConfig": "OwnConfig", "AutoModelForSequenceClassification": "OwnForCausalLM"}
    _change(
        directory / "config.json",
        model_type="own",
        auto_map={auto: f"own.{name}" for auto, name in classes.items()},
    )
    _change(
        directory / "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": [None, "own.OwnTokenizerFast"]},
    )
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    return directory


def _change(path: Path, **keys: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def _plain_tokenizer(model: Path) -> Path:
    """The same model with a tokenizer that needs no code."""
    save_model(model.parent / "plain", "llama")
    shutil.copy(model.parent / "plain/tokenizer_config.json", model)
    return model


def _chat(model: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["chat", str(model), "--prompt", "x", "--max-new-tokens", "1"])
        patch.setattr("megatron_fuse.errors.exit_code", lambda main: main())
        runpy.run_path(str(ROOT / "tools/chat.py"), run_name="__main__")


def _merge(model: Path) -> None:
    pytest.importorskip("mergekit")
    merge_models(Merge("linear", (model, model)), model.parent / "merged")


def _evaluate(model: Path) -> None:
    pytest.importorskip("lm_eval")
    harness.load_model(model, 1, Settings())


def _reward_model(model: Path) -> None:
    reward_model = save_model(model.parent / "reward", "llama", reward=True)
    for name in ("config.json", "own.py"):
        shutil.copy(model / name, reward_model)
    _change(reward_model / "config.json", architectures=["OwnForSequenceClassification"], num_labels=1)
    load_reward_model(RewardModelOptions(model=str(reward_model)), "reward")


ROADS: dict[str, tuple[Callable[[Path], object], str]] = {
    "tokenizer": (load_tokenizer, "This command does not run such code"),
    "recipe's tokenizer": (
        lambda model: load_format(ModelOptions(model=str(model)), "sources.own"),
        r"set sources\.own\.trust_remote_code: true",
    ),
    "weights": (
        lambda model: load_causal_lm(AnsweringOptions(model=str(model)), where="sources.own"),
        r"set sources\.own\.trust_remote_code: true",
    ),
    "config of a target": (read_architecture, "model_type|model type|custom code|needs Python code"),
    "reward model": (_reward_model, "needs Python code that comes with the model|custom code"),
    "encoder of BERTScore": (
        lambda model: _load_encoder(str(model), None),
        "This command does not run such code",
    ),
    "merge": (_merge, "needs Python code that comes with the model"),
    "evaluation": (_evaluate, "This command does not run such code"),
    "chat, tokenizer": (_chat, "set --trust-remote-code"),
    "chat, weights": (lambda model: _chat(_plain_tokenizer(model)), "set --trust-remote-code"),
}


@pytest.mark.parametrize("road", ROADS)
def test_no_road_runs_or_asks_without_permission(road: str, model: Path, marker: Path) -> None:
    load, message = ROADS[road]
    _load_encoder.cache_clear()
    with pytest.raises(UserError, match=message) as refused:
        load(model)
    assert len(str(refused.value)) <= 600
    assert not marker.exists()
    assert sys.stdin.read() == "y\n" * 20  # nobody asked


def test_with_permission_the_code_of_the_model_runs(
    model: Path, marker: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = AnsweringOptions(model=str(model), trust_remote_code=True, dtype="fp32")
    form = load_format(options, "sources.own")
    assert marker.exists()
    loaded = load_causal_lm(options, torch.device("cpu"), "sources.own")
    assert type(loaded).__name__ == "OwnForCausalLM"
    loaded(torch.tensor([form.encode_prompt([{"role": "user", "content": "12"}])]))
    arguments = ["chat", str(model), "--prompt", "x", "--max-new-tokens", "2", "--trust-remote-code"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "tools/chat.py"), run_name="__main__")
    assert not end.value.code, capsys.readouterr().err


PRODUCT = ("megatron_fuse", "tools", "examples", "benchmarks", "kernels", "pretrain_fuse.py")


def test_every_loader_is_given_its_permission() -> None:
    """A call that leaves trust_remote_code out asks at the terminal."""
    calls, silent = 0, []
    for path in (
        found
        for name in PRODUCT
        for found in ([ROOT / name] if name.endswith(".py") else (ROOT / name).rglob("*.py"))
    ):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("from_pretrained", "HFLM") or (
                name == "from_config" and ast.unparse(node).startswith("Auto")
            ):
                calls += 1
                if "trust_remote_code" not in [keyword.arg for keyword in node.keywords]:
                    silent.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert calls > 10 and not silent
