"""Python imports this at its start, because `surefoot run` put this folder first on PYTHONPATH.

It leaves `sys.path` as it would be without the folder, runs the `sitecustomize` that it hides, if any, and installs
the hook.
"""

import importlib.machinery
import importlib.util
import os
import sys

_here = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 (pathlib costs a program's start 10 ms)
sys.path[:] = [path for path in sys.path if os.path.abspath(path) != _here]  # noqa: PTH100

_hidden = importlib.machinery.PathFinder.find_spec("sitecustomize")
if _hidden is not None and _hidden.loader is not None:
    _hidden.loader.exec_module(sys.modules[__name__])

# Another Python, of another environment, may have inherited ours: it has neither our torch nor us.
if os.environ.get("SUREFOOT_RUN_PREFIX") == sys.prefix:
    if importlib.util.find_spec("surefoot") is None:  # it was found in the folder where we were started
        sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(_here))))  # noqa: PTH120
    from surefoot.run.hook import install

    install()
