"""The table of planted errors keeps up with the code that it damages.

The check itself is kernels/checks/mutations.py.
"""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def mutations(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "kernels" / "checks"))  # kernels/ is no package
    import mutations

    return mutations


def test_what_each_mutation_replaces_is_there_once(mutations):
    for mutation in mutations.MUTATIONS:
        damaged = mutations.mutated(mutation)  # raises where it is not
        assert damaged != (mutations.PACKAGE / mutation.file).read_text()
        compile(damaged, mutation.file, "exec")  # to find an error of syntax takes no test


def test_a_mutation_whose_text_is_gone_is_refused(mutations):
    lost = mutations.Mutation("an error", "chunked.py", "text that is nowhere", "")
    with pytest.raises(ValueError, match=r"chunked\.py has 'text that is nowhere' 0 times, not once"):
        mutations.mutated(lost)


def test_every_mutated_file_has_tests(mutations):
    assert {mutation.file for mutation in mutations.MUTATIONS} == set(mutations.TESTS)
    for selected in mutations.TESTS.values():
        assert (ROOT / selected[0]).is_file()
