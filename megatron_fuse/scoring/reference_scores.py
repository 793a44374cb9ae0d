"""The second part of the scores stage: how close the sources' answers are to the ground truth.

    scores/NAME/reference/shard-00000.npy    float32 [examples of the shard, 3]: BLEU, ROUGE-L, BERTScore,
                                             each from 0 to 1

The three measures are stored separately. Their weights (`reference` in the recipe) apply when a later stage
uses them, so that other weights need no new run. A row of NaN marks an empty answer. A column of NaN for
BERTScore, and a note in the manifest, say that no model was given for it.
"""

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from megatron_fuse.chat.thoughts import split_thought
from megatron_fuse.errors import UserError
from megatron_fuse.huggingface.fingerprints import WEIGHT_SUFFIXES, model_fingerprint
from megatron_fuse.huggingface.resolving import resolve_model
from megatron_fuse.instructions import INSTRUCTIONS, example_shards, shard_sizes
from megatron_fuse.model.parameter_count import count_parameters
from megatron_fuse.recipe import REFERENCE, Recipe, ReferenceOptions
from megatron_fuse.responses import RESPONSES, response_shards
from megatron_fuse.scoring.reference import reference_measures, used_weights
from megatron_fuse.scoring.scores import COMMAND, NAME, read_shards, save_shard
from megatron_fuse.stages import Amounts, Context, Key, Stage
from megatron_fuse.storage import Artifact, ShardProgress, Workspace, run_plans, sha256_of_parts

_PACKAGES = ("sacrebleu", "rouge-score")
_WITHOUT_BERTSCORE = "left out: there is no bertscore_model, and the other weights are brought to 1"


def _options(recipe: Recipe, _: str) -> dict[str, Any]:
    used_weights(recipe.reference)  # refuses a missing model, unless the recipe allows to go without
    with_model = recipe.reference.bertscore_model is not None
    return {"bertscore": {"layer": recipe.reference.bertscore_layer} if with_model else _WITHOUT_BERTSCORE}


def _origin(context: Context, _: str) -> dict[str, str]:
    """The fingerprints of BERTScore's encoder and of its tokenizer. Empty without BERTScore."""
    model = context.recipe.reference.bertscore_model
    if not model:
        return {}
    directory = resolve_model(model, "reference.bertscore_model")
    return {
        "bertscore model": context.once("bertscore model", model, lambda: model_fingerprint(directory)),
        "bertscore tokenizer": context.once("bertscore tokenizer", model, lambda: _small_files(directory)),
    }


def _flops(context: Context, amounts: Amounts, _: str) -> float:
    """BERTScore's encoder reads every answer, and the ground truth as well."""
    model = context.recipe.reference.bertscore_model
    if not model:
        return 0.0
    encoder = resolve_model(model, "reference.bertscore_model")
    return 2 * count_parameters(encoder) * (amounts.answer_tokens + amounts.response_tokens)


def _keys(recipe: Recipe) -> list[Key]:
    return [(name,) for name, scorers in recipe.scorers.items() if REFERENCE in scorers]


REFERENCE_SCORES = Stage(
    name=NAME,
    recorded_as="scores",
    command=COMMAND + " --source {} --reference",
    keys=_keys,
    directory=lambda recipe, source: Workspace(recipe.workdir).scores(source, REFERENCE),
    options=_options,
    parents=lambda _, source: {"responses": (RESPONSES, (source,))},
    origin=_origin,
    packages=lambda recipe, _: {"packages": _package_versions(recipe.reference)},
    flops=_flops,
)


def require_measures(options: ReferenceOptions) -> None:
    """Raises UserError if the score cannot be computed:
    a package is not installed, or BERTScore has no model."""
    used_weights(options)
    _package_versions(options)


def _package_versions(options: ReferenceOptions) -> dict[str, str]:
    names = (*_PACKAGES, "bert-score") if options.bertscore_model else _PACKAGES
    try:
        return {name: version(name) for name in names}
    except PackageNotFoundError as error:
        raise UserError(
            f"{error.name} is not installed. Run pip install 'megatron-fuse[reference]'."
        ) from error


def _small_files(directory: Path) -> str:
    """sha256 of all files of a model directory but its weights. They hold the tokenizer, in whatever form."""
    files = [
        path for path in sorted(directory.iterdir()) if path.is_file() and path.suffix not in WEIGHT_SUFFIXES
    ]
    return sha256_of_parts(*(part for path in files for part in (path.name.encode(), path.read_bytes())))


def score_against_reference(context: Context, sources: Sequence[str] | None = None) -> list[Artifact]:
    """Compares the answers of these sources (default: all) with the ground truth.

    Returns the finished artifacts.
    """
    recipe, instructions = context.recipe, context.open(INSTRUCTIONS)
    examples = example_shards(instructions)
    progress = ShardProgress("reference scores", "answers", shard_sizes(instructions))
    sources = list(recipe.sources if sources is None else sources)
    answers = {source: response_shards(context.open(RESPONSES, source)) for source in sources}
    plans = {source: context.plan(REFERENCE_SCORES, source) for source in sources}

    def make_shards(index: int, prefixes: dict[str, Path]) -> dict[str, dict[str, int]]:
        # Thoughts take no part in the comparison.
        # Those that a model wrote before its answer are stored separately already.
        references = [split_thought(example.response)[1] for example in examples[index]]
        counts = {}
        for source, prefix in prefixes.items():
            responses = [split_thought(response.response)[1] for response in answers[source][index]]
            counts[source] = save_shard(prefix, reference_measures(recipe.reference, responses, references))
        return counts

    return list(run_plans(plans, make_shards, progress).values())


def load_reference_scores(context: Context, source: str) -> np.ndarray:
    """The measures float32 [examples, 3].

    Raises UserError if they are missing or were made by other options.
    """
    return read_shards(context.open(REFERENCE_SCORES, source))
