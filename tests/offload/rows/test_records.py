"""Where the parts of a record stand, in fp32 and in bf16."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.records.row_init import initial_rows
from offload.config import RowDtype, TableOptimizerConfig
from offload.optimizers import OPTIMIZERS
from offload.rows.records import RecordLayout, RowInit, padded_words, torch_dtype

KINDS = [(name, dtype) for name, optimizer in OPTIMIZERS.items() for dtype in optimizer.state_dtypes]


def layout(dim: int, optimizer: str, row_dtype: RowDtype, state_dtype: RowDtype = "fp32") -> RecordLayout:
    return RecordLayout.of(dim, TableOptimizerConfig(type=optimizer, state_dtype=state_dtype), row_dtype)


@pytest.mark.parametrize(
    ("optimizer", "row_dtype", "state_dtype", "size"),
    [
        ("adam", "fp32", "fp32", 4 * (80 + 160 + 1)),
        ("adam", "bf16", "fp32", 2 * 80 + 4 * (160 + 1)),
        ("adam", "fp32", "bf16", 644),
        ("adam", "bf16", "bf16", 484),
        ("rowwise_adagrad", "fp32", "fp32", 4 * (80 + 1 + 1)),
        ("rowwise_rmsprop", "bf16", "fp32", 2 * 80 + 4 + 4),
        ("sgd", "fp32", "fp32", 4 * (80 + 1)),
        ("sgd", "bf16", "fp32", 2 * 80 + 4),
    ],
)
def test_sizes_of_records(optimizer: str, row_dtype: RowDtype, state_dtype: RowDtype, size: int) -> None:
    assert layout(80, optimizer, row_dtype, state_dtype).bytes == size


@pytest.mark.parametrize(
    ("words", "padded"),
    [
        (241, 256),  # Adam, fp32, 80 columns: 6 % more
        (201, 224),  # and bf16
        (161, 168),  # with bf16 moments: lines would be 19 % more
        (121, 128),  # and bf16
        (256, 256),
        (257, 288),
        (256 + 29, 288),
        (57, 64),  # 12.3 % more
        (56, 56),  # lines would be 14 % more
        (82, 88),  # row-wise Adagrad, fp32
        (42, 48),  # and bf16
        (1, 8),
    ],
)
def test_records_fill_lines_where_that_is_cheap_and_else_sectors(words: int, padded: int) -> None:
    assert padded_words(words, torch.device("cuda", 0)) == padded
    assert padded_words(words, torch.device("cpu")) == words


def test_the_memory_of_a_record_counts_its_padding() -> None:
    adam = layout(80, "adam", "fp32")
    assert (adam.stride(torch.device("cuda")), adam.stride_bytes(torch.device("cuda"))) == (256, 1024)
    assert adam.stride_bytes(torch.device("cpu")) == adam.bytes == 964


@given(st.integers(1, 9), st.sampled_from(KINDS), st.sampled_from(["fp32", "bf16"]), st.integers(0, 4))
def test_parts_cover_the_record_and_do_not_overlap(
    dim: int, kind: tuple[str, RowDtype], row_dtype: RowDtype, rows: int
) -> None:
    (optimizer, state_dtype), parts = kind, layout(dim, kind[0], row_dtype, kind[1])
    records = torch.zeros(rows, parts.words)
    parts.weights(records).fill_(1.1)
    parts.state(records).fill_(-2.1)
    parts.version(records).fill_(2**31 - 1)
    assert torch.allclose(parts.weights(records).float(), torch.tensor(1.1), rtol=1e-2)
    assert torch.allclose(parts.state(records).float(), torch.tensor(-2.1), rtol=1e-2)
    assert (parts.version(records) == 2**31 - 1).all()
    assert parts.state(records).dtype == torch_dtype(state_dtype)
    assert parts.state(records).shape == (rows, OPTIMIZERS[optimizer].state_size(dim))
    padding = 1 if row_dtype == "bf16" and dim % 2 else 0
    assert int((records.view(torch.int16) == 0).sum()) == rows * padding


LAYOUTS = st.builds(RecordLayout, st.integers(1, 9), st.integers(0, 9), *[st.sampled_from(["fp32", "bf16"])] * 2)


@given(LAYOUTS, st.integers(0, 4))
def test_packing_undoes_unpacking(parts: RecordLayout, rows: int) -> None:
    words = torch.randint(-(2**31), 2**31, (rows, parts.words), dtype=torch.int32)
    records = words.view(torch.float32)
    parts.weights(records).nan_to_num_()
    parts.state(records).nan_to_num_()
    if parts.row_dtype == "bf16" and parts.dim % 2:
        records.view(torch.int16)[:, parts.dim] = 0
    if parts.state_dtype == "bf16" and parts.state_size % 2:
        records.view(torch.int16)[:, -3] = 0
    unpacked = parts.unpack(records)
    assert unpacked.shape == (rows, parts.unpacked.words)
    assert torch.equal(parts.unpacked.weights(unpacked), parts.weights(records).float())
    assert torch.equal(parts.unpacked.state(unpacked), parts.state(records).float())
    assert torch.equal(parts.unpacked.version(unpacked), parts.version(records))
    into = torch.full_like(records, torch.nan)  # no half of a word may keep what was there
    for packed in (parts.pack(unpacked), parts.pack(unpacked, into)):
        assert torch.equal(packed.view(torch.int32), words)


@pytest.mark.parametrize("row_dtype", ["fp32", "bf16"])
def test_only_rows_that_were_never_updated_get_initial_values_rounded_to_nearest(row_dtype: RowDtype) -> None:
    parts = layout(5, "adam", row_dtype)
    records = torch.zeros(4, parts.words)
    parts.weights(records).fill_(7.0)
    parts.version(records)[1] = 3
    ids = torch.tensor([10, 11, 12, 2**40])
    RowInit(seed=4, std=0.02).fill(parts, records, ids)
    expected = initial_rows(ids, 5, seed=4, std=0.02).to(parts.weights(records).dtype)
    expected[1] = 7.0
    assert torch.equal(parts.weights(records), expected)
