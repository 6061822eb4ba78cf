"""From events and inventories to a `Scene`.

Reading order: `telemetry` (counts events) with `time_series`, `inventory` (what the swarm consists of), `sampler`,
which puts both together with `registry` (who there is), `rates`, `curves`, `waiting` (what passes wait for) and
`server_reports`.
"""
