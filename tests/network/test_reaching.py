"""Experts on one host, trainers on another: who reaches whom, and what is said where somebody does not."""

from __future__ import annotations

import pytest

EVERYBODY = ["public", "two_faced", "one", "two", "deep", "firewalled"]


@pytest.fixture
def public(on):
    """A swarm at the public host with two experts."""
    notebook = on.notebook("public")
    invite = notebook.start(listen="tcp://0.0.0.0:*", announce="5.5.5.10")
    notebook.serve(grid=[2])
    return invite


def test_everybody_reaches_a_public_host(on, public):
    notebooks = {host: on.notebook(host) for host in EVERYBODY if host != "public"}
    for host, notebook in notebooks.items():
        notebook.join(invite=public)
        assert notebook.call() == {"ffn.0": "", "ffn.1": ""}, host
