"""What the CUDA tests share: the kernels on a CPU, a simulated driver, a PTX interpreter."""
