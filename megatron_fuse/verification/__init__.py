"""Checks all fusion data of a recipe, and reports every problem.

    verify.py       goes through all fusion data and collects the problems
    artifacts.py    files: size and sha256 against the manifest, for the text, the rows of the sources and, if
                    they are there, the artifacts that these were made from; lineage: recorded options and
                    inputs against recipe and parents
    shards.py       documents: ids within the vocabulary, one mark per token, lengths that fit each other;
                    rows: counts that fit labels and entries, no id twice in a row, finite log-probabilities
                    of at most 0, a mass of at most 1
    selection.py    the choice between the sources: it must follow from the stored arrays of the examples
    curriculum.py   the values that order the examples: they must follow from the lengths and rewards
    recomputed.py   for both: compares stored arrays with the same arrays computed again

One shard is in memory at a time.
"""

from megatron_fuse.verification.verify import Verification, verify_fusion_data

__all__ = ["Verification", "verify_fusion_data"]
