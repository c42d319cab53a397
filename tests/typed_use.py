"""What a type checker makes of our constructors.  It is checked, not run: an error that is missing is an error too."""

import torch

import surefoot
from surefoot import AdamW, optimizers

params = [torch.nn.Parameter(torch.zeros(2))]

by_position: surefoot.Optimizer = surefoot.RMSprop(params, 1e-2, 0.99, 1e-8, 0, 0.9, True, False, None, True)
surefoot.Adadelta(params, 1.0, 0.9, 1e-6, 0, True, maximize=True)
AdamW(params, lr=torch.tensor(1e-3), foreach=True, state_dtype=torch.float32, max_grad_norm=1.0)
optimizers.SGD(params, momentum=0.9, capturable=True)

matrices = surefoot.Part(surefoot.Muon, ["*.weight", lambda name, param: param.dim() == 2], lr=0.02)
surefoot.Combined([("weight", params[0])], [matrices, surefoot.Part(AdamW)], max_grad_norm=1.0)
surefoot.muon_with(torch.nn.Linear(2, 2), rest=surefoot.Lion, head=(), ema=0.99).load_state_dicts({})

surefoot.Combined(params, [matrices], lr=0.1)  # type: ignore[call-arg]
surefoot.Part("AdamW")  # type: ignore[arg-type]
surefoot.Adam(params, forech=True)  # type: ignore[call-arg]
surefoot.Adam(params, fused="yes")  # type: ignore[arg-type]
surefoot.Adam(params, betas=0.9)  # type: ignore[arg-type]
surefoot.Muon(params, foreach=True)  # type: ignore[call-arg]

surefoot.AdamX  # type: ignore[attr-defined]  # noqa: B018
optimizers.AdamX  # type: ignore[attr-defined]  # noqa: B018
