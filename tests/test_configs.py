"""Every YAML in `configs/` is a valid job, and so is what it resolves to."""

from pathlib import Path

import pytest

from train.config import JobConfig
from train.config_file import dump, load

CONFIGS = sorted((Path(__file__).parent.parent / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_loads_and_its_resolved_form_loads_back(path: Path, tmp_path: Path) -> None:
    job = load(path, [], JobConfig)
    dump(job, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml", [], JobConfig) == job


def test_every_field_of_every_section_is_described() -> None:
    from pydantic import BaseModel

    def check(schema: type[BaseModel], seen: set[type[BaseModel]]) -> None:
        seen.add(schema)
        for name, field in schema.model_fields.items():
            assert field.description, f"{schema.__name__}.{name} has no description"
            for part in [field.annotation, *getattr(field.annotation, "__args__", ())]:
                if isinstance(part, type) and issubclass(part, BaseModel) and part not in seen:
                    check(part, seen)

    seen: set[type[BaseModel]] = set()
    check(JobConfig, seen)
    assert len(seen) > 12


def test_the_default_job_has_more_rows_than_its_windows() -> None:
    job = load(CONFIGS[[path.stem for path in CONFIGS].index("tiny")], [], JobConfig)
    assert job.model.engram is not None
    rows = len(job.model.engram.layers) * job.model.engram.slots * job.model.engram.rows_per_head
    assert rows > 2 * 2 * job.offload.window_rows
