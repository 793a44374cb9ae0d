"""The published forms of reward models, how to tell them apart, and the files that decide their scores."""

from dataclasses import dataclass
from pathlib import Path

from megatron_fuse.chat import ChatFormat, load_chat_format
from megatron_fuse.errors import UserError
from megatron_fuse.huggingface.fingerprints import model_fingerprint, weight_parts
from megatron_fuse.huggingface.resolving import local_model, resolve_model, trust_key
from megatron_fuse.model.config_file import read_model_config
from megatron_fuse.model.weight_files import WeightFiles
from megatron_fuse.recipe import RewardModelOptions
from megatron_fuse.storage import sha256_of_parts
from megatron_fuse.storage.strict_json import read_small_file
from megatron_fuse.tokenization import load_tokenizer


@dataclass(frozen=True)
class Form:
    """A form of reward models.

    head: the name of the head's weights, shape [1, h]. template: the built-in chat template if the recipe
    names none; None: the tokenizer's own. stop: see RewardModel.
    """

    head: str
    template: str | None
    stop: bool


FORMS = {
    "classifier": Form("score.weight", template=None, stop=True),
    "value_head": Form("v_head.weight", template="starling_rm", stop=True),
    "regression_head": Form("regression_head.weight", template="eurus_rm", stop=False),
}


@dataclass(frozen=True)
class RewardModelFiles:
    """The form and the directories of a reward model.

    weights: the directory with the weights. body: that with config and tokenizer, mostly the same.
    """

    form: str
    weights: Path
    body: Path


def find_reward_model(options: RewardModelOptions, name: str) -> RewardModelFiles:
    """Directories and form of a reward model of the recipe.

    Raises UserError if a directory is missing or the form cannot be found out, ValueError for options without
    a model.
    """
    where = f"reward_models.{name}"
    if options.model is None:
        raise ValueError(f"{where} has a file of scores, but no model")
    # A directory without config.json is allowed here, so local_model comes first. If it finds nothing,
    # resolve_model raises.
    weights = local_model(options.model, f"{where}.model") or resolve_model(options.model, f"{where}.model")
    if options.body is not None:
        body = resolve_model(options.body, f"{where}.body")
    elif (weights / "config.json").is_file():
        body = weights
    else:
        raise UserError(
            f"{where}.model: {weights} has no config.json. Set {where}.body to the model that it was trained "
            "from: config and tokenizer are read there (for Starling-RM-7B-alpha: Llama-2-7b-chat)."
        )
    form = options.form if options.form != "auto" else _form(weights, body, where)
    return RewardModelFiles(form, weights, body)


def _form(weights: Path, body: Path, where: str) -> str:
    if weights == body and any(
        name.endswith("ForSequenceClassification") for name in read_model_config(body).architectures or ()
    ):
        return "classifier"
    names = WeightFiles(weights).file_of
    forms = [form for form, kind in FORMS.items() if kind.head in names]
    if len(forms) == 1:
        return forms[0]
    heads = ", ".join(kind.head for kind in FORMS.values())
    raise UserError(
        f"{where}.model: {weights} holds {'several' if forms else 'none'} of {heads}. "
        + (f"Choose one with {where}.form." if forms else f"Name a reward model, or set {where}.form.")
    )


def load_reward_model_format(options: RewardModelOptions, name: str) -> ChatFormat:
    """Tokenizer and chat format in which a reward model of the recipe reads conversations.

    Raises UserError.
    """
    files = find_reward_model(options, name)
    template = options.chat_template or FORMS[files.form].template
    where = f"reward_models.{name}"
    tokenizer = load_tokenizer(
        files.body, trust_remote_code=options.trust_remote_code, allowed_by=trust_key(where)
    )
    return load_chat_format(tokenizer, template, options.system, where)


def reward_model_fingerprint(options: RewardModelOptions, name: str) -> str:
    """sha256 over form, config and weights of a reward model (see model_fingerprint).

    The chat format is not covered. If `body` is another directory than `weights`, its weights are neither
    used nor covered. Raises UserError.
    """
    files = find_reward_model(options, name)
    if files.weights == files.body:
        return sha256_of_parts(files.form.encode(), model_fingerprint(files.weights).encode())
    parts = [files.form.encode(), read_small_file(files.body / "config.json")]
    return sha256_of_parts(*parts, *weight_parts(files.weights))
