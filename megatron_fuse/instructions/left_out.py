"""A table of what prepare_instructions left out, and why. It is made from the listings in the artifact."""

from collections.abc import Iterator

from megatron_fuse.storage import Artifact, read_jsonl

LISTINGS = ("bad_rows", "dropped")


def left_out(artifact: Artifact) -> Iterator[str]:
    """The lines of the table, the most frequent kind first. There are none if nothing was left out."""
    counts: dict[str, int] = {}
    first: dict[str, int] = {}
    for listing in LISTINGS:
        for _, row in read_jsonl(artifact.directory / f"examples.{listing}.jsonl"):
            counts[row["kind"]] = counts.get(row["kind"], 0) + 1
            first.setdefault(row["kind"], row["line"])
    if not counts:
        return
    width = max(len(kind) for kind in ("left out", *counts))
    yield f"{'left out':<{width}}  {'rows':>9}  for example"
    for kind, count in sorted(counts.items(), key=lambda item: -item[1]):
        yield f"{kind:<{width}}  {count:>9,}  line {first[kind]}"
