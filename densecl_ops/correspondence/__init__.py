"""Which position of one view matches which of the other: one operation, its module and its backends."""
