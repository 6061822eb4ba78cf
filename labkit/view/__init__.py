"""What is seen of a swarm while it trains: collected, put together as a `Scene`, and shown.

Reading order: `collect` (events and inventories), `scene`, `swarm_view` (who is given a scene, and when) with
`outputs`; then what is made of scenes: `page` (the dashboard), `picture`, `log`, `recording` and `export`. Besides:
`summary` (the repr of a swarm), `progress` (a bar), `worker_thread`. The pages themselves are in `frontend`.
"""
