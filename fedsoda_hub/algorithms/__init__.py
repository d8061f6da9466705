"""Compute what the papers say: tensors in, tensors out, one idea a file. Disk, sockets and processes are others'."""
