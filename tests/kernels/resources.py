"""What every kernel takes of an H100's processor, at the widths of the large jobs: `python -m tests.kernels.resources`.

Each is compiled to machine code for a GPU that is not there; nothing runs.
"""

import torch

from kernels.branches.compose_triton import compose_backward, compose_forward
from kernels.branches.mappings_triton import mappings_backward, mappings_forward
from kernels.branches.projections_triton import project_backward, project_forward
from kernels.branches.sinkhorn_triton import sinkhorn_backward, sinkhorn_forward
from kernels.branches.triton import mix_backward, mix_forward
from kernels.gate.triton import gate_backward, gate_forward
from kernels.records.fresh_triton import draw_records
from kernels.records.row_init_triton import initial_rows
from kernels.records.triton import fetch_records, write_records
from kernels.rows.stochastic_rounding_triton import stochastic_round_bf16_
from tests.kernels.ahead_of_time import Resources
from tests.kernels.gather import test_add_rows, test_parts
from tests.kernels.gather import test_triton as test_gather
from tests.kernels.hash import test_triton as test_hash
from tests.kernels.own_process import resources_of_launches
from tests.kernels.record_tables import RecordShape, table_at_a_line
from tests.kernels.rows import test_adam_triton, test_rowwise_triton, test_sgd_triton

BF16 = torch.bfloat16


def moved() -> None:
    """Records of Adam's rows of 80 columns as a GPU has them, and lines that are not whole."""
    numbers, ranges = torch.arange(300), torch.tensor([[0, 1], [7, 2]])
    for shape in (
        RecordShape(80, 160, apart=15, padded=True),
        RecordShape(80, 160, BF16, apart=23, padded=True),
        RecordShape(80, 160),
    ):
        host, how = table_at_a_line(shape, 300), {"padded": shape.padded, "programs": 8}
        fetch_records(host, numbers, host, numbers, **how)
        draw_records(host, numbers, numbers, id_ranges_M2=ranges, **shape.initial)
        write_records(host, numbers, host, numbers, **how)
    initial_rows(numbers, 80, seed=1, std=0.1)


def updated() -> None:
    """Rows of 80 columns under every optimizer, and rounded."""
    test_adam_triton.adam_of_80_columns(test_adam_triton.REGISTERS)
    test_rowwise_triton.compiled_calls()
    test_sgd_triton.compiled_calls()
    stochastic_round_bf16_(torch.zeros(40, 80), torch.arange(40), seed=0, step=1)


def looked_up() -> None:
    """Token ids hashed, rows gathered, gradients summed and added up."""
    test_hash.launches()
    test_gather.launches()
    test_add_rows.launch_all()
    test_parts.launch_all()


def computed() -> None:
    """Four branches of 2,048 columns: mappings, mixing, and the gate."""
    shapes = ((2, 8, 4, 2048), (2, 8, 4, 2048), (2, 8, 2048), (4, 2048), (4, 2048))
    inputs = [torch.empty(shape, dtype=BF16) for shape in shapes]
    gated, saved = gate_forward(*inputs, 1e-20, True)
    gate_backward(gated, *inputs, saved, True)
    parts = [inputs[0], inputs[2]]
    weights, projection = torch.empty(2, 8, 4, 5), torch.empty(24, 8192, dtype=BF16)
    mix_backward(mix_forward(weights, parts[0], parts[1:]), weights, parts[0], parts[1:])
    projected, scale = project_forward(projection, weights, parts[0], parts[1:], 1e-6)
    project_backward(projected, projected, scale, projection, weights, parts[0], parts[1:])
    bias = torch.empty(24, dtype=BF16)
    pre, post, res = mappings_forward(projected, bias[:3], bias, 4)
    mappings_backward(pre, post, res, pre, post, projected, bias[:3], bias)
    compose_backward(compose_forward(res, weights, post), res, weights, post)
    logits = torch.empty(1, 16, 24)[..., 8:].unflatten(-1, (4, 4))
    sinkhorn_backward(sinkhorn_forward(logits, 20), logits, 20)


def everything() -> None:
    """A launch of every kernel."""
    for launched in (moved, updated, looked_up, computed):
        launched()


def resources_of_all() -> list[tuple[str, Resources]]:
    """Every kernel's, each form once, in the order of launches."""
    return list(dict.fromkeys(resources_of_launches(everything)))


def main() -> None:
    print(f"{'kernel':26}{'registers':>10}{'stack':>7}{'shared':>9}{'threads':>9}")
    for name, needs in resources_of_all():
        print(f"{name:26}{needs.registers:10}{needs.stack:7}{needs.shared:9,}{needs.threads:9}")


if __name__ == "__main__":
    main()
