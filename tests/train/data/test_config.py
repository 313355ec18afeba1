import pytest
from pydantic import ValidationError

from train.data.config import DataConfig


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
