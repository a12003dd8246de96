"""The dense InfoNCE loss: one operation, its module and its backends."""
