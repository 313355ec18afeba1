"""What a checkpoint must agree on with the run that takes it up: to go on from it, or to begin a new phase with it."""

import json
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from model.config import ModelConfig

FORMAT_VERSION = 1
_FREE = {("attention", "rope_scaling"), ("moe", "balance_rate"), ("moe", "sequence_balance_factor")}
"""Keys of the model's sections that change neither shapes nor addresses: a new phase may set them anew."""


@dataclass(frozen=True)
class Identity:
    """What a run is.

    Attributes:
        model: the `model` section.
        addresses: fingerprint of the row addresses; None without Engram.
        data: all that the global batches depend on.
    """

    model: dict[str, Any]
    addresses: dict[str, Any] | None
    data: dict[str, Any]

    def same_run(self, saved: dict[str, Any]) -> None:
        """Raises ValueError, in one line, if a run of this identity cannot go on from a checkpoint's state."""
        _check_format(saved)
        for key, current in vars(self).items():
            value = _with_defaults(saved[key]) if key == "model" else saved[key]
            if (where := _difference(value, current, key)) is not None:
                raise ValueError(
                    f"saved with another {where}; restore that setting, or start anew under another run.name"
                )

    def same_weights(self, saved: dict[str, Any]) -> None:
        """Raises ValueError, in one line, if a checkpoint's weights and rows mean something else in this run.

        Its data, sequence length and balancing, and the scaling of its rotary positions, may be others.
        """
        _check_format(saved)
        where = _difference(_fixed(_with_defaults(saved["model"])), _fixed(self.model), "model")
        where = where or _difference(saved["addresses"], self.addresses, "addresses")
        if where is None and self.addresses is not None:
            # Rows that were never updated are not saved, but drawn again.
            where = _difference(saved["data"]["seed"], self.data["seed"], "train.seed")
        if where is not None:
            raise ValueError(
                f"saved with another {where}; take over that setting, or begin without checkpoint.init_from"
            )


def _check_format(saved: dict[str, Any]) -> None:
    if saved["format"] != FORMAT_VERSION:
        raise ValueError(f"has format {saved['format']}, this version reads {FORMAT_VERSION}")


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
    """The first key at which two JSON-able values differ, with both values."""
    if isinstance(saved, dict) and isinstance(current, dict):
        for name in {**saved, **current}:
            if (where := _difference(saved.get(name), current.get(name), f"{key}.{name}")) is not None:
                return where
        return None
    return None if saved == current else f"{key} ({_shortened(saved)}, now {_shortened(current)})"


def _shortened(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
