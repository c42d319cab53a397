"""Machine code: from a source to an address, by way of a cache on disk, and running it on threads.

Knows neither rules nor tensors; the CPU engine and the native guards are built on it.
"""
