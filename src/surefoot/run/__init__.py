"""`surefoot run`: an unmodified script with torch.optim's classes replaced by ours.

The command starts Python anew on the script, with a folder first on `PYTHONPATH` whose `sitecustomize` installs a hook
(`site/`, `hook.py`).  So the script has an interpreter of its own: its argv, `__main__`, tracebacks, signals and exit
code are Python's, and torch is imported when it imports it.  As soon as that happens the hook replaces the classes
(`swap.py`) and watches steps (`watch.py`); at the end comes the report (`report.py`, `compare.py`).

Modules here are imported into other people's programs: they must be light, and may import torch only after the script
has done so.
"""
