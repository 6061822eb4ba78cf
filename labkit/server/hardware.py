"""The devices that a server can compute on: what a text names, and whether this machine has it.

Before any batch: `optimizer` checks the text where a config is made, `server` the machine where experts are.
"""

from __future__ import annotations

import torch


def check_device_name(device: object) -> str:
    """Returns the text of a device, such as "cpu" or "cuda:1". Raises `ValueError` for one that is none."""
    try:
        if not isinstance(device, (str, torch.device)):
            raise TypeError
        return str(device) if torch.device(device).type != "meta" else _refuse(device)
    except (RuntimeError, TypeError):
        return _refuse(device)


def check_device(device: str) -> None:
    """Compute something on a device of this machine. Raises `ValueError` with those that it has if that fails."""
    try:
        torch.ones((), device=device).add(1).item()
    except (RuntimeError, AssertionError) as error:  # NotImplementedError is a RuntimeError
        have = _devices()
        if device in have:
            raise ValueError(f"device={device!r} does not compute: {str(error).splitlines()[0]}") from None
        raise ValueError(f"device={device!r}: not here; torch can compute on {', '.join(have)}") from None


def _devices() -> list[str]:
    """The devices that torch can compute on here."""
    found = ["cpu"]
    if (accelerator := torch.accelerator.current_accelerator(check_available=True)) is not None:
        kind = accelerator.type
        found += [kind, *(f"{kind}:{number}" for number in range(torch.accelerator.device_count()))]
    return found


def _refuse(device: object) -> str:
    raise ValueError(f"device={device!r}: write cpu, or cuda (cuda:1, …) for a GPU that torch can use")
