"""Commands that make no artifact in shards: reports, evaluations, experiments."""

import re
from pathlib import Path

import yaml
from jobs import Server, run_tool
from stages import recipe_target
from targets import Target

_IMPORTED = (
    "megatron_fuse.pipeline",
    "megatron_fuse.evaluation",
    "lm_eval.models.huggingface",
    "lm_eval.tasks",
    "transformers.models.llama.modeling_llama",
    "transformers.models.gpt_neox.modeling_gpt_neox",
    "matplotlib.pyplot",
)
# A measurement that takes some time; what it finds depends on model and seed alone.
_MEASURE = """
import json, sys, time
from pathlib import Path
model, output, split, seed = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
time.sleep(0.05)
output.write_text(json.dumps({"right": {"value": len(model.name) + seed, "n": 50}}))
"""


def report_targets(server: Server, root: Path) -> dict[str, Target]:
    """Both reports on the fusion data of stage_targets."""
    targets = {}
    for name in ("advantage", "alignment"):
        target = recipe_target(server, root, "report", [name], f"reports/{name}")
        target.name, target.ranked = f"report {name}", False
        targets[target.name] = target.learn()
    return targets


def start_evaluation_server(root: Path) -> Server:
    """A process that has imported lm-evaluation-harness, and has made two models and questions."""
    return Server(_IMPORTED, _prepare, root)


def _prepare(root: Path) -> None:
    from small_questions import small_model, write_questions

    from megatron_fuse.evaluation.harness import make_task_manager

    write_questions(root / "questions")
    small_model(root / "alpha", "llama", 1)
    small_model(root / "beta", "gpt_neox", 2)
    make_task_manager(root / "questions")


def evaluation_target(server: Server, root: Path) -> Target:
    """Two models on two tasks, two questions each."""
    under, scratch = root / "work", root / "scratch"
    for directory in (under, scratch):
        directory.mkdir()
    models = [f"{name}={root / name}" for name in ("alpha", "beta")]
    words = [
        *models,
        "--tasks",
        "winogrande",
        "truthfulqa_mc2",
        "--limit",
        "2",
        "--data",
        str(root / "questions"),
    ]
    arguments = ("evaluate", [*words, "--output", str(under / "results")])
    target = Target("evaluate", run_tool, arguments, under / "results", under, scratch, server, ranked=False)
    target.normal = _without_times
    return target.learn()


def run_experiments(path: Path) -> None:
    """Without the libraries that commands usually find imported: the measurements of this one need none."""
    import megatron_fuse.experiments.fork_server

    megatron_fuse.experiments.fork_server.LIBRARIES = ()
    run_tool("run_experiments", [str(path)])


def experiment_target(server: Server, root: Path) -> Target:
    """Two models with two seeds, measured two at a time."""
    under, scratch = root / "work", root / "scratch"
    for directory in (under, scratch, root / "a", root / "bb"):
        directory.mkdir(parents=True)
    (root / "measure.py").write_text(_MEASURE)
    (root / "data.jsonl").write_text('{"instruction": "Why?", "output": "Because."}\n')
    recipe = {
        "workdir": str(root),
        "target": {"model": str(root / "a")},
        "sources": {"one": {"model": str(root / "a")}},
        "data": {"path": str(root / "data.jsonl")},
        "schedule": {"preset": "fuse"},
        "training": {"seq_length": 128},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    content = {
        "recipe": str(root / "recipe.yaml"),
        "workdir": str(under / "experiment"),
        "results": str(under / "experiment/results.csv"),
        "seeds": [1, 2],
        "evaluate": f"python {root / 'measure.py'} {{model}} {{output}} {{split}} {{seed}}",
        "metrics": {"right": "right %"},
        "models": {name: str(root / name) for name in ("a", "bb")},
        "variants": {"never": {}},
        "tables": {"main": {"title": "All", "rows": ["a", "bb"], "baseline": "a"}},
    }
    (root / "experiment.yaml").write_text(yaml.safe_dump(content))
    arguments = (root / "experiment.yaml",)
    target = Target(
        "run_experiments", run_experiments, arguments, under / "experiment", under, scratch, server
    )
    target.ranked, target.normal = False, _without_times
    return target.learn()


def _without_times(name: str, content: bytes) -> bytes | None:
    """Files without dates and seconds; no log, to which every try appends, and no lock."""
    if Path(name).name in ("log.txt", "lock"):
        return None
    content = re.sub(rb"\d{4}-\d\d-\d\d", b"DATE", content)
    return re.sub(rb'("seconds": )[\d.e-]+', rb"\1TIME", content)
