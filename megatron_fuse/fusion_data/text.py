"""Conversations in the target's tokens: the text of fusion data.

The rows of every source refer to its tokens.

FUSION/text/shard-00000.{tokens,supervised}.{bin,idx}    one sequence per example, empty if it is left out
FUSION/text/shard-00000.spans.safetensors                the bytes that its labels cover (stored_spans.py)
FUSION/text/shard-00000.examples.jsonl                   {id, held_out, supervised_tokens}
"""

from pathlib import Path

from megatron_fuse.fusion_data.encoding import encode_ground_truth, id_dtype, write_documents
from megatron_fuse.fusion_data.layout import TEXT
from megatron_fuse.fusion_data.stored_spans import write_spans
from megatron_fuse.instructions import INSTRUCTIONS, example_shards, shard_sizes
from megatron_fuse.stages import Context
from megatron_fuse.storage import Artifact, ShardProgress, run_plan, write_jsonl
from megatron_fuse.tokenization.spans import SpanFlag


def build_text(context: Context) -> Artifact | None:
    """Writes prompt and ground truth of every example. Returns the artifact, None if other ranks still work.

    Raises UserError if the instructions are missing or damaged.
    """
    recipe, target, plan = context.recipe, context.target, context.plan(TEXT)
    instructions = context.open(INSTRUCTIONS)
    shards = example_shards(instructions)
    progress = ShardProgress(plan.directory, "examples", shard_sizes(instructions))

    def make_shard(index: int, prefix: Path) -> dict[str, int]:
        examples = shards[index]
        documents = encode_ground_truth(recipe, target, examples)
        write_documents(prefix, documents, id_dtype(target.tokenizer.vocab_size))
        write_spans(prefix, documents)
        rows = [
            {"id": example.id, "held_out": example.is_validation, "supervised_tokens": len(spans)}
            for example, spans in zip(examples, documents.spans, strict=True)
        ]
        write_jsonl(Path(f"{prefix}.examples.jsonl"), rows)
        present = documents.present
        progress.update(len(examples), sum(map(len, documents.tokens)))
        return {
            "examples": len(examples),
            "documents": int(present.sum()),
            "too_long": int((~present).sum()),
            "tokens": sum(map(len, documents.tokens)),
            "supervised_tokens": sum(map(len, documents.spans)),
            "lossy_tokens": sum(int(spans.has(SpanFlag.LOSSY).sum()) for spans in documents.spans),
        }

    return run_plan(plan, make_shard, progress)
