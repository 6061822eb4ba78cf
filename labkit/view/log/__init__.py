"""Training and swarm as rows: `swarm_logging` hands the `rows` to one of the `loggers`. `custom_loop`: `swarm.log`."""
