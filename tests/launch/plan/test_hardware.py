"""What a file of hardware numbers must have."""

from pathlib import Path

from launch.plan.hardware import read_catalogue
from train.config import yaml_text

EMULATED = {
    "link": {"write_back_with_4_programs", "beside_model"},
    "host": {"lost_to_each_thread", "factor", "gather_bytes_per_second", "scatter_bytes_per_second", "staging_cores"},
    "rows": {"draw_seconds"},
}


def test_a_new_gpu_needs_no_numbers_that_the_emulation_alone_reads(tmp_path: Path) -> None:
    known = read_catalogue().gpu("h200").model_dump()
    numbers = {
        part: {key: known[part][key] for key in known[part] if key not in EMULATED.get(part, ())} for part in known
    }
    (tmp_path / "mine.yaml").write_text(yaml_text.render({"gpus": {"mine": numbers}}))
    mine = read_catalogue(tmp_path / "mine.yaml").gpu("mine")
    assert mine.model_dump(exclude=EMULATED) == numbers
