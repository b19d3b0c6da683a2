"""What a step of an MoE layer costs on a given cluster: exchange, expert compute, and the price of replicas."""
