"""Laws of the view of a chat template: what is shown as learned and as an end is what training and
sampling use.
"""

import json
import runpy
import sys
from pathlib import Path

import pytest
from chat_families import FAMILIES, save_tokenizer
from transformers import LlamaConfig

from megatron_fuse.huggingface.formats import load_format
from megatron_fuse.inspection.templates import format_template_view, view_template
from megatron_fuse.recipe import ModelOptions

TOOL = Path(__file__).resolve().parents[2] / "tools" / "inspect_data.py"


def _model(name: str, directory: Path) -> Path:
    LlamaConfig(vocab_size=500).save_pretrained(save_tokenizer(name, directory))
    return directory


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", [str(TOOL), *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(TOOL), run_name="__main__")
    return ended.value.code


@pytest.mark.parametrize("name", FAMILIES)
def test_a_view_shows_what_is_learned_and_what_ends_an_answer(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    chat = load_format(ModelOptions(model=str(_model(name, tmp_path))), "sources.x")
    view = view_template("x", chat)
    learned = "".join(token["text"] for token in view["tokens"] if token["supervised"])
    assert learned == f"{family.separator}It is 7.{family.stop}"
    assert view["stop"]["text"] == family.stop
    assert {token["text"] for token in view["ends"]} == {family.stop, family.tokens[0], *family.listed}
    text = format_template_view(view)
    for shown in (family.generation, family.opening, family.closing):
        assert repr(shown) in text or not shown
    assert ("tools: the template prints offered tools, calls and outputs" in text) == bool(family.calls)
    assert ("tools: rows with tools are left out: sources.x: the chat template of" in text) == (
        not family.calls
    )
    assert ("takes no system message" in text) == ("no system" in family.template)


def test_the_tool_shows_one_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    model = _model("nemotron 3", tmp_path / "model")
    assert _run(monkeypatch, "--template", str(model)) == 0
    assert "the generation prompt ends in '<think>\\n'; before a given response" in capsys.readouterr().out
    assert _run(monkeypatch, "--template", str(model), "--json") == 0
    assert json.loads(capsys.readouterr().out)["generation"] == "<think>\n"
    assert _run(monkeypatch, "--template", str(tmp_path / "none")) == 2
    assert "--template.model: " in capsys.readouterr().err
    assert _run(monkeypatch, "--template", str(model), "--mode", "training") == 2
    assert "--mode and --source choose the document of an example" in capsys.readouterr().err


def test_a_template_for_one_question_is_shown_with_one(tmp_path: Path) -> None:
    model, template = _model("chatml and mpt", tmp_path / "model"), tmp_path / "one.jinja"
    refusal = "{% if messages|length > 3 %}{{ raise_exception('one question only') }}{% endif %}"
    template.write_text(refusal + FAMILIES["chatml and mpt"].template)
    view = view_template(
        "x", load_format(ModelOptions(model=str(model), chat_template=str(template)), "sources.x")
    )
    assert "".join(token["text"] for token in view["tokens"] if token["supervised"]) == "It is 7.<|im_end|>"
    assert "It is 5." not in "".join(token["text"] for token in view["tokens"])


def test_the_tool_shows_every_role_of_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    models = {name: str(_model(name, tmp_path / name)) for name in ("qwen3", "glm 4", "gemma 3")}
    recipe = {
        "workdir": str(tmp_path / "work"),
        "target": {"model": models["qwen3"]},
        "sources": {"glm": {"model": models["glm 4"]}},
        "reward_models": {
            "reward": {"model": models["gemma 3"], "form": "classifier"},
            "elsewhere": {"scores": "scores.jsonl"},  # nothing to show
        },
        "schedule": {"preset": "profuser"},
        "data": {"path": "none.jsonl"},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    assert _run(monkeypatch, "--recipe", str(path), "--template", "--json") == 0
    views = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [view["model"] for view in views] == ["target", "sources.glm", "reward_models.reward"]
    assert [view["stop"]["text"] for view in views] == ["<|im_end|>", "<|user|>", "<end_of_turn>"]
