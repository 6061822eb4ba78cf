"""Servers at workers of a Dask cluster on other hosts: who reaches whom, and what is said where somebody does not."""

from __future__ import annotations

import pytest

from tests.network.waiting import until_answered, until_said
from tests.network.world import Notebook, Process, Processes

OPEN = "tcp://0.0.0.0:*"
SCHEDULER = "tcp://5.5.5.10:8786"
ADDRESSES = {"two_faced": "5.5.5.11", "firewalled": "5.5.5.30", "public": "5.5.5.10"}
BOTH = ["ffn.0", "ffn.1"]


@pytest.fixture
def cluster(on: Processes) -> Process:
    """The scheduler of a cluster, on the public host."""
    scheduler = on.start("public", "-m", "dask", "scheduler", "--host", "5.5.5.10", "--port", "8786", "--no-dashboard")
    scheduler.until("Scheduler at:")
    return scheduler


def start_worker(on: Processes, host: str) -> Process:
    """A worker without a nanny, in the ports that the firewall lets through."""
    worker = on.start(
        host, "-m", "dask", "worker", SCHEDULER, "--host", ADDRESSES[host], "--worker-port", "31090", "--name", host,
        "--no-nanny", "--no-dashboard", "--nthreads", "2",
    )  # fmt: skip
    worker.until("Registered to:")
    return worker


def refused(notebook: Notebook) -> str:
    """What `serve` says when it fails."""
    return notebook.refused("serve", kind="ffn", hidden=4, grid=[2], on=SCHEDULER)


def test_servers_run_on_other_hosts_and_one_that_is_lost_comes_back_on_another(on, cluster):
    notebook, worker = on.notebook("public"), start_worker(on, "two_faced")
    notebook.start(listen=OPEN)
    notebook.serve(grid=[2], on=SCHEDULER)
    until_answered(notebook, BOTH)
    assert "5.5.5.11:" in notebook.look()
    worker.kill()
    assert "was lost; restart() brings" in notebook.order(0, "wait", timeout=60)
    start_worker(on, "public")
    notebook.order(0, "restart")
    until_answered(notebook, BOTH)
    assert "5.5.5.10:" in notebook.look().partition("servers[0]")[2]


def test_a_worker_behind_a_firewall_is_named_and_serves_in_the_range_of_ports_that_is_let_through(on, cluster):
    notebook, _ = on.notebook("public"), start_worker(on, "firewalled")
    notebook.start(listen=OPEN)
    said = refused(notebook)
    assert "this notebook cannot reach the server on " in said and " at 5.5.5.30:" in said
    assert "through the firewall of that host" in said and 'lk.Swarm(listen="tcp://0.0.0.0:31000-31099")' in said
    notebook.start(listen="tcp://0.0.0.0:31000-31099")
    notebook.serve(grid=[2], servers=2, on=SCHEDULER)
    until_answered(notebook, BOTH)


def test_a_notebook_behind_a_router_is_told_that_workers_do_not_reach_it_and_is_reached_through_a_relay(on, cluster):
    notebook, public, _ = on.notebook("one"), on.notebook("public"), start_worker(on, "two_faced")
    notebook.start(listen=OPEN)
    said = refused(notebook)
    assert "cannot reach this notebook at 192.168.1.10:" in said and "through the firewall of this machine" in said
    notebook.join(public.start(listen=OPEN, relay=True), listen=OPEN)
    until_said(notebook, "relayed by 5.5.5.10")
    notebook.serve(grid=[2], on=SCHEDULER)
    until_answered(notebook, BOTH)
    until_answered(public, BOTH)
