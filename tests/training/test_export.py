"""An export is of the checkpoint that it names, with the files that were written, and loses nothing that
is the user's.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from chat_families import save_tokenizer
from log_lines import logged
from synthetic import make_tiny_recipe, make_tiny_target
from test_layouts import run_training

from megatron_fuse.chat.templates import TEMPLATES


@pytest.fixture(scope="module")
def trained(ranks, tmp_path_factory) -> tuple[Path, Path]:  # type: ignore[no-untyped-def]
    """Checkpoints of two steps, the second the latest, and their target."""
    directory = tmp_path_factory.mktemp("trained")
    target = save_tokenizer("qwen2.5 and smollm2", make_tiny_target(directory / "target"))
    ranks(1, run_training, directory / "work", target, {"training": {"train_iters": 2, "save_interval": 1}})
    return directory / "work/training/checkpoints", target


@pytest.fixture
def run(trained, tmp_path: Path) -> tuple[Path, Path]:  # type: ignore[no-untyped-def]
    """A workdir of the test's own with these checkpoints, and the target."""
    shutil.copytree(trained[0], tmp_path / "work/training/checkpoints")
    return tmp_path / "work", trained[1]


def set_latest(workdir: Path, iteration: int) -> None:
    (workdir / "training/checkpoints/latest_checkpointed_iteration.txt").write_text(f"{iteration}\n")


def export(workdir: Path, target: Path, **training: Any) -> str:
    """In a rank: the name of the checkpoint that was exported, or the error."""
    from megatron_fuse.errors import UserError
    from megatron_fuse.runtime import start_runtime

    start_runtime()
    from megatron_fuse.training.export import export_fused_model

    recipe = make_tiny_recipe(workdir, target, export={"checkpoint": "latest"}, training=training)
    try:
        return export_fused_model(recipe)[1].name
    except UserError as error:
        return str(error)


def story(workdir: Path, target: Path) -> None:
    """All in one process, which has started Megatron once."""
    output = workdir / "export"
    weights = output / "model.safetensors"
    assert export(workdir, target) == "iter_0000002"
    record = json.loads((output / "fusion.json").read_text())
    assert record["facts"]["iteration"] == 2
    assert record["files"].keys() == {path.name for path in output.iterdir()} - {"fusion.json"}
    second, stamp = weights.read_bytes(), weights.stat().st_mtime_ns
    assert export(workdir, target) == "iter_0000002" and weights.stat().st_mtime_ns == stamp

    for name in ("model.safetensors", "config.json"):  # gone: made again
        (output / name).unlink()
        assert export(workdir, target) == "iter_0000002" and weights.read_bytes() == second

    weights.write_bytes(second[:-1])  # cut off: named, with or without checksums
    for training in ({}, {"verify": False}):
        assert f"{weights}: {len(second) - 1} bytes" in export(workdir, target, **training)
    weights.write_bytes(second[:-1] + bytes([second[-1] ^ 1]))  # one bit: by its checksum
    assert f"{weights}: checksum" in export(workdir, target)
    assert export(workdir, target, verify=False) == "iter_0000002"
    weights.unlink()
    assert export(workdir, target) == "iter_0000002" and weights.read_bytes() == second

    # A file of the user stays where nothing is to be replaced, and is named where something is.
    (output / "notes.md").write_text("mine")
    assert export(workdir, target) == "iter_0000002"
    set_latest(workdir, 1)
    message = export(workdir, target)
    assert "notes.md" in message and "export.path" in message and len(message) <= 600
    assert weights.read_bytes() == second and (output / "notes.md").read_text() == "mine"
    (output / "notes.md").unlink()

    # A damaged checkpoint costs no export that is there.
    damaged = workdir / "training/checkpoints/iter_0000001/__0_0.distcp"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert f"{damaged}: checksum" in export(workdir, target) and weights.read_bytes() == second
    damaged.write_bytes(content)
    assert export(workdir, target) == "iter_0000001" and weights.read_bytes() != second
    assert json.loads((output / "fusion.json").read_text())["facts"]["iteration"] == 1

    # An export of a version that did not record its files
    record = json.loads((output / "fusion.json").read_text())
    (output / "fusion.json").write_text(
        json.dumps({key: record[key] for key in ("checkpoint", "facts", "dtype")})
    )
    assert "older version" in export(workdir, target)
    assert sorted(path.name for path in workdir.iterdir()) == ["export", "training"]


def test_an_export_is_made_once_and_again_where_its_files_are_gone(ranks, run) -> None:  # type: ignore[no-untyped-def]
    ranks(1, story, *run)


def another_template(workdir: Path, target: Path, template: Path) -> None:
    """The same checkpoint for another chat template, which the exported tokenizer has."""
    from megatron_fuse.runtime import start_runtime
    from megatron_fuse.training import export as module

    start_runtime()
    recipe = make_tiny_recipe(workdir, target)
    recipe = recipe.model_copy(
        update={"target": recipe.target.model_copy(update={"chat_template": str(template)})}
    )
    for text in (TEMPLATES["alpaca"], TEMPLATES["alpaca"].replace("###", "##")):
        template.write_text(text)
        output, _ = module.export_fused_model(recipe)
        assert (output / "chat_template.jinja").read_text() == text


def test_another_chat_template_is_another_export(ranks, run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    ranks(1, another_template, *run, tmp_path / "template.jinja")


def ends_of(workdir: Path, target: Path) -> list[str]:
    """In a rank: what an export says of the ends of answers."""
    from megatron_fuse.runtime import start_runtime
    from megatron_fuse.training.export import export_fused_model

    start_runtime()
    with logged() as text:
        export_fused_model(make_tiny_recipe(workdir, target))
    return [line for line in text.getvalue().splitlines() if "answers end" in line]


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        # A base model with its own EOS.
        ({"eos_token_id": 0, "top_k": 5}, {}, {"eos_token_id": [0, 2], "top_k": 5}),
        ({"eos_token_id": [0, 1]}, {}, {"eos_token_id": [0, 1, 2]}),
        ({"top_k": 5}, {"eos_token_id": 0}, {"eos_token_id": [0, 2], "top_k": 5}),
        (None, {"eos_token_id": 0, "bos_token_id": 1}, {"eos_token_id": [0, 2], "bos_token_id": 1}),
        ({"eos_token_id": [2, 0]}, {"eos_token_id": 0}, None),
        (None, {"eos_token_id": 2}, None),
    ],
)
def test_an_export_ends_answers_where_the_training_did(  # type: ignore[no-untyped-def]
    ranks, run, tmp_path: Path, generation: dict | None, config: dict, expected: dict | None
) -> None:
    workdir, trained_from = run
    target = shutil.copytree(trained_from, tmp_path / "target")
    path, written = target / "generation_config.json", workdir / "export/generation_config.json"
    path.unlink(missing_ok=True)
    if generation is not None:
        path.write_text(json.dumps(generation))
    known = json.loads((target / "config.json").read_text())
    known = {
        key: value
        for key, value in known.items()
        if key not in ("eos_token_id", "bos_token_id", "pad_token_id")
    }
    (target / "config.json").write_text(json.dumps(known | config))
    said = ranks(1, ends_of, workdir, target)[0]
    if expected is None:
        assert said == [] and written.exists() == path.exists()
        assert not path.exists() or written.read_bytes() == path.read_bytes()
    else:
        assert json.loads(written.read_text()) == expected
        assert said == ["generation_config.json: answers end at '<|im_end|>' (2) as well"]


def import_again(target: Path, output: Path) -> str:
    from megatron_fuse.errors import UserError
    from megatron_fuse.runtime import start_runtime

    start_runtime()
    from megatron_fuse.training.target import import_hugging_face

    try:
        import_hugging_face(target, output)
    except UserError as error:
        return str(error)
    return "imported"


def test_importing_weights_where_a_run_has_its_checkpoints_is_refused(ranks, run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    directory = run[0] / "training/checkpoints"
    before = sorted(os.listdir(directory))
    (message,) = ranks(1, import_again, run[1], directory)
    assert f"{directory} already holds checkpoints (iter_0000002)" in message
    assert sorted(os.listdir(directory)) == before
    assert (directory / "latest_checkpointed_iteration.txt").read_text() == "2\n"
    assert ranks(1, import_again, run[1], tmp_path / "new") == ["imported"]
