"""Experiments in virtual time, with the code that ships.

`expert_search` asks how long the search takes in a large swarm, `convergence` how well stale trainers learn. `runner`
does many runs of the latter and can be resumed; `results` keeps what was found.
"""
