"""The figures of a job's model and tables, all from its config: nothing is allocated, no data or tokenizer needed."""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from launch.plan.memory.tables import HostMemory, Table, Window, count_tables, host_memory, window
from model.census import Census, PartCount, take_census
from model.flops import Flops, flops_per_token
from train.config.job import JobConfig


@dataclass(frozen=True)
class Figures:
    """The sizes of a model.

    Attributes:
        job: the config.
        ranks: that share the tables.
        census: of the backbone and the Engram modules.
        tables: one per Engram layer.
        host_memory: that the tables take, by optimizer, row dtype and state dtype.
        window: on each rank's device; None without tables.
        flops: of training on one token.
    """

    job: JobConfig
    ranks: int
    census: Census
    tables: list[Table]
    host_memory: list[HostMemory]
    window: Window | None
    flops: Flops

    @cached_property
    def parts(self) -> dict[str, PartCount]:
        """The census, and the rows of the tables as a part of their own: those that one token reads are active."""
        engram = self.job.model.engram
        stored = sum(table.parameters for table in self.tables)
        read = len(engram.layers) * engram.memory_width if engram else 0
        return self.census.parts | {"engram_tables": PartCount(stored, read)}

    @property
    def step_tokens(self) -> int:
        """Tokens of a training step."""
        return self.job.train.global_batch_size * self.job.data.sequence_length

    @property
    def total(self) -> int:
        """All parameters, tables included."""
        return sum(part.total for part in self.parts.values())

    @property
    def active(self) -> int:
        """Those active for one token, the rows that it reads included, the input embedding not."""
        return sum(part.active for part in self.parts.values())

    @property
    def active_with_embedding(self) -> int:
        """The same with the whole input embedding."""
        embedding = self.parts["input_embedding"]
        return self.active + embedding.total - embedding.active

    @cached_property
    def non_embedding(self) -> tuple[int, int]:
        """Total and active parameters, both without input embedding and head (the Engram paper's P_tot and P_act,
        section 3.1)."""
        ends = [self.parts[part] for part in ("input_embedding", "output_head")]
        return self.total - sum(part.total for part in ends), self.active - sum(part.active for part in ends)

    @property
    def allocation_ratio(self) -> float | None:
        """rho of the Engram paper (section 3.1, equation 7): the routed experts' share of the inactive parameters
        P_tot - P_act, the others being table rows that a token does not read. None where there are none."""
        total, active = self.non_embedding
        return self.census.idle_experts / (total - active) if total > active else None

    def to_json(self) -> dict[str, Any]:
        """The figures as a JSON object."""
        moe, (total, active) = self.job.model.moe, self.non_embedding
        return {
            "run": self.job.run.name,
            "parameters": {
                "parts": {name: {"total": part.total, "active": part.active} for name, part in self.parts.items()},
                "total": self.total,
                "active": self.active,
                "active_with_input_embedding": self.active_with_embedding,
                "non_embedding": {"total": total, "active": active},
            },
            "routed_experts": moe.num_experts if moe else 0,
            "experts_per_token": moe.experts_per_token if moe else 0,
            "allocation_ratio": self.allocation_ratio,
            "tables": [asdict(table) for table in self.tables],
            "flops_per_token": {
                "sequence_length": self.job.data.sequence_length,
                **self.flops._asdict(),
                "total": self.flops.total,
            },
            "step_tokens": self.step_tokens,
            "steps": self.job.train.steps,
            "ranks": self.ranks,
            "host_memory": [asdict(memory) for memory in self.host_memory],
            "window": asdict(self.window) if self.window else None,
        }


def plan(job: JobConfig, ranks: int) -> Figures:
    """Computes the figures: in seconds for the largest models, and without their memory."""
    model = job.model
    census = take_census(model)
    flops = flops_per_token(model, census, job.data.sequence_length)
    if model.engram is None:
        return Figures(job, ranks, census, [], [], None, flops)
    tables = count_tables(model.engram)
    return Figures(
        job,
        ranks,
        census,
        tables,
        host_memory(tables, model.engram, job.offload, ranks),
        window(tables, model.engram, job.offload, ranks),
        flops,
    )
