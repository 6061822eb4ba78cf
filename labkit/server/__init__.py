"""The wing that holds experts: a server answers calls to them, and trains them.

Reading order, a request's way: `server`, `runtime` (batches), `task_pool`, `executor` (the compute thread), `batch`,
`backend` (one expert), `optimizer`. Besides: `layers` (kinds of experts), `validation`, `checkpoints`, `statistics`.
"""
