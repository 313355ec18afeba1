"""Every YAML in `configs/` is a valid job, and so is what it resolves to."""

import re
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from launch.plan.figures import plan
from train.config.errors import Schema, dotted
from train.config.file import dump, load
from train.config.job import JobConfig

CONFIGS_FOLDER = Path(__file__).parent.parent / "configs"
CONFIGS = sorted(CONFIGS_FOLDER.rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_loads_and_its_resolved_form_loads_back(path: Path, tmp_path: Path) -> None:
    job = load(path, [], JobConfig)
    dump(job, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml", [], JobConfig) == job


def test_every_field_of_every_section_is_described() -> None:
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


def test_the_page_about_configs_says_where_each_section_is_declared() -> None:
    text = (CONFIGS_FOLDER.parent / "docs" / "config.md").read_text()
    said = dict(re.findall(r"^\| `(\w+)` \| `([\w/.]+)` \|", text, re.MULTILINE))
    sections = {name: field.annotation for name, field in JobConfig.model_fields.items()}
    assert said == {name: f"{schema.__module__.replace('.', '/')}.py" for name, schema in sections.items()}


def test_the_default_job_has_more_rows_than_its_windows() -> None:
    job = load(CONFIGS[[path.stem for path in CONFIGS].index("tiny")], [], JobConfig)
    assert job.model.engram is not None
    rows = len(job.model.engram.layers) * job.model.engram.lookups_per_token * job.model.engram.rows_per_head
    assert rows > 2 * 2 * job.offload.window_rows


def test_the_bench_trains_what_the_figures_are_claimed_for() -> None:
    job = load(CONFIGS[[path.stem for path in CONFIGS].index("bench")], [], JobConfig)
    assert job.model.moe
    assert job.model.hyper_connections
    figures = plan(job, ranks=1)
    assert figures.active > 300e6
    rows = sum(table.rows for table in figures.tables)
    assert rows >= 4 * job.offload.window_rows
    table_bytes, backbone = rows * 1024, figures.total - 80 * rows
    assert table_bytes > 20e9
    # bf16 weights and gradients, fp32 masters, gradients and two moments; activations of 11 GB at most.
    assert table_bytes + 20 * backbone + 11e9 < 78 * 2**30


def test_the_study_compares_models_of_equal_size_on_the_same_text_by_the_same_recipe() -> None:
    jobs = {path.stem: load(path, [], JobConfig) for path in CONFIGS if path.parent.name == "study"}
    figures = {name: plan(job, ranks=1) for name, job in jobs.items()}
    moe, engram, control = figures["moe"], figures["engram"], figures["engram-capacity-1"]
    assert engram.total == pytest.approx(moe.total, rel=1e-4)
    assert engram.allocation_ratio == pytest.approx(0.8, abs=1e-3)
    for each in figures.values():
        assert each.active == pytest.approx(moe.active, rel=3e-4)
    assert [table.rows for table in control.tables] == [8]
    assert control.total < engram.total
    rest = [job.model_dump(exclude={"run", "model"}) for job in jobs.values()]
    assert all(each == rest[0] for each in rest)


def test_every_number_of_a_job_has_bounds() -> None:
    schema = Schema(JobConfig)
    for path in schema.fields():
        for node in schema._branches(schema.at(path)):
            bounds = {"maximum", "exclusiveMaximum", "enum"} & node.keys()
            assert node.get("type") != "integer" or bounds, dotted(path)
    sections = [JobConfig]
    while sections:
        section = sections.pop()
        assert section.model_config.get("allow_inf_nan") is False, section
        for field in section.model_fields.values():
            parts = (field.annotation, *get_args(field.annotation))
            sections += [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]
