// The CUDA kernels of the family as ops.
