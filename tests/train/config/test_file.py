import math
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field, RootModel, model_validator

from train.config.file import base_of, dump, load
from train.errors import UserError


class Section(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True):
    pass


class Link(Section):
    bytes_per_s: float = Field(gt=0, allow_inf_nan=False)


class Train(Section):
    steps: int = Field(ge=1)
    """Optimizer steps in all.

    Counted from the first run,
    also when resumed."""
    seed: int = Field(0, ge=0)
    warmup: int = 0
    rate: float = 1e-3
    folder: Path = Path("runs")
    layers: tuple[int, ...] = (1,)
    orders: list[Literal["two", "three"]] = []
    batch: int | Literal["auto"] = "auto"
    name: str | None = None

    @model_validator(mode="after")
    def _warmup_fits(self) -> "Train":
        if self.warmup > self.steps:
            raise ValueError(f"warmup {self.warmup} is longer than the run of {self.steps} steps")
        return self


class Offload(Section):
    depth: int = Field(1, ge=0, le=64)
    mode: Literal["window", "resident"] = "window"
    link: Link | None = None


class Eval(Section):
    every: int = Field(100, multiple_of=10)
    every_seed: bool = False


class Passed(BaseModel, extra="allow", frozen=True, strict=True):
    stage: int = 0


class Raw(RootModel[dict[str, Any]], frozen=True):
    root: dict[str, Any] = {}


class Job(Section):
    train: Train
    offload: Offload = Offload()
    eval: Eval = Eval()
    engine: dict[str, Any] = {}
    passed: Passed = Passed()
    raw: Raw = Raw()

    @model_validator(mode="after")
    def _sections_agree(self) -> "Job":
        if self.offload.depth > self.train.steps:
            raise ValueError("offload.depth looks further ahead than train.steps")
        return self


BASE = "train: {steps: 30}\n"


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(**files: str) -> None:
    for name, text in files.items():
        Path(f"{name}.yaml").write_text(text)


def message(*overrides: str, file: str = "job.yaml") -> str:
    with pytest.raises(UserError) as caught:
        load(file, overrides, Job)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_bases_merge_key_by_key_and_lists_are_replaced() -> None:
    Path("sub").mkdir()
    write(
        root="train: {steps: 9, seed: 1, layers: [1, 2]}\noffload: {link: {bytes_per_s: 2e9}}\nengine: {a: {b: 1}}",
        middle="extends: root.yaml\ntrain: {seed: 2, rate: 4e-4}\nengine: {a: {c: 2}}",
        **{"sub/job": "extends: ../middle.yaml\ntrain: {layers: [7]}\noffload: {link: null}"},
    )
    job = load("sub/job.yaml", ["train.seed=5", "engine.a.d=x y", "train.folder=out/a"], Job)
    assert job.train == Train(steps=9, seed=5, rate=4e-4, layers=(7,), folder=Path("out/a"))
    assert job.offload.link is None
    assert job.engine == {"a": {"b": 1, "c": 2, "d": "x y"}}


def test_the_last_override_wins_and_a_mapping_opens_a_section_that_was_null() -> None:
    write(job=BASE + "offload: {link: null}")
    job = load("job.yaml", ["train.seed=1", "train.seed=2", "offload.link.bytes_per_s=1e9"], Job)
    assert (job.train.seed, job.offload.link) == (2, Link(bytes_per_s=1e9))
    assert load("job.yaml", ["offload.link={bytes_per_s: 1}", "offload.link=null"], Job).offload.link is None


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("offload.detph=3", "offload.detph: unknown key; did you mean offload.depth? (allowed: depth, mode, link)"),
        ("offload.seed=3", "offload.seed: unknown key; did you mean train.seed? (allowed: depth, mode, link)"),
        (
            "steps=3",
            "steps: unknown key; did you mean train.steps? (sections: train, offload, eval, engine, passed, raw)",
        ),
        (
            "offlaod.depth=3",
            "offlaod: unknown key; did you mean offload? (sections: train, offload, eval, engine, passed, raw)",
        ),
        (
            "train.zzz=3",
            "train.zzz: unknown key (allowed: steps, seed, warmup, rate, folder, layers, orders, batch, name)",
        ),
        ("train.steps=many", 'train.steps: expected an integer >= 1, got "many"'),
        ("train.steps=0", "train.steps: expected an integer >= 1, got 0"),
        ("train.steps=1e3", "train.steps: expected an integer >= 1, got 1000.0"),
        ("train.steps=true", "train.steps: expected an integer >= 1, got true"),
        ("train.steps={a: 1}", "train.steps: expected an integer >= 1, got a mapping"),
        ("offload.depth=65", "offload.depth: expected an integer >= 0 and <= 64, got 65"),
        ("offload.mode=windw", 'offload.mode: expected one of window, resident, got "windw"'),
        ("train.batch=half", 'train.batch: expected an integer or auto, got "half"'),
        ("train.name=3", "train.name: expected text or null, got 3"),
        ("train.rate='4e-4'", 'train.rate: expected a number, got "4e-4"'),
        ("train.layers=[1, x]", 'train.layers.1: expected an integer, got "x"'),
        ("train.layers=3", "train.layers: expected a list, each an integer, got 3"),
        ("train.orders=[four]", 'train.orders.0: expected one of two, three, got "four"'),
        ("offload.link={}", "offload.link.bytes_per_s: missing; expected a number > 0"),
        ("offload.link.bytes_per_s=.inf", "offload.link.bytes_per_s: expected a finite number > 0, got inf"),
        ("offload=null", "offload: expected a mapping of keys, got null"),
        ("eval.every=15", "eval.every: expected an integer, a multiple of 10, got 15"),
        ("eval.every_seed=yes", 'eval.every_seed: expected true or false, got "yes"'),
        ("train.seed", 'expected section.key=value, got "train.seed"'),
        ("train.seed=", 'expected section.key=value, got "train.seed="'),
        ("train..seed=1", 'expected section.key=value, got "train..seed=1"'),
        ("train.layers=[1", "train.layers: not a YAML value (line 1: "),
        ("extends=x.yaml", "extends: belongs in a file"),
    ],
)
def test_a_wrong_override_is_told_with_what_is_allowed(override: str, expected: str) -> None:
    write(job=BASE)
    assert message(override).startswith(f"command line: {expected}")


def test_the_message_names_the_file_in_which_the_key_stands() -> None:
    write(base="train: {steps: 3, sede: 1}", job="extends: base.yaml\noffload: {depth: 1}")
    assert message().startswith("base.yaml: train.sede: unknown key; did you mean train.seed?")
    write(base="train: {steps: 3, seed: -1}")
    assert message() == "base.yaml: train.seed: expected an integer >= 0, got -1"
    write(job="extends: base.yaml\ntrain: {seed: x}")
    assert message().startswith("job.yaml: train.seed: ")
    write(job="offload: {depth: 1}")
    assert message() == "job.yaml: train: missing; expected a mapping of keys"


def test_a_mistyped_key_is_told_before_the_missing_one_it_causes() -> None:
    write(job="train: {stesp: 3}")
    assert message().startswith("job.yaml: train.stesp: unknown key; did you mean train.steps? (allowed: ")
    assert message().endswith(" | job.yaml: train.steps: missing; expected an integer >= 1")


def test_all_mistakes_are_told_at_once_each_with_its_source() -> None:
    write(base="train: {steps: 0, seed: -1}", job="extends: base.yaml\noffload: {depth: x}")
    assert message("train.warmup=y").split(" | ") == [
        "base.yaml: train.steps: expected an integer >= 1, got 0",
        "base.yaml: train.seed: expected an integer >= 0, got -1",
        'command line: train.warmup: expected an integer, got "y"',
        'job.yaml: offload.depth: expected an integer >= 0 and <= 64, got "x"',
    ]
    write(job="train: {steps: 3, " + ", ".join(f"key{number}: 1" for number in range(20)) + "}")
    assert message().count(" | ") == 12
    assert message().endswith(" | and 8 more")


def test_a_dotted_key_in_a_file_is_told_how_to_nest() -> None:
    write(job=BASE + "offload.depth: 3")
    assert message() == "job.yaml: offload.depth: unknown key; in a file, write depth as a key under offload"


def test_impossible_combinations_name_all_their_sources() -> None:
    write(base="train: {steps: 3, warmup: 2}", job="extends: base.yaml")
    assert message("train.steps=1") == ("base.yaml + command line: train: warmup 2 is longer than the run of 1 steps")
    write(job="extends: base.yaml\noffload: {depth: 9}")
    assert message() == "base.yaml + job.yaml: offload.depth looks further ahead than train.steps"


def test_unreadable_files_are_one_line() -> None:
    write(
        job=BASE,
        circle="extends: ring.yaml",
        ring="extends: circle.yaml",
        orphan="extends: jbo.yaml",
        two="extends: [a]",
    )
    assert message(file="jbo.yaml") == "jbo.yaml: no such file or directory; did you mean job.yaml?"
    assert message(file="no/such.yaml") == "no/such.yaml: no such file or directory"
    assert message(file="orphan.yaml").endswith("did you mean job.yaml? (named by extends in orphan.yaml)")
    assert message(file=".") == ".: is a directory"
    assert message(file="circle.yaml") == (
        "ring.yaml: extends: goes in a circle: circle.yaml -> ring.yaml -> circle.yaml"
    )
    assert message(file="two.yaml") == 'two.yaml: extends: expected the name of one file, got ["a"]'
    write(list="- a", empty="# nothing\n", twice=BASE + BASE, syntax="train:\n  steps: [1\n")
    assert message(file="list.yaml") == "list.yaml: expected a mapping of sections such as `train:`, found list"
    assert message(file="empty.yaml") == "empty.yaml: expected a mapping of sections such as `train:`, found nothing"
    assert message(file="twice.yaml") == "twice.yaml: line 2: train: this key appears twice"
    assert message(file="syntax.yaml").startswith("syntax.yaml: line 3: ")
    Path("latin.yaml").write_bytes(b"train: {name: \xe9}")
    assert message(file="latin.yaml") == "latin.yaml: not UTF-8 text (byte 14)"


def test_the_resolved_config_is_documented_and_leaves_no_partial_file() -> None:
    write(job=BASE)
    dump(load("job.yaml", [], Job), "resolved.yaml")
    text = Path("resolved.yaml").read_text()
    assert "  # Optimizer steps in all.\n  # Counted from the first run, also when resumed.\n  steps: 30\n" in text
    assert sorted(path.name for path in Path().iterdir()) == ["job.yaml", "resolved.yaml"]


def test_a_failed_dump_keeps_the_old_file(monkeypatch: pytest.MonkeyPatch) -> None:
    write(job=BASE)
    job = load("job.yaml", [], Job)

    def full(self: Path, *args: object, **kwargs: object) -> int:
        with self.open("w") as file:
            file.write("train:")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        dump(job, "job.yaml")
    assert Path("job.yaml").read_text() == BASE
    assert [path.name for path in Path().iterdir()] == ["job.yaml"]


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"))  # what a config can hold
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
RATES = st.floats(allow_nan=False)
JOBS = st.builds(
    Job,
    train=st.builds(
        Train,
        steps=st.integers(64, 2**63 - 1),
        warmup=st.integers(0, 64),
        rate=RATES,
        folder=st.text("ab/. #'", min_size=1).map(Path),
        layers=st.lists(st.integers()).map(tuple),
        orders=st.lists(st.sampled_from(["two", "three"])),
        batch=st.integers() | st.just("auto"),
        name=st.none() | TEXT,
    ),
    offload=st.builds(
        Offload,
        depth=st.integers(0, 64),
        link=st.none() | st.builds(Link, bytes_per_s=st.floats(0, exclude_min=True, allow_infinity=False)),
    ),
    engine=st.dictionaries(TEXT, JSON, max_size=3),
    passed=st.dictionaries(st.sampled_from(["a", "b-c", "1", "stage"]), st.integers()).map(Passed.model_validate),
    raw=st.dictionaries(TEXT, JSON, max_size=3).map(Raw),
)


@given(job=JOBS)
@example(job=Job(train=Train(steps=64), engine={"a": math.inf}, raw=Raw({"": -math.inf})))
@example(job=Job(train=Train(steps=64, folder=Path("a..."), name="and so on...")))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_dumped_configs_load_back_equal(job: Job) -> None:
    dump(job, "resolved.yaml")
    loaded = load("resolved.yaml", [], Job)
    assert loaded == job
    assert math.copysign(1, loaded.train.rate) == math.copysign(1, job.train.rate)


def test_the_base_of_a_config_is_what_it_extends_or_itself(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("train: {steps: 1, seed: 2}\n")
    (tmp_path / "two.yaml").write_text("extends: one.yaml\ntrain: {steps: 5}\n")
    (tmp_path / "three.yaml").write_text("extends: two.yaml\ntrain: {seed: 7}\n")
    assert base_of(tmp_path / "three.yaml") == (str(tmp_path / "two.yaml"), {"train": {"steps": 5, "seed": 2}})
    assert base_of(tmp_path / "one.yaml") == (str(tmp_path / "one.yaml"), {"train": {"steps": 1, "seed": 2}})
