"""Everything measured on a GPU, in one command: see `benchmarks.gpu_suite.__main__`."""
