"""From files to a RewardModel: a decoder's body and head by the tensors' names,
an encoder by transformers itself.

A decoder is read without the class of its publisher. For two of the three forms that class is code that comes
with the model or with its model card, and it holds nothing but body and head. Other tensors of a checkpoint
are refused unless they are known to take no part in the reward.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoModelForSequenceClassification
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging as transformers_logging

from megatron_fuse.errors import UserError
from megatron_fuse.huggingface.bars import without_bars
from megatron_fuse.huggingface.loading import load_model, this_device
from megatron_fuse.huggingface.loading_checks import check_layers, check_size, sizes
from megatron_fuse.huggingface.reward_models import (
    FORMS,
    RewardModelFiles,
    find_reward_model,
    load_reward_model_format,
)
from megatron_fuse.model.config_file import check_model_directory, load_config, reason
from megatron_fuse.model.expected_weights import refuse_non_finite
from megatron_fuse.model.weight_files import DTYPES, WeightFiles
from megatron_fuse.own_code import not_loadable
from megatron_fuse.recipe import RewardModelOptions
from megatron_fuse.scoring.reward_models.reward_model import RewardModel
from megatron_fuse.text_safety import brief

# Left from the language model that the body was made from.
_OUTPUT_LAYERS = ("lm_head.weight", "embed_out.weight")
_MEND = "Name a complete reward model, and name the model that it was trained from with the key `body`."


def load_reward_model(options: RewardModelOptions, name: str) -> RewardModel:
    """Loads a reward model of the recipe onto this process's device.

    Raises UserError, which names file and tensor, unless its files hold a whole body, one head [1, h] and no
    other tensor that could matter.
    """
    where = f"reward_models.{name}"
    files = find_reward_model(options, name)
    if not options.trust_remote_code:
        load_config(files.body)  # first, because the errors of the tokenizer's library name no key
    chat = load_reward_model_format(options, name)
    form = FORMS[files.form]
    causal = files.form != "classifier" or form.head in WeightFiles(files.weights).file_of
    backbone: nn.Module
    head: nn.Module
    if causal:
        backbone, head = _load_decoder(files, DTYPES[options.dtype], where)
    else:
        backbone, head = _load_encoder(options, files, where), nn.Identity()
    return RewardModel(name, backbone.to(this_device()), head.to(this_device()), chat, form.stop, causal)


def _load_decoder(files: RewardModelFiles, dtype: torch.dtype, where: str) -> tuple[nn.Module, nn.Linear]:
    """The body in dtype, and the head in fp32. Each tensor is converted when it is read."""
    weights, head_name = WeightFiles(files.weights), FORMS[files.form].head
    stated = check_model_directory(files.body)
    weights.open_all()
    check_layers(stated, weights, files.body, f"{where}.model")
    config = load_config(files.body)
    try:
        # Transformers annotates its mappings as those of tokenizers.
        body_class: Any = MODEL_MAPPING[type(config)]
        with torch.device("meta"):
            empty = body_class(config)
    except Exception as error:  # transformers raises many kinds for unknown or impossible configs
        raise UserError(
            f"{where}: transformers cannot make a model from {files.body / 'config.json'} ({sizes(config)}): "
            f"{reason(error, config)}"
        ) from error
    check_size(empty, config, weights, files.body, f"{where}.model")
    head = _load_head(weights, head_name, getattr(config, "hidden_size", None), where)
    (prefix, names), *copies = _bodies(weights, head_name, _embedding_name(empty), where).items()
    for copy, copied in copies:
        _refuse_another(weights, prefix, copy, copied, where)
    for name, _ in empty.named_parameters():
        if prefix + name in weights.file_of:
            _refuse_unusable(weights, prefix + name, where)
    # A scalar is no weight but a constant of old attention masks, which transformers no longer reads. Tensors
    # are copied even if their dtype is right already: a tensor in the mapped file may lie at an unaligned
    # address, where the CPU's kernels round differently.
    read = [name for name in names if weights.shape(prefix + name)]
    tensors = {name: _read(weights, prefix + name).to(dtype, copy=True) for name in read}
    try:
        with _quiet():
            body, report = body_class.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                dtype=dtype,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # which reports them, for us to refuse
            )
    except Exception as error:
        raise not_loadable(weights.model_dir, error, f"{where}.model") from error
    _refuse_incomplete(report, weights, prefix, files.body, sizes(config), where)
    return body.eval().requires_grad_(False), head


def _bodies(weights: WeightFiles, head: str, embedding: str, where: str) -> dict[str, list[str]]:
    """Prefix -> names under it, for every copy of the body, the one with most tensors first.

    Starling-RM's file holds the same weights several times. embedding: the name of a tensor that every copy
    has. Raises UserError if there is no copy, or if a tensor belongs to none.
    """
    names = list(weights.file_of)
    ends = [name for name in names if name == embedding or name.endswith("." + embedding)]
    prefixes = sorted((name.removesuffix(embedding) for name in ends), key=len, reverse=True)
    bodies: dict[str, list[str]] = {prefix: [] for prefix in prefixes}
    for name in names:
        if name == head or name.endswith(_OUTPUT_LAYERS):
            continue
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if prefix is None and bodies:
            _refuse_left_over(weights, name, where)
        elif prefix is not None:
            bodies[prefix].append(name.removeprefix(prefix))
    if not bodies:
        near = (
            f" (a similar name: {brief(found[0], 100)})"
            if (found := get_close_matches(embedding, names, 1, 0.3))
            else ""
        )
        raise UserError(
            f"{where}.model: {weights.model_dir} has no {embedding}, also not with a prefix{near}. {_MEND}"
        )
    return dict(sorted(bodies.items(), key=lambda body: -len(body[1])))


def _embedding_name(model: Any) -> str:
    embedding = model.get_input_embeddings().weight
    return next(name for name, parameter in model.named_parameters() if parameter is embedding)


def _load_head(weights: WeightFiles, name: str, hidden_size: int | None, where: str) -> nn.Linear:
    if name not in weights.file_of:
        raise UserError(
            f"{where}.model: {weights.model_dir} has no {name}. Name a reward model, or set its form with "
            f"{where}.form."
        )
    shape = weights.shape(name)
    if shape != (1, hidden_size):
        raise UserError(
            f"{where}.model: {weights.place(name)} has shape {list(shape)}, but a head that gives one reward "
            f"has shape [1, {hidden_size}]. Name a reward model with one output over this body."
        )
    _refuse_unusable(weights, name, where)
    head = nn.Linear(shape[1], 1, bias=False, dtype=torch.float32)
    head.weight = nn.Parameter(_read(weights, name).to(torch.float32, copy=True), requires_grad=False)
    return head


def _read(weights: WeightFiles, name: str) -> Tensor:
    return weights.read(name, 0, 0, weights.shape(name)[0])


def _refuse_unusable(weights: WeightFiles, name: str, where: str) -> None:
    """Raises UserError for weights that are quantised, NaN or infinite: their scores would mean nothing."""
    if weights.dtype(name) not in DTYPES:
        raise UserError(
            f"{where}.model: {weights.place(name)} is {weights.dtype(name)}, but must be "
            f"{', '.join(DTYPES)}. Name a model that is not quantised."
        )
    if weights.shape(name):
        refuse_non_finite(_read(weights, name), f"{where}.model: {weights.place(name)}")


def _refuse_incomplete(
    report: dict[str, Any], weights: WeightFiles, prefix: str, body: Path, stated: str, where: str
) -> None:
    """Raises UserError for the first tensor that transformers reports as missing,
    of another shape, or unused.

    body: the directory of the config.
    stated: the config's sizes, for the message.
    """
    if report["missing_keys"]:
        name = prefix + min(report["missing_keys"])
        raise UserError(
            f"{where}.model: {weights.model_dir} has no {name}, so this weight would be random ({stated}). "
            f"{_MEND}"
        )
    if report["mismatched_keys"]:
        name, shape, expected_shape = min(report["mismatched_keys"])
        raise UserError(
            f"{where}.model: {weights.place(prefix + name)} has shape {list(shape)}, but "
            f"{body / 'config.json'} gives {list(expected_shape)} ({stated}). {_MEND}"
        )
    if report["unexpected_keys"]:
        _refuse_left_over(weights, prefix + min(report["unexpected_keys"]), where)


def _refuse_left_over(weights: WeightFiles, name: str, where: str) -> None:
    raise UserError(
        f"{where}.model: {weights.place(name)} does not belong to a body or to a head without bias. {_MEND}"
    )


def _refuse_another(weights: WeightFiles, prefix: str, copy: str, names: list[str], where: str) -> None:
    """Raises UserError if another copy of the body differs from the first in any tensor. Copies in a pickle
    usually share memory."""
    for name in names:
        if prefix + name not in weights.file_of:
            _refuse_left_over(weights, copy + name, where)
        if not weights.shape(prefix + name) and not weights.shape(copy + name):
            continue  # scalars are no weights
        one, other = (
            _read(weights, start + name) if weights.shape(start + name) else None for start in (prefix, copy)
        )
        if (
            one is None
            or other is None
            or one.dtype != other.dtype
            or not (one.is_set_to(other) or torch.equal(one, other))
        ):
            raise UserError(
                f"{where}.model: {weights.place(copy + name)} differs from {prefix}{name}, but only one of "
                "the two copies can be the body. Remove the other copy from the file."
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences transformers' progress bar and report: whatever it would report is an error here."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with without_bars():
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)


class _EncoderLogits(nn.Module):
    """A one-label encoder as a backbone with one hidden state, at the first token: the reward itself.

    The layers between an encoder's hidden states and its logits (poolers, dense layers) differ from class to
    class. So the head of such a RewardModel is the identity.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> BaseModelOutput:
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits  # [b, 1]
        return BaseModelOutput(last_hidden_state=logits[:, None])


def _load_encoder(options: RewardModelOptions, files: RewardModelFiles, where: str) -> _EncoderLogits:
    model = load_model(
        AutoModelForSequenceClassification,
        str(files.weights),
        dtype=options.dtype,
        trust_remote_code=options.trust_remote_code,
        where=where,
    )
    if model.config.num_labels != 1:
        raise UserError(
            f"{where}.model: {options.model} has {model.config.num_labels} labels, but a reward model has 1. "
            "Name a sequence classifier with one label."
        )
    return _EncoderLogits(model)
