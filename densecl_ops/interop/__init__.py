"""Training checkpoints of DenseCL, mmselfsup, mmpretrain, MoCo and lightly: read into our modules, written back.

What does not fit raises. docs/checkpoints.md has the table of names and an example of each way.
"""

from densecl_ops.interop.checkpoint import Checkpoint
from densecl_ops.interop.reading import read_checkpoint
from densecl_ops.interop.writing import write_checkpoint

__all__ = ["Checkpoint", "read_checkpoint", "write_checkpoint"]
