"""A notebook as in Colab and Kaggle: a kernel, with Colab's versions of the packages, that takes no connections."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.colab_environment import interpreter
from tests.front_end import WIDGET, FrontEnd, open_kernel
from tests.network.waiting import until_answered
from tests.network.world import Notebook

COLAB = interpreter(Path(__file__).parents[2] / ".venv-colab")
CELLS = [
    "import labkit as lk\nfrom torch import nn",
    "swarm = lk.Swarm.join(INVITE)\nswarm.serve('ffn', hidden=4, grid=(2,), name='colab')",
    "model = nn.Sequential(nn.Linear(64, 4), swarm.moe(4, k_best=2), nn.Linear(4, 10))",
    "run = lk.fit(model, lk.load('digits'), steps=5, trainers=2, batch_size=16)\nrun.wait()",
]
EXPERTS = ["colab.0", "colab.1", "ffn.0", "ffn.1"]


def run_all(kernel: FrontEnd, public: Notebook, invite: str) -> None:
    """Run all cells, look at the swarm and at its dashboard, and call its experts from outside."""
    for cell in CELLS:
        kernel.run(cell.replace("INVITE", repr(invite)))
    assert kernel.value("run.steps") == 5
    kernel.until(lambda: "relayed by 5.5.5.10" in kernel.run("swarm").bundle["text/plain"])
    until_answered(public, EXPERTS, 40)
    comm = kernel.run("dashboard = swarm.dashboard()\ndashboard").bundle[WIDGET]["model_id"]
    page = kernel.page(comm)
    page.look(fresh=True)
    kernel.until(lambda: any("relayed by 5.5.5.10" in line for h in page.headers for line in h.get("reach", ())))


@pytest.mark.timeout(180)
def test_a_notebook_that_takes_no_connections_joins_serves_trains_and_does_so_again_after_a_restart(
    on, world, tmp_path
):
    public = on.notebook("public")
    invite = public.start(listen="tcp://0.0.0.0:*", relay=True)
    public.serve(grid=[2])
    with open_kernel(tmp_path, COLAB, within=world["deep"].command(), COLAB_RELEASE_TAG="release-colab") as kernel:
        run_all(kernel, public, invite)
        kernel.restart()
        run_all(kernel, public, invite)
