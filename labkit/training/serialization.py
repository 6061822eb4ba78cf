"""A state as plain JSON and named tensors: written without pickle, and read without executing anything.

Beside a batch's way: `run_folder` writes what `Run.state_dict` returns in this form.
"""

from __future__ import annotations

import math
import numbers
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

SPECIAL = "$"  # the key of a dictionary that stands for something that JSON lacks
MAX_DEPTH = 100


def flatten(state: Any, where: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Take a state apart.

    Args:
        state: Numbers, texts, None, tensors, and lists, tuples and dictionaries of them, to any depth.
        where: A name for it, which the tensors' names begin with.

    Returns:
        What `json` can write, and the tensors by name.

    Raises:
        ValueError: There is something else in it; the text says what, and where.
    """
    tensors: dict[str, Tensor] = {}

    def plain(value: Any, path: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError(f"{path} is nested too deeply to be saved; does it hold itself?")
        if value is None or isinstance(value, (bool, str)):
            return value
        if isinstance(value, Tensor):
            if value.layout is not torch.strided or value.is_quantized or value.is_meta:
                raise ValueError(f"{path} is a tensor that cannot be saved: {value.layout}, on {value.device}")
            name = path
            while name in tensors:  # since keys may have dots in them
                name += "'"
            tensors[name] = value.detach()
            return {SPECIAL: "tensor", "name": name}
        if isinstance(value, numbers.Integral):
            return int(value)
        if isinstance(value, numbers.Real):
            number = float(value)
            return number if math.isfinite(number) else {SPECIAL: "float", "value": repr(number)}
        if isinstance(value, (list, tuple, deque)) and not hasattr(value, "_fields"):
            parts = [plain(part, f"{path}.{place}", depth + 1) for place, part in enumerate(value)]
            return parts if isinstance(value, list) else {SPECIAL: "tuple", "parts": parts}
        if type(value) in (dict, OrderedDict, defaultdict, Counter):
            items = [(key, plain(part, f"{path}.{key}", depth + 1)) for key, part in value.items()]
            if all(isinstance(key, str) for key in value) and SPECIAL not in value and type(value) is not Counter:
                return dict(items)
            pairs = [[plain(key, f"{path}.{key}", depth + 1), part] for key, part in items]
            return {SPECIAL: "counter" if type(value) is Counter else "dict", "items": pairs}
        raise ValueError(
            f"{path} is a {type(value).__module__}.{type(value).__qualname__}, which cannot be saved: a saved run has "
            "numbers, texts, tensors, and lists and dictionaries of them, and nothing that would have to be executed"
        )

    return plain(state, where, 0), tensors


def unflatten(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Put together what `flatten` took apart.

    Raises:
        ValueError: A tensor is missing, or this is not what `flatten` makes.
    """
    if isinstance(plain, list):
        return [unflatten(part, tensors) for part in plain]
    if not isinstance(plain, dict):
        return plain
    match plain:
        case {"$": "tensor", "name": str(name)}:
            if name not in tensors:
                raise ValueError(f"the tensor {name} is missing")
            return tensors[name]
        case {"$": "float", "value": "nan" | "inf" | "-inf" as text}:
            return float(text)
        case {"$": "tuple", "parts": list(parts)}:
            return tuple(unflatten(part, tensors) for part in parts)
        case {"$": "dict" | "counter" as kind, "items": list(items)}:
            try:
                made = {unflatten(key, tensors): unflatten(part, tensors) for key, part in items}
            except TypeError as error:
                raise ValueError(f"a dictionary with impossible keys: {error}") from None
            return Counter(made) if kind == "counter" else made
        case {"$": _}:
            raise ValueError(f"nothing known: {str(plain)[:100]}")
    return {key: unflatten(part, tensors) for key, part in plain.items()}
