import re

import pytest
from pydantic import ValidationError

from train.data.config import DataConfig, MixSource


def test_defaults_survive_a_round_trip_through_plain_values():
    config = DataConfig(sequence_length=128, path="x")
    assert DataConfig.model_validate(config.model_dump()) == config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sequence_lenght", 5),
        ("sequence_length", "256"),
        ("sequence_length", 1),
        ("validation_fraction", 0.9),
        ("corpus", "c"),
        ("bpe_vocab", 257),
        ("workers", 0),
    ],
)
def test_wrong_values_are_refused(key, value):
    with pytest.raises(ValidationError, match=key):
        DataConfig.model_validate({key: value})


def test_every_field_is_documented():
    assert all(field.description for field in DataConfig.model_fields.values())


def test_the_saved_config_of_an_older_run_is_taken():
    assert DataConfig.model_validate({"corpus": "python", "path": "x"}) == DataConfig(path="x")


@pytest.mark.parametrize("ranges", [[[0, 1]], [[3, 2]], [[1, 4], [4, 5]], [[5]]])
def test_ranges_to_pass_over_ascend_and_do_not_meet(ranges: list[list[int]]) -> None:
    with pytest.raises(ValidationError, match="is not a range"):
        DataConfig(skip_steps=ranges)
    assert DataConfig(skip_steps=[[1, 4], [5, 5]]).skip_steps == [[1, 4], [5, 5]]


def test_paths_are_those_of_the_place_where_they_were_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    anchored = DataConfig(path="a/b", tokenizer="../t.json").anchored()
    assert (anchored.path, anchored.tokenizer) == (f"{tmp_path}/a/b", f"{tmp_path}/../t.json")
    assert anchored.cache == f"{tmp_path}/data"
    assert DataConfig(path="/x", tokenizer="deepseek").anchored().tokenizer == "deepseek"
    assert DataConfig().anchored() == DataConfig(cache=f"{tmp_path}/data")
    mixed = DataConfig.model_validate({"mix": "1 a 2 /x/b", "phases": [{"after_steps": 1, "mix": "1 c"}]}).anchored()
    urls = DataConfig.model_validate({"mix": "1 s3://b/web 1 https://x/code"})
    assert urls.anchored().mix == urls.mix
    assert [source.called for source in urls.mix or []] == ["web", "code"]
    (web, code), (late,) = mixed.mix or [], mixed.phases[0].mix or []
    assert (web.path, code.path, late.path) == (f"{tmp_path}/a", "/x/b", f"{tmp_path}/c")


def test_megatrons_blend_is_read_as_what_it_stands_for() -> None:
    mix = [{"path": "data/my web", "weight": 0.7}, {"path": "data/code", "weight": 0.3}]
    wanted = DataConfig.model_validate({"mix": mix})
    for written in ("0.7 'data/my web' 0.3 data/code", ["0.7", "data/my web", 0.3, "data/code"]):
        assert DataConfig.model_validate({"mix": written}) == wanted
    phase = {"after_steps": 5, "mix": "1 data/code"}
    assert DataConfig.model_validate({"mix": mix, "phases": [phase]}).phases[0].mix == [
        MixSource(path="data/code", weight=1.0)
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"mix": []}, "no source: name at least one"),
        ({"mix": "0.7 a 0.3"}, "expected `weight path weight path ...`, got 3 words"),
        ({"mix": "a 0.7 b 0.3"}, "got 'a' in the place of a weight"),
        ({"mix": "0 a 1 b"}, "greater than 0"),
        ({"mix": "1 a 2 a"}, "a path stands there twice"),
        ({"mix": "1 web/en 2 code/en"}, "are both called en"),
        ({"mix": [{"path": "a"}]}, "a: give it a weight, or tokens"),
        ({"mix": [{"path": "a", "weight": 1.0}, {"path": "b", "tokens": 5}]}, "all sources of a mixture have a weight"),
        ({"mix": "1 a", "path": "b"}, "path and mix are both set"),
        ({"phases": [{"after_steps": 3, "mix": "1 a"}]}, "the run begins without one"),
        ({"path": "a", "phases": [{"after_steps": 3}]}, "a phase changes mix or sequence_length"),
        ({"path": "a", "phases": [{"sequence_length": 9}]}, "begins after_steps or after_tokens"),
        ({"shuffle_window": 9, "packing": "best_fit"}, "shuffle_window and packing: best_fit exclude each other"),
    ],
)
def test_mixtures_and_phases_that_are_none_are_refused(data, message):
    with pytest.raises(ValidationError, match=re.escape(message)):
        DataConfig.model_validate(data)
