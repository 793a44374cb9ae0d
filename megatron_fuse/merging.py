"""Merging: models of one architecture become one by arithmetic on their weights, without data and without
training.

These are the baselines of the paper's Table 3. mergekit does the arithmetic, tensor by tensor and in fp32
(docs/merging.md has the formulae). This module checks that the models can be merged. It sets every parameter
of mergekit, because the defaults differ between versions. It writes the result as a Hugging Face directory,
whole or not at all.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_fuse.errors import UserError
from megatron_fuse.huggingface.fingerprints import model_fingerprint
from megatron_fuse.huggingface.resolving import resolve_model
from megatron_fuse.merge_options import DEFAULTS, METHODS, RESCALES, ROWS, Merge
from megatron_fuse.model.carried_files import write_beside_weights
from megatron_fuse.model.config_file import load_config
from megatron_fuse.model.expected_weights import refuse_non_finite
from megatron_fuse.model.weight_files import DTYPES, WeightFiles, common_dtype, write_weight_files
from megatron_fuse.storage.recorded_directory import directory_then_rename, find, record_files, sole_writer
from megatron_fuse.storage.records import quoted
from megatron_fuse.tokenization import load_tokenizer

logger = logging.getLogger(__name__)

RECORD = "merge.json"  # in the merged model's directory: what it was made from, and its files
SHARD_BYTES = 5_000_000_000
# Keys of a config that do not change what the weights compute. Ids of special tokens are compared with the
# tokenizer.
_NOT_COMPARED = {
    *(
        "_name_or_path",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "use_cache",
        "pretraining_tp",
        "initializer_range",
    ),
    *("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "id2label", "label2id"),
}


def read_models(named: Sequence[str]) -> tuple[tuple[Path, ...], tuple[float, ...] | None]:
    """Directories and weights of models given as DIR or DIR:WEIGHT.

    DIR may also be a name in the local Hugging Face cache. The weights are None if no model has one. Raises
    UserError if only some models have a weight, or if DIR holds no model.
    """
    directories, weights = [], []
    for text in named:
        directory, colon, weight = text.rpartition(":")
        try:
            number = float(weight) if colon and not Path(text).is_dir() else None
        except ValueError:
            number = None
        directories.append(resolve_model(text if number is None else directory, "--model"))
        weights.append(number)
    given = tuple(weight for weight in weights if weight is not None)
    if given and len(given) < len(weights):
        raise UserError(
            f"--model: {len(given)} of {len(weights)} models have a weight. Give a weight to all models "
            "(DIR:WEIGHT) or to none."
        )
    return tuple(directories), given or None


def merge_models(merge: Merge, output: Path) -> bool:
    """Writes the merged model to `output`, with the tokenizer, chat template and config of the first model.

    Returns True if it wrote the model, False if `output` already holds this merge with unchanged files. If
    files of it are missing, it is made again. If a file was changed, a UserError names it. Memory holds one
    tensor of every model and one shard of the result.

    Raises UserError before anything is computed: for options that do not fit the method, models that do not
    fit each other, something else in the place of the output, or a missing mergekit.
    """
    merge = _complete(merge)
    merge_tensors = _mergekit()
    directories = [*merge.models, *([merge.base] if merge.base else [])]
    inputs = [WeightFiles(directory) for directory in directories]
    shapes = _common_shapes(inputs, merge.rows)
    stored = common_dtype(weights.dtype(name) for weights in inputs for name in shapes)
    dtype = merge.dtype or stored
    merge = replace(merge, dtype=dtype)
    record = _record(merge)
    merged_tensor = _MergedTensor(merge, inputs, shapes, merge_tensors, dtype)

    with sole_writer(output, RECORD):
        previous = find(output, RECORD, "--output")
        if previous:
            _check_same_merge(output, previous.origin, record)
            if previous.whole:
                return False
            previous.refuse_changes("--output")
        with directory_then_rename(output, previous) as temporary:
            if dtype not in (stored, "fp32"):
                logger.warning(
                    f"{stored} weights are written as {dtype}, which rounds them: --dtype {stored} keeps them"
                )
            write_weight_files(temporary, shapes, merged_tensor, DTYPES[dtype], SHARD_BYTES)
            write_beside_weights(merge.models[0], temporary, dtype)
            record_files(temporary, RECORD, record)
    return True


def _complete(merge: Merge) -> Merge:
    """The merge with every option of its method set.

    Raises UserError for a value that is not allowed, or for an option that the method does not use.
    """
    if merge.method not in METHODS:
        raise UserError(f"--method is {merge.method!r}. Choose one of {', '.join(METHODS)}.")
    if merge.rows not in (None, *ROWS):
        raise UserError(f"--rows is {merge.rows!r}. Set it to {' or '.join(ROWS)}, or remove it.")
    if merge.dtype not in (None, *DTYPES):
        raise UserError(f"--dtype is {merge.dtype!r}. Choose one of {', '.join(DTYPES)}.")
    method, count = METHODS[merge.method], len(merge.models)
    for option in ("weights", "base", "t", "density", "rescale", "seed"):
        if getattr(merge, option) is not None and option not in method.options:
            said = "a weight in --model" if option == "weights" else f"--{option}"
            raise UserError(f"--method {merge.method} does not use {said}. Remove it.")
    if "base" in method.options and merge.base is None:
        raise UserError(
            f"--method {merge.method} merges differences to a base model, but there is no --base. Name the "
            "base model with --base."
        )
    if count < method.least or count > (method.most or count):
        wanted = f"exactly {method.least}" if method.most else f"at least {method.least}"
        raise UserError(f"--method {merge.method} merges {wanted} models, but --model names {count}")
    values: dict[str, Any] = {option: DEFAULTS[option] for option in method.options if option in DEFAULTS}
    if "weights" in method.options:
        values["weights"] = (1 / count,) * count
    merge = replace(merge, **{key: value for key, value in values.items() if getattr(merge, key) is None})
    if merge.weights is not None and not all(1e-6 <= weight <= 1e6 for weight in merge.weights):
        raise UserError(
            f"the weights of the models are {', '.join(map(str, merge.weights))}, but must be from 1e-6 to "
            "1e6"
        )
    if merge.density is not None and not 1e-6 <= merge.density <= 1:
        raise UserError(
            f"--density is {merge.density}, but the share of entries that is kept must be from 1e-6 to 1"
        )
    if merge.t is not None and not 0 <= merge.t <= 1:
        raise UserError(f"--t is {merge.t}, but must be from 0 (the first model) to 1 (the second model)")
    if merge.rescale is not None and merge.rescale not in RESCALES:
        raise UserError(f"--rescale is {merge.rescale!r}. Choose one of {', '.join(RESCALES)}.")
    return merge


@dataclass(frozen=True)
class _MergedTensor:
    """Reads the tensors of one name from all models and merges them."""

    merge: Merge  # with every option set
    inputs: list[WeightFiles]  # of the models, then of the base
    shapes: dict[str, tuple[int, ...]]  # of the result
    merge_tensors: Callable[..., Tensor]  # mergekit's
    dtype: str  # of the result

    def __call__(self, name: str) -> Tensor:
        merge, out_dtype = self.merge, DTYPES[self.dtype]
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(_tensor_seed(merge.seed or 0, name))
            common = min(weights.shape(name)[0] for weights in self.inputs)
            tensors = [weights.read(name, 0, 0, common) for weights in self.inputs]
            for weights, tensor in zip(self.inputs, tensors, strict=True):
                refuse_non_finite(tensor, weights.place(name))
            tensor = self.merge_tensors(
                tensors,
                merge.method,
                parameters=_mergekit_parameters(merge),
                base_index={"slerp": 0, "linear": None}.get(merge.method, len(merge.models)),
                name=name,
                dtype=torch.float32,
                out_dtype=out_dtype,
            )
            # Appended after the merge, because slerp, ties and dare compute with the norm or the ranks of a
            # whole tensor.
            if further := self.shapes[name][0] - common:
                tensor = torch.cat([tensor, self.inputs[0].read(name, 0, common, further).to(out_dtype)])
            refuse_non_finite(tensor, f"{name} of the merge, in {self.dtype},")
        return tensor.contiguous()


def _mergekit_parameters(merge: Merge) -> dict[str, Any]:
    """Every parameter under mergekit's name, so that none depends on the defaults of the installed version.

    When the paper was written, mergekit's `rescale` multiplied by 1/density. Today it restores the L1 norm.
    Today's `lambda` expresses the earlier rule: it is one factor on the merged difference, and neither the
    signs nor the choice of entries depend on it.
    """
    if merge.method == "slerp":
        return {"t": merge.t}
    weights = dict(enumerate(merge.weights or ()))
    if merge.method == "linear":
        return {"weight": weights, "normalize": True}
    task_vectors = {"weight": weights, "density": merge.density, "int8_mask": False}
    if merge.method == "ties":
        return {**task_vectors, "normalize": True, "rescale": False, "lambda": 1.0}
    by_density = merge.rescale == "density"
    factor = 1 / merge.density if by_density and merge.density else 1.0
    return {**task_vectors, "normalize": False, "rescale": not by_density, "lambda": factor}


def _mergekit() -> Callable[..., Tensor]:
    try:
        from mergekit.merge_methods import merge_tensors
    except ImportError as error:
        raise UserError(
            f"merging needs mergekit 0.1.5 or newer ({error}). Run pip install 'megatron-fuse[merge]'."
        ) from error
    return merge_tensors


def _tensor_seed(seed: int, name: str) -> int:
    """A seed for one tensor.

    The entries that DARE drops from it then do not depend on the other tensors or their order.
    """
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little", signed=True)


def _common_shapes(inputs: list[WeightFiles], rows: str | None) -> dict[str, tuple[int, ...]]:
    """Name and shape of the tensors that are merged.

    Raises UserError if configs, tokenizers or tensors do not agree. If `rows` is given, the vocabularies may
    differ in size. Then only the rows that both models have are compared, and the shapes are those of the
    first model.
    """
    first, *others = inputs
    config, shapes = _config(first.model_dir), _shapes(first)
    size = config.get("vocab_size")
    tokens = _tokens(first.model_dir, size)
    for other in others:
        their_config, their_shapes = _config(other.model_dir), _shapes(other)
        their_size = their_config.get("vocab_size")
        their_tokens = _tokens(other.model_dir, their_size)
        ours, theirs = tokens, their_tokens
        if isinstance(size, int) and isinstance(their_size, int) and size != their_size:
            if rows is None:
                raise _other_rows(
                    (first.model_dir, size, tokens), (other.model_dir, their_size, their_tokens)
                )
            logger.warning(
                f"{other.model_dir}: its rows from {size} on, of {their_size}, are cut"
                if their_size > size
                else f"{other.model_dir}: the rows that it lacks, {their_size} to {size - 1}, are those of "
                f"{first.model_dir}"
            )
            least = min(size, their_size)
            ours, theirs = (
                {token: text for token, text in each.items() if token < least} for each in (tokens, theirs)
            )
            their_config["vocab_size"] = size
            their_shapes = {
                name: (size, *shape[1:])
                if (shapes.get(name, ())[:1], shape[0]) == ((size,), their_size)
                else shape
                for name, shape in their_shapes.items()
            }
        _compare("config.json", config, their_config, first, other)
        _compare("the tokenizer", ours, theirs, first, other)
        _compare("the shapes of tensors", shapes, their_shapes, first, other)
    return shapes


_Vocabulary = tuple[Path, int, Mapping[int, str | bytes]]  # a model's directory, rows and tokens


def _other_rows(ours: _Vocabulary, theirs: _Vocabulary) -> UserError:
    """The error for vocabularies of different size.

    It says what the further rows stand for, and what --rows does with them.
    """
    (_, fewer, _), (longer, more, tokens) = sorted((ours, theirs), key=lambda each: each[1])
    lie = "row lies" if more - fewer == 1 else "rows lie"
    further = [token for token in sorted(tokens) if token >= fewer]
    if further:
        shown = ", ".join(quoted(tokens[token]) for token in further[:3]) + ", ..." * (len(further) > 3)
        meaning = (
            f"{len(further)} of the {more - fewer} extra rows of {longer} are for tokens that the other "
            f"model does not have ({shown})"
        )
    else:
        meaning = (
            f"the {more - fewer} extra {lie} beyond the {len(tokens)} tokens of the tokenizer of {longer}. "
            "No text uses them, so they can be cut"
        )
    does = "leaves them out" if longer == theirs[0] else "keeps them as they are in that model"
    return UserError(
        f"{ours[0]} and {theirs[0]} have vocabularies of {ours[1]} and {theirs[1]} rows: {meaning}. Set "
        f"--rows first to merge the rows of the first model: it {does}."
    )


def _compare(
    what: str, ours: Mapping[Any, Any], theirs: Mapping[Any, Any], first: WeightFiles, other: WeightFiles
) -> None:
    for key in [*ours, *(key for key in theirs if key not in ours)]:
        if ours.get(key) != theirs.get(key):
            raise UserError(
                f"{first.model_dir} and {other.model_dir} cannot be merged: they differ in {what}, at {key}: "
                f"{quoted(ours.get(key))} and {quoted(theirs.get(key))}. Choose models that were trained "
                "from one base."
            )


def _config(model_dir: Path) -> dict[str, Any]:
    """The keys of a config that decide what the weights compute, with defaults filled in.

    The model class comes first.
    """
    config = load_config(model_dir).to_dict()
    order = sorted(config, key=lambda key: (key not in ("architectures", "model_type", "vocab_size"), key))
    return {key: config[key] for key in order if key not in _NOT_COMPARED}


def _tokens(model_dir: Path, rows: int | None) -> dict[int, str | bytes]:
    """Token id -> what its row of the embedding stands for.

    That is the text of a special or added token, else the token's bytes.
    """
    tokenizer = load_tokenizer(model_dir)
    known = range(min(rows or tokenizer.vocab_size, tokenizer.vocab_size))
    return {token: tokenizer.token_text(token) or tokenizer.token_bytes[token] for token in known}


def _shapes(weights: WeightFiles) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the learned tensors, in the file's order.

    Left out are the rotary frequencies and the scalars of old attention masks, which older checkpoints hold.
    They follow from the config, and some Llama-2 models have them while others do not.
    """
    shapes = {
        name: weights.shape(name) for name in weights.file_of if not name.endswith("rotary_emb.inv_freq")
    }
    shapes = {name: shape for name, shape in shapes.items() if shape}
    for name in shapes:
        dtype = weights.dtype(name)
        if dtype not in DTYPES:
            raise UserError(
                f"{weights.model_dir}: {name} is {dtype}, but only weights of fp32, bf16 or fp16 can be "
                "merged. Load the model with transformers, dequantise it and save it again."
            )
    return shapes


def _record(merge: Merge) -> dict[str, Any]:
    models = [*merge.models, *([merge.base] if merge.base else [])]
    options = {
        key: value
        for key, value in asdict(merge).items()
        if value is not None and key not in ("models", "base")
    }
    return {
        **options,
        "weights": list(merge.weights) if merge.weights else None,
        "models": [str(model) for model in merge.models],
        "base": str(merge.base) if merge.base else None,
        "fingerprints": [model_fingerprint(model) for model in models],  # of the models, then of the base
        "tokenizer": load_tokenizer(merge.models[0]).sha256,
        "mergekit": version("mergekit"),
    }


def _check_same_merge(output: Path, recorded: dict[str, Any], record: dict[str, Any]) -> None:
    """Raises UserError unless `output` holds the merge of this record.

    Models may have moved; their fingerprints stay.
    """
    for key, value in record.items():
        if key not in ("models", "base") and recorded.get(key) != value:
            raise UserError(
                f"--output: {output} holds another merge: {key} is {recorded.get(key)!r} there, but "
                f"{value!r} here. Remove it or choose another directory."
            )
