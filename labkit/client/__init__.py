"""The wing that calls experts: the MoE layer, and what it takes to find them, ask them and go on without some.

Reading order, a batch's way: `moe` (the layer), `dispatch` (one pass), `beam_search`, `gather`, `expert_client` (one
call). Besides: `expert` (one expert as a module), `session` (how layers reach a swarm), `fitting` (a layer to a grid),
`dispatch_config` (the options), `sizes` (of requests), `patience` (with slow servers), `overload` (busy ones),
`refusals` (what the caller is told), `frozen` (whether experts train), `outside_graphs` (torch.compile), `tracing` (the
search step by step, for teaching).
"""
