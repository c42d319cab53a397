"""A parameter's state: made, checked against its parameter, moved, read as numbers, and loaded.

Handed a spec, a group, a parameter and its entry; nothing here knows an optimizer, an engine or a step.
"""
