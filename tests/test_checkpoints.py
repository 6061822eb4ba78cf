"""Checkpoints are exact to the bit, replaced atomically, and refused with the file's name when they are not ours."""

import os
import resource
import subprocess
import sys
import threading

import pytest
import safetensors
import safetensors.torch
import torch
import trio

from labkit import tensor_files
from labkit.errors import CheckpointError, RemoteFailure
from labkit.expert_file import pack_expert
from labkit.server import checkpoints
from labkit.server.backend import ExpertBackend
from labkit.server.checkpoints import Progress, keep_checkpoints, load_expert, restore, save_all, save_expert
from labkit.server.layers import make_expert
from labkit.server.optimizer import BackendConfig
from labkit.server.runtime import InlineCompute, Runtime
from tests.runtimes import submit

pytestmark = pytest.mark.usefixtures("forked_python")

UID = "ffn.0.1"
STATE = {"counter": torch.tensor(7), "weight": torch.arange(6.0).reshape(2, 3)}


def expert(uid: str = UID, hidden: int = 4, **options) -> ExpertBackend:
    torch.manual_seed(0)
    return ExpertBackend(uid, make_expert("ffn", hidden=hidden), BackendConfig(**options), kind="ffn")


def train(backend: ExpertBackend, seeds: range) -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        backend.backward(torch.randn(3, 4, generator=generator), torch.randn(3, 4, generator=generator))


def assert_same_bits(one, other) -> None:
    assert one is not None and other is not None and one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape)
        bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, other[name])]
        assert torch.equal(*bits), name


def of_every_kind() -> dict[str, torch.Tensor]:
    dtypes = [
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.complex64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32,
        torch.uint64,
    ]  # fmt: skip
    state = {f"{dtype}".replace("torch.", "t."): torch.randn(3, 5).mul(9).abs().to(dtype) for dtype in dtypes}
    return state | {
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(2**62 + 1),
        "nothing": torch.zeros(0, 3),
        "odd values": torch.tensor([float("nan"), -0.0, float("inf"), 1e-45]),
        "a view": torch.arange(12.0).reshape(3, 4).T,
        "an expanded one": torch.ones(1).expand(5),
    }


@pytest.mark.parametrize("at_once", [0, tensor_files.READ_AT_ONCE])
def test_every_kind_of_tensor_comes_back_to_the_bit(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(tensor_files, "READ_AT_ONCE", at_once)
    state = of_every_kind()
    save_expert(tmp_path, UID, state)
    assert_same_bits(load_expert(tmp_path, UID), state)


def test_what_is_packed_for_a_copy_is_the_file_that_would_be_saved(tmp_path):
    state = of_every_kind()
    data, crc32 = pack_expert(UID, state, kind="ffn")
    path = save_expert(tmp_path, UID, state, kind="ffn")
    with safetensors.safe_open(path, "pt") as saved:
        metadata = saved.metadata()
    assert metadata["crc32"] == crc32 and len(data) == path.stat().st_size
    path.write_bytes(data)
    with safetensors.safe_open(path, "pt") as copied:
        assert copied.metadata() == metadata
        assert_same_bits({name: copied.get_tensor(name) for name in copied.keys()}, state)  # noqa: SIM118


def test_a_type_that_no_file_can_hold_is_named():
    with pytest.raises(ValueError, match=r"torch\.complex128 \(weight\)"):
        pack_expert(UID, {"weight": torch.zeros(2, dtype=torch.complex128)})


def test_an_expert_without_a_checkpoint_has_none(tmp_path):
    assert load_expert(tmp_path / "nowhere", UID) is None
    assert restore(tmp_path, expert()) is False


@pytest.mark.parametrize("amsgrad", [False, True])
def test_training_continued_from_a_checkpoint_is_bit_identical(tmp_path, amsgrad):
    uninterrupted, first, second = (expert(amsgrad=amsgrad) for _ in range(3))
    train(uninterrupted, range(6))
    train(first, range(3))
    save_expert(tmp_path, UID, first.state(), kind="ffn")
    assert restore(tmp_path, second) is True
    assert_same_bits(second.state(), first.state())
    train(second, range(3, 6))
    assert_same_bits(second.state(), uninterrupted.state())


@pytest.mark.parametrize("broken", ["replace", "fsync"])
def test_a_crash_in_the_middle_of_a_save_leaves_the_old_file(tmp_path, monkeypatch, broken):
    def crash(*_):
        raise OSError("the power went")

    save_expert(tmp_path, UID, STATE)
    monkeypatch.setattr(os, broken, crash)
    with pytest.raises(OSError, match="the power went"):
        save_expert(tmp_path, UID, {"weight": torch.zeros(1)})
    assert_same_bits(load_expert(tmp_path, UID), STATE)
    assert [path.name for path in tmp_path.iterdir()] == [f"{UID}.safetensors"]


def test_a_full_disk_leaves_the_old_file_and_is_an_os_error(tmp_path):
    save_expert(tmp_path, UID, STATE)
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, most))
    try:
        with pytest.raises(OSError, match=rf"{UID}.*could not be written.*too large"):
            save_expert(tmp_path, UID, {"weight": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert_same_bits(load_expert(tmp_path, UID), STATE)
    assert [path.name for path in tmp_path.iterdir()] == [f"{UID}.safetensors"]


def test_a_save_copies_only_what_shares_memory(tmp_path, monkeypatch):
    written = {}
    save_file = safetensors.torch.save_file

    def save(tensors, *rest):
        written.update(tensors)
        save_file(tensors, *rest)

    monkeypatch.setattr(safetensors.torch, "save_file", save)
    both = torch.arange(4.0)
    state = {"alone": torch.ones(3), "one": both, "the other": both, "a part": both[1:]}
    save_expert(tmp_path, UID, state)
    assert_same_bits(load_expert(tmp_path, UID), state)
    assert [name for name in state if written[name].data_ptr() != state[name].data_ptr()] == ["the other", "a part"]


def test_what_a_crashed_save_left_is_removed_at_the_next_start_and_only_that(tmp_path):
    save_expert(tmp_path, UID, expert().state(), kind="ffn")
    left = tmp_path / f".{UID}~0123.tmp"
    left.mkdir()
    (left / ".tmpO0DK6X").write_bytes(b"half of a")
    others = tmp_path / f".{UID}.2~0123.tmp"
    others.mkdir()
    assert restore(tmp_path, expert())
    assert sorted(path.name for path in tmp_path.iterdir()) == [others.name, f"{UID}.safetensors"]


def test_who_reads_a_checkpoint_does_not_disturb_the_save_that_is_under_way(tmp_path, monkeypatch):
    replace = os.replace

    def look_and_replace(*paths):
        assert_same_bits(load_expert(tmp_path, UID), STATE)
        replace(*paths)

    save_expert(tmp_path, UID, STATE)
    monkeypatch.setattr(os, "replace", look_and_replace)
    new = {"weight": torch.ones(2)}
    save_expert(tmp_path, UID, new)
    assert_same_bits(load_expert(tmp_path, UID), new)


def test_a_server_killed_in_the_middle_of_a_save_leaves_the_old_file_and_nothing_else_for_long(tmp_path):
    save_expert(tmp_path, UID, {"weight": torch.zeros(3)})
    script = f"""
import torch
from labkit.server.checkpoints import save_expert
state = {{"weight": torch.ones(10_000_000)}}
print(flush=True)
while True:
    save_expert({str(tmp_path)!r}, {UID!r}, state)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        while not any(path.is_dir() for path in tmp_path.iterdir()):
            assert child.poll() is None
        child.kill()
    found = load_expert(tmp_path, UID)
    assert found is not None and found["weight"].shape in ((3,), (10_000_000,))
    with pytest.raises(CheckpointError, match="does not fit"):  # the next start, of another kind of expert
        restore(tmp_path, expert())
    assert [path.name for path in tmp_path.iterdir()] == [f"{UID}.safetensors"]


@pytest.mark.parametrize(("folder", "file"), [(0o755, 0o644), (0o700, 0o600), (0o770, 0o660)])
def test_who_may_read_the_folder_may_read_the_checkpoint(tmp_path, folder, file):
    tmp_path.chmod(folder)
    assert save_expert(tmp_path, UID, STATE).stat().st_mode & 0o777 == file


@pytest.mark.parametrize("folder", [0o1777, 0o777, 0o1775])
def test_nobody_else_may_change_a_checkpoint_in_a_folder_that_strangers_share(tmp_path, folder):
    tmp_path.chmod(folder)
    assert save_expert(tmp_path, UID, STATE).stat().st_mode & 0o777 == 0o644


def flip_last_bit(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-3], lambda data: b"", lambda data: b"x" * 500, flip_last_bit, lambda data: data + b"x"],
)
def test_a_damaged_file_is_refused_by_name_with_a_way_out(tmp_path, damage):
    path = save_expert(tmp_path, UID, STATE)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=rf"{UID}\.safetensors.*move it away"):
        load_expert(tmp_path, UID)


def test_a_file_that_is_not_this_experts_is_refused(tmp_path):
    path = save_expert(tmp_path, UID, STATE, kind="ffn")
    with pytest.raises(CheckpointError, match="of kind 'ffn', not 'transformer'"):
        load_expert(tmp_path, UID, kind="transformer")
    path.rename(tmp_path / "ffn.0.2.safetensors")
    with pytest.raises(CheckpointError, match=r"holds expert 'ffn\.0\.1'"):
        load_expert(tmp_path, "ffn.0.2")
    safetensors.torch.save_file(STATE, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of this version"):
        load_expert(tmp_path, UID)


def test_a_checkpoint_of_another_size_names_file_and_tensor(tmp_path):
    save_expert(tmp_path, UID, expert(hidden=6).state(), kind="ffn")
    with pytest.raises(CheckpointError, match=rf"{UID}\.safetensors does not fit: .*module\.layers"):
        restore(tmp_path, expert())


@pytest.mark.parametrize("uid", ["../ffn.0", "ffn", "ffn.0/1", "", "ffn..1", "/etc/x.0"])
def test_a_uid_cannot_lead_out_of_the_directory(tmp_path, uid):
    with pytest.raises(ValueError, match="not an expert uid"):
        save_expert(tmp_path, uid, STATE)
    with pytest.raises(ValueError, match="not an expert uid"):
        load_expert(tmp_path, uid)


# ---------------------------------------------------------------- more than the last one


def save_after_each_of(updates: int, directory, keep: int) -> ExpertBackend:
    backend = expert()
    for seed in range(updates):
        train(backend, range(seed, seed + 1))
        save_expert(directory, UID, backend.state(), kind="ffn", keep=keep)
    return backend


def names(directory) -> list[str]:
    return sorted(path.name.removesuffix(".safetensors") for path in directory.iterdir())


def test_as_many_checkpoints_are_kept_as_wanted_and_the_oldest_go(tmp_path):
    backend = save_after_each_of(5, tmp_path, keep=3)
    assert names(tmp_path) == [UID, f"{UID}~3", f"{UID}~4", f"{UID}~5"]
    save_expert(tmp_path, UID, backend.state(), kind="ffn", keep=3)  # again, without an update
    assert names(tmp_path) == [UID, f"{UID}~3", f"{UID}~4", f"{UID}~5"]
    assert_same_bits(load_expert(tmp_path, UID), backend.state())


def test_one_that_was_kept_can_be_put_back(tmp_path):
    save_after_each_of(3, tmp_path, keep=2)
    os.replace(tmp_path / f"{UID}~2.safetensors", tmp_path / f"{UID}.safetensors")
    backend = expert()
    assert restore(tmp_path, backend) and backend.updates == 2


def test_an_expert_that_is_begun_afresh_keeps_its_own_checkpoints_and_not_those_with_higher_numbers(tmp_path):
    save_after_each_of(5, tmp_path, keep=2)
    (tmp_path / f"{UID}.safetensors").unlink()
    assert not restore(tmp_path, expert())
    save_after_each_of(2, tmp_path, keep=2)
    assert names(tmp_path) == [UID, f"{UID}~1", f"{UID}~2"]


def test_if_the_last_one_is_damaged_the_one_before_takes_its_place_and_the_log_says_so(tmp_path, caplog):
    save_after_each_of(3, tmp_path, keep=3)
    path = tmp_path / f"{UID}.safetensors"
    for damaged in (path, tmp_path / f"{UID}~3.safetensors"):
        damaged.unlink()
        damaged.write_bytes(b"damaged")
    backend = expert()
    assert restore(tmp_path, backend) and backend.updates == 2
    assert f"expert {UID} carries on from {UID}~2.safetensors instead" in caplog.text
    with pytest.raises(CheckpointError, match="does not fit"):  # which is no damage
        restore(tmp_path, expert(hidden=6))
    for kept in tmp_path.glob("*~*"):
        kept.unlink()
    with pytest.raises(CheckpointError, match="move it away"):
        restore(tmp_path, expert())


def test_where_a_file_cannot_have_two_names_it_is_copied(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    save_after_each_of(2, tmp_path, keep=2)
    assert names(tmp_path) == [UID, f"{UID}~1", f"{UID}~2"]


# ---------------------------------------------------------------- while a runtime runs


async def run_with_saves(monkeypatch, runtime, directory, save, period=10.0, seconds=25.0, updated=(UID,), saved=None):
    """Some virtual seconds, with an update of one expert (or others) at the beginning."""

    async def in_this_task(function):  # virtual time would run ahead of a real thread
        function()

    monkeypatch.setattr(checkpoints, "save_expert", save)
    monkeypatch.setattr(trio.to_thread, "run_sync", in_this_task)
    async with trio.open_nursery() as nursery:
        await nursery.start(runtime.run)
        await nursery.start(keep_checkpoints, runtime, directory, period, saved)
        x = torch.ones(2, 4)
        for uid in updated:
            await submit(runtime, uid, "backward", [x, x], trio.current_time() + 1)
        await trio.sleep(seconds)
        nursery.cancel_scope.cancel()


async def test_only_updated_experts_are_saved_and_each_update_once(monkeypatch, tmp_path, autojump_clock):
    saves = []

    def save(directory, uid, state, **options):
        saves.append((trio.current_time(), uid))
        return save_expert(directory, uid, state, **options)

    runtime = Runtime({UID: expert(), "ffn.0.2": expert("ffn.0.2")}, executor=InlineCompute())
    await run_with_saves(monkeypatch, runtime, tmp_path, save)
    assert saves == [(10.0, UID)]
    assert_same_bits(load_expert(tmp_path, UID, kind="ffn"), runtime.backends[UID].state())


@pytest.mark.parametrize(("megabytes", "period"), [(1, 10.0), (100, 10.0), (1000, 100.0), (50_000, 600.0)])
async def test_large_experts_are_saved_more_rarely(monkeypatch, tmp_path, autojump_clock, megabytes, period):
    saves = []

    def save(*_, **__):
        saves.append(trio.current_time() - started)

    monkeypatch.setattr(ExpertBackend, "state_bytes", megabytes * 1_000_000)
    runtime, started = Runtime({UID: expert()}, executor=InlineCompute()), trio.current_time()
    await run_with_saves(monkeypatch, runtime, tmp_path, save, period=None, seconds=period + 1)
    assert saves == [period]


async def test_a_save_that_fails_is_logged_and_tried_again(monkeypatch, tmp_path, autojump_clock, caplog):
    saves = []

    def save(*_, **__):
        saves.append(trio.current_time())
        if len(saves) == 1:
            raise OSError("no space left")

    await run_with_saves(monkeypatch, Runtime({UID: expert()}, executor=InlineCompute()), tmp_path, save)
    assert saves == [10.0, 20.0]
    assert "no space left" in caplog.text


ERRORS = [OSError("no space left"), MemoryError(), RuntimeError("cannot allocate memory"), KeyError("dtype")]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
async def test_whatever_fails_in_a_save_the_other_experts_are_saved(
    monkeypatch, tmp_path, autojump_clock, caplog, error
):
    def save(directory, uid, state, **options):
        if uid == UID:
            raise error
        return save_expert(directory, uid, state, **options)

    runtime = Runtime({UID: expert(), "ffn.0.2": expert("ffn.0.2")}, executor=InlineCompute())
    await run_with_saves(monkeypatch, runtime, tmp_path, save, period=10.0, updated=[UID, "ffn.0.2"])
    assert [path.name for path in tmp_path.iterdir()] == ["ffn.0.2.safetensors"]
    assert f"{UID} was not saved" in caplog.text and "trying again in 10 s" in caplog.text
    (tmp_path / "ffn.0.2.safetensors").unlink()
    with pytest.raises(RemoteFailure, match=rf"{UID} was not saved to .*(no space|Error)"):
        await save_all(runtime, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["ffn.0.2.safetensors"]


async def test_an_expert_whose_state_cannot_be_copied_does_not_stop_the_saves(monkeypatch, tmp_path, autojump_clock):
    def fail() -> None:
        raise MemoryError

    full, other = expert(), expert("ffn.0.2")
    monkeypatch.setattr(full, "state", fail)
    runtime = Runtime({UID: full, "ffn.0.2": other}, executor=InlineCompute())
    await run_with_saves(monkeypatch, runtime, tmp_path, save_expert, updated=[UID, "ffn.0.2"])
    assert [path.name for path in tmp_path.iterdir()] == ["ffn.0.2.safetensors"]


async def test_a_clean_stop_saves_every_expert(tmp_path):
    runtime = Runtime({UID: expert(), "ffn.0.2": expert("ffn.0.2")})
    async with trio.open_nursery() as nursery:
        await nursery.start(runtime.run)
        x = torch.ones(2, 4)
        await submit(runtime, UID, "backward", [x, x], trio.current_time() + 10)
        nursery.cancel_scope.cancel()
    await save_all(runtime, tmp_path)
    for uid, backend in runtime.backends.items():
        assert_same_bits(load_expert(tmp_path, uid), backend.state())


async def test_a_clean_stop_does_not_save_again_what_has_learnt_nothing_since_it_was_saved(tmp_path, monkeypatch):
    begun, go, saves = trio.Event(), threading.Event(), []
    token = trio.lowlevel.current_trio_token()

    def save(directory, uid, state, **options):
        saves.append(uid)
        token.run_sync_soon(begun.set)
        assert go.wait(20)
        return save_expert(directory, uid, state, **options)

    monkeypatch.setattr(checkpoints, "save_expert", save)
    saved: dict[str, Progress] = {}
    runtime, x = Runtime({UID: expert(), "ffn.0.2": expert("ffn.0.2")}), torch.ones(2, 4)
    async with trio.open_nursery() as nursery:
        await nursery.start(runtime.run)
        async with trio.open_nursery() as keepers:
            await keepers.start(keep_checkpoints, runtime, tmp_path, 0.01, saved)
            await submit(runtime, UID, "backward", [x, x], trio.current_time() + 10)
            await begun.wait()
            keepers.cancel_scope.cancel()  # while it saves
            go.set()
        await submit(runtime, UID, "forward", [x], trio.current_time() + 10)
        nursery.cancel_scope.cancel()
    await save_all(runtime, tmp_path, saved)
    assert saves == [UID, "ffn.0.2"]  # the other one was never saved
    for uid, backend in runtime.backends.items():
        state = load_expert(tmp_path, uid)
        assert state is not None and state["counter.updates"] == backend.updates


@pytest.mark.parametrize("accumulate", [1, 2])
async def test_a_clean_stop_saves_what_has_learnt_since_and_what_is_not_there_any_more(
    monkeypatch, tmp_path, autojump_clock, accumulate
):
    saved: dict[str, Progress] = {}
    runtime = Runtime({UID: expert(accumulate=accumulate)}, executor=InlineCompute())
    await run_with_saves(monkeypatch, runtime, tmp_path, save_expert, updated=[UID] * accumulate, saved=saved)
    path = tmp_path / f"{UID}.safetensors"
    path.unlink()
    await save_all(runtime, tmp_path, saved)
    assert path.exists()
    train(runtime.backends[UID], range(1))
    await save_all(runtime, tmp_path, saved)
    assert_same_bits(load_expert(tmp_path, UID), runtime.backends[UID].state())
