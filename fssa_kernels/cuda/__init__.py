"""CUDA C++ kernels: loading their module, and what the ops' CUDA backends share."""
