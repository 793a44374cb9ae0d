"""A stored tensor is read as torch reads it, from the bytes where they lie, and damage has one outcome."""

import io
import random
import tracemalloc

import pytest
import torch

from megatron_fuse.errors import UserError
from megatron_fuse.training.stored_tensor import _view_tensor, read_tensor


def stored(tensor: torch.Tensor) -> memoryview:
    file = io.BytesIO()
    torch.save(tensor, file)
    return memoryview(bytearray(file.getvalue()))


BASE = torch.arange(60, dtype=torch.float32)
TENSORS = {
    "vector": BASE,
    "scalar": torch.tensor(2.5),
    "one": torch.tensor([3]),
    "matrix": BASE.view(6, 10),
    "transposed": BASE.view(6, 10).t(),
    "part": BASE.view(6, 10)[1:4, 2:7],
    "spread": BASE.view(6, 10)[:, :1].expand(6, 10),
    "last": BASE[-1:],
    "singletons": BASE.view(1, 1, 60),
}


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8],
)
@pytest.mark.parametrize("crc32", [True, False])
def test_a_plain_tensor_is_viewed(name: str, dtype: torch.dtype, crc32: bool) -> None:
    tensor = TENSORS[name].to(dtype) if name != "spread" else TENSORS[name].to(dtype)[:, :1].expand(6, 10)
    torch.serialization.set_crc32_options(crc32)
    try:
        content = stored(tensor)
    finally:
        torch.serialization.set_crc32_options(True)
    found = _view_tensor(content)
    assert found.dtype == dtype and found.shape == tensor.shape and torch.equal(found, tensor)
    begin = torch.frombuffer(content, dtype=torch.uint8).data_ptr()
    assert begin <= found.data_ptr() < begin + len(content)


# Types that have no storage class of their own, and tensors whose pickle is another one
@pytest.mark.parametrize(
    "tensor",
    [
        torch.empty(0),
        torch.tensor([True, False]),
        torch.tensor([1, 2], dtype=torch.uint16),
        torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn),
        torch.ones(2, dtype=torch.complex64),
    ],
    ids=lambda tensor: str(tensor.dtype),
)
def test_other_tensors_are_read_by_torch(tensor: torch.Tensor) -> None:
    found = read_tensor(stored(tensor), "file")
    assert found.dtype == tensor.dtype and torch.equal(found.float(), tensor.detach().float())


def test_what_is_no_tensor_is_refused() -> None:
    for value in ([torch.ones(2)], {"a": 1}, None, 5):
        file = io.BytesIO()
        torch.save(value, file)
        with pytest.raises(UserError, match="file is a"):
            read_tensor(memoryview(file.getvalue()), "file")


def test_a_damaged_byte_takes_no_memory() -> None:
    """BINPUT, which numbers an object by one byte, as LONG_BINPUT, which takes four."""
    whole = bytes(stored(torch.arange(6.0).view(2, 3)))
    place = whole.index(b"q\x00")
    damaged = whole[:place] + b"r" + (1 << 24).to_bytes(4, "little") + whole[place + 5 :]
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="the file"):
            read_tensor(memoryview(damaged), "the file")
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_damage_is_a_tensor_or_an_error_that_names_the_file() -> None:
    seed = random.randrange(1 << 30)
    rng = random.Random(seed)
    whole = bytes(stored(torch.arange(6.0).view(2, 3)))
    for _ in range(1500):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 5])):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        if rng.random() < 0.2:
            damaged = damaged[: rng.randrange(len(damaged))]
        try:
            assert isinstance(read_tensor(memoryview(damaged), "the file"), torch.Tensor)
        except UserError as error:
            assert "the file" in str(error) and len(str(error)) <= 600, seed
