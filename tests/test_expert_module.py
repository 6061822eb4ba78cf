"""What an expert's module may be: anything that torch can train as a layer. And whose fault it is when it fails."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import labkit as lk
from labkit.errors import BadRequest, RemoteFailure, ServerFailed
from labkit.server.backend import ExpertBackend
from labkit.server.batch import compute_batch
from labkit.server.layers import make_expert
from labkit.server.optimizer import BackendConfig
from labkit.server.validation import CallOptions
from tests.test_backend import assert_same

X = torch.linspace(-1, 1, 24).view(6, 4)
INDEX = torch.tensor([[1, 2], [3, 1], [0, 0], [4, 4], [2, 2], [1, 3]])


def expert(module: nn.Module, **options: Any) -> ExpertBackend:
    return ExpertBackend("odd.0", module, BackendConfig(**{"optimizer": "sgd", "lr": 0.1, **options}))


def error_of(module: nn.Module, *tensors: Tensor, direction: Any = "forward", **options: Any) -> Exception:
    backend = expert(module)
    if options.pop("find_schema", False):
        backend.expert.find_schema()
    [answer], _ = compute_batch(backend, direction, [tensors], options=CallOptions(**options))
    assert isinstance(answer, Exception)
    return answer


# ---------------------------------------------------------------- torch's other ways in


class SecondInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        changed = (x if y is None else y).mul_(2).relu_()
        return self.linear(changed)  # type: ignore[no-any-return]


class View(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        x[:, 0].mul_(self.scale)
        return x.view(len(x), 2, 2)


class ComplexWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(torch.complex64) @ self.weight).abs()


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.layers(x)  # type: ignore[no-any-return]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).relu_())  # type: ignore[no-any-return]


class PartlyFrozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.free = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.frozen(x)
        return self.free(x)  # type: ignore[no-any-return]


class Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 2).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.view(-1, 1, 2, 2)).flatten(1)  # type: ignore[no-any-return]


class Hooked(nn.Module):
    """Its gradients pass through hooks, and through sparse ones of a table that is an input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.linear.weight.register_hook(lambda grad: grad * 2)
        self.linear.register_forward_hook(lambda module, args, output: output * 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = nn.functional.embedding(torch.arange(len(x)), x, sparse=True)
        return self.linear(rows)  # type: ignore[no-any-return]


FLOAT_EXPERTS = {
    "relu in place": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)),
    "dropout in place": lambda: nn.Sequential(nn.Dropout(0.5, inplace=True), nn.Linear(4, 4)),
    "add in place to an input": SecondInPlace,
    "a view of a changed input": View,
    "complex": ComplexWeight,
    "autocast": Autocast,
    "tied": Tied,
    "partly frozen": PartlyFrozen,
    "channels last": Image,
    "hooks": Hooked,
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    "lstm": lambda: FirstOfTwo(nn.LSTM(4, 4, batch_first=True)),
}


class FirstOfTwo(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x[:, None])[0][:, 0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", FLOAT_EXPERTS)
@pytest.mark.parametrize(
    "options",
    [{}, {"optimizer": "adam"}, {"clip_grad_norm": 0.1}, {"accumulate": 2}, {"max_batch_size": 4}],
    ids=lambda options: ",".join(options) or "plain",
)
def test_whatever_trains_as_a_layer_trains_as_an_expert_and_no_input_is_changed(kind, options):
    torch.manual_seed(0)
    local = FLOAT_EXPERTS[kind]().eval()
    torch.manual_seed(0)
    backend = expert(FLOAT_EXPERTS[kind](), fused=False, **options)
    trained = [p for p in local.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, 0.1) if options.get("optimizer") else torch.optim.SGD(trained, 0.1)
    for step in range(4):
        before = X.clone()
        leaf = X.clone().requires_grad_()
        output = local(leaf.clone())
        torch.testing.assert_close(backend.forward(X), output.detach(), atol=1e-2, rtol=1e-2)
        grad = torch.ones_like(output, dtype=torch.float32) / 7
        output.backward(grad.to(output.dtype))
        [grad_x] = backend.backward(X, grad)
        expected = torch.zeros_like(X) if leaf.grad is None else leaf.grad.to_dense()
        torch.testing.assert_close(grad_x, expected, atol=1e-2, rtol=1e-2)
        assert torch.equal(X, before)
        if (step + 1) % options.get("accumulate", 1) == 0:
            if "clip_grad_norm" in options:
                nn.utils.clip_grad_norm_(trained, options["clip_grad_norm"])
            optimizer.step()
            optimizer.zero_grad()
    for one, other in zip(backend.module.parameters(), local.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=2e-2, rtol=2e-2)
    assert backend.updates == (2 if "accumulate" in options else 4)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # by torch's compiler itself
def test_a_compiled_expert_trains_too():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))
    compiled = expert(torch.compile(copy.deepcopy(plain), backend="eager"))  # type: ignore[arg-type]
    for rows in (6, 3):
        torch.testing.assert_close(compiled.forward(X[:rows]), plain(X[:rows].clone()).detach())
    [grad] = compiled.backward(X, torch.ones(6, 4))
    leaf = X.clone().requires_grad_()
    torch.testing.assert_close(grad, torch.autograd.grad(plain(leaf.clone()).sum(), leaf)[0])
    assert compiled.updates == 1


def test_an_input_that_is_changed_in_place_may_be_any_of_them():
    backend, x = expert(SecondInPlace()), X.clone()
    for _ in range(2):
        grad_x, grad_y = backend.backward(x, x, X)
        assert torch.equal(x, X) and torch.equal(grad_x, torch.zeros_like(X)) and grad_y.abs().sum() > 0


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize(
    "options", [{}, {"clip_grad_norm": 0.1}, {"accumulate": 2}, {"max_batch_size": 4}, {"fused": False}]
)
def test_an_embedding_with_sparse_gradients_trains_as_one_with_dense_ones(optimizer, options):
    def table(sparse: bool) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(6, 3, sparse=sparse), nn.Flatten())

    sparse, dense = (expert(table(s), optimizer=optimizer, **options) for s in (True, False))
    for _ in range(2):
        for backend in (sparse, dense):
            assert backend.backward(INDEX, torch.ones(6, 6)) == []
    assert sparse.updates == dense.updates > 0
    for name, tensor in dense.state().items():
        torch.testing.assert_close(sparse.state()[name], tensor)


@pytest.mark.parametrize("own", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("sent", [torch.bfloat16, torch.float16, torch.float32])
def test_an_expert_of_any_precision_takes_rows_of_any_other_and_gives_gradients_in_theirs(own, sent):
    backend = expert(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)).to(own))
    assert backend.forward(X.to(sent)).dtype == own
    [grad] = backend.backward(X.to(sent), X.to(sent))
    assert grad.dtype == sent and backend.updates == 1


def test_float64_is_not_narrowed_silently():
    assert "got float64" in str(error_of(nn.Linear(4, 4), X.double(), find_schema=True))


def test_a_module_of_several_precisions_is_given_what_a_trial_or_its_example_has_shown():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(4, 4).bfloat16(), nn.LayerNorm(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.first(x).float())  # type: ignore[no-any-return]

    backend = expert(Mixed())
    backend.expert.find_schema()
    assert backend.schema is not None and backend.schema.inputs[0].dtype == "bfloat16"
    assert backend.forward(X).dtype == torch.float32


def test_an_answer_is_no_view_of_what_later_steps_change():
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.ones(6, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.table

    backend = expert(Table())
    answer = backend.forward(X)
    backend.backward(X, X)
    assert torch.equal(answer, torch.ones(6, 4))


class Thinking(nn.Module):
    """Computes without a graph."""

    def __init__(self, mode: Any) -> None:
        super().__init__()
        self.mode, self.linear = mode, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with self.mode():
            return self.linear(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_expert_that_computes_without_a_graph_answers_and_gives_zeros_as_gradients(mode):
    backend = expert(Thinking(mode), max_batch_size=4)
    assert backend.forward(X).shape == X.shape
    assert torch.equal(backend.backward(X, X)[0], torch.zeros_like(X))


def test_an_expert_that_changes_its_input_only_now_and_then_trains_too():
    class Sometimes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2) if float(x.detach()[0, 0]) > 0 else x * 2

    backend, ones = expert(Sometimes()), torch.ones(2, 4)
    for x in (-ones, ones, -ones, ones):
        assert torch.equal(backend.backward(x, ones)[0], 2 * ones)


def test_buffers_that_are_replaced_or_change_their_shape_are_put_back():
    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.replaced: Tensor
            self.grown: Tensor
            self.register_buffer("replaced", torch.zeros(2))
            self.register_buffer("grown", torch.zeros(2))
            self.register_buffer("cache", None)

        def forward(self, x: Tensor) -> Tensor:
            self.replaced = torch.ones(3)
            self.grown.resize_(5).fill_(1)
            self.cache = x.detach().clone()
            return x

    backend = expert(Growing())
    before = backend.module.state_dict()
    backend.forward(X)
    backend.backward(X, X, train=False)
    after = backend.module.state_dict()
    assert all(torch.equal(after[name], torch.zeros(2)) for name in before)


def test_lazy_modules_with_buffers_learn_their_shape_from_the_first_rows():
    backend = expert(nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d()))
    backend.expert.find_schema()
    assert backend.schema is None
    backend.backward(X, torch.ones(6, 3))
    assert backend.updates == 1 and backend.forward(X).shape == (6, 3)


# ---------------------------------------------------------------- input gradients only


@pytest.mark.parametrize("options", [{}, {"accumulate": 3}, {"train_mode": True}, {"max_batch_size": 4}])
def test_a_backward_pass_that_does_not_train_gives_the_same_gradients_and_changes_nothing(options):
    torch.manual_seed(0)
    backend = expert(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), **options)
    backend.backward(X, X)
    before = backend.state()
    grads = backend.backward(X, X, train=False)
    assert_same({**backend.state(), "counter.rows": before["counter.rows"]}, before)
    torch.testing.assert_close(grads, backend.backward(X, X))


# ---------------------------------------------------------------- keywords and several outputs


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, *, scale: Tensor, shift: Tensor | None = None) -> Tensor:
        y: Tensor = self.linear(x) * scale
        return y if shift is None else y + shift


def test_the_last_inputs_are_handed_over_by_keyword_and_get_gradients_in_their_order():
    backend, scale, shift = expert(Named()), torch.full((6, 1), 2.0), torch.ones(6, 4)
    linear = copy.deepcopy(backend.module.linear)
    expected = linear(X) * 2 + 1  # type: ignore[operator]
    for names, tensors in ((("scale", "shift"), (scale, shift)), (("shift", "scale"), (shift, scale))):
        assert torch.equal(backend.forward(X, *tensors, keywords=names), expected)
    grads = backend.backward(X, shift, scale, torch.ones(6, 4), keywords=("shift", "scale"), train=False)
    assert [g.shape for g in grads] == [(6, 4), (6, 4), (6, 1)] and torch.equal(grads[1], torch.ones(6, 4))
    assert backend.schema is not None
    assert [t.name for t in backend.schema.inputs] == ["", "scale", "shift"]


@pytest.mark.parametrize(
    ("tensors", "keywords", "text"),
    [
        ((X, X), ("sclae",), "unexpected keyword argument 'sclae'|missing a required .*: 'scale'"),
        ((X,), (), "missing a required"),
        ((X, X, X), ("scale", "scale"), "each once, for an input"),
        ((X,), ("x", "scale"), "2 keywords for 1 inputs"),
        ((X, X, X), ("x", "scale"), "multiple values for argument 'x'"),
    ],
)
def test_keywords_that_an_expert_does_not_know_are_a_bad_request(tensors, keywords, text):
    with pytest.raises(BadRequest, match=text):
        expert(Named()).forward(*tensors, keywords=keywords)


class Pair(NamedTuple):
    total: Tensor
    largest: Tensor


class Several(nn.Module):
    """Gives a wide output, a narrow one, and one without a gradient."""

    def __init__(self, form: Any) -> None:
        super().__init__()
        self.form = form
        self.linear = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Any:
        wide = self.linear(x)
        return self.form(wide, wide.sum(1), wide.argmax(1))


FORMS = [
    lambda *tensors: tensors,
    lambda *tensors: list(tensors),
    lambda *tensors: dict(zip("abc", tensors, strict=True)),
    lambda *tensors: OrderedDict(zip("abc", tensors, strict=True)),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("most", [4096, 4])
def test_several_outputs_are_answered_and_get_a_gradient_each(form, most):
    torch.manual_seed(0)
    backend = expert(Several(form), max_batch_size=most)
    x = X.clone().requires_grad_()
    wide, total, index = backend.module(x).values() if isinstance(backend.module(x), dict) else backend.module(x)
    answers = backend.compute("forward", [X])
    for answer, output in zip(answers, (wide, total, index), strict=True):
        torch.testing.assert_close(answer, output.detach())
    grads = torch.rand(6, 8), torch.rand(6), torch.zeros(6)
    torch.autograd.backward([wide, total], grads[:2])
    torch.testing.assert_close(backend.backward(X, *grads, outputs=3), [x.grad])
    assert backend.updates == 1
    assert backend.schema is not None
    assert [(t.dtype, t.shape) for t in backend.schema.outputs] == [("float32", (8,)), ("float32", ()), ("int64", ())]


def test_named_tuples_are_tuples_and_requests_with_several_outputs_are_merged():
    class Both(nn.Module):
        def forward(self, x: Tensor) -> Pair:
            return Pair(x.sum(1), x.argmax(1))

    answers, _ = compute_batch(expert(Both()), "forward", [[X[:2]], [X[2:]]])
    assert [[len(tensor) for tensor in answer] for answer in answers if isinstance(answer, list)] == [[2, 2], [4, 4]]


def test_a_wrong_number_of_output_gradients_is_a_bad_request():
    backend = expert(Several(FORMS[0]))
    before = backend.state()
    for outputs in (1, 2):
        with pytest.raises(BadRequest, match=r"has output float32 \[rows, 8\] and float32 \[rows\] and int64 \[rows\]"):
            backend.backward(X, *[torch.zeros(6, 8)] * outputs, outputs=outputs)
    with pytest.raises(BadRequest, match="at least 4 tensors, not 3"):
        backend.backward(X, X, X, outputs=3)
    assert_same(backend.state(), before)


@pytest.mark.parametrize("wrong", [(), (X, None), "text", [X[:3]], X.to_sparse(), [X] * 17])
def test_outputs_that_are_no_rows_are_the_experts_own_failure(wrong):
    class Wrong(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return wrong

    error = error_of(Wrong(), X)
    assert isinstance(error, RemoteFailure)
    assert "an expert's module returns one tensor with a row per input row, or a tuple, a list" in str(error)


# ---------------------------------------------------------------- what it takes, before the first call


class Stated(nn.Module):
    def __init__(self, example: Any) -> None:
        super().__init__()
        self.example_inputs = example

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x[..., :2]


@pytest.mark.parametrize(
    ("module", "inputs", "outputs"),
    [
        (lambda: make_expert("ffn", hidden=4), [("float32", (4,), "")], [(4,)]),
        (lambda: make_expert("transformer", hidden=8), [("float32", (-1, 8), "")], [(-1, 8)]),
        (lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 9)), [("float32", (4,), "")], [(9,)]),
        (lambda: nn.Linear(4, 9).bfloat16(), [("bfloat16", (4,), "")], [(9,)]),
        (lambda: nn.Sequential(nn.Embedding(9, 3), nn.Flatten()), [("int64", (-1,), "")], [(-1,)]),
        (lambda: nn.Conv2d(3, 5, 3, padding=1), [("float32", (3, -1, -1), "")], [(5, -1, -1)]),
        (lambda: nn.BatchNorm1d(4), [("float32", (4,), "")], [(4,)]),
        (lambda: Stated(torch.zeros(2, 7)), [("float32", (7,), "")], [(2,)]),
        (lambda: Stated((torch.zeros(2, 7), torch.ones(2))), [("float32", (7,), ""), ("float32", (), "")], [(2,)]),
        (lambda: Stated({"x": torch.zeros(1, 3, 7)}), [("float32", (3, 7), "x")], [(3, 2)]),
    ],
)
def test_what_an_expert_takes_is_known_before_its_first_call(module, inputs, outputs):
    backend = expert(module())
    before, random = backend.state(), torch.get_rng_state()
    backend.expert.find_schema()
    assert backend.schema is not None
    assert [(t.dtype, t.shape, t.name) for t in backend.schema.inputs] == inputs
    assert [t.shape for t in backend.schema.outputs] == outputs
    assert_same(backend.state(), before)
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize(
    "module",
    [
        lambda: make_expert("nop"),
        lambda: Stated("text"),
        lambda: Stated([X, 1]),
        lambda: nn.Bilinear(4, 4, 2),
        lambda: Raising(SystemExit("no")),
    ],
)
def test_what_cannot_be_found_out_is_unknown_until_a_call_has_shown_it(module):
    backend = expert(module())
    backend.expert.find_schema()
    assert backend.schema is None


def test_an_expert_that_takes_too_long_is_not_waited_for_and_what_it_gives_late_is_ignored():
    class Slow(nn.Linear):
        go, ended = threading.Event(), threading.Event()

        def forward(self, x: Tensor) -> Tensor:
            assert self.go.wait(20)
            output = super().forward(x)
            self.ended.set()
            return output

    backend = expert(Slow(4, 4))
    backend.expert.find_schema(timeout=0.05)
    assert backend.schema is None
    Slow.go.set()
    assert Slow.ended.wait(20)
    for thread in threading.enumerate():
        if thread.name == "labkit-trial":
            thread.join(20)
    assert backend.schema is None


def test_a_trial_in_train_mode_leaves_random_numbers_and_running_statistics_alone():
    backend = expert(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), Counting()), train_mode=True)
    before, random = backend.state(), torch.get_rng_state()
    backend.expert.find_schema()
    assert backend.schema is not None
    assert torch.equal(random, torch.get_rng_state())
    assert_same(backend.state(), before)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


def test_a_schema_is_learned_from_calls_and_any_size_will_do_where_they_differ():
    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum(-1)

    backend = expert(Own())
    backend.forward(torch.zeros(2, 3, 4))
    backend.forward(torch.zeros(2, 5, 4))
    assert backend.schema is not None
    assert (backend.schema.inputs[0].shape, backend.schema.outputs[0].shape) == ((-1, 4), (-1,))


# ---------------------------------------------------------------- whose fault it is


class Raising(nn.Module):
    """Code of the user's own with a mistake in it."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        self.layer(x)
        raise self.error


MISTAKES = [
    AttributeError("no attribute 'lienar'"), KeyError("key"), TypeError("'NoneType' object is not callable"),
    RuntimeError("boom"), ZeroDivisionError("division by zero"), NameError("name 'y' is not defined"),
    NotImplementedError("later"), OSError("no such file"), SystemExit(3), KeyboardInterrupt(), GeneratorExit(),
]  # fmt: skip


@pytest.mark.parametrize("find_schema", [True, False])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("error", MISTAKES, ids=lambda error: type(error).__name__)
def test_a_mistake_in_an_experts_own_code_is_named_with_its_type_its_text_and_its_line(error, direction, find_schema):
    tensors = [X] if direction == "forward" else [X, X]
    with ThreadPoolExecutor(1) as compute_thread:  # in the main thread, a KeyboardInterrupt is the user's Ctrl-C
        answer = compute_thread.submit(
            error_of, Raising(error), *tensors, direction=direction, find_schema=find_schema
        ).result()
    assert type(answer) is RemoteFailure
    line = Raising.forward.__code__.co_firstlineno + 2
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    where = f"(test_expert_module.py:{line}, in forward)"
    assert str(answer) == f"the code of expert odd.0 failed in a {direction} pass: {said} {where}"


class Mistaken(nn.Module):
    """A mistake that torch complains about as about wrong inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))  # type: ignore[no-any-return]


def test_an_error_about_shapes_is_the_experts_own_if_the_request_fits_its_first_layer():
    own, wrong = (error_of(Mistaken(), x, find_schema=True) for x in (X, X[:, :3]))
    assert type(own) is RemoteFailure and "mat1 and mat2 shapes cannot be multiplied" in str(own)
    assert "test_expert_module.py" in str(own)
    assert type(wrong) is BadRequest and "does not take float32 [rows, 3]" in str(wrong)


@pytest.mark.parametrize("find_schema", [True, False])
@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (lambda: nn.Linear(4, 4), [X[:, :3]]),
        (lambda: nn.Linear(4, 4), [X.long()]),
        (lambda: nn.Linear(4, 4), [X, X]),
        (lambda: make_expert("ffn", hidden=4), [X[:, :3]]),
        (lambda: make_expert("transformer", hidden=8, max_length=5), [torch.zeros(1, 6, 8)]),
        (lambda: make_expert("transformer", hidden=8), [torch.zeros(1, 8)]),
        (lambda: nn.Sequential(nn.Embedding(6, 3)), [X]),
        (lambda: nn.Conv2d(3, 2, 1), [torch.zeros(1, 2, 4, 4)]),
    ],
)
def test_what_an_expert_does_not_take_is_a_bad_request_that_says_what_came(module, inputs, find_schema):
    error = error_of(module(), *inputs, find_schema=find_schema)
    assert type(error) is BadRequest
    assert f"{str(inputs[0].dtype).removeprefix('torch.')} [rows, " in str(error)
    if find_schema:
        assert "expert odd.0 takes " in str(error) and "; got " in str(error)


class FailsBackward(nn.Module):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.layer, self.error = nn.Linear(4, 4), error

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x)
        if output.requires_grad:
            output.register_hook(self.fail)
        return output

    def fail(self, grad: Tensor) -> Tensor:
        raise self.error


@pytest.mark.parametrize("error", [SystemExit(1), ValueError("shape")])
def test_a_hook_that_fails_in_a_backward_pass_is_named_and_only_that_pass_fails(error):
    backend = expert(FailsBackward(error))
    before = backend.state()
    answers, _ = compute_batch(backend, "backward", [[X, X], [X, X]])
    for answer in answers:
        assert type(answer) is RemoteFailure
        assert f"in a backward pass: {type(error).__name__}: {error} (test_expert_module.py:" in str(answer)
    assert_same(backend.state(), before)
    assert backend.forward(X).shape == X.shape


def test_errors_name_no_folder_of_the_server_and_stay_short():
    error = error_of(Raising(RuntimeError("x" * 10_000)), X)
    assert len(str(error)) < 500 and "/" not in str(error).replace("x" * 10, "")


class Leaving(nn.Module):
    """Ends the process, as it thinks, in one of its methods."""

    def __init__(self, where: str = "forward") -> None:
        super().__init__()
        self.where, self.layer = where, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "forward":
            sys.exit(1)
        return self.layer(x)  # type: ignore[no-any-return]

    def state_dict(self, *args: Any, **options: Any) -> Any:
        if self.where == "state_dict":
            sys.exit(2)
        return super().state_dict(*args, **options)


def leaving_when_made() -> nn.Module:
    sys.exit(3)


def test_an_expert_that_is_a_task_and_calls_exit_takes_nobody_else_along(tmp_path):
    with lk.Swarm(name="leaving") as swarm:
        swarm.serve("nop", name="good", grid=(1,), isolation="task")
        swarm.serve(Leaving, name="bad", grid=(1,), isolation="task")
        with pytest.raises(RemoteFailure, match=r"SystemExit: 1 \(test_expert_module\.py"):
            swarm.expert("bad.0")(X)
        with pytest.raises((ValueError, ServerFailed), match="SystemExit: 3"):
            swarm.serve(leaving_when_made, name="unborn", grid=(1,), isolation="task")
        swarm.serve(Leaving, where="state_dict", name="unsaved", grid=(1,), isolation="task", checkpoint_dir=tmp_path)
        with pytest.raises(ServerFailed, match="SystemExit: 2"):
            swarm.servers[-1].stop()
        assert torch.equal(swarm.expert("good.0")(X), X)
        assert [server.state for server in swarm.servers[:2]] == ["running", "running"]


def test_a_call_of_one_width_does_not_make_an_expert_that_takes_anything_refuse_another():
    with lk.Swarm() as swarm:
        swarm.serve("nop", grid=(1,), isolation="task")
        expert = swarm.expert("nop.0")
        assert expert(torch.ones(1, 4)).shape == (1, 4)
        assert expert.schema is None
        assert swarm.moe(16, name="nop")(torch.ones(2, 16)).shape == (2, 16)


TOGETHER = """
import threading, torch, labkit as lk
torch.set_num_threads(1)
with lk.Swarm() as swarm:
    swarm.serve("nop", grid=(1,), isolation="task")
    expert, together = swarm.expert("nop.0"), threading.Barrier(4)
    def train():
        for _ in range(150):
            together.wait()
            expert(torch.ones(1, 4)).sum().backward()
    threads = [threading.Thread(target=train) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
"""


def test_passes_that_threads_begin_at_the_same_moment_do_not_wait_for_each_other_for_ever():
    subprocess.run([sys.executable, "-c", TOGETHER], check=True, timeout=60)
