"""How servers are started from a notebook, watched, and brought back.

Reading order: `lab` (where they live), `planning` (what to serve), `places` (where in a grid), `order` (what executes
`Swarm.serve`), `handle` (what a notebook holds), `lifecycle` and its table in `states`, `runners` (a task or a
process), `child` (what runs in that process), `parent` (whose end it watches for), `child_python` (how such a process
is started), `temporary_folder` (the files of a swarm).
"""
