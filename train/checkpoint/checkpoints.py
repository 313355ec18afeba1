"""The checkpoints of a run: saved, resumed from, and let go of, by all ranks together.

What a checkpoint is, and what holds of it, is in docs/checkpoints.md.
"""

import importlib.metadata
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from offload.tables import EngramTables
from train.checkpoint.checked import Damaged
from train.checkpoint.host_copies import HostCopies
from train.checkpoint.identity import Identity
from train.checkpoint.image import Rows, SavedImage
from train.checkpoint.index import RowRange, Save, Written
from train.checkpoint.listing import checkpoints_in
from train.checkpoint.manifest import FORMAT_VERSION, INCREMENT_VERSION, Manifest
from train.checkpoint.open import open_image
from train.checkpoint.parts import PIECE_BYTES
from train.checkpoint.saves import Content, Ended, Saves
from train.checkpoint.tensor_files import CODES
from train.checkpoint.together import SHARE, Failed, on_rank_0, together
from train.config.job import JobConfig
from train.engine import Engine
from train.errors import UserError
from train.optim.pieces import StatePiece

_PROGRAMS = ("engram-pretrain", "torch", "deepspeed")


@dataclass(frozen=True)
class Resumed:
    """What a run goes on from.

    Attributes:
        step: steps that are done; 0 for a fresh start.
        path: the checkpoint; None for a fresh start.
        notes: what was passed over or has changed, in lines for the user.
        recent: loss and gradient norm of the last updates, if the run looks for spikes.
    """

    step: int = 0
    path: Path | None = None
    notes: list[str] = field(default_factory=list)
    recent: list[tuple[float, float]] = field(default_factory=list)


class _Choice(NamedTuple):
    """A checkpoint that rank 0 has chosen, and the checksum of its manifest, which holds the nonce of its save."""

    path: Path
    checksum: str


class Checkpoints:
    """The checkpoints of a run. All ranks call the same methods in the same order.

    Args:
        folder: where they live; made when the first is saved. What else a user keeps there is left alone.
        job: its resolved config.
        identity: of this run.
    """

    def __init__(self, folder: Path, job: JobConfig, identity: Identity) -> None:
        self.folder, self._config, self._identity = folder, job.checkpoint, identity
        self._job, self._allow_data_change = job.model_dump(mode="json"), job.data.allow_change
        self._passed_over: dict[Path, str] = {}
        self._saves = Saves(folder, self._config, self._passed_over.keys())
        self._backbone = HostCopies()
        self._data_changes: list[dict[str, Any]] = []
        self._mixed = False  # whether a load was begun before

    def probe(self) -> None:
        """Writes next to nothing by the way that a save takes, and removes it. Collective.

        Raises:
            Failed: on all ranks, if one cannot write into the folder or does not see what another one wrote.
        """
        saving = self._saves.begin(self.folder / "probe", step=0)
        written = saving.write([StatePiece("probe", 0, torch.zeros(1))], ())
        saving.publish(written, lambda: b"{}\n")
        on_rank_0(lambda: shutil.rmtree(saving.target))

    def save(
        self,
        step: int,
        engine: Engine,
        tables: EngramTables | None,
        skipped_in_a_row: int = 0,
        recent: Sequence[tuple[float, float]] = (),
    ) -> Path:
        """Saves the state after `step` steps, the last `skipped_in_a_row` of which changed nothing. Collective.

        Waits for the save under way beside the loop, if there is one. `recent` comes back in `Resumed`.

        Raises:
            Failed: on all ranks, if the disk of one of them is full or cannot be written. Nothing half-written is left,
                and what was saved before is still there.
        """
        return self._saves.save(self._content(step, engine, tables, skipped_in_a_row, recent, beside=False))

    def save_beside(
        self,
        step: int,
        engine: Engine,
        tables: EngramTables | None,
        skipped_in_a_row: int = 0,
        recent: Sequence[tuple[float, float]] = (),
    ) -> None:
        """The same, while steps go on: waits only for the save before, and until the state is frozen. Collective.

        What comes of it, `take_ended` tells.
        """
        content = self._content(step, engine, tables, skipped_in_a_row, recent, beside=True)
        self._saves.save_beside(content, engine.device)

    def take_ended(self, *, wait: bool = False) -> list[Ended]:
        """What has come of saves beside the loop since the last call; each rank may hear of them at another step.

        Args:
            wait: for the one under way, too.

        Raises:
            Exception: whatever has gone wrong with one that is no matter of the disk.
        """
        return self._saves.take_ended(wait=wait)

    def resume(self, engine: Engine, tables: EngramTables | None) -> Resumed:
        """Loads the newest checkpoint that is whole, if there is any. Collective.

        One that is not is passed over by all ranks together; so is, where there is another, one that was saved while
        steps were skipped.

        Raises:
            UserError: the checkpoint is another model's or of other data, ranks see different ones, or none is whole.
        """
        while (choice := on_rank_0(self._choose)) is not None:
            image = self._open_everywhere(choice)
            changed = self._compare(image)
            try:
                self._load(image, engine, tables)
            except Failed as error:
                self._passed_over[choice.path] = str(error)
                continue
            notes = [f"{path} was passed over: {why}" for path, why in self._passed_over.items()]
            if changed:
                notes.append(f"data.allow_change: from here on with another {changed}")
                self._data_changes = [*image.manifest.data_changes, {"step": image.manifest.step, "change": changed}]
            recent = [(loss, norm) for loss, norm in image.manifest.recent]
            return Resumed(image.manifest.step, choice.path, notes, recent)
        return Resumed()

    def begin_with(self, source: Path, engine: Engine, tables: EngramTables | None) -> None:
        """Loads the checkpoint of another run, to begin a new phase with it at step 0. Collective.

        Raises:
            UserError: it is damaged, or its weights or rows mean something else in this run.
        """
        try:
            image = self._open_everywhere(on_rank_0(lambda: _Choice(source, _open_whole(source).checksum)))
            _refuse(source, lambda: self._identity.same_weights(image.manifest))
            self._load(image, engine, tables)
        except Failed as error:
            raise UserError(f"checkpoint.init_from: {source}: {error}; give another checkpoint") from None

    def _choose(self) -> _Choice | None:
        """The checkpoint to go on from, as rank 0 sees it. Raises UserError if there are some, but none is whole."""
        images: list[SavedImage] = []
        for _, path in reversed(checkpoints_in(self.folder)):
            if path in self._passed_over:
                continue
            try:
                images.append(_open_whole(path))
            except Damaged as error:
                self._passed_over[path] = str(error)
                continue
            if images[-1].manifest.good:
                break
        if images:
            chosen = images[-1] if images[-1].manifest.good else images[0]
            for image in images[: images.index(chosen)]:
                skipped = image.manifest.skipped_in_a_row
                self._passed_over[image.path] = f"it was saved after {skipped} skipped step(s)"
            return _Choice(chosen.path, chosen.checksum)
        if self._passed_over:
            path, why = next(iter(self._passed_over.items()))
            raise UserError(
                f"{path}: {why}; no checkpoint is whole: delete {self.folder} to start anew, or choose another run.name"
            )
        return None

    def _open_everywhere(self, choice: _Choice) -> SavedImage:
        """The checkpoint that rank 0 has chosen. Raises UserError if a rank sees another one, or none, in its place."""
        opened: list[SavedImage] = []

        def look() -> None:
            opened.append(open_image(choice.path))
            if opened[0].checksum != choice.checksum:
                raise Damaged(f"{choice.path} is that of another save")

        try:
            together(look)
        except Failed as error:
            raise UserError(f"{choice.path}: {error}, while rank 0 can read it: {SHARE}") from None
        return opened[0]

    def _load(self, image: SavedImage, engine: Engine, tables: EngramTables | None) -> None:
        """Every rank takes what it needs. Raises Failed on all of them if one reads what was not saved."""
        _refuse(image.path, lambda: engine.check_state(image))
        if tables is not None:
            state = image.manifest.tables or {}
            _refuse(image.path, lambda: tables.load_optimizer_state(state))
            if self._mixed:
                tables.forget_rows()
        self._mixed = True
        taken = together(lambda: _load_part(image, engine, tables))
        if tables is not None and sum(taken) != sum(span.count for span in image.spans):
            raise Failed(f"{sum(taken):,} of its rows are rows of this run's tables, and not all")
        engine.publish_state()

    def _compare(self, image: SavedImage) -> str | None:
        """Refuses a checkpoint that is none of this run; returns what is another in its data, if that may be."""
        change = self._identity.changed_data(image.manifest) if self._allow_data_change else None
        _refuse(image.path, lambda: self._identity.same_run(image.manifest, but_for_data=change is not None))
        return change

    def _content(
        self,
        step: int,
        engine: Engine,
        tables: EngramTables | None,
        skipped_in_a_row: int,
        recent: Sequence[tuple[float, float]],
        *,
        beside: bool,
    ) -> Content:
        """What a save writes: with `beside`, a state that stays as it is now."""
        base, since = self._saves.next_base(has_rows=tables is not None)
        tensors = {name: (CODES[info.dtype], list(info.shape)) for name, info in engine.state_tensors().items()}
        of_step: dict[str, Any] = {
            "step": step,
            "steps_applied": engine.steps,
            "skipped_in_a_row": skipped_in_a_row,
            "recent": list(recent),
            "tables": tables.optimizer_state() if tables else None,
            "base": base,
            "format": INCREMENT_VERSION if base else FORMAT_VERSION,
        }

        def describe(save: Save, written: Sequence[Written]) -> Manifest:
            return Manifest(
                nonce=save.nonce,
                world_size=save.world_size,
                **of_step,
                **vars(self._identity),
                data_changes=self._data_changes,
                tensors=tensors,
                ranks=list(written),
                config=self._job,
                versions={name: importlib.metadata.version(name) for name in _PROGRAMS},
            )

        updates, pieces = tables.updates if tables else 0, engine.state_pieces(PIECE_BYTES)
        if not beside:
            rows = tables.updated_rows(PIECE_BYTES, since=since) if tables else ()
            return Content(step, updates, base, pieces, rows, describe)
        if tables is None:
            return Content(step, updates, base, self._backbone.copied(pieces), (), describe)
        frozen = tables.freeze(since=since, undo_bytes=self._config.undo_bytes)
        rows = frozen.pieces(PIECE_BYTES)
        return Content(step, updates, base, self._backbone.copied(pieces), rows, describe, frozen.close)


def _refuse(path: Path, check: Callable[[], None]) -> None:
    """Runs a check that ends alike on all ranks; ValueError becomes a UserError that names the checkpoint."""
    try:
        check()
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _open_whole(path: Path) -> SavedImage:
    image = open_image(path)
    image.check_files()
    return image


def _load_part(image: SavedImage, engine: Engine, tables: EngramTables | None) -> int:
    """Loads this rank's part; returns how many rows of the tables are its own."""
    engine.load_state(image)
    if tables is None:
        return 0
    owned = tables.owned_rows()
    wanted = (s for s in image.spans if any(s.first < rows.stop and rows.start <= s.last for rows in owned))
    return sum(tables.load_rows(*rows) for rows in _one_ahead(wanted, image.rows))


def _one_ahead(spans: Iterable[RowRange], read: Callable[[RowRange], Rows]) -> Iterator[Rows]:
    """Reads rows while those before are being taken."""
    with ThreadPoolExecutor(1, "engram-load") as reader:
        coming: deque[Future[Rows]] = deque()
        for span in spans:
            coming.append(reader.submit(read, span))
            if len(coming) > 1:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
