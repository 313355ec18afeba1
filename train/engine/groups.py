"""Which parameters share an optimizer group, and what of them each flat tensor on this rank holds."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from train.engine.auto_ep import LogicalNames
from train.engine.zero.wrapper import Wrapper, expert_group, full_shape
from train.optim.backbone import group_options
from train.optim.flat_parts import FlatPart, Layout
from train.optim.optimizer import GroupKey, OptimizerConfig


def optimizer_groups(
    model: nn.Module, config: OptimizerConfig, assignment: Mapping[str, GroupKey]
) -> list[dict[str, Any]]:
    """Options and parameters of every group: those of one key, and of the same experts' ranks.

    Args:
        model: as DeepSpeed has it.
        config: of the optimizer.
        assignment: key of every parameter, by logical name.
    """
    names = LogicalNames(model)
    members: dict[tuple[GroupKey, str | None], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        members.setdefault((assignment[names.name(name)], expert_group(parameter)), []).append(parameter)
    groups = []
    for (key, experts), parameters in members.items():
        # What DeepSpeed looks for: `moe`, and as `name` that of the ranks the experts are spread over.
        labels = {"name": experts, "moe": True} if experts else {"name": str(key)}
        groups.append({"params": parameters, **group_options(config, key), **labels})
    return groups


def describe_flat_parts(module: nn.Module, names: LogicalNames, wrapper: Wrapper) -> tuple[list[FlatPart], list[bool]]:
    """This rank's flat tensors in logical terms, and whether Muon updates each."""
    name_of = {parameter: name for name, parameter in module.named_parameters()}
    parts, muon = [], []
    for group in wrapper.flat_groups():
        runs = [
            run
            for parameter, *span in group.fragments
            for run in names.runs(name_of[parameter], full_shape(parameter), *span)
        ]
        parts.append(FlatPart(group.flat, runs, group.group, wrapper.replicated))
        muon.append(group.muon)
    return parts, muon


def parameters_of(layout: Layout, selected: Sequence[bool]) -> set[str]:
    """Parameters with a run, on any rank, in a selected part."""
    return {run.name for rank in layout for part, chosen in zip(rank, selected, strict=True) if chosen for run in part}
