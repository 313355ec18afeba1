"""The device that is measured."""

from typing import Literal

import torch

from train.errors import UserError


def chosen_device(name: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    """What `auto` means here: a GPU where there is one."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def open_device(name: Literal["cpu", "cuda"]) -> torch.device:
    """The device, a GPU by its number.

    Raises:
        UserError: there is no GPU.
    """
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("torch finds no usable GPU: measure with --device cpu")
    return torch.device("cuda", torch.cuda.current_device())


def finish(device: torch.device) -> None:
    """Waits until the device has done all the work it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
