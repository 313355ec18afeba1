"""Plans on their way to a device whose memory is not the host's: one copy a step, of what the device needs alone."""

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from offload.config import OffloadConfig
from offload.device.streams import HostStreams
from offload.plan.finders import HostFinder
from offload.plan.plan import Plan, make_plan
from offload.plan.sharding import Sharding
from offload.plan.uploads import PlanUploads
from tests.distributed import run_ranks
from tests.offload.tables_job import Addresses, Job, run_job

CPU = torch.device("cpu")
JOB = Job(steps=4, global_batch=8, micro_batch=1)


class Apart(HostStreams):
    """A device that reads nothing of the host's: what it has was sent."""

    def __init__(self) -> None:
        self.sent: list[Tensor] = []

    def reads(self, tensor: Tensor) -> bool:
        return False

    def pin(self, tensor: Tensor) -> Tensor:
        self.sent.append(tensor)
        return tensor.clone()


def uploads_apart() -> tuple[PlanUploads, Apart]:
    streams = Apart()
    with mock.patch("offload.device.sender.streams_of", return_value=streams):
        return PlanUploads(CPU), streams


def plan_of(batches: int) -> Plan:
    job = replace(JOB, global_batch=batches)
    addresses: Any = Addresses()
    rows = tuple(addresses.num_rows(module) for module in range(addresses.num_modules))
    return make_plan(job.batches(0, 0, 1), HostFinder(addresses), Sharding(rows, 1), 0, None)


@pytest.mark.parametrize("batches", [1, 8])
def test_a_plan_is_sent_as_one_however_many_micro_batches_it_has(batches: int) -> None:
    uploads, streams = uploads_apart()
    plan = plan_of(batches)
    expected = [tensor.clone() for tensor in plan.tensors]
    pinned = uploads.pin(plan)
    streams.sent.clear()
    uploads.send(3, pinned)
    assert [len(sent) for sent in streams.sent] == [sum(map(len, expected))]
    there = uploads.take(3, pinned)
    assert there.packed is None
    assert len(there.tensors) == len(expected) == 2 * (4 * batches + 3)
    for found, tensor in zip(there.tensors, expected, strict=True):
        assert torch.equal(found, tensor)
        assert found.dtype == torch.int32


def test_a_single_rank_sends_itself_no_places() -> None:
    plan = plan_of(8)
    of_indices = [part for module in plan.modules for index in module.indices for part in index.tensors]
    assert sum(map(len, plan.tensors)) == sum(map(len, of_indices))


def run_apart(config: OffloadConfig) -> tuple[str, str]:
    """Digests of a job whose plans lie where they were made, and of one whose plans were sent."""
    here = run_job(JOB, config)
    with mock.patch("offload.tables.PlanUploads", return_value=uploads_apart()[0]):
        apart = run_job(JOB, config)
    return here.digest, apart.digest


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_was_sent_trains_the_same_bits(ranks: int) -> None:
    config = OffloadConfig(depth=2, window_rows=1000, verify=True)
    results = [run_apart(config)] if ranks == 1 else run_ranks(run_apart, ranks, config)
    for here, apart in results:
        assert here == apart
