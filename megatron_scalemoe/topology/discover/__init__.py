"""Reads a cluster's topology from what its tools print: `nvidia-smi topo -m`, NCCL's topology XML, Slurm's topology.conf."""
