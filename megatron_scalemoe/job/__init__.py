"""A training job in one YAML file: read, checked, and turned into Megatron's flags and an sbatch script."""
