"""The checkpoints of a run: saved, resumed from, and removed, by all ranks together.

What a checkpoint is, and what it guarantees, is in docs/checkpoints.md.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from offload.tables import EngramTables
from train.checkpoint.choice import Candidate, Key, candidates, look, open_everywhere
from train.checkpoint.content import Contents, Now
from train.checkpoint.delivery import Delivery
from train.checkpoint.huggingface_image import HuggingFaceImage
from train.checkpoint.identity import Identity
from train.checkpoint.load import load, refuse
from train.checkpoint.nodes import Nodes
from train.checkpoint.saved_image import SavedImage
from train.checkpoint.saves import Content, Ended, Saves
from train.checkpoint.together import Failed
from train.config.job import JobConfig
from train.engine import Engine
from train.errors import UserError
from train.optim.pieces import StatePiece


@dataclass(frozen=True)
class Resumed:
    """What a run continues from.

    Attributes:
        step: steps that are done; 0 for a fresh start.
        path: the checkpoint; None for a fresh start.
        notes: what was passed over or has changed, in lines for the user.
        recent: loss and gradient norm of the last updates, if the run looks for spikes.
        unevaluated: whether the evaluation of that step is still to be made.
        tokens: that the run was trained on.
    """

    step: int = 0
    path: Path | None = None
    notes: list[str] = field(default_factory=list)
    recent: list[tuple[float, float]] = field(default_factory=list)
    unevaluated: bool = False
    tokens: int = 0


class Checkpoints:
    """The checkpoints of a run. All ranks call the same methods in the same order.

    Args:
        folder: where they live; made when the first is saved. Whatever else a user keeps there is left alone.
        job: its resolved config.
        identity: of this run.
    """

    def __init__(self, folder: Path, job: JobConfig, identity: Identity) -> None:
        self.folder, self._identity = folder, identity
        self._job, self._allow_data_change = job.model_dump(mode="json"), job.data.allow_change
        group = dist.new_group(backend="gloo")
        self.nodes = Nodes.found(folder, group) if job.run.local_checkpoints else Nodes.one(group)
        """Which ranks see one folder."""
        self._passed_over: dict[Key, str] = {}
        self._saves = Saves(folder, job.checkpoint, self._passed_over.keys(), self.nodes)
        self._contents = Contents(job, identity, self.nodes.hosts)
        self._mixed = False  # whether a load was begun before

    def probe(self) -> None:
        """Writes next to nothing the way a save does, and removes it. Collective.

        Raises:
            Failed: on all ranks, if one cannot write into the folder or does not see what another one wrote.
        """
        saving = self._saves.begin(self.folder / "probe", step=0)
        written = saving.write([StatePiece("probe", 0, torch.zeros(1))], ())
        saving.publish(written, lambda: b"{}\n")
        self.nodes.on_leaders(lambda: shutil.rmtree(saving.target))

    def save(self, step: int, now: Now, *, ephemeral: bool = False) -> Path:
        """Saves the state after `step` steps. Collective.

        Waits for the save under way beside the loop, if there is one. With `ephemeral`, it is removed once there is a
        newer good one.

        Raises:
            Failed: on all ranks, if the disk of one of them is full or cannot be written. Nothing half-written is left,
                and what was saved before is still there.
        """
        return self._saves.save(self._content(step, now, beside=False, ephemeral=ephemeral))

    def save_beside(self, step: int, now: Now, *, ephemeral: bool = False) -> None:
        """The same, while steps go on: waits only for the save before, and until the state is frozen. Collective.

        `take_ended` reports the outcome.
        """
        content = self._content(step, now, beside=True, ephemeral=ephemeral)
        self._saves.save_beside(content, now.engine.device)

    def take_ended(self, *, wait: bool = False) -> list[Ended]:
        """The outcome of saves beside the loop since the last call; each rank may learn of them at another step.

        Args:
            wait: for the one under way too.

        Raises:
            Exception: whatever went wrong with one that is not a matter of the disk.
        """
        return self._saves.take_ended(wait=wait)

    def resume(self, engine: Engine, tables: EngramTables | None) -> Resumed:
        """Loads the newest intact checkpoint, if there is any. Collective.

        One that is not is passed over by all ranks together; so is, where there is another, one that was saved while
        steps were skipped.

        Raises:
            UserError: the checkpoint is another model's or of other data, ranks see different ones, or none is intact.
        """
        while (choice := self._choose()) is not None:
            path = self.folder / choice.key.name
            image = open_everywhere(path, choice, self.nodes)
            changed = self._compare(image)
            try:
                self._load(image, choice, engine, tables)
            except Failed as error:
                self._passed_over[choice.key] = str(error)
                continue
            notes = [f"{self.folder / key.name} was passed over: {why}" for key, why in self._passed_over.items()]
            manifest = image.manifest
            if changed:
                notes.append(f"data.allow_change: from here on with another {changed}")
                change = {"step": manifest.step, "change": changed}
                self._contents.data_changes = [*manifest.data_changes, change]
            recent = [(loss, norm) for loss, norm in manifest.recent]
            tokens = manifest.tokens_seen(self._job)
            return Resumed(manifest.step, path, notes, recent, manifest.unevaluated, tokens)
        return Resumed()

    def begin_with(self, source: Path, engine: Engine, tables: EngramTables | None) -> None:
        """Loads the checkpoint of another run, or a folder of Hugging Face's, to begin with it at step 0. Collective.

        Raises:
            UserError: it is damaged, or its weights or rows mean something else in this run.
        """
        try:
            found = look(source, self.nodes)
            whole = [candidate for candidate in found if candidate.why_not() is None]
            if not whole:
                raise Failed(str(found[0].why_not()) if found else "no checkpoint is there")
            image = open_everywhere(source, whole[0], self.nodes)
            refuse(source, lambda: self._same_weights(image))
            self._load(image, whole[0], engine, tables)
        except Failed as error:
            raise UserError(f"checkpoint.init_from: {source}: {error}; give another checkpoint") from None

    def _same_weights(self, image: SavedImage) -> None:
        if isinstance(image, HuggingFaceImage):
            self._identity.fits(image.settings.model, image.settings.addresses)
        else:
            self._identity.same_weights(image.manifest)

    def _choose(self) -> Candidate | None:
        """The checkpoint to continue from. Raises UserError if there are some, but none is intact. Collective."""
        whole: list[Candidate] = []
        for candidate in candidates(self.folder, self.nodes):
            if candidate.key in self._passed_over:
                continue
            if (why := candidate.why_not()) is not None:
                self._passed_over[candidate.key] = why
                continue
            whole.append(candidate)
            if not candidate.skipped:
                break
        if whole:
            chosen = whole[0] if whole[-1].skipped else whole[-1]
            for newer in whole[: whole.index(chosen)]:
                self._passed_over[newer.key] = f"it was saved after {newer.skipped} skipped step(s)"
            return chosen
        if self._passed_over:
            key, why = next(iter(self._passed_over.items()))
            raise UserError(
                f"{self.folder / key.name}: {why}; no checkpoint is whole: delete {self.folder} to start anew, or "
                "choose another run.name"
            )
        return None

    def _load(self, image: SavedImage, choice: Candidate, engine: Engine, tables: EngramTables | None) -> None:
        """Every rank loads what it needs. Raises Failed on all of them if one reads what was not saved."""
        mixed, self._mixed = self._mixed, True
        load(image, Delivery(image, choice.readers(self.nodes), self.nodes.group), engine, tables, anew=mixed)

    def _compare(self, image: SavedImage) -> str | None:
        """Refuses a checkpoint that is not this run's; returns what differs in its data, if that is allowed."""
        change = self._identity.changed_data(image.manifest) if self._allow_data_change else None
        refuse(image.path, lambda: self._identity.same_run(image.manifest, but_for_data=change is not None))
        return change

    def _content(self, step: int, now: Now, *, beside: bool, ephemeral: bool) -> Content:
        base, since = self._saves.next_base(has_rows=now.tables is not None)
        return self._contents.of(step, now, base, since, beside=beside, ephemeral=ephemeral)
