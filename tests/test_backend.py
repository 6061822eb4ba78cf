"""An expert backend trains exactly as a local module with an optimizer does, and refuses without a trace."""

import copy
import subprocess
import sys
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor, nn

from labkit.errors import BadRequest, CheckpointError, NonFiniteTensor
from labkit.server import optimizer
from labkit.server.backend import ExpertBackend
from labkit.server.layers import make_expert
from labkit.server.optimizer import BackendConfig
from labkit.server.validation import check_finite

HIDDEN = 6


def ffn(**options) -> ExpertBackend:
    torch.manual_seed(0)
    return ExpertBackend("ffn.0.0", make_expert("ffn", hidden=HIDDEN), BackendConfig(**options))


def batch(rows: int = 4, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, HIDDEN, generator=generator), torch.randn(rows, HIDDEN, generator=generator)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


class Gathering(nn.Module):
    """Three inputs, one of them integer: picks from a table and scales."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, HIDDEN)

    def forward(self, x, index, scale):
        return (x + self.table(index)) * scale


class Overflowing(nn.Module):
    """Finite outputs whose gradient by the parameter is not."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sqrt(self.weight)


@pytest.mark.parametrize(
    "options", [{}, {"amsgrad": True}, {"optimizer": "sgd"}, {"optimizer": "sgd", "momentum": 0.9}]
)
def test_the_bytes_of_a_state_are_known_without_taking_it(options):
    backend = ffn(**options)
    backend.backward(*batch())
    numbers = [t.nbytes for name, t in backend.state().items() if t.ndim]
    assert backend.state_bytes == sum(numbers)


# ---------------------------------------------------------------- the same as a local module


def test_forward_and_backward_equal_a_local_module_and_optimizer():
    backend = ffn()
    local = copy.deepcopy(backend.module)
    optimizer = torch.optim.Adam(local.parameters(), lr=1e-3, fused=True)
    for seed in range(3):
        x, grad = batch(seed=seed)
        x_local = x.clone().requires_grad_()
        output = local(x_local)
        assert torch.equal(backend.forward(x), output)
        output.backward(grad)
        optimizer.step()
        optimizer.zero_grad()
        [grad_x] = backend.backward(x, grad)
        assert torch.equal(grad_x, x_local.grad)  # type: ignore[arg-type]
    assert_same(backend.module.state_dict(), local.state_dict())
    assert (backend.updates, backend.rows_processed) == (3, 24)


class Transposing(nn.Module):
    """The gradient of its parameter comes transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(HIDDEN, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,oi->bo", x, self.w)


class Summing(Transposing):
    """The gradient of its parameter is one number, expanded."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.w.sum()


class Transposed(nn.Module):
    """Its parameter is transposed itself."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(HIDDEN, HIDDEN).T)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


class Sliced(Transposed):
    """Its parameter has gaps in its memory."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(HIDDEN, 2 * HIDDEN)[:, :HIDDEN])


def expert(kind: type[nn.Module], **options) -> ExpertBackend:
    torch.manual_seed(0)
    return ExpertBackend("odd.0", kind(), BackendConfig(**options))


@pytest.mark.parametrize("kind", [Transposing, Summing, Transposed, Sliced])
def test_gradients_and_parameters_in_any_layout_train_as_they_do_locally_with_an_optimizer_that_is_not_fused(kind):
    backend = expert(kind)
    local = copy.deepcopy(backend.module)
    optimizer = torch.optim.Adam(local.parameters(), lr=1e-3, fused=False)
    for seed in range(3):
        x, grad = batch(seed=seed)
        local(x).backward(grad)
        optimizer.step()
        optimizer.zero_grad()
        backend.backward(x, grad)
    for one, other in zip(backend.module.parameters(), local.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", [Transposing, Summing, Transposed, Sliced])
@pytest.mark.parametrize(
    "options", [{"accumulate": 2}, {"clip_grad_norm": 0.1}, {"optimizer": "sgd", "momentum": 0.9, "lr": 0.1}]
)
def test_any_layout_trains_the_same_when_gradients_are_accumulated_or_clipped_and_after_a_restart(kind, options):
    fused, plain = expert(kind, **options), expert(kind, fused=False, **options)
    for seed in range(6):
        fused.backward(*batch(seed=seed))
        plain.backward(*batch(seed=seed))
        restarted = expert(kind, **options)
        restarted.load_state(fused.state())
        fused = restarted
    torch.testing.assert_close(fused.module.w, plain.module.w)


def test_a_module_that_learns_its_shape_from_its_first_rows_is_trained_too():
    backend = ExpertBackend("lazy.0", nn.LazyLinear(3))
    backend.backward(torch.ones(2, HIDDEN), torch.ones(2, 3))
    assert backend.updates == 1


def test_adam_is_fused_by_default():
    optimizer = ffn().optimizer
    assert isinstance(optimizer, torch.optim.Adam) and optimizer.defaults["fused"] is True


def test_the_input_gradient_is_that_of_the_parameters_before_the_step():
    backend, (x, grad) = ffn(optimizer="sgd", lr=1.0), batch()
    before = copy.deepcopy(backend.module)
    [grad_x] = backend.backward(x, grad)
    x.requires_grad_()
    assert torch.equal(grad_x, torch.autograd.grad(before(x), x, grad)[0])


def test_dropout_and_running_statistics_are_off_so_that_recomputing_is_exact():
    module = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.Dropout(0.5))
    backend, (x, grad) = ExpertBackend("odd.0", module), batch()
    assert torch.equal(backend.forward(x), backend.forward(x))
    backend.backward(x, grad)
    assert int(backend.state()["module.1.num_batches_tracked"]) == 0


def test_in_train_mode_only_a_backward_pass_moves_running_statistics():
    backend, (x, grad) = ExpertBackend("odd.0", nn.BatchNorm1d(HIDDEN), BackendConfig(train_mode=True)), batch()
    before = backend.state()
    backend.forward(x)
    assert_same({**backend.state(), "counter.rows": torch.tensor(0)}, before)
    backend.backward(x, grad)
    assert int(backend.state()["module.num_batches_tracked"]) == 1


def test_several_inputs_get_gradients_except_the_integer_one():
    backend = ExpertBackend("table.0", Gathering())
    x, grad = batch()
    index, scale = torch.tensor([1, 2, 3, 1]), torch.full((4, 1), 3.0)
    before = backend.forward(x, index, scale)
    grad_x, grad_scale = backend.backward(x, index, scale, grad)
    torch.testing.assert_close(grad_x, 3 * grad)
    assert grad_scale.shape == (4, 1)
    assert not torch.equal(backend.forward(x, index, scale), before)


def test_an_input_that_the_output_does_not_depend_on_gets_zeros():
    backend, (x, grad) = ExpertBackend("nop.0", make_expert("nop")), batch()
    grad_x, grad_unused = backend.backward(x, x, grad)
    assert torch.equal(grad_x, grad)
    assert torch.equal(grad_unused, torch.zeros_like(x))


def test_an_expert_without_parameters_passes_gradients_and_never_updates():
    backend, (x, grad) = ExpertBackend("nop.0", make_expert("nop")), batch()
    assert torch.equal(backend.forward(x), x)
    assert torch.equal(backend.backward(x, grad)[0], grad)
    assert (backend.updates, backend.parameter_bytes, backend.optimizer) == (0, 0, None)


# ---------------------------------------------------------------- options of training


def test_clipping_bounds_the_step():
    backend, (x, grad) = ffn(optimizer="sgd", lr=1.0, clip_grad_norm=0.5), batch()
    before = [p.detach().clone() for p in backend.module.parameters()]
    backend.backward(x, 100 * grad)
    moved = torch.cat([(a - b).flatten() for a, b in zip(before, backend.module.parameters(), strict=True)])
    torch.testing.assert_close(moved.norm(), torch.tensor(0.5), rtol=1e-3, atol=0)


class Shared(nn.Module):
    """One gradient is that of two parameters and of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.zeros(1, HIDDEN)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.a + self.b)


def test_clipping_changes_no_other_gradient_that_is_the_same_tensor():
    config = BackendConfig(optimizer="sgd", lr=1.0, clip_grad_norm=0.5)
    backend, local = ExpertBackend("shared.0", Shared(), config), Shared()
    x, grad = (tensor.requires_grad_() for tensor in batch(1))
    local(x).backward(grad)
    nn.utils.clip_grad_norm_(local.parameters(), 0.5)
    assert torch.equal(backend.backward(x.detach(), grad.detach())[0], grad)
    for parameter, expected in zip(backend.module.parameters(), local.parameters(), strict=True):
        assert expected.grad is not None
        torch.testing.assert_close(parameter.detach(), -expected.grad)


def test_accumulation_sums_the_gradients_of_several_passes_into_one_step():
    accumulating, at_once = ffn(optimizer="sgd", accumulate=2), ffn(optimizer="sgd")
    x, grad = batch(8)
    accumulating.backward(x[:4], grad[:4])
    assert accumulating.updates == 0
    accumulating.backward(x[4:], grad[4:])
    at_once.backward(x, grad)
    assert accumulating.updates == at_once.updates == 1
    for one, other in zip(accumulating.module.parameters(), at_once.module.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_the_linear_schedule_warms_up_and_decays_to_zero():
    config = BackendConfig(lr=1.0, schedule="linear", warmup_steps=2, total_steps=6)
    assert [config.lr_at(step) for step in range(8)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert BackendConfig(lr=0.5).lr_at(10**6) == 0.5
    assert [BackendConfig(lr=0.5, age_power=0.5).lr_at(0, age) for age in (0, 3, 15)] == [0.5, 0.25, 0.125]


def test_the_schedule_reaches_the_optimizer():
    backend = ffn(lr=1.0, schedule="linear", warmup_steps=4, total_steps=8)
    backend.backward(*batch())
    backend.backward(*batch())
    assert backend.optimizer is not None and backend.optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    "wrong",
    [
        {"optimizer": "adamm"},
        {"schedule": "linear"},
        {"accumulate": 0},
        {"clip_grad_norm": 0.0},
        {"lr": -1},
        {"lr": "1e-3"},
        {"weight_decay": float("nan")},
        {"momentum": -0.1},
    ],
)
def test_a_config_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        BackendConfig(**wrong)


def test_a_config_travels_as_json():
    config = BackendConfig(optimizer="adamw", clip_grad_norm=1.0, schedule="linear", total_steps=9)
    assert msgspec.json.decode(msgspec.json.encode(config), type=BackendConfig) == config


# ---------------------------------------------------------------- refusals change nothing


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_non_finite_inputs_and_gradients_are_refused_and_change_nothing(poison, accumulate):
    backend, (x, grad) = ffn(accumulate=accumulate), batch()
    backend.backward(x, grad)
    before, bad = backend.state(), x.clone()
    bad[2, 3] = poison
    with pytest.raises(NonFiniteTensor):
        backend.forward(bad)
    with pytest.raises(NonFiniteTensor):
        backend.backward(bad, grad)
    with pytest.raises(NonFiniteTensor):
        backend.backward(x, bad)
    assert_same(backend.state(), before)


def test_gradients_that_overflow_inside_the_expert_are_refused_and_change_nothing():
    backend, (x, grad) = ExpertBackend("odd.0", Overflowing()), batch()
    before = backend.state()
    with pytest.raises(NonFiniteTensor, match="parameter gradients"):
        backend.backward(x, grad)
    assert_same(backend.state(), before)
    with pytest.raises(NonFiniteTensor, match="finite inputs"):
        ffn().backward(x, torch.full_like(grad, 3e38))


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_finite_gradient_whose_square_overflows_is_refused_and_training_goes_on(clip):
    backend, (x, grad) = ExpertBackend("odd.0", nn.Linear(HIDDEN, HIDDEN), BackendConfig(clip_grad_norm=clip)), batch()
    before = backend.state()
    with pytest.raises(NonFiniteTensor, match="parameter gradients"):
        backend.backward(x, torch.full_like(grad, 1e30))
    assert_same(backend.state(), before)


@pytest.mark.parametrize("options", [{}, {"clip_grad_norm": 1000.0}])
def test_in_half_precision_a_square_that_overflows_is_refused_and_one_that_does_not_trains(options):
    backend = ExpertBackend("half.0", nn.Linear(1, 1, bias=False).half(), BackendConfig(**options))
    x, before = torch.ones(1, 1).half(), backend.state()
    with pytest.raises(NonFiniteTensor, match="parameter gradients"):
        backend.backward(x, 300 * x)
    assert_same(backend.state(), before)
    for _ in range(3):
        backend.backward(x, 250 * x)
    assert not torch.equal(backend.state()["module.weight"], before["module.weight"])
    check_finite(list(backend.state().values()))


def test_in_half_precision_many_gradients_are_no_reason_to_refuse_them_nor_is_a_large_one_that_is_clipped():
    x = torch.ones(1, 1000).half()
    ExpertBackend("half.0", nn.Linear(1000, 1000).half()).backward(x, 100 * x)
    ExpertBackend("half.0", nn.Linear(1000, 1).half(), BackendConfig(clip_grad_norm=1.0)).backward(x, 1000 * x[:, :1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_in_half_precision_sgd_moves_all_parameters(dtype, momentum):
    module, x = nn.Linear(20, 20, bias=False, dtype=dtype), torch.ones(1, 20, dtype=dtype)
    nn.init.zeros_(module.weight)
    ExpertBackend("half.0", module, BackendConfig(optimizer="sgd", lr=0.5, momentum=momentum)).backward(x, x)
    assert (module.weight == -0.5).all()


def test_in_half_precision_gradients_are_clipped_whose_norm_is_more_than_it_holds():
    config = BackendConfig(optimizer="sgd", lr=1.0, clip_grad_norm=100.0)
    backend, x = ExpertBackend("half.0", nn.Linear(1000, 1000, bias=False).half(), config), torch.ones(1, 1000).half()
    before = backend.state()["module.weight"].float()
    backend.backward(x, 100 * x)  # a million gradients of 100
    assert (backend.state()["module.weight"].float() - before).norm().item() == pytest.approx(100.0, rel=0.01)


def test_in_half_precision_an_optimizer_that_keeps_no_squares_takes_all_that_is_finite():
    module, x = nn.Linear(1, 1, bias=False).half(), torch.ones(1, 1).half()
    nn.init.zeros_(module.weight)
    backend = ExpertBackend("half.0", module, BackendConfig(optimizer="sgd", lr=1e-3))
    backend.backward(x, 300 * x)
    assert module.weight.item() == pytest.approx(-0.3, rel=0.01)
    with pytest.raises(NonFiniteTensor, match="parameter gradients"):
        backend.backward(2 * x, 60_000 * x)
    assert module.weight.item() == pytest.approx(-0.3, rel=0.01)


def test_a_refused_pass_puts_running_statistics_back():
    module = nn.Sequential(nn.BatchNorm1d(HIDDEN), Overflowing())
    backend, (x, grad) = ExpertBackend("odd.0", module, BackendConfig(train_mode=True)), batch()
    before = backend.state()
    with pytest.raises(NonFiniteTensor):
        backend.backward(x, grad)
    assert_same(backend.state(), before)


def test_a_finite_tensor_whose_sum_overflows_is_finite():
    check_finite([torch.full((4,), 3e38), torch.tensor([60000.0, 60000.0], dtype=torch.float16), torch.arange(3)])


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ((torch.zeros(4, HIDDEN + 1),), rf"takes float32 \[rows, {HIDDEN}\]; got float32 \[rows, {HIDDEN + 1}\]"),
        ((torch.zeros(4, HIDDEN, dtype=torch.float64),), r"got float64 \[rows, 6\]"),
        ((torch.zeros(4, HIDDEN), torch.zeros(4, 1)), r"got float32 \[rows, 6\] and float32 \[rows, 1\]"),
        ((torch.zeros(()),), "same number of rows"),
        ((torch.zeros(0, HIDDEN),), "at least one"),
        ((), "at least 1 tensor"),
    ],
)
def test_inputs_that_the_expert_does_not_take_are_a_bad_request_naming_both_shapes(tensors, text):
    with pytest.raises(BadRequest, match=text):
        ffn(max_batch_size=8).forward(*tensors)


def test_an_expert_that_answers_in_half_precision_takes_a_gradient_in_full():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return (x * self.scale).bfloat16()

    backend = ExpertBackend("half.0", Half(), BackendConfig(optimizer="sgd", lr=1.0))
    (grad,) = backend.backward(torch.ones(2, 4), torch.full((2, 4), 0.5))
    assert torch.equal(grad, torch.full((2, 4), 0.5))
    assert torch.equal(backend.state()["module.scale"], torch.zeros(4))


def test_an_output_gradient_of_another_shape_is_a_bad_request_and_changes_nothing():
    backend, (x, grad) = ffn(), batch()
    before = backend.state()
    for wrong in (grad[:, :1], grad.long(), grad[:3]):
        with pytest.raises(BadRequest):
            backend.backward(x, wrong)
    assert_same(backend.state(), before)


def test_a_module_that_says_nothing_of_its_inputs_is_described_by_those_that_worked():
    backend = ExpertBackend("linear.0", nn.Linear(HIDDEN, 2))
    backend.forward(torch.zeros(1, HIDDEN))
    with pytest.raises(BadRequest, match=r"takes float32 \[rows, 6\]; got float32 \[rows, 5\]"):
        backend.forward(torch.zeros(1, 5))


# ---------------------------------------------------------------- steps that fail


@pytest.mark.parametrize("room", [0, 1, 2, 7])  # tensors that the optimizer gets before memory is out
def test_a_first_step_that_fails_for_want_of_memory_leaves_no_trace_and_the_next_one_works(room, monkeypatch):
    backend, twin, restarted = (ffn(accumulate=2, amsgrad=True) for _ in range(3))
    for either in (backend, twin):
        either.backward(*batch(seed=0))
    before, allocate, left = backend.state(), torch.zeros_like, iter(range(room))

    def zeros_like(*args, **options):
        if next(left, None) is None:
            raise torch.OutOfMemoryError("no room is left")
        return allocate(*args, **options)

    with monkeypatch.context() as full:
        full.setattr(torch, "zeros_like", zeros_like)
        with pytest.raises(torch.OutOfMemoryError):
            backend.backward(*batch(seed=1))
    assert_same(backend.state(), before)
    assert all(parameter.grad is None for parameter in backend.module.parameters())
    restarted.load_state(backend.state())
    for either in (backend, twin, restarted):
        either.backward(*batch(seed=1))
    assert backend.updates == 1
    assert_same(backend.state(), twin.state())
    assert_same(restarted.state(), twin.state())


def test_a_later_step_that_fails_keeps_what_the_optimizer_knew(monkeypatch):
    backend = ffn()
    backend.backward(*batch(seed=0))
    before = backend.state()
    with monkeypatch.context() as broken:
        broken.setattr(backend.optimizer, "step", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            backend.backward(*batch(seed=1))
    assert_same(backend.state(), before)
    assert all(parameter.grad is None for parameter in backend.module.parameters())


# ---------------------------------------------------------------- state


@pytest.mark.parametrize(
    "options",
    [
        {"amsgrad": True},
        {"optimizer": "adamw", "fused": False},
        {"optimizer": "sgd", "momentum": 0.9},
        {"accumulate": 3, "schedule": "linear", "total_steps": 9},
    ],
)
def test_training_continued_from_a_state_is_bit_identical(options):
    uninterrupted, first, second = ffn(**options), ffn(**options), ffn(**options)
    for seed in range(4):
        uninterrupted.backward(*batch(seed=seed))
        first.backward(*batch(seed=seed))
    second.load_state(first.state())
    assert_same(second.state(), uninterrupted.state())
    for seed in range(4, 8):
        uninterrupted.backward(*batch(seed=seed))
        second.backward(*batch(seed=seed))
    assert_same(second.state(), uninterrupted.state())
    assert second.updates == uninterrupted.updates


def test_a_state_is_a_copy():
    backend = ffn()
    backend.backward(*batch())
    state = backend.state()
    copied = {name: tensor.clone() for name, tensor in state.items()}
    backend.backward(*batch())
    assert_same(state, copied)


def test_a_state_that_does_not_fit_names_the_tensor_and_changes_nothing():
    backend, other = ffn(), ExpertBackend("ffn.0.1", make_expert("ffn", hidden=HIDDEN, inner=5))
    backend.backward(*batch())
    before = backend.state()
    sgd = ffn(optimizer="sgd")
    with pytest.raises(
        CheckpointError, match=r"module.layers.0.weight is .*\[5, 6\]; expert ffn.0.0 needs .*\[24, 6\]"
    ):
        backend.load_state(other.state())
    with pytest.raises(CheckpointError, match=r"has no counter\.updates"):
        backend.load_state({name: t for name, t in before.items() if name != "counter.updates"})
    with pytest.raises(CheckpointError, match=r"has no optimizer.step.layers.0.bias"):
        backend.load_state({name: t for name, t in before.items() if name != "optimizer.step.layers.0.bias"})
    with pytest.raises(CheckpointError, match="another optimizer than sgd"):
        sgd.load_state(before)
    assert_same(backend.state(), before)
    assert sgd.updates == 0


STEPS = """
import sys, torch
from labkit.server import optimizer
from labkit.server.backend import ExpertBackend

def trained(name):
    torch.manual_seed(0)
    config = optimizer.BackendConfig(optimizer=name, momentum=0.9 * (name == "sgd"), clip_grad_norm=1.0)
    backend = ExpertBackend("ffn.0", torch.nn.Linear(4, 4), config)
    for _ in range(3):
        backend.compute("backward", [torch.ones(2, 4), torch.ones(2, 4)])
    state = backend.optimizer.state_dict()
    backend.optimizer.load_state_dict(state)
    return backend.module.weight.tolist()
"""
SPARED = "print([trained(name) for name in sys.argv[1:]], {'torch._dynamo', 'sympy'} & set(sys.modules))"


def test_experts_train_as_with_torchs_own_optimizers_but_without_its_compiler_or_sympy(monkeypatch):
    names = ("adam", "adamw", "sgd")
    command = [sys.executable, "-c", STEPS + SPARED, *names]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    for kind in ("Adam", "AdamW", "SGD"):
        monkeypatch.setattr(optimizer, kind, getattr(torch.optim, kind))
    here: dict[str, Any] = {}
    exec(STEPS, here)
    assert output == f"{[here['trained'](name) for name in names]} set()\n"
