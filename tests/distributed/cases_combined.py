"""Steps of several algorithms of sharded parameters, beside those of one process."""

import functools

from cases_step import OPTIONS, compared, layouts, nan_in
from cases_whole import collectives, refused, reloaded
from torch.distributed.device_mesh import init_device_mesh

import surefoot

ASKED = ("nothing", "norm", "ema", "guarded", "telemetry", "all")


def is_matrix(name, param):
    return param.dim() == 2


def combined(params, select=is_matrix, first=surefoot.Muon, **options):
    parts = [surefoot.Part(first, select, lr=0.02), surefoot.Part(surefoot.AdamW, lr=0.01)]
    return surefoot.Combined(params, parts, **options)


def cases(world):
    line = init_device_mesh("cpu", (world,))
    for name, mesh, placements in layouts(world):
        of = functools.partial(compared, combined, mesh=mesh, placements=placements)
        for option in ASKED:
            yield f"{name} / Muon / {option}", functools.partial(of, OPTIONS[option])
        for row in (0, 3):
            options = {"nonfinite": "skip", "max_grad_norm": 1.0}
            yield f"{name} / Muon / nan in row {row}", functools.partial(of, options, spoil=nan_in(row))
        yield f"{name} / Muon / groups", functools.partial(of, {"max_grad_norm": 1.0}, groups=2)
        lamb = functools.partial(combined, first=surefoot.LAMB)
        yield f"{name} / LAMB / norm", functools.partial(compared, lamb, {"max_grad_norm": 1.0}, mesh, placements)
        prodigy = functools.partial(combined, first=surefoot.Prodigy)
        yield f"{name} / Prodigy / norm", functools.partial(compared, prodigy, {"max_grad_norm": 1.0}, mesh, placements)
        yield f"reloaded / {name}", functools.partial(reloaded, combined, {}, mesh, placements)
    for mine, select in (("Muon", "p[01]"), ("AdamW", "p[02]")):
        cls = functools.partial(combined, select=select)
        for case in ("state", "gradient", "closure") if mine == "Muon" else ("state", "closure"):
            yield f"refused / {mine} / {case}", functools.partial(refused, cls, {}, line, case, world - 1)
    for count in (5, 9):
        for option in ("nothing", "norm"):
            yield (
                f"collectives / {option} / {count}",
                functools.partial(collectives, named, OPTIONS[option], line, count),
            )


def named(params, **options):
    return combined([(f"p{i}", param) for i, param in enumerate(params)], select="p[0-3]", **options)
