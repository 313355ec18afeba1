"""The outcome of a run, in figures a user can check, and what to try next."""

import json
import math
import shlex
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Self

from pydantic import TypeAdapter, ValidationError

from train.files import new_file
from train.run_folder import LOG_FILE

SUMMARY_FILE = "summary.json"


@dataclass(frozen=True)
class SourceSummary:
    """What a run has of a source of its mixture.

    Attributes:
        tokens, epochs: that it was read, by the config of the end.
        val_loss, val_bits_per_byte: of the last evaluation; None where nothing of it is held out to predict.
    """

    tokens: int
    epochs: float
    val_loss: float | None = None
    val_bits_per_byte: float | None = None


@dataclass(frozen=True)
class Summary:
    """The end of a run.

    Attributes:
        run: folder of the run.
        steps, tokens: of the whole run.
        val_loss, val_bits_per_byte: of the last evaluation; None where nothing is held out to predict.
        unigram_entropy: nats per token of the validation text for a model that only knows token frequencies; None as
            well.
        parameters: of the backbone and the tables.
        active_parameters: that compute for one token; the input embedding is not counted, the rows read are.
        table_parameters: weights of all rows.
        table_bytes: of all records in host memory, optimizer state and padding included, if every row were touched.
        window_bytes: of all ranks' windows; None without tables or with mode=resident.
        rows_moved: between host memory and the windows since the run was started or resumed.
        tokens_per_s: median over the records since then; None if nothing was trained.
        samples: continued texts.
        init_from: what `checkpoint.init_from` named; None for a run that began anew.
        look_ahead: that `offload.depth=auto` chose last; None if it chose none.
        vocab_size: tokens that the model has room for; None in summaries of older versions.
        sources: of a mixture, by name; empty without one.
    """

    run: str
    steps: int
    tokens: int
    val_loss: float | None
    val_bits_per_byte: float | None
    unigram_entropy: float | None
    parameters: int
    active_parameters: int
    table_parameters: int
    table_bytes: int
    window_bytes: int | None
    rows_moved: int
    tokens_per_s: float | None
    samples: list[str]
    init_from: str | None = None
    look_ahead: int | None = None
    vocab_size: int | None = None
    sources: dict[str, SourceSummary] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The summary in a run's folder; None if there is none.

        Raises:
            ValueError: it is damaged, or of another version; the message is one line.
        """
        try:
            content = (folder / SUMMARY_FILE).read_bytes()
            return TypeAdapter(cls).validate_json(content, strict=True)
        except FileNotFoundError:
            return None
        except ValidationError as error:
            wrong = [f"{'.'.join(map(str, each['loc']))}: {each['msg'].lower()}" for each in error.errors()]
            raise ValueError("; ".join(wrong)) from None

    def kept(self, folder: Path) -> Self:
        """This summary of a run that had no step left, with what the one in its folder knows about the training."""
        with suppress(ValueError):
            earlier = self.read(folder)
            if earlier and earlier.steps == self.steps:
                kept = {name: getattr(earlier, name) for name in ("rows_moved", "tokens_per_s", "look_ahead")}
                return replace(self, **kept)
        return self

    def save(self, folder: Path) -> None:
        """Keeps the figures in the run's folder, and the text in its log."""
        with new_file(folder / SUMMARY_FILE) as partial:
            partial.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        with (folder / LOG_FILE).open("a", encoding="utf-8") as log:
            print(self, file=log)

    def __str__(self) -> str:
        lines = [""]
        for sample in self.samples:
            lines += ["A continuation:", *(f"    {line}" for line in sample.splitlines()), ""]
        rows = [
            *self._loss(),
            *(("" if number else "sources", each) for number, each in enumerate(self._of_sources())),
            ("parameters", self._parameters()),
            *self._memory(),
            ("trained on", f"{_count(self.tokens)} tokens in {self.steps:,} steps{self._speed()}"),
            ("run folder", f"{self.run} (config.yaml, metrics.jsonl, summary.json, log.txt, checkpoints/)"),
        ]
        lines += [f"{name:<16} {value}" for name, value in rows]
        return "\n".join([*lines, "", "What to try next:", *(f"    {line}" for line in self._next())])

    def _loss(self) -> list[tuple[str, str]]:
        if self.val_loss is None or self.unigram_entropy is None:
            return [("validation loss", "none: no document is held out (data.validation_fraction)")]
        gain = self.unigram_entropy - self.val_loss
        bits = "" if self.val_bits_per_byte is None else f", {self.val_bits_per_byte:.4f} bits/byte"
        return [
            ("validation loss", f"{self.val_loss:.4f} nats/token{bits}"),
            ("unigram entropy", f"{self.unigram_entropy:.4f} nats/token: {_verdict(gain)}"),
        ]

    def _of_sources(self) -> Iterator[str]:
        for name, source in self.sources.items():
            loss = "" if source.val_loss is None else f", validation loss {source.val_loss:.4f}"
            yield f"{name}: {_count(source.tokens)} tokens, {source.epochs:.2f} epochs{loss}"

    def _parameters(self) -> str:
        tables = f", {_count(self.table_parameters)} of them in tables" if self.table_parameters else ""
        return f"{_count(self.parameters)} in all, {_count(self.active_parameters)} active a token{tables}"

    def _memory(self) -> list[tuple[str, str]]:
        if self.window_bytes is None:
            return []
        share = f"{_bytes(self.table_bytes)} in host memory through windows of {_bytes(self.window_bytes)}"
        ahead = f"; look-ahead {self.look_ahead}, as offload.depth=auto chose" if self.look_ahead is not None else ""
        return [("tables", f"{share}; {_count(self.rows_moved)} rows moved{ahead}")]

    def _speed(self) -> str:
        return f", {self.tokens_per_s:,.0f} tokens/s" if self.tokens_per_s else ""

    def _next(self) -> list[str]:
        config = shlex.quote(f"{self.run}/config.yaml")
        # Another model or tokenizer cannot begin with these weights.
        anew = " checkpoint.init_from=null" if self.init_from else ""
        lines = [
            f"your own text   engram data prepare FOLDER --out data/mine --train-bpe {self.vocab_size or 4096}",
            f"                engram train {config} run.name=mine data.path=data/mine{self._no_mix()}{anew}",
            f"longer, anew    engram train {config} train.steps={2 * self.steps} run.name=longer",
        ]
        if self.table_parameters:
            lines.append(f"no memory       engram train {config} model.engram=null run.name=no-memory{anew}")
        return lines

    def _no_mix(self) -> str:
        return " data.mix=null" if self.sources else ""


def _verdict(gain: float) -> str:
    if gain > 0:
        return f"the model is {gain:.2f} nats better than word frequencies"
    return "not reached, train for longer"


def _count(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return str(number)


def _bytes(number: int) -> str:
    power = min(4, int(math.log(max(number, 1), 1024)))
    return f"{number / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
