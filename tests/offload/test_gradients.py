"""Gradients of a step's rows: each micro-batch adds its own, and the last one's sends them all."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from kernels.gather import gather
from kernels.gather.values import RowValues
from kernels.threads import on_one_thread
from offload import gradients
from offload.config import OffloadConfig
from offload.gradients import ModuleGradient
from offload.plan import exchange
from offload.plan.finders import HostFinder
from offload.plan.plan import Plan, make_plan
from offload.plan.sharding import Sharding
from tests.distributed import run_ranks
from tests.offload.tables_job import DIM, Addresses, Job, open_tables, train_step

JOB = Job(steps=2, global_batch=12, micro_batch=2)


def plan_of(job: Job) -> Plan:
    addresses: Any = Addresses()
    rows = tuple(addresses.num_rows(module) for module in range(addresses.num_modules))
    return make_plan(job.batches(0, 0, 1), HostFinder(addresses), Sharding(rows, 1), 0, None)


def densely_summed(values_UD: Tensor, indices: Any, gradients_BND: list[Tensor]) -> Tensor:
    """As autograd has it: a gradient of all rows for each micro-batch, added one by one."""
    leaf_UD = values_UD.detach().clone().requires_grad_()
    for index, gradient_ND in zip(indices, gradients_BND, strict=True):
        gather(leaf_UD, index).backward(gradient_ND)
    assert leaf_UD.grad is not None
    return leaf_UD.grad


@pytest.mark.parametrize("micro_batch", [2, 12])
def test_micro_batches_add_up_to_the_bits_of_dense_gradients(micro_batch: int) -> None:
    """Also numbers below the smallest normal one, and those that cancel."""
    plan = plan_of(Job(global_batch=12, micro_batch=micro_batch)).modules[0]
    values_UD = torch.randn(plan.indices[0].num_rows, DIM)
    sizes = [len(index.segment_N) for index in plan.indices]
    scales = torch.tensor([1e-41, 1.0, -1.0, 0.0, 1e20, -1e-41])
    given = [torch.randn(size, 1) * scales for size in sizes]
    module = ModuleGradient(plan, RowValues(values_UD), None)
    for place, gradient_ND in enumerate(given):
        leaf_VD, index = module.leaf(place)
        assert len(leaf_VD) == len(plan.indices[place].rows_V)
        assert torch.equal(gather(leaf_VD, index), values_UD[plan.indices[place].index_N.long()])
        gather(leaf_VD, index).backward(gradient_ND)
    expected_UD = densely_summed(values_UD, plan.indices, given)
    assert torch.equal(module.sum().view(torch.int32), expected_UD.view(torch.int32))


def test_a_micro_batch_touches_its_own_rows_alone() -> None:
    """No gradient of all rows: the sum is the only memory of its size."""
    plan = plan_of(JOB).modules[0]
    values_UD = torch.randn(plan.indices[0].num_rows, DIM)
    module, added = ModuleGradient(plan, RowValues(values_UD), None), []
    with mock.patch.object(gradients, "add_rows", lambda table, rows, part: added.append((len(rows), len(part)))):
        for place in range(len(plan.indices)):
            leaf_VD, index = module.leaf(place)
            gather(leaf_VD, index).sum().backward()
            assert leaf_VD.grad is None, "kept beside the sum"
    assert added == [(len(index.rows_V),) * 2 for index in plan.indices]
    assert max(added)[0] < len(values_UD), "the test would prove nothing"


def test_a_single_rank_copies_no_rows() -> None:
    """They are looked up in their slots or, where they missed steps, beside them; a leaf has no values of its own."""
    pytest.importorskip("numba")
    job = Job(steps=3, global_batch=12, micro_batch=4)
    with contextlib.closing(open_tables(job, OffloadConfig(depth=1))) as tables:
        for number in range(3):
            step = tables.begin(number)
            for place in range(len(step.batches)):
                for rows, values, (leaf, index) in zip(
                    step.rows.found, step.rows.values, step.rows.of(place), strict=True
                ):
                    assert rows.table_CW.data_ptr() == tables._shard.store.records.data_ptr()
                    assert leaf.untyped_storage().nbytes() == 4
                    looked_up = gather(leaf, index)
                    names = index.rows_V.long() if len(index.rows_V) < len(values) else slice(None)
                    assert torch.equal(looked_up, values[names][index.segment_N.long()])
                    looked_up.square().sum().backward()
            step.reduce()
            step.apply(lr=0.1)


def test_the_norm_is_summed_by_one_thread_and_so_are_its_bits_at_any_number() -> None:
    """OpenMP's threads, once woken, would keep the cores that the update wants."""
    job, threads, seen = Job(steps=1), torch.get_num_threads(), []
    norm = torch.linalg.vecdot

    def watched(*tensors: Tensor) -> Tensor:
        seen.append(torch.get_num_threads())
        return norm(*tensors)

    torch.set_num_threads(2)
    try:
        with (
            contextlib.closing(open_tables(job, OffloadConfig())) as tables,
            mock.patch.object(torch.linalg, "vecdot", watched),
        ):
            train_step(tables, job, 0)
        assert (seen, torch.get_num_threads()) == ([1], 2)
        with pytest.raises(KeyError), on_one_thread():
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_a_gradient_that_comes_too_late_is_refused() -> None:
    plan = plan_of(JOB).modules[0]
    module = ModuleGradient(plan, RowValues(torch.zeros(plan.indices[0].num_rows, DIM)), None)
    for place in range(len(plan.indices)):
        gather(*module.leaf(place)).sum().backward()
    with pytest.raises(RuntimeError, match="came after those of all micro-batches were sent"):
        gather(*module.leaf(0)).sum().backward()


@contextmanager
def noted(log: list[str]) -> Iterator[None]:
    """Notes when gradients are sent and awaited."""
    begin = exchange._all_to_all

    def sending(sent: Tensor, *args: Any) -> Callable[[], Tensor]:
        arrived = begin(sent, *args)
        log.append(f"sent {len(sent)}")

        def arriving() -> Tensor:
            log.append("awaited")
            return arrived()

        return arriving

    with mock.patch.object(exchange, "_all_to_all", sending):
        yield


def order_of_a_step() -> tuple[list[str], list[int]]:
    """What a rank does in a step of three micro-batches, of layers module 0, module 1, and more; and its rows."""
    log: list[str] = []
    job = Job(steps=1, global_batch=6, micro_batch=6 // dist.get_world_size() // 3)
    with contextlib.closing(open_tables(job, OffloadConfig(depth=0))) as tables, noted(log):
        step = tables.begin(0)
        del log[:]
        for place in range(3):
            stream = torch.ones(1, requires_grad=True)
            stream.register_hook(lambda _, place=place: log.append(f"backward {place} ends"))
            hidden = stream
            for leaf, index in step.rows.of(place):
                hidden = hidden * 2 + gather(leaf, index).sum()
            log.append(f"backward {place}")
            hidden.backward()
        log.append("reduce")
        step.reduce()
        step.apply(lr=0.1)
    return log, [len(values) for values in step.rows.values]


def test_gradients_leave_with_the_last_micro_batchs_while_its_backward_goes_on() -> None:
    for log, (first, second) in run_ranks(order_of_a_step, 2):
        assert log == [
            *("backward 0", "backward 0 ends", "backward 1", "backward 1 ends", "backward 2"),
            *(f"sent {second}", f"sent {first}", "backward 2 ends"),
            *("reduce", "awaited", "awaited"),
        ]
