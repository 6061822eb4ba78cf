"""How servers are started from a notebook, watched, and brought back.

Reading order: `lab` (where they live), `planning` (what to serve), `places` (where in a grid), `order` (what executes
`Swarm.serve`), `handle` (what a notebook holds), `lifecycle` and its table in `states`, `runners` (a task),
`server_process` (a process), `child` (what runs in that process), `by_value` (code that it is handed), `parent` (whose
end it watches for), `child_python` (how such a process is started), `temporary_folder` (the files of a swarm).

On a cluster: `cluster` (its workers), `placement` (at which of them), `cluster_runner` (the runner here),
`cluster_worker` (what keeps the same child there).
"""
