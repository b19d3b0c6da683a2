"""What is measured of the MoE layers while they train, and where it is written."""
