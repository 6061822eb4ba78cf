"""The wing that holds experts: a server answers calls to them, and trains them.

Reading order, a request's way: `server` and its `config`, `runtime` (batches), `device` (what waits for it),
`task_pool`, `executor` (its threads), `batch`, `backend` (one expert), `parts` (of a large request), `expert_module`
(calls the module), `optimizer`. Besides: `layers` (kinds of experts), `schema` (what they take), `user_code` (what they
raise), `validation`, `leaving` (a clean stop), `checkpoints`, `ownership` (of their folder), `loading` (of saved
states), `serving` (from start to end), `building` (of experts), `holdings` (which are served now), `carrying` (copies),
`hardware` (the devices of this machine), `snapshots` (an expert's state over the network), `statistics`.
"""
