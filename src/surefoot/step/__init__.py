"""A step as a pipeline of values: handed a spec, groups, tensors and state, never an optimizer.

`pipeline.py` reads from top to bottom; `cache.py` is its fast lane.
"""
