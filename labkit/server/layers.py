"""What an expert computes: factories of expert modules, by name, and the kinds that come with labkit.

A server builds each of its experts with `make_expert`; from then on the module belongs to an expert backend. A kind is
a registered name (`"ffn"`), a factory (any callable that returns a module), or text `"package.module:factory"`, which
is how a child process gets a class of the user's own. Kinds come from whoever starts a server, never from a peer.

A module may have an attribute `takes`, a text such as `"float32 [rows, 512]"`, which errors to callers quote, and an
attribute `example_inputs`, which shows what it takes before the first call (see `server/schema`).
"""

from __future__ import annotations

import importlib
import inspect
import numbers
import sys
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from typing import Any, TypeVar, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.server.gated import Gated
from labkit.server.user_code import CodeWantedOut, contained, describe_error
from labkit.suggest import OTHER_WORDS, did_you_mean

Factory = Callable[..., nn.Module]
F_co = TypeVar("F_co", bound=Factory)

MAX_SIZE = 1 << 20  # of a dimension of the kinds below

_factories: dict[str, Factory] = {}
_importing: ContextVar[str | None] = ContextVar("importing", default=None)


# ---------------------------------------------------------------- factories by name


@overload
def register_expert(name: str) -> Callable[[F_co], F_co]: ...
@overload
def register_expert(name: str, factory: F_co) -> F_co: ...
def register_expert(name: str, factory: F_co | None = None) -> F_co | Callable[[F_co], F_co]:
    """Give a kind of expert of your own a name, under which `swarm.serve` finds it.

    A name that is registered again is replaced, so a cell may run twice.

    Example:
        @lk.register_expert("mine")
        class MyExpert(nn.Module):
            def __init__(self, hidden): ...

        swarm.serve("mine", hidden=256, grid=(4, 4))

    Args:
        name: Letters, digits and _ only; not one of labkit's own: "ffn", "transformer",
            "nop".
        factory: A class or function that returns a new `nn.Module`, whose keyword arguments
            become options of `swarm.serve`. The module takes one or more tensors [rows, ...],
            by place or by keyword, and returns one [rows, ...] or a tuple, list or dictionary
            of up to 16, in which each row depends on the same row of the inputs only.
            Floating-point inputs are cast to the dtype of its parameters. An attribute
            `example_inputs` (a tensor, a tuple, or a dictionary by keyword) says what it
            takes; without one, a row of the width of one of its first layers is tried. Leave
            it out to use `register_expert` as a decorator.

    Returns:
        The factory; without one, a decorator that registers what it decorates.

    Raises:
        ValueError: The name cannot be used.
    """
    if not isinstance(name, str):
        raise ValueError('register_expert needs a name: @register_expert("mine")')
    if factory is None:
        return lambda decorated: register_expert(name, decorated)
    if not name.isidentifier():
        raise ValueError(f"{name!r} is not a name for an expert kind: letters, digits and _ only")
    if name in _factories and name in BUILTIN_KINDS:
        raise ValueError(f"{name!r} is one of labkit's own expert kinds; register yours under another name")
    _factories[name] = factory
    return factory


def make_expert(kind: str | Factory, **options: Any) -> nn.Module:
    """Build one expert module, with fresh parameters.

    Args:
        kind: A registered name, `"package.module:factory"`, or a factory.
        **options: What the factory is given.

    Raises:
        ValueError: The kind is unknown, or the factory doesn't take an option, or misses one.
    """
    factory = find_factory(kind) if isinstance(kind, str) else kind
    if isinstance(factory, nn.Module):
        raise ValueError(
            f"an expert kind is what makes a module, not a module: give the class {type(factory).__name__} and its "
            "options, or a function that returns a new one"
        )
    if not callable(factory):
        raise ValueError(f"an expert kind is a name or a callable that returns a module, not {factory!r}")
    _check_options(kind, factory, options)
    try:
        with contained():
            module = factory(**options)
    except CodeWantedOut as error:
        raise ValueError(
            f"expert kind {_label(kind)!r} makes no module: its code raised {describe_error(error)}"
        ) from error
    if not isinstance(module, nn.Module):
        raise ValueError(f"expert kind {_label(kind)!r} made a {type(module).__name__}, not a torch.nn.Module")
    return module


def expert_reference(kind: str | Factory) -> str:
    """The kind as text from which another process can build: a built-in name or `"package.module:factory"`.

    Raises `ValueError` if a fresh process could not find it: lambdas, things defined in a notebook or inside a function
    or class, and instances. `launch/planning` then hands over its code.
    """
    if isinstance(kind, str):
        if kind in BUILTIN_KINDS or ":" in kind:
            return kind
        kind = find_factory(kind)
    module, name = getattr(kind, "__module__", None), getattr(kind, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str):
        raise ValueError(f"a server process cannot import {kind!r}, which has no name of its own")
    if module == "__main__":
        raise ValueError(f"{name!r} is defined in the notebook or script, which a server process cannot import")
    if not name.isidentifier():  # "<lambda>", "f.<locals>.g", "Outer.Inner"
        raise ValueError(f"a server process cannot import {module}.{name}, which is not at the top level")
    reference = f"{module}:{name}"
    if _import_factory(reference) is not kind:
        raise ValueError(f"{reference} is now another object than the one given (redefined, or wrapped)")
    return reference


def kind_name(kind: str | Factory) -> str:
    """The name of a kind in checkpoints. It is the same whether a process or a task serves the expert."""
    try:
        return expert_reference(kind)
    except ValueError:
        return kind if isinstance(kind, str) else getattr(kind, "__name__", type(kind).__name__)


def find_factory(kind: str) -> Factory:
    """The factory of a kind that is registered, or of `"package.module:factory"`. Raises `ValueError` if it is none."""
    if ":" in kind:
        return _import_factory(kind)
    if kind not in _factories:
        raise ValueError(
            f"unknown expert kind {kind!r}; known are {', '.join(sorted(_factories))} and "
            f"'package.module:name'{did_you_mean(kind, _factories)}"
        )
    return _factories[kind]


def _import_factory(reference: str) -> Factory:
    module_name, _, name = reference.partition(":")
    module = sys.modules.get(module_name)
    try:
        if not hasattr(module, name):
            # Another thread may be importing it, and waiting for us: a module that serves its own class does that.
            if getattr(getattr(module, "__spec__", None), "_initializing", False):
                raise AttributeError(f"the module is still being imported, and has not come to {name!r}")
            mark = _importing.set(module_name)
            try:
                with contained():
                    module = importlib.import_module(module_name)
            finally:
                _importing.reset(mark)
        factory: Factory = getattr(module, name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"expert kind {reference!r} cannot be imported: {error}") from error
    except Exception as error:  # the module's own code failed
        raise ValueError(f"expert kind {reference!r} cannot be imported: {describe_error(error)}") from error
    return factory


def importing() -> str | None:
    """The name of the module that is being imported for the sake of a kind of experts in it; None if none is."""
    return _importing.get()


def check_options(kind: str | Factory, options: Mapping[str, Any], also: Iterable[str] = ()) -> None:
    """Check that a kind has options of these names, as far as that can be said without an import.

    Args:
        kind: As for `make_expert`.
        options: The options that were given. There may be more.
        also: What else the caller has that could have been meant.

    Raises:
        ValueError: The kind is unknown, or has no such option; perhaps with the one that is meant.
    """
    if isinstance(kind, str) and ":" in kind:
        return
    factory = find_factory(kind) if isinstance(kind, str) else kind
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return  # not callable, or written in C: it will complain itself
    unknown = options.keys() - {p.name for p in parameters}
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise ValueError(_no_option(kind, factory, unknown, also))


def _check_options(kind: str | Factory, factory: Factory, options: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # a callable written in C says nothing; it will complain itself
        return
    try:
        signature.bind(**options)
    except TypeError as error:
        unknown = options.keys() - {p.name for p in _takes(factory)}
        if unknown:
            raise ValueError(_no_option(kind, factory, unknown, ())) from None
        raise ValueError(
            f"expert kind {_label(kind)!r} cannot be made with these options ({error}); {_options_of(factory)}"
        ) from None


def _no_option(kind: str | Factory, factory: Factory, unknown: Iterable[str], also: Iterable[str]) -> str:
    unknown = sorted(unknown)
    known = [*(p.name for p in _takes(factory)), *also]
    meant = OTHER_WORDS.get(unknown[0])
    close = f"; did you mean {meant!r}?" if meant in known else did_you_mean(unknown[0], known)
    text = f"expert kind {_label(kind)!r} takes no option {', '.join(unknown)}"
    return f"{text}{close} I{_options_of(factory)[1:]}" if close else f"{text}; {_options_of(factory)}"


def _options_of(factory: Factory) -> str:
    names = (f"{p.name} (required)" if p.default is p.empty else p.name for p in _takes(factory))
    return f"it takes {', '.join(names) or 'nothing'}. How it is trained is set by backend=BackendConfig(…)"


def _takes(factory: Factory) -> list[inspect.Parameter]:
    parameters = inspect.signature(factory).parameters.values()
    return [p for p in parameters if p.kind not in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL)]


def _label(kind: str | Factory) -> str:
    return kind if isinstance(kind, str) else getattr(kind, "__name__", repr(kind))


# ---------------------------------------------------------------- the kinds that come with labkit


def check_size(name: str, value: object) -> int:
    """Returns the size of a dimension that an option gives. Raises `ValueError` if it is none."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool) and 1 <= (size := int(value)) <= MAX_SIZE:
        return size
    raise ValueError(f"{name}={value!r}: a whole number from 1 to {MAX_SIZE:,}")


class FeedForward(nn.Module):
    """The kind "ffn", the paper's feed-forward expert: hidden -> inner -> inner -> hidden.

    LayerNorm and ReLU stand between the layers, and a residual around all of them. Input
    [rows, ..., hidden] -> output of the same shape. The paper has 512 -> 2048 -> 2048 -> 512
    in its MNIST run and 1024 -> 4096 -> 4096 -> 1024 in its throughput run.

    Args:
        hidden: Size of the last dimension of input and output.
        inner: Size of the layers between; by default 4 * hidden.
    """

    def __init__(self, hidden: int, inner: int | None = None) -> None:
        super().__init__()
        check_size("hidden", hidden)
        inner = 4 * hidden if inner is None else check_size("inner", inner)
        self.takes = f"float32 [rows, {hidden}]"
        self.layers = nn.Sequential(
            nn.Linear(hidden, inner), nn.LayerNorm(inner), nn.ReLU(),
            nn.Linear(inner, inner), nn.LayerNorm(inner), nn.ReLU(),
            nn.Linear(inner, hidden),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = x + self.layers(x)
        return output


class Transformer(nn.Module):
    """The kind "transformer": a pre-LayerNorm block of self-attention and a feed-forward part.

    Both have a residual. Input [rows, seq, hidden] -> output of the same shape. Rows do not
    see each other. A further input `mask=` [rows, seq], of bools or whole numbers, says which
    positions are there: the others are padding, which none of them sees. The paper's block
    has hidden 1024, 16 heads and inner 2048.

    Args:
        hidden: Size of the last dimension of input and output, a multiple of `heads`.
        heads: Number of attention heads.
        inner: Width of the feed-forward part; by default 2 * hidden.
        causal: Whether a position sees only itself and those before it.
        max_length: The longest seq that is accepted, since callers choose it and attention
            costs its square.
    """

    def __init__(
        self, hidden: int, heads: int = 8, inner: int | None = None, causal: bool = False, max_length: int = 2048
    ) -> None:
        super().__init__()
        for name, size in (("hidden", hidden), ("heads", heads), ("max_length", max_length)):
            check_size(name, size)
        if not isinstance(causal, bool):
            raise ValueError(f"causal={causal!r}: true or false")
        if hidden % heads:
            raise ValueError(f"hidden={hidden} is not a multiple of heads={heads}")
        inner = 2 * hidden if inner is None else check_size("inner", inner)
        self.heads, self.causal, self.max_length = heads, causal, max_length
        self.takes = f"float32 [rows, at most {max_length}, {hidden}], and maybe mask= bool [rows, as many]"
        self.attention_norm = nn.LayerNorm(hidden)
        self.query_key_value = nn.Linear(hidden, 3 * hidden)
        self.attention_output = nn.Linear(hidden, hidden)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(hidden), nn.Linear(hidden, inner), nn.ReLU(), nn.Linear(inner, hidden)
        )

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        if x.ndim != 3 or x.shape[1] > self.max_length:
            raise ValueError(
                f"a transformer expert takes [rows, seq <= {self.max_length}, hidden], not {list(x.shape)}"
            )
        rows, seq, hidden = x.shape
        qkv = self.query_key_value(self.attention_norm(x))  # [rows, seq, 3 * hidden]
        qkv = qkv.view(rows, seq, 3, self.heads, hidden // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)  # each [rows, heads, seq, hidden / heads]
        mixed = self._attention(query, key, value, None if mask is None else _there(mask, x))
        x = x + self.attention_output(mixed.transpose(1, 2).reshape(rows, seq, hidden))
        output: Tensor = x + self.feed_forward(x)
        return output

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, there: Tensor | None) -> Tensor:
        """Each [rows, heads, seq, size]; `there`: bool [rows, seq]. No mask is seq * seq large: callers choose seq."""
        if there is None:
            return F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        if not self.causal:
            there = there | ~there.any(1, keepdim=True)  # padding alone sees itself, lest a mean be over nothing
            return F.scaled_dot_product_attention(query, key, value, there[:, None, None, :])
        # What is there moves to the front, in its order, so that each position sees those before it and no padding.
        order = torch.argsort((~there).byte(), dim=1, stable=True)  # [rows, seq]
        query, key, value = (_taken(tensor, order) for tensor in (query, key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return _taken(mixed, torch.argsort(order, dim=1))


def _there(mask: Tensor, x: Tensor) -> Tensor:
    """A mask of x [rows, seq, hidden] as bool [rows, seq]. Raises `ValueError` if it is none."""
    if mask.shape != x.shape[:2] or mask.is_floating_point() or mask.is_complex():
        raise ValueError(
            f"mask: bools or whole numbers {list(x.shape[:2])}, true where a position is there; got {mask.dtype} "
            f"{list(mask.shape)}"
        )
    return mask != 0


def _taken(tensor: Tensor, places: Tensor) -> Tensor:
    """Positions of [rows, heads, seq, size] in another order, [rows, seq]."""
    return tensor.gather(2, places[:, None, :, None].expand_as(tensor))


class Nop(nn.Module):
    """The kind "nop": returns its first input, to measure all that is not the expert's work.

    Args:
        hidden: Ignored. It is there so that "nop" can stand in for the other kinds.
    """

    def __init__(self, hidden: int | None = None) -> None:
        super().__init__()
        self.takes = "tensors of any shape and type"
        self.takes_anything = True

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        return x


BUILTIN_KINDS: dict[str, Factory] = {
    "ffn": FeedForward, "transformer": Transformer, "nop": Nop, "gated": Gated,
}  # fmt: skip
_factories.update(BUILTIN_KINDS)
