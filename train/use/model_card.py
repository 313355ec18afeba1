"""The model card of an export: its README.md, in the form that the Hugging Face hub shows."""

from pathlib import Path
from typing import Any

from model.census import take_census
from offload.host.limits import size_text
from train.report.metrics import METRICS_FILE, read_metrics
from train.use.saved_run import SavedRun

MODEL_CARD = "README.md"


def model_card(run: SavedRun, config: dict[str, Any], size: int) -> str:
    """The text. What only the user knows, as the license, is left to fill in.

    Args:
        run: that is exported.
        config: of the export.
        size: bytes of all tensors.
    """
    model, data = run.job.model, run.job.data
    # Names alone: the card may be published, and paths tell of the machine.
    sources = [f"{source.called} ({source.amount:g})" for source in data.first_mix] or [Path(data.shown).name]
    loss = _validation_loss(run)
    rows = {
        "architecture": _architecture(run),
        **_counts(run),
        "context": f"{data.longest:,} tokens",
        "trained on": f"{config['engram_pretrain']['tokens']:,} tokens in {run.step:,} steps",
        "text": ", ".join(sources),
        "validation loss": "not evaluated at this step" if loss is None else f"{loss:.4f} nats a token",
        "vocabulary": f"{model.vocab_size:,} ids; tokenizer `{run.tokenizer.sha256[:12]}`",
        "size": f"{size_text(size)} in {config['torch_dtype']}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return _TEXT.format(name=run.job.run.name, table=table, note=_MEMORY if model.engram else "", trust=_trust(config))


_TEXT = """\
---
library_name: transformers
pipeline_tag: text-generation
# license: fill in, for example apache-2.0
---

# {name}

A base language model, neither instructed nor aligned.

| | |
|---|---|
{table}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER"{trust})
model = AutoModelForCausalLM.from_pretrained("FOLDER"{trust})
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```
{note}
## License

Not stated: to be filled in by whoever publishes this.
"""
_MEMORY = """
The tables are in `tables/`, memory-mapped: rows are read as they are needed, and memory need not hold them all.
`table_placement="cpu"` loads them into memory at first, `table_placement="model"` onto the model's device.
"""


def _trust(config: dict[str, Any]) -> str:
    return ", trust_remote_code=True" if "auto_map" in config else ""


def _architecture(run: SavedRun) -> str:
    model = run.job.model
    parts = [f"{model.num_layers} layers of width {model.hidden_size:,}, multi-head latent attention"]
    if model.moe is not None:
        moe = model.moe
        shared = f" and {moe.shared_experts} shared" if moe.shared_experts else ""
        parts.append(f"mixture of {moe.num_experts} experts, {moe.experts_per_token}{shared} a token")
    if model.engram is not None:
        engram = model.engram
        orders, layers = (", ".join(map(str, numbers)) for numbers in (engram.orders, engram.layers))
        parts.append(f"Engram memory (arXiv 2601.07372) at layers {layers} (from 0): n-grams of {orders} tokens")
    if model.branches > 1:
        parts.append(f"hyper-connections of {model.branches} branches")
    return "; ".join(parts)


def _counts(run: SavedRun) -> dict[str, str]:
    census, engram, tables = take_census(run.job.model), run.job.model.engram, run.tables()
    in_tables = sum(tables.num_rows) * tables.dim if tables else 0
    read = len(engram.layers) * engram.memory_width if engram else 0
    rows = {
        "parameters": f"{census.total + in_tables:,}",
        "active a token": f"{census.active + read:,}, rows that it reads included, input embedding not",
    }
    return rows | ({"parameters in tables": f"{in_tables:,}"} if tables else {})


def _validation_loss(run: SavedRun) -> float | None:
    """That of the checkpoint's step; None if it was not evaluated, or its record is gone."""
    path = run.folder / METRICS_FILE
    records = read_metrics(path) if path.exists() else []
    return next((each["val_loss"] for each in records if each["step"] == run.step and "val_loss" in each), None)
