"""The one error of the demo that is the user's to read: what happened and what to do, without a traceback."""


class DemoError(Exception):
    """The demo cannot go on; its text is all that the user sees."""
