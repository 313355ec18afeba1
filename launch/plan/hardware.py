"""The hardware numbers of hardware.yaml, and of a file of the user's that is laid over it.

What the keys mean is said in the file; times in seconds, sizes in bytes, rates in bytes or operations per second. What
tests/emulation alone reads has a default: a file of the user's need not have it.
"""

import difflib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from train.config import yaml_text
from train.errors import UserError

FILE = Path(__file__).with_name("hardware.yaml")


class _Numbers(BaseModel, extra="forbid", frozen=True):
    pass


class Kept(_Numbers):
    """What a rank's process keeps beyond its tensors, of what comes and goes in a step."""

    bytes: float = Field(0.0, ge=0)
    share: float = Field(0.0, ge=0)


class Device(_Numbers):
    """A GPU, or a processor in place of one."""

    overlaps_launches: bool = True
    flops_per_second: float = Field(gt=0)
    columns_at_half_rate: float = Field(0.0, ge=0)
    rate_with_all_busy: float = Field(1.0, gt=0, le=1)
    memory_bytes: float = Field(gt=0)
    memory_bytes_per_second: float = Field(gt=0)
    exchange_bytes_per_second: float = Field(gt=0)
    gather_bytes_per_second: float | None = Field(None, gt=0)
    kept: Kept = Kept()
    kept_adding: Kept = Kept()

    @property
    def is_processor(self) -> bool:
        """Whether the ranks compute on the machine's processor, and their tensors are in its memory."""
        return not self.overlaps_launches


class Link(_Numbers):
    """The bus between a GPU and host memory."""

    copy_engine_bytes_per_second: float = Field(gt=0)
    fetch_bytes_per_second: float = Field(gt=0)
    write_back_bytes_per_second: float = Field(gt=0)
    write_back_with_4_programs: float = Field(1.0, gt=0, le=1)  # tests/emulation
    both_directions: float = Field(gt=0, le=1)
    beside_model: float = Field(1.0, gt=0, le=1)  # tests/emulation
    lost_to_copies: float = Field(ge=0, lt=1)


class Host(_Numbers):
    """The processor, as one rank sees it."""

    launch_seconds: float = Field(ge=0)
    decide_seconds: float = Field(ge=0)
    # tests/emulation
    lost_to_each_thread: float = Field(0.0, ge=0, lt=0.5)
    factor: float = Field(1.0, ge=0)
    gather_bytes_per_second: float = Field(4.1e9, gt=0)
    scatter_bytes_per_second: float = Field(2.8e9, gt=0)
    staging_cores: int = Field(4, ge=1)


class Rows(_Numbers):
    """The row optimizer's kernels, of rows of 80 columns."""

    read_seconds: float = Field(ge=0)
    update_seconds: float = Field(ge=0)
    draw_seconds: float = Field(0.0, ge=0)  # tests/emulation


class Backbone(_Numbers):
    """The backbone's optimizer."""

    optimizer_bytes: float = Field(ge=0)
    optimizer_launches: int = Field(ge=0)


class Node(_Numbers):
    """A machine with its GPUs."""

    memory_bytes: float = Field(gt=0)
    dram_bytes_per_second: float = Field(gt=0)
    disk_records_per_second: float = Field(500e3, gt=0)
    cores: int = Field(ge=1)


class Hardware(_Numbers):
    """A kind of GPU, and the machines that it comes in."""

    device: Device
    link: Link
    host: Host
    rows: Rows
    backbone: Backbone
    node: Node


class Network(_Numbers):
    """What joins the machines."""

    bytes_per_second: float = Field(gt=0)
    ports: Literal["gpu", "node"]
    latency_seconds: float = Field(ge=0)


class Catalogue(_Numbers):
    """All that is known, by name."""

    gpus: dict[str, Hardware] = {}
    networks: dict[str, Network] = {}

    def gpu(self, name: str) -> Hardware:
        """Raises UserError with the nearest name if there is no such GPU."""
        return self.gpus[_known(name, "--gpu", list(self.gpus))]

    def network(self, name: str) -> Network:
        """Raises UserError with the nearest name if there is no such network."""
        return self.networks[_known(name, "--network", list(self.networks))]


def read_catalogue(file: str | Path | None = None) -> Catalogue:
    """The numbers of this project, with those of `file` laid over them, key by key.

    Raises:
        UserError: the file is missing, is not YAML, or has a key or a number that cannot be.
    """
    values = _read(FILE)
    if file is not None:
        values = _laid_over(values, _read(Path(file)))
    try:
        return Catalogue.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{file or FILE}: {where}: {first['msg'].lower()} (launch/plan/hardware.yaml says what each key means)"
        ) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml_text.parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping with `gpus:` or `networks:`, as in launch/plan/hardware.yaml")
    return values


def _laid_over(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        mine = base.get(key)
        merged[key] = _laid_over(mine, value) if isinstance(mine, dict) and isinstance(value, dict) else value
    return merged


def _known(name: str, option: str, names: list[str]) -> str:
    if name in names:
        return name
    near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else "others come from a file of yours, given with --hardware"
    raise UserError(f"{option}: no numbers of {name!r}, only of {', '.join(names)}; {hint}")
