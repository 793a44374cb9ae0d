"""Artifact directories: the output of a stage.

An artifact is complete or can be resumed, and records the hashes of all its inputs.

    DIRECTORY/plan.json             what is being made: stage, options, input hashes, number of shards;
                                    written first
    DIRECTORY/shard-00000.*         data files; they are moved here when the shard is whole
    DIRECTORY/shard-00000.done      {files: {name: {bytes, sha256}}, counts}: the shard is whole
    DIRECTORY/manifest.json         plan, files and summed counts; written last, its presence means complete
    .DIRECTORY.lock                 beside it, while processes are at work: locks of the shards, with their
                                    owners' names

    .DIRECTORY.claims/              in the place of locks, if processes take shards by claim (claims.py)

A rerun compares the plan. If it is equal, the rerun makes only the shards that have no marker, or whose files
are missing or have another size. If it differs, a UserError names the key and both values, and nothing is
overwritten. Any number of processes may share the work, or do the same work: a process holds the lock of a
shard while it makes the shard, and the process that completes the last shard writes the manifest. plan.json,
markers and manifest hold the sha256 of their own content.
"""

from megatron_fuse.storage.artifact import Artifact, Plan, Shards, completed, open_artifact
from megatron_fuse.storage.files import (
    parse_row,
    read_json,
    read_jsonl,
    read_sealed,
    remove_abandoned,
    sha256_of_file,
    sha256_of_json,
    sha256_of_parts,
    temporary_then_rename,
    write_json,
    write_jsonl,
    write_sealed,
)
from megatron_fuse.storage.locks import LockFile
from megatron_fuse.storage.safetensors_file import write_safetensors
from megatron_fuse.storage.shard_progress import ShardProgress
from megatron_fuse.storage.stage import Share, rank_and_world, run_plan, run_plans, shard_bounds
from megatron_fuse.storage.workspace import Workspace

__all__ = [
    "Artifact",
    "LockFile",
    "Plan",
    "ShardProgress",
    "Shards",
    "Share",
    "Workspace",
    "completed",
    "open_artifact",
    "parse_row",
    "rank_and_world",
    "read_json",
    "read_jsonl",
    "read_sealed",
    "remove_abandoned",
    "run_plan",
    "run_plans",
    "sha256_of_file",
    "sha256_of_json",
    "sha256_of_parts",
    "shard_bounds",
    "temporary_then_rename",
    "write_json",
    "write_jsonl",
    "write_safetensors",
    "write_sealed",
]
