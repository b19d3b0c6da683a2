"""The cluster as a graph: GPUs, NICs, switches, their links, the routes between ranks, and the ports that limit them."""
