"""What the ranks of a group exchange rows through, beside the collectives of torch.distributed."""
