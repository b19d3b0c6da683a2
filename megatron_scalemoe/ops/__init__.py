"""Torch operations behind the dispatchers. Tests have a plain-torch twin of each.

Shape letters, here and in `dispatch`: T local tokens, D hidden, K experts per token, E logical experts, G ranks of the dispatch group,
L experts on one rank, N rows on the wire (one per token and destination rank), R rows that the local experts compute.
"""
