"""Checks everything that fusion data holds, and says all that is wrong with it.

    verify.py       goes through all of it, and keeps what is found
    artifacts.py    files: size and sha256 against the manifest, of the text, of the sources' rows and, as far as it is there, of
                    what they were made from; lineage: what each was made with and from, against the recipe and its parents
    shards.py       documents: ids within the vocabulary, one mark a token, lengths that fit each other; rows: counts that fit
                    labels and entries, no id twice in a row, finite log-probabilities of at most 0, a mass of at most 1
    selection.py    the choice between the sources: who has the example, and what the stored facts lead to
    curriculum.py   what orders the examples: the lengths and rewards that it was measured from
    recomputed.py   stored arrays against those that the stored facts lead to, for both of these

One shard is in memory at a time.
"""

from megatron_fuse.verification.verify import Verification, verify_fusion_data

__all__ = ["Verification", "verify_fusion_data"]
