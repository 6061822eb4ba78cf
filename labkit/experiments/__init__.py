"""Experiments in virtual time, with the code that ships.

`expert_search` asks how long the search takes in a large swarm, `convergence` how well stale trainers learn, and
`language_model` the same of a Transformer. A run of the latter two is done by `virtual_training`, with the settings of
`convergence_config`; `runner` does many and can be resumed; `results` keeps what was found.
"""
