"""The options of a model in a recipe: how it answers or scores, and files of answers or scores."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, JsonValue, model_validator

from megatron_fuse.recipe.model_parallel import ModelParallelOptions
from megatron_fuse.recipe.values import Line, Location, ModelPlace, Options, Precision

TARGET = "target"  # directory name of the target's own answers, beside those of the sources
# Directory name of the scores against the ground truth, beside those of the reward models.
REFERENCE = "reference"


ChatTemplate = Annotated[
    ModelPlace | None,
    Field(
        description="vicuna_v1.1, llama2, llama3, chatml, alpaca, starling_rm, eurus_rm or a .jinja file; "
        "default: the template of the tokenizer"
    ),
]
SystemMessage = Annotated[str | None, Field(description="system message for examples without one")]
TrustRemoteCode = Annotated[bool, Field(description="run Python code that comes with the model")]


class ModelOptions(Options):
    model: ModelPlace = Field(
        description="Hugging Face model directory, or the hub name of a model that is in the local cache"
    )
    chat_template: ChatTemplate = None
    system: SystemMessage = None
    trust_remote_code: TrustRemoteCode = False


class FileOptions(Options):
    """How to read one file. In a recipe its path alone may be given in place of the mapping."""

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str | Path) else value


class ResponseFile(FileOptions):
    """A file of answers that exist already.

    A key may be nested: `responses.gpt-4` is the value under "gpt-4" in the mapping under "responses".
    """

    path: Location = Field(description="JSONL, Parquet or a directory of Parquet, one row per example")
    response: Line = Field("response", description="key of the answer's text")
    match: Literal["id", "prompt"] = Field(
        "id", description="how the row of an example is found: by the example's id or by its prompt"
    )
    id: Line = Field("id", description="key of the example's id, with match: id")
    prompt: Line = Field(
        "prompt",
        description="key of the text of the last user message, or of a list of all messages, with match: "
        "prompt",
    )


def _is_host(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and (parts.port is None or parts.port > 0) and not re.search(r"\s", url)
    except ValueError:  # the port is no number, or brackets do not close
        return False


Engine = Literal["vllm", "sglang"]


class ServerAddress(Options):
    """Where a server is, and how it is asked."""

    url: Line = Field(description="base URL, such as http://localhost:8000/v1")
    model: Line = Field(description="name of the model on the server")
    answers_as: Line | None = Field(
        None,
        description="name of the model in the server's answers, if it is different (for example behind a "
        "deployment)",
    )
    api_key_variable: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=200)] = Field(
        "OPENAI_API_KEY", description="environment variable that holds the key, if the server needs one"
    )
    concurrency: Annotated[int, Field(ge=1, le=10_000)] = Field(
        16, description="number of requests at the same time"
    )
    timeout: Annotated[float, Field(ge=0.001, le=1e6)] = Field(600.0, description="seconds for one answer")
    max_retries: Annotated[int, Field(ge=0, le=1000)] = Field(
        6, description="repeated tries of a request, with growing pauses"
    )

    @model_validator(mode="after")  # of the whole model: an error about a single key would quote its value
    def _holds_no_secret(self) -> Self:
        scheme, _, rest = self.url.partition("://")
        if scheme not in ("http", "https") or not _is_host(self.url):
            raise ValueError("url must be a base URL, such as http://localhost:8000/v1")
        if "@" in rest.partition("/")[0] or "?" in rest:
            raise ValueError(
                "url must not hold a user name, a password or a query: put a key into an environment "
                "variable (api_key_variable)"
            )
        return self


class ServerOptions(ServerAddress):
    """An OpenAI-compatible server: vLLM, SGLang, llama.cpp, `transformers serve` or a hosted one."""

    endpoint: Literal["chat", "completions"] = Field(
        "chat",
        description="of answers; chat: the server applies its own template; completions: the prompt is "
        "rendered here and sent as text",
    )
    engine: Engine = Field(
        "vllm", description="program of a server that a source is captured from (backend: server)"
    )
    extra: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="additional keys in the body of every request for an answer; null removes a key that is "
        "set by default",
    )

    @model_validator(mode="after")
    def _extra_is_free(self) -> Self:
        reserved = self.extra.keys() & {
            "model",
            "messages",
            "prompt",
            "stop",
            "seed",
            "stream",
            "n",
            "api_key",
        }
        if reserved:
            raise ValueError(
                f"extra must not have {', '.join(sorted(reserved))}: the recipe has its own keys for the "
                "model, the stop texts and the seed, the server's key is read from the environment, and "
                "every request asks for one whole answer"
            )
        return self


class RewardServerOptions(ServerAddress):
    """A server that gives the rewards of a sequence classifier with one label, or of a reward model."""

    engine: Engine = Field("vllm", description="program of the server")
    endpoint: Literal["classify", "pooling"] = Field(
        "classify",
        description="of vLLM; classify: a sequence classifier; pooling: also a model with a reward per "
        "token, of which the last counts",
    )

    @model_validator(mode="after")
    def _endpoint_exists(self) -> Self:
        if self.engine == "sglang" and self.endpoint != "classify":
            raise ValueError("endpoint pooling is one of vLLM. Set endpoint to classify, or engine to vllm.")
        return self


class AnsweringOptions(ModelOptions):
    dtype: Precision = Field("bf16", description="precision in which the model answers and is captured")
    device_map: Line | None = Field(None, description="'auto' divides a model over several GPUs")
    stop: list[str] = Field(
        default_factory=list, description="texts at which an answer ends; they are not part of it"
    )
    responses: ResponseFile | None = Field(
        None, description="file of existing answers, instead of generating them"
    )
    server: ServerOptions | None = Field(
        None, description="server that generates the answers, instead of the model in this process"
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if self.responses and self.server and not self._captured_from_server:
            raise ValueError("responses (a file) and server are both set. Remove one of the two.")
        if self.responses and self.stop:
            raise ValueError(
                "responses (a file) and stop are both set, but answers of a file are not cut. Remove one of "
                "the two."
            )
        if "" in self.stop:
            raise ValueError("stop holds an empty text, at which every answer would end at once. Remove it.")
        return self

    @property
    def _captured_from_server(self) -> bool:
        """Whether `server` has another use than answers."""
        return False


class TargetOptions(AnsweringOptions):
    """Options of the target. It answers only if schedule.order is target_reward."""


class SourceParallelOptions(ModelParallelOptions):
    """How the ranks of a capture divide a source. The other ranks are data-parallel over shards."""

    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"

    @property
    def expert_tensor_size(self) -> int:
        """The tensor-parallel ranks of each expert.

        The tensor-parallel ranks share the experts, so that a copy of the source is whole without others.
        """
        return self.tensor_model_parallel_size // self.expert_model_parallel_size

    @property
    def sizes(self) -> dict[str, Any]:
        return super().sizes | {"expert_tensor_parallel_size": self.expert_tensor_size}

    @model_validator(mode="after")
    def _shares_experts_over_tensor_ranks(self) -> Self:
        tensor, experts = self.tensor_model_parallel_size, self.expert_model_parallel_size
        if tensor % experts:
            raise ValueError(
                f"expert_model_parallel_size {experts} does not divide tensor_model_parallel_size {tensor}, "
                "whose ranks share the experts of a source. Set it to a divisor, or to 1."
            )
        return self


class SourceOptions(AnsweringOptions):
    backend: Literal["hf", "megatron", "server"] = Field(
        "hf",
        description="what captures the source's distributions; hf: its model in every process; megatron: "
        "Megatron-core, which divides the model over several processes; server: the server of the key "
        "`server`, a vLLM or SGLang",
    )
    parallel: SourceParallelOptions = Field(
        SourceParallelOptions(), description="how the processes divide the model, with backend: megatron"
    )
    captures: dict[Literal["inference", "training"], Location] = Field(
        default_factory=dict,
        description="for each mode a Parquet or JSONL file of distributions that were captured elsewhere "
        "(docs/captures.md)",
    )

    @model_validator(mode="after")
    def _has_what_its_backend_needs(self) -> Self:
        if self.backend != "megatron" and self.parallel != SourceParallelOptions():
            raise ValueError(
                f"parallel divides a source of backend megatron, but backend is {self.backend}. Set backend "
                "to megatron, or remove parallel."
            )
        if self.backend == "server" and self.server is None:
            raise ValueError("backend is server, but server is not set. Set server.url and server.model.")
        return self

    @property
    def _captured_from_server(self) -> bool:
        return self.backend == "server"


class ScoreFile(FileOptions):
    """A file of scores made elsewhere.

    It has rows {id, source, score}, or one row per id with a mapping {source: score} under `scores`.
    """

    path: Location = Field(description="JSONL, Parquet or a directory of Parquet")
    id: Line = Field("id", description="key of the example's id")
    scores: Line = Field(
        "scores", description="key of the mapping from source to score; a.b is the key b in a"
    )


class RewardModelOptions(Options):
    model: ModelPlace | None = Field(
        None, description="Hugging Face model directory, or the hub name of a model in the local cache"
    )
    chat_template: ChatTemplate = None
    system: SystemMessage = None
    trust_remote_code: TrustRemoteCode = False
    form: Literal["auto", "classifier", "value_head", "regression_head"] = Field(
        "auto",
        description="classifier: sequence classifier with one label (FsfairX); value head over a causal LM "
        "(Starling); regression head, read at the last token (Eurus); auto: decided by the names of the "
        "weights",
    )
    body: ModelPlace | None = Field(
        None,
        description="model with the config and the tokenizer, for a reward model that has none of its own "
        "(Starling: Llama-2-7b-chat)",
    )
    dtype: Precision = Field("bf16", description="precision in which the reward model runs")
    server: RewardServerOptions | None = Field(
        None, description="server that gives the rewards, instead of the model in this process"
    )
    scores: ScoreFile | None = Field(None, description="file of existing scores, instead of a model")

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if self.server and self.model is None:
            raise ValueError(
                "server is set, but model is not. Set model: its tokenizer and chat template are needed here."
            )
        if (self.model is None) == (self.scores is None):
            raise ValueError("exactly one of model and scores (a file) must be set. Set one of the two.")
        return self
