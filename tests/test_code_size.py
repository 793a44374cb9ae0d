"""A function has at most 60 lines and a file at most 400, except those that are listed here with a reason."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CODE = ("megatron_fuse", "kernels", "tools", "examples", "benchmarks", "pretrain_fuse.py")
LINES_OF_A_FUNCTION, LINES_OF_A_FILE = 60, 400

KERNEL = "a kernel and its many pointers and sizes are one function; its steps share values in registers"
CONTRACT = "most of it is the signature and the docstring: every argument with shape, dtype and meaning"
LONG_FUNCTIONS = {
    "kernels/fuse_kernels/triton_kernels.py:gather_kernel": KERNEL,
    "kernels/fuse_kernels/triton_kernels.py:finish_kernel": KERNEL,
    "kernels/fuse_kernels/triton_kernels.py:whole_row_kernel": KERNEL,
    "kernels/fuse_kernels/triton_topk.py:topk_kernel": KERNEL,
    "kernels/fuse_kernels/loss.py:sparse_kl_cross_entropy": CONTRACT,
    "kernels/fuse_kernels/linear.py:fused_linear_sparse_kl": CONTRACT,
    "megatron_fuse/model/config.py:transformer_config": "one table: each option of Megatron with its value",
}
LONG_FILES = {
    "kernels/fuse_kernels/triton_kernels.py": "the kernels of one loss, with the functions that they share",
    "kernels/fuse_kernels/triton_loss.py": "the operators that launch these kernels, each with its form for "
    "torch.compile",
}


def files() -> Iterator[tuple[str, str]]:
    """(path from the root, text) of every file of code."""
    for name in CODE:
        for path in [ROOT / name] if name.endswith(".py") else sorted((ROOT / name).rglob("*.py")):
            if "build" not in path.parts:
                yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")


def functions() -> dict[str, int]:
    """`path:name` of every function -> its lines; of several with one name, those of the longest."""
    lines: dict[str, int] = {}
    for path, text in files():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                place = f"{path}:{node.name}"
                lines[place] = max(lines.get(place, 0), node.end_lineno - node.lineno + 1)
    return lines


def test_functions_are_short_or_listed_with_a_reason() -> None:
    """A function that is short again goes off the list."""
    assert {place for place, count in functions().items() if count > LINES_OF_A_FUNCTION} == set(
        LONG_FUNCTIONS
    )


def test_files_are_short_or_listed_with_a_reason() -> None:
    lines = {path: len(text.splitlines()) for path, text in files()}
    assert {path for path, count in lines.items() if count > LINES_OF_A_FILE} == set(LONG_FILES)
