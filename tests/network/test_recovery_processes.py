"""A server that was frozen and wakes up, with real processes and signals, while others train."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
from torch import nn

import labkit as lk
from labkit.events import ExpertGivenUp, ExpertTakenOver
from tests.swarms import eventually

DIM = 8


def test_a_server_that_is_frozen_and_wakes_up_gives_up_what_others_have_taken_over_while_training_goes_on():
    events: list[Any] = []
    with lk.Swarm("frozen") as swarm:
        swarm.on_event(events.append)
        swarm.serve("ffn", hidden=DIM, grid=(4,), servers=2, isolation="process", backups=1)
        x = torch.randn(256, DIM)
        y = (x @ torch.randn(DIM, 3)).argmax(-1)
        moe = swarm.moe(DIM, k_best=2, forward_timeout=3.0, backward_timeout=3.0, timeout_after_k_min=0.3)
        run = lk.fit(nn.Sequential(moe, nn.Linear(DIM, 3)), (x, y), steps=1_000_000, trainers=2, batch_size=32)
        frozen = swarm.servers[1]
        eventually(lambda: all(info.copies for info in swarm.experts().values()), 20)
        theirs = {info.uid for info in swarm.experts().values() if info.contact == frozen.contact}
        assert frozen.pid is not None
        os.kill(frozen.pid, signal.SIGSTOP)
        try:
            eventually(lambda: theirs <= {e.uid for e in events if isinstance(e, ExpertTakenOver)}, 20)
            steps = run.steps
            eventually(lambda: run.steps >= steps + 20)
        finally:
            os.kill(frozen.pid, signal.SIGCONT)
        eventually(lambda: theirs <= {e.uid for e in events if isinstance(e, ExpertGivenUp)}, 15)
        steps = run.steps
        eventually(lambda: run.steps >= steps + 20)
        eventually(lambda: len(swarm.experts()) == 4)
        run.stop()
