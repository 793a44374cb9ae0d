"""The forms in which reward models are published, how one is told from another, and which files decide a judge's scores."""

from dataclasses import dataclass
from pathlib import Path

from megatron_fuse.chat import ChatFormat, load_chat_format
from megatron_fuse.errors import UserError
from megatron_fuse.huggingface.fingerprints import model_fingerprint, weight_parts
from megatron_fuse.huggingface.resolving import local_model, resolve_model, trust_key
from megatron_fuse.model.config_file import read_model_config
from megatron_fuse.model.weight_files import WeightFiles
from megatron_fuse.recipe import RewardModelOptions
from megatron_fuse.storage import sha256_of_bytes
from megatron_fuse.storage.strict_json import read_small_file
from megatron_fuse.tokenization import load_tokenizer


@dataclass(frozen=True)
class Form:
    """head: the name of its [1, h] weights; template: built-in one where the recipe names none, None = the tokenizer's own;
    stop: see RewardModel."""

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
    """Where a judge lies: `weights` and, with config and tokenizer, `body` are directories, the same one for most."""

    form: str
    weights: Path
    body: Path


def find_reward_model(options: RewardModelOptions, name: str) -> RewardModelFiles:
    """Directories and form of a judge of the recipe. Raises UserError where one is missing or the form cannot be told."""
    where = f"reward_models.{name}"
    if options.model is None:
        raise ValueError(f"{where} has scores from a file and no model")
    weights = local_model(options.model, f"{where}.model") or resolve_model(
        options.model, f"{where}.model"
    )  # which refuses it
    if options.body is not None:
        body = resolve_model(options.body, f"{where}.body")
    elif (weights / "config.json").is_file():
        body = weights
    else:
        raise UserError(
            f"{where}.model: {weights} has no config.json: set {where}.body to the model that it was trained from, whose config "
            "and tokenizer it goes by (for Starling-RM-7B-alpha: Llama-2-7b-chat)"
        )
    form = options.form if options.form != "auto" else _form(weights, body, where)
    return RewardModelFiles(form, weights, body)


def _form(weights: Path, body: Path, where: str) -> str:
    if weights == body and any(
        name.endswith("ForSequenceClassification") for name in read_model_config(body).architectures or ()
    ):
        return "classifier"
    names = WeightFiles(weights).file_of
    found = [form for form, kind in FORMS.items() if kind.head in names]
    if len(found) == 1:
        return found[0]
    heads = ", ".join(kind.head for kind in FORMS.values())
    raise UserError(
        f"{where}.model: {weights} holds {'several' if found else 'none'} of {heads}: "
        + (f"choose one by {where}.form" if found else "name a reward model, or the form of this one")
    )


def load_reward_model_format(options: RewardModelOptions, name: str) -> ChatFormat:
    """Tokenizer and chat format in which a judge of the recipe reads conversations."""
    files = find_reward_model(options, name)
    template = options.chat_template or FORMS[files.form].template
    where = f"reward_models.{name}"
    tokenizer = load_tokenizer(files.body, trust_remote_code=options.trust_remote_code, allowed_by=trust_key(where))
    return load_chat_format(tokenizer, template, options.system, where)


def reward_model_fingerprint(options: RewardModelOptions, name: str) -> str:
    """sha256 over what a judge's scores come from besides its chat format: form, config and weights (see model_fingerprint).

    The weights of a `body` of its own are not used and not covered.
    """
    files = find_reward_model(options, name)
    if files.weights == files.body:
        return sha256_of_bytes(files.form.encode(), model_fingerprint(files.weights).encode())
    parts = [files.form.encode(), read_small_file(files.body / "config.json")]
    return sha256_of_bytes(*parts, *weight_parts(files.weights))
