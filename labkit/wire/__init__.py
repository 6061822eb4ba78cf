"""Remote calls between nodes: what a message is, how it travels, who asks and who answers.

Reading order: `frames` (a message), `compression` (its tensors), `transport` (the seam to a network), `rpc_types`,
`rpc_client` (asks), `rpc_server` (answers); then the network itself: `zmq_transport`, `zmq_socket`. `timers` is for
what is done later, `security` for keys and for who may connect.
"""
