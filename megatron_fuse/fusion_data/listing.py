"""The list of examples of a text: FUSION/text/shard-00000.examples.jsonl, one JSON object per example."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_fuse.errors import UserError
from megatron_fuse.storage import Artifact, read_jsonl


class ListedExample(BaseModel):
    """is_validation: kept out of training. supervised_tokens: number of labels of the ground truth; 0 if
    the example is left out.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    id: str
    is_validation: Annotated[bool, Field(validation_alias="held_out")]
    supervised_tokens: Annotated[int, Field(ge=0, lt=2**31)]


def read_examples(text: Artifact) -> list[ListedExample]:
    """All examples of a text in their order. Raises UserError if a list is not what the stage wrote."""
    return [example for path in text.files(".examples.jsonl") for example in read_listed(text.checked(path))]


def read_listed(path: Path) -> list[ListedExample]:
    """The examples of one shard.

    Raises UserError, naming the line and the key, if the file is no such list.
    """
    listed = []
    for number, row in read_jsonl(path):
        try:
            listed.append(ListedExample.model_validate(row))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(map(str, first["loc"])) or "the row"
            raise UserError(
                f"{path}:{number}: {key} is wrong ({first['msg']}). Restore the file, or remove "
                f"{path.parent} and run its stage again."
            ) from error
    return listed
