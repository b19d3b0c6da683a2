"""Live balance: plans in force, what is recorded and measured, replicas, sequences, migration."""
