"""Does the dense term help? Pre-training without labels, then four dense tasks on the frozen backbone."""
