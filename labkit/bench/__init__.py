"""`labkit bench`: what is measured stands beside the limit of this machine.

Reading order: `rpc`, `moe`, `dht`, `latency`, `transformers` (a benchmark each), `limits` and `echo`,
`processes` (that do the work), `report`; `suite` runs all of them.
"""
