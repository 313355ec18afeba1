"""What a checkpoint must share with the run that loads it: to continue from it, or to begin a new phase with it."""

import json
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from model.config import ModelConfig
from train.checkpoint.manifest import Manifest

_FREE = {("attention", "rope_scaling"), ("moe", "balance_rate"), ("moe", "sequence_balance_factor")}
"""Keys of the model's sections that change neither shapes nor addresses: a new phase may set them anew."""


@dataclass(frozen=True)
class Identity:
    """What a run is.

    Attributes:
        model: the `model` section.
        addresses: fingerprint of the row addresses; None without Engram.
        data: all that the global batches depend on.
        tokenizer: SHA-256 of what the text was tokenized with.
    """

    model: dict[str, Any]
    addresses: dict[str, Any] | None
    data: dict[str, Any]
    tokenizer: str

    def same_run(self, saved: Manifest, *, but_for_data: bool = False) -> None:
        """Raises ValueError, in one line, if a run of this identity cannot continue from a checkpoint.

        Args:
            saved: what the checkpoint says about itself.
            but_for_data: its data may be others, if they have the same tokenizer.
        """
        where = _difference(_with_defaults(saved.model), self.model, "model")
        where = where or _difference(saved.addresses, self.addresses, "addresses")
        if saved.tokenizer is not None:
            where = where or _difference(saved.tokenizer, self.tokenizer, "tokenizer")
        if but_for_data:
            where = where or self._other_seed(saved)
        elif where is None and (change := self.changed_data(saved)):
            raise ValueError(
                f"saved with another {change}; restore that setting, set data.allow_change=true to go on all the same, "
                "or start anew under another run.name"
            )
        if where is not None:
            raise ValueError(f"saved with another {where}; restore that setting, or start anew under another run.name")

    def changed_data(self, saved: Manifest) -> str | None:
        """The first thing in which the data are others than the checkpoint's, with both values.

        Phases that had not begun do not count.
        """
        return _difference(_begun(saved.data, saved.step), _begun(self.data, saved.step), "data")

    def same_weights(self, saved: Manifest) -> None:
        """Raises ValueError, in one line, if a checkpoint's weights and rows mean something else in this run.

        Its data, sequence length and balancing, and the scaling of its rotary positions, may differ.
        """
        where = _difference(_fixed(_with_defaults(saved.model)), _fixed(self.model), "model")
        where = where or _difference(saved.addresses, self.addresses, "addresses") or self._other_seed(saved)
        if where is not None:
            raise ValueError(
                f"saved with another {where}; take over that setting, or begin without checkpoint.init_from"
            )

    def fits(self, model: dict[str, Any], addresses: dict[str, Any] | None) -> None:
        """Raises ValueError, in one line, if weights and rows of such a model are none of this run's.

        Args:
            model: settings that must be the same; this run's model may have more.
            addresses: numbers of the fingerprint that must be; None where there are no rows.
        """
        where = _difference(model, _restricted(self.model, model), "model")
        if addresses is not None:
            where = where or _difference(addresses, _restricted(self.addresses, addresses), "addresses")
        if where is not None:
            raise ValueError(f"has another {where}; take over that setting, or begin without checkpoint.init_from")

    def _other_seed(self, saved: Manifest) -> str | None:
        # Rows that were never updated are not saved, but drawn again.
        return _difference(saved.data["seed"], self.data["seed"], "train.seed") if self.addresses is not None else None


def _begun(data: dict[str, Any], steps: int) -> dict[str, Any]:
    """Data without the phases that its first steps have not reached."""
    last = steps - 1
    for first, end in data.get("skip_steps", []):
        last += end - first + 1 if last >= first - 1 else 0
    phases = [phase for phase in data.get("phases", []) if phase["after_steps"] <= last]
    return {name: value for name, value in data.items() if name != "phases"} | ({"phases": phases} if phases else {})


def _restricted(value: Any, like: Any) -> Any:
    """A JSON value without the keys that another one lacks."""
    if isinstance(value, dict) and isinstance(like, dict):
        return {key: _restricted(value.get(key), each) for key, each in like.items()}
    return value


def _fixed(model: dict[str, Any]) -> dict[str, Any]:
    """A model section without the keys of `_FREE`."""
    return {
        name: {key: item for key, item in value.items() if (name, key) not in _FREE}
        if isinstance(value, dict)
        else value
        for name, value in model.items()
    }


def _with_defaults(model: dict[str, Any]) -> dict[str, Any]:
    """A saved model section with the keys that were added since, at their defaults."""
    try:
        return ModelConfig.model_validate(model).model_dump(mode="json")
    except ValidationError:
        return model


def _difference(saved: Any, current: Any, key: str) -> str | None:
    """The first key at which two JSON values differ, with both values."""
    if isinstance(saved, dict) and isinstance(current, dict):
        for name in {**saved, **current}:
            if (where := _difference(saved.get(name), current.get(name), f"{key}.{name}")) is not None:
                return where
        return None
    return None if saved == current else f"{key} ({_shortened(saved)}, now {_shortened(current)})"


def _shortened(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
