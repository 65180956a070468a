"""The Triton kernels: one operator a file, and the device functions they share. Imports nothing."""
