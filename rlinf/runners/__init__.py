"""What happens when: training, evaluation, checkpoints."""
