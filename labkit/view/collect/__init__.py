"""From events and inventories to a `Scene`.

Reading order: `telemetry` (counts events) with `time_series`, `inventory` (what the swarm consists of), `sampler`,
which puts both together with `registry` (who there is), `rates`, `curves`, `waiting` (what passes wait for), `moves`
(experts that change their server) and `server_reports`. `takeovers` makes events of what servers elsewhere report.
"""
