from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from train.checkpoint.tensor_files import TensorSource, split, write_tensors


def test_the_library_reads_what_was_written_in_pieces(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(7, 3),
        "b": torch.randn(5, 2).bfloat16(),
        "c": torch.arange(4) - 2,
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
        "transposed": torch.randn(3, 4).T,
    }
    sources = [TensorSource.of(name, tensor) for name, tensor in tensors.items()]
    sources[0] = TensorSource("a", torch.float32, (7, 3), lambda: tensors["a"].split(2))
    write_tensors(tmp_path / "x.safetensors", sources)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize(
    "pieces", [[torch.zeros(2)], [torch.zeros(4), torch.zeros(4)], [torch.zeros(3), torch.zeros(3).double()]]
)
def test_pieces_that_are_not_the_tensor_are_refused(pieces: list[torch.Tensor], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="t: "):
        write_tensors(tmp_path / "x.safetensors", [TensorSource("t", torch.float32, (6,), lambda: pieces)])


def test_files_are_filled_up_to_the_limit() -> None:
    sources = [TensorSource.of(str(rows), torch.zeros(rows)) for rows in (5, 4, 1, 12, 2, 8)]
    parts = [[source.name for source in part] for part in split(sources, 40)]
    assert parts == [["5", "4", "1"], ["12"], ["2", "8"]]
