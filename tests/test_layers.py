"""Expert kinds: found by name, by reference or given; and what the built-in ones compute."""

import sys
from functools import partial

import pytest
import torch
from torch import nn

from labkit.server import layers
from labkit.server.layers import FeedForward, expert_reference, kind_name, make_expert, register_expert


class Doubling(nn.Module):
    def forward(self, x):
        return 2 * x


def doubling(scale: float = 2.0) -> nn.Module:
    return Doubling()


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(layers, "_factories", dict(layers.BUILTIN_KINDS))


@pytest.mark.parametrize(
    ("kind", "options", "shape"),
    [
        ("ffn", {"hidden": 8}, (3, 8)),
        ("ffn", {"hidden": 8, "inner": 5}, (3, 8)),
        ("transformer", {"hidden": 8, "heads": 2}, (3, 5, 8)),
        ("gated", {"hidden": 8}, (3, 8)),
        ("gated", {"hidden": 8, "inner": 5, "gate": "none", "bias": True}, (3, 8)),
        ("nop", {}, (3, 7, 2)),
        ("nop", {"hidden": 8}, (3, 8)),
    ],
)
def test_builtin_kinds_keep_the_shape_and_pass_a_gradient(kind, options, shape):
    x = torch.randn(shape, requires_grad=True)
    output = make_expert(kind, **options)(x)
    output.sum().backward()
    assert output.shape == shape
    assert x.grad is not None and x.grad.shape == shape


def test_ffn_is_the_papers_expert():
    widths = [layer.weight.shape for layer in make_expert("ffn", hidden=512).modules() if isinstance(layer, nn.Linear)]
    assert widths == [(2048, 512), (2048, 2048), (512, 2048)]


def test_a_causal_transformer_does_not_look_ahead():
    expert = make_expert("transformer", hidden=8, heads=2, causal=True)
    x = torch.randn(1, 6, 8)
    changed = x.clone()
    changed[:, 4:] = 0
    torch.testing.assert_close(expert(x)[:, :4], expert(changed)[:, :4])


def test_a_transformer_takes_its_mask_by_keyword_only_so_that_a_layer_knows_it_for_one():
    expert, x, mask = make_expert("transformer", hidden=8, heads=2), torch.randn(2, 3, 8), torch.ones(2, 3).bool()
    assert expert(x, mask=mask).shape == x.shape
    with pytest.raises(TypeError, match="positional"):
        expert(x, mask)
    for wrong in (mask[:1], mask.float()):
        with pytest.raises(ValueError, match=r"mask: bools or whole numbers \[2, 3\], true where"):
            expert(x, mask=wrong)


def test_a_transformer_refuses_a_sequence_over_its_bound():
    with pytest.raises(ValueError, match="seq <= 4"):
        make_expert("transformer", hidden=8, heads=2, max_length=4)(torch.zeros(1, 5, 8))


def test_a_factory_is_registered_by_decorator_or_by_call_and_may_be_replaced():
    @register_expert("mine")
    class Mine(nn.Module):
        pass

    assert isinstance(make_expert("mine"), Mine)
    assert register_expert("mine", Doubling) is Doubling
    assert isinstance(make_expert("mine"), Doubling)


def test_a_builtin_kind_cannot_be_replaced():
    with pytest.raises(ValueError, match="labkit's own"):
        register_expert("ffn", Doubling)


def test_an_unknown_kind_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown expert kind 'fnn'.*ffn, gated, nop, transformer"):
        make_expert("fnn", hidden=8)


def test_an_option_that_the_factory_does_not_take_is_named():
    with pytest.raises(
        ValueError, match=r"'ffn' takes no option hiden; did you mean 'hidden'\? It takes hidden \(required\), inner"
    ):
        make_expert("ffn", hiden=8)
    with pytest.raises(ValueError, match="missing a required argument: 'hidden'"):
        make_expert("ffn")


def test_a_module_is_no_kind_and_a_kind_has_a_name():
    with pytest.raises(ValueError, match="give the class Doubling"):
        make_expert(Doubling())
    with pytest.raises(ValueError, match=r'needs a name: @register_expert\("mine"\)'):
        register_expert(Doubling)  # type: ignore[call-overload]


def test_a_factory_has_to_make_a_module():
    with pytest.raises(ValueError, match="made a dict"):
        make_expert(dict)  # type: ignore[arg-type]


def test_a_factory_that_wants_to_end_the_process_makes_no_module_and_is_named(tmp_path, monkeypatch):
    def leaving() -> nn.Module:
        sys.exit("bye")

    with pytest.raises(
        ValueError, match=r"'leaving' makes no module: its code raised SystemExit: bye \(test_layers\.py"
    ):
        make_expert(leaving)
    (tmp_path / "kinds_that_leave.py").write_text("import sys\nsys.exit(3)\n")
    (tmp_path / "kinds_that_fail.py").write_text("\n1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"cannot be imported: SystemExit: 3 \(kinds_that_leave\.py:2"):
        make_expert("kinds_that_leave:Mine")
    with pytest.raises(ValueError, match=r"cannot be imported: ZeroDivisionError: .*\(kinds_that_fail\.py:2"):
        make_expert("kinds_that_fail:Mine")


def test_an_importable_factory_becomes_text_and_back():
    reference = expert_reference(doubling)
    assert reference == f"{__name__}:doubling"
    assert isinstance(make_expert(reference, scale=3.0), Doubling)
    assert expert_reference(Doubling) == f"{__name__}:Doubling"


def test_names_become_text_that_a_fresh_process_understands():
    register_expert("mine", Doubling)
    assert expert_reference("ffn") == "ffn"
    assert expert_reference(FeedForward) == "labkit.server.layers:FeedForward"
    assert expert_reference("mine") == f"{__name__}:Doubling"


def test_a_kind_has_one_name_whoever_builds_it():
    assert kind_name("ffn") == "ffn" and kind_name("labkit.server.layers:FeedForward") == kind_name(FeedForward)
    assert kind_name(partial(FeedForward, 8)) == "partial"
    assert kind_name(lambda: FeedForward(8)) == "<lambda>"


def test_what_a_fresh_process_cannot_import_has_no_reference():
    class Local(nn.Module):
        pass

    in_notebook = type("InNotebook", (nn.Module,), {"__module__": "__main__"})
    for factory in (lambda: Doubling(), Local, in_notebook, partial(doubling, scale=1.0)):
        with pytest.raises(ValueError, match="a server process cannot import"):
            expert_reference(factory)


def test_a_reference_that_cannot_be_imported_says_why():
    with pytest.raises(ValueError, match="No module named 'no_such_module'"):
        make_expert("no_such_module:thing")
    with pytest.raises(ValueError, match="no attribute"):
        make_expert("torch.nn:NoSuchLayer")
