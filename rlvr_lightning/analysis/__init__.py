"""What training changed in the weights: how many entries, of what rank, along which directions, and where twice.

Commands of the same names compare checkpoints of any form: `sparsity`, `rank`, `spectrum`, `overlap`.
"""
