"""What tensors are in memory: their shards, their layout, what a kernel may take of them.

The only room that knows how sharded tensors are made up.  Nothing here knows an algorithm or an engine.
"""
