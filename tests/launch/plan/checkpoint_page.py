"""Makes the table of docs/checkpoints.md anew: `python -m tests.launch.plan.checkpoint_page`."""

from launch.plan.cluster import Cluster
from launch.plan.hardware import read_catalogue
from offload.host.limits import size_text
from tests.launch.plan.saves import SavedBytes
from tests.launch.plan.scale_page import DOCS, put
from train.config.file import load
from train.config.job import JobConfig

PAGE, MARK = DOCS / "checkpoints.md", "sizes"
JOBS = {"engram-40b": 8, "deepseek-v41-memory": 64}


def table() -> str:
    """Of Markdown."""
    heads = ["config", "ranks", "rows a rank", "backbone a rank", "all ranks"]
    heads += ["at 1 GB/s a rank", "at 10 GB/s for all", "beside training, a rank", "index, a rank that loads"]
    rows = [heads, ["---"] * len(heads)]
    catalogue = read_catalogue()
    for name, ranks in JOBS.items():
        job = load(DOCS.parent / f"configs/paper/{name}.yaml", (), JobConfig)
        network = catalogue.network("ib400") if ranks > 8 else None
        saved = SavedBytes.of(job, Cluster(ranks // 8, 8, catalogue.gpu("h100"), network))
        sizes = map(size_text, (saved.rows, saved.backbone, ranks * saved.written))
        seconds = (f"{its:.0f} s" for its in (saved.written / 1e9, ranks * saved.written / 10e9))
        memory = map(size_text, (saved.beside, saved.index))
        rows.append([name, str(ranks), *sizes, *seconds, *memory])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    PAGE.write_text(put(PAGE.read_text(), MARK, table()))
