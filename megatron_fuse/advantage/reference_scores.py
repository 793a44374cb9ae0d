"""The scores stage's other half: how close everyone's answers come to the ground truth.

    scores/NAME/reference/shard-00000.npy    float32 [examples of the shard, 3]: BLEU, ROUGE-L, BERTScore, each from 0 to 1

The measures are stored apart: what they weigh is decided where they are used (`reference` in the recipe), and other weights need
no new run. A row of NaN marks an empty answer; a column of NaN for BERTScore says that no model was named for it, as does the
manifest.
"""

from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from megatron_fuse.advantage.reference import reference_measures, used_weights
from megatron_fuse.advantage.scores import COMMAND, STAGE, open_answers, read_shards, save_shard
from megatron_fuse.errors import UserError
from megatron_fuse.instructions import example_shards, require_instructions
from megatron_fuse.recipe import REFERENCE, Recipe, ReferenceOptions
from megatron_fuse.responses import open_responses
from megatron_fuse.sources.huggingface import WEIGHT_SUFFIXES, model_fingerprint, resolve_model
from megatron_fuse.storage import Artefact, Plan, Workspace, open_artefact, run_plans, sha256_of_bytes
from megatron_fuse.text_safety import say
from megatron_fuse.thoughts import split_thought

_PACKAGES = ("sacrebleu", "rouge-score")
_WITHOUT_BERTSCORE = "left out: there is no bertscore_model, and the other weights are brought to 1"


def _basis(recipe: Recipe, source: str) -> tuple[dict[str, Any], dict[str, str]]:
    """(options, inputs) of the measures, all but the packages' versions and BERTScore's encoder."""
    used_weights(recipe.reference)  # refuses a missing model, unless the recipe allows to go without
    with_model = recipe.reference.bertscore_model is not None
    bertscore = {"layer": recipe.reference.bertscore_layer} if with_model else _WITHOUT_BERTSCORE
    return {"bertscore": bertscore}, {"responses": open_responses(recipe, source).sha256}


def plan_reference_scores(recipe: Recipe, source: str) -> Plan:
    """What the measures of one source's answers depend on. The answers must be there."""
    options, inputs = _basis(recipe, source)
    model = recipe.reference.bertscore_model
    options["packages"] = _package_versions(recipe.reference)
    if model:
        directory = resolve_model(model, "reference.bertscore_model")
        inputs |= {"bertscore model": model_fingerprint(directory), "bertscore tokenizer": _small_files(directory)}
    directory = Workspace(recipe.workdir).scores(source, REFERENCE)
    return Plan(directory, STAGE, options, inputs, open_responses(recipe, source).manifest["shards"])


def require_measures(options: ReferenceOptions) -> None:
    """Raises UserError where the score cannot be made: a package is not installed, or BERTScore has no model."""
    used_weights(options)
    _package_versions(options)


def _package_versions(options: ReferenceOptions) -> dict[str, str]:
    names = (*_PACKAGES, "bert-score") if options.bertscore_model else _PACKAGES
    try:
        return {name: version(name) for name in names}
    except PackageNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install 'megatron-fuse[reference]'") from error


def _small_files(directory: Path) -> str:
    """sha256 of a model directory's files without its weights: its tokenizer, in whatever form."""
    files = [path for path in sorted(directory.iterdir()) if path.is_file() and path.suffix not in WEIGHT_SUFFIXES]
    return sha256_of_bytes(*(part for path in files for part in (path.name.encode(), path.read_bytes())))


def score_against_reference(
    recipe: Recipe, sources: Sequence[str] | None = None, progress: Callable[[str], None] = say
) -> list[Artefact]:
    """Compares the answers of these sources (default: all) with the ground truth. Returns the finished artefacts."""
    examples = example_shards(require_instructions(recipe))
    sources = list(recipe.sources if sources is None else sources)
    answers = {source: open_answers(recipe, source) for source in sources}
    plans = {source: plan_reference_scores(recipe, source) for source in sources}

    def make_shards(index: int, prefixes: dict[str, Path]) -> dict[str, dict[str, int]]:
        # Answers are compared without thoughts: those that a model wrote before its own are kept apart already.
        references = [split_thought(example.response)[1] for example in examples[index]]
        counts = {}
        for source, prefix in prefixes.items():
            responses = [split_thought(response.response)[1] for response in answers[source][index]]
            counts[source] = save_shard(prefix, reference_measures(recipe.reference, responses, references, progress))
        return counts

    return list(run_plans(plans, make_shards, progress).values())


def load_reference_scores(recipe: Recipe, source: str) -> np.ndarray:
    """float32 [examples, 3]. Raises UserError where they are missing or were made otherwise."""
    options, inputs = _basis(recipe, source)
    directory = Workspace(recipe.workdir).scores(source, REFERENCE)
    command = f"{COMMAND} --source {source} --reference"
    return read_shards(open_artefact(directory, STAGE, command, options=options, inputs=inputs))
