"""Replicas of a model: what a copy shares with it, in which mode its modules are, and how buffers are kept equal.

A trainer computes on a replica; `shared_model` makes it here and refreshes it before each step.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from types import FunctionType, MethodType, ModuleType

from torch import Tensor, nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
MAX_LOOKED_AT = 1000  # objects, in search of parts of the model
_OWN = ("_parameters", "_buffers", "_modules")  # what every module has, and can be copied


def training_modes(model: nn.Module) -> list[bool]:
    """In which mode each module is to be trained: in its own, where the caller has chosen modes.

    A model that is in eval mode as a whole has just been evaluated, and is trained in train mode, except for modules
    whose parameters are all frozen.
    """
    if any(module.training for module in model.modules()):
        return [module.training for module in model.modules()]
    frozen: set[nn.Module] = set()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            frozen.update(module.modules())
    return [module not in frozen for module in model.modules()]


def copy_model(model: nn.Module, modes: list[bool] | None = None) -> nn.Module:
    """A copy with parameters, buffers and modules of its own; what cannot be copied is shared.

    That may be a lock, an open file, a logger, or an activation that a module keeps. Hooks are called in the copy, too,
    and objects that they belong to are shared, so that they see what happens in all copies.

    Args:
        model: The model.
        modes: Which of its modules are to be in train mode; by default those that are.

    Raises:
        Exception: A module cannot be copied, for a reason of its own.
    """
    shared = {id(owner): owner for owner in (*_owners_of_hooks(model), *_compilers(model))}
    try:
        replica = copy.deepcopy(model, dict(shared))
    except Exception:
        more = {id(value): value for value in _uncopyable(model, shared)}
        if not more:
            raise
        replica = copy.deepcopy(model, {**shared, **more})
    for mine, original in zip(replica.parameters(), model.parameters(), strict=True):
        vars(mine).update(vars(original))  # what somebody keeps in a parameter; torch does not copy it
    for module, training in zip(replica.modules(), modes or [], strict=modes is not None):
        module.training = training
    return replica


def _owners_of_hooks(model: nn.Module) -> Iterator[object]:
    """The objects outside the model that its hooks belong to."""
    own = set(map(id, model.modules()))
    for module in model.modules():
        for name in HOOKS:
            for hook in list(vars(module).get(name, {}).values()):
                owner = hook.__self__ if isinstance(hook, MethodType) else hook
                if not isinstance(owner, (FunctionType, type)) and id(owner) not in own:
                    yield owner


def _compilers(model: nn.Module) -> Iterator[object]:
    """What `torch.compile` keeps in the modules that it wrapped; shared, so that replicas share what was compiled."""
    for module in model.modules():
        if (compiler := vars(module).get("dynamo_ctx")) is not None:
            yield compiler


def is_compiled(model: nn.Module) -> bool:
    """Whether `torch.compile` has wrapped any of its modules."""
    return any(True for _ in _compilers(model))


def _uncopyable(model: nn.Module, shared: Mapping[int, object]) -> Iterator[object]:
    """What modules keep as attributes and cannot be copied."""
    # Modules and tensors stay as they are in these trials, so that each is about one attribute, and quick.
    own = {id(one): one for one in (*model.modules(), *model.parameters(), *model.buffers())}
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if name not in _OWN:
                yield from _uncopyable_parts(value, {**shared, **own}, own, set())


def _uncopyable_parts(
    value: object, memo: Mapping[int, object], own: Mapping[int, object], seen: set[int]
) -> Iterator[object]:
    """What has to be shared so that a value can be copied: itself, or less of it where it holds parts of the model."""
    if id(value) in seen or _copies(value, memo):
        return
    seen.add(id(value))
    if isinstance(value, (list, tuple, dict, set)) or _holds(value, own, set()):
        found = [part for inner in _inside(value) for part in _uncopyable_parts(inner, memo, own, seen)]
        if _copies(value, {**memo, **{id(part): part for part in found}}):
            yield from found
            return
    yield value


def _copies(value: object, memo: Mapping[int, object]) -> bool:
    try:
        copy.deepcopy(value, dict(memo))
    except Exception:
        return False
    return True


def _holds(value: object, own: Mapping[int, object], seen: set[int]) -> bool:
    """Whether a module or tensor of the model is in an object, so that each copy of the model needs one of its own."""
    if id(value) in own:
        return True
    if id(value) in seen or len(seen) > MAX_LOOKED_AT:
        return False
    seen.add(id(value))
    return any(_holds(inner, own, seen) for inner in _inside(value))


def _inside(value: object) -> list[object]:
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, (list, tuple, set)):
        return list(value)
    return [] if isinstance(value, (ModuleType, type)) else list(getattr(value, "__dict__", {}).values())


def copy_buffers(source: nn.Module, target: nn.Module) -> None:
    """Make the buffers of a copy equal to those of the model, or the other way round; their shapes may have changed."""
    anew: dict[int, Tensor] = {}  # by the buffer that was copied, since modules may share it
    for theirs, mine in zip(source.modules(), target.modules(), strict=True):
        for name, buffer in theirs._buffers.items():
            old = mine._buffers.get(name)
            if buffer is None:
                mine._buffers[name] = None
            elif old is None or old.shape != buffer.shape or old.dtype != buffer.dtype or old.device != buffer.device:
                if id(buffer) not in anew:
                    anew[id(buffer)] = buffer.detach().clone()
                mine._buffers[name] = anew[id(buffer)]
            else:
                old.copy_(buffer)
