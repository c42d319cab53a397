"""What reads torch's own structures in memory: where they keep things, and the guards built on that.

Make guards with `tensors.guards`; nothing else knows this room.
"""
