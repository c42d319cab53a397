"""What the parameters of a model are, by modules and names: decayed or not, of which layer, matrices of hidden layers.

Results are plain lists of dicts and functions, for any optimizer of surefoot or torch; nothing here knows an optimizer.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from operator import itemgetter
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from surefoot.rule.hyperparameters import LR, WEIGHT_DECAY, Interval

Predicate = Callable[[str, nn.Parameter], bool | None]

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_STACKS = (nn.ModuleList, nn.Sequential)
_CONTAINERS = {nn.ModuleList, nn.ModuleDict, nn.Sequential}
_LAYER_DECAY = Interval("Invalid layer_decay value: ", low_open=True, high=1.0, optional=True)


def parameter_groups(
    model: nn.Module,
    lr: float | Tensor | None = None,
    weight_decay: float | Tensor | None = None,
    layer_decay: float | None = None,
    no_decay: Predicate | None = None,
    *,
    decay_embeddings: bool = True,
) -> list[dict[str, Any]]:
    """Make param groups from a model: no weight decay where it does harm, and learning rates by depth.

    Not decayed are biases, the parameters of norms, and all others with fewer than two dimensions.  With
    `layer_decay`, the layers are the children of the model's outermost `ModuleList`s and `Sequential`s of repeated
    blocks, such as a transformer's blocks or the stages of a ResNet, in the order in which they were registered::

        lr of a layer = lr * layer_decay ** (number of layers above it)

    What is registered before the first block, and embeddings outside of blocks, are one more layer at the bottom; what
    comes after the last block, the head, is one at the top; what stands between two blocks belongs to the upper one.

    Args:
        model: the model; parameters that do not require gradients are left out, tied ones stand in their first place.
        lr: learning rate of the topmost layer, >= 0; by default that of the optimizer, for all groups.
        weight_decay: weight decay where there is any, >= 0; by default that of the optimizer.
        layer_decay: factor of the learning rate from a layer to the one below, in (0, 1]; needs `lr`.
        no_decay: `no_decay(name, param)` decides first: True for no weight decay, False for weight decay, None for
            the rule above.
        decay_embeddings: whether the weights of `Embedding` and `EmbeddingBag` are decayed, tied ones included.

    Returns:
        Groups, from the bottom of the model to its top, each with named `params`, a readable `name`, and `lr` and
        `weight_decay` as far as they were given; `weight_decay` is 0 where there is none.

    Raises:
        TypeError: `model` is not a module, or `no_decay` neither callable nor its answers True, False or None.
        ValueError: a number is out of range, `layer_decay` comes without `lr`, no repeated blocks were found for it, no
            parameter requires a gradient, or a lazy module has not been initialized.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8))
        >>> groups = surefoot.parameter_groups(model, lr=1e-3, weight_decay=0.1)
        >>> [(group["name"], [name for name, _ in group["params"]]) for group in groups]
        [('decay', ['0.weight']), ('no decay', ['0.bias', '1.weight', '1.bias'])]
        >>> optimizer = surefoot.AdamW(groups)

    Papers: layer-wise learning rates, Howard & Ruder 2018, "Universal language model fine-tuning for text
    classification", section 3.2, and Bao et al. 2022, "BEiT", whose count of layers this is.
    """
    _check(model, lr, weight_decay, layer_decay, no_decay)
    owners = _owners(model)
    blocks = _layers(model) if layer_decay is not None else []
    levels = _levels(model, blocks, owners)
    members: defaultdict[tuple[int, bool], list[tuple[str, nn.Parameter]]] = defaultdict(list)
    for name, param in _trainable(model):
        decayed = _is_decayed(name, param, owners[param], no_decay, decay_embeddings=decay_embeddings)
        members[levels[param], not decayed].append((name, param))
    groups = []
    for (level, spared), params in sorted(members.items(), key=itemgetter(0)):
        above = max(levels.values()) - level
        rate = lr if lr is None or layer_decay is None else lr * layer_decay**above
        options = {"lr": rate, "weight_decay": 0.0 if spared else weight_decay}
        given = {name: value for name, value in options.items() if value is not None}
        groups.append({"params": params, "name": _name(level, len(blocks), spared=spared), **given})
    return groups


def _name(level: int, layers: int, *, spared: bool) -> str:
    """Name a group for people and for the logs of learning rates."""
    decay = "no decay" if spared else "decay"
    place = {0: "stem", layers + 1: "head"}.get(level, f"layer {level}")
    return f"{place}, {decay}" if layers else decay


def _check(model: Any, lr: Any, weight_decay: Any, layer_decay: Any, no_decay: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, but got {type(model).__name__}; give the model itself")
    for name, check, value in (("lr", LR, lr), ("weight_decay", WEIGHT_DECAY, weight_decay)):
        if value is not None:
            check(name, value)
    _LAYER_DECAY("layer_decay", layer_decay)
    if layer_decay is not None and lr is None:
        raise ValueError("`layer_decay` needs `lr`, the learning rate of the topmost layer; give both")
    if no_decay is not None and not callable(no_decay):
        raise TypeError(f"`no_decay` must be a function of a name and a parameter, but got {no_decay!r}")


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return names and parameters that require gradients, each once."""
    found = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    if not found:
        raise ValueError(
            f"no parameter of this {type(model).__name__} requires a gradient; there is nothing to optimize"
        )
    if lazy := [name for name, param in found if is_lazy(param)]:
        raise ValueError(f"`{lazy[0]}` has not been initialized yet; run the model once on data first")
    return found


def _owners(model: nn.Module) -> Mapping[nn.Parameter, list[nn.Module]]:
    """Return for each parameter the modules that hold it; tied parameters have several."""
    owners: defaultdict[nn.Parameter, list[nn.Module]] = defaultdict(list)
    for module in model.modules():
        for param in module.parameters(recurse=False):
            owners[param].append(module)
    return owners


# Weight decay


def _is_decayed(
    name: str, param: nn.Parameter, owners: list[nn.Module], no_decay: Predicate | None, *, decay_embeddings: bool
) -> bool:
    answer = no_decay(name, param) if no_decay is not None else None
    if answer is not None:
        if not isinstance(answer, bool):
            raise TypeError(f"`no_decay` must answer True, False or None, but answered {answer!r} for `{name}`")
        return not answer
    is_bias = "bias" in name.rpartition(".")[2].split("_")
    spared = _NORMS if decay_embeddings else (*_NORMS, *_EMBEDDINGS)
    return param.dim() > 1 and not is_bias and not any(isinstance(owner, spared) for owner in owners)


# Depth


def _layers(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of the model's outermost stacks.

    A stack of one block counts where the same class of block is stacked elsewhere.
    """
    blocks = _repeated_blocks(model)
    if not blocks:
        raise ValueError(
            f"`layer_decay` needs layers, but this {type(model).__name__} has no ModuleList or Sequential of two or "
            f"more blocks of the same class; make its groups by hand"
        )
    return blocks


def _repeated_blocks(model: nn.Module) -> list[nn.Module]:
    stacks = [module for module in model.modules() if _kind(module)]
    kinds = {_kind(stack) for stack in stacks if sum(1 for _ in stack.children()) > 1}
    return list(_blocks(model, kinds))


def _blocks(module: nn.Module, kinds: set[type | None]) -> Iterator[nn.Module]:
    """Yield the children of the outermost stacks whose blocks are of these classes."""
    if _kind(module) and _kind(module) in kinds:
        yield from module.children()
        return
    for child in module.children():
        yield from _blocks(child, kinds)


def _kind(module: nn.Module) -> type | None:
    """Return the class of the blocks of a stack, which have parts and parameters; None if the module is no stack."""
    blocks = list(module.children()) if isinstance(module, _STACKS) else []
    kinds = {type(block) for block in blocks}
    whole = all([*block.children()] and [*block.parameters()] for block in blocks)
    return kinds.pop() if len(kinds) == 1 and whole and not kinds & _CONTAINERS else None


def _levels(
    model: nn.Module, blocks: list[nn.Module], owners: Mapping[nn.Parameter, list[nn.Module]]
) -> dict[nn.Parameter, int]:
    """Return the level of every parameter: 0 below the blocks, 1 in the first block, and so on up to the head."""
    inside = {param: level for level, block in reversed([*enumerate(blocks, 1)]) for param in block.parameters()}
    params = list(model.parameters())
    first = next((position for position, param in enumerate(params) if param in inside), len(params))
    levels = dict.fromkeys(params[:first], 0)
    level = len(blocks) + 1
    for param in reversed(params[first:]):
        level = inside.get(param, level)
        is_embedding = param not in inside and any(isinstance(owner, _EMBEDDINGS) for owner in owners[param])
        levels[param] = 0 if is_embedding else level
    return levels


# Matrices of hidden layers

_HEADS = frozenset(
    {
        *("head", "heads", "output", "output_layer", "output_projection", "proj_out", "embed_out"),
        *("unembed", "unembedding", "logits", "classifier", "score", "fc", "qa_outputs"),
    }
)
"""What output layers are called, beside names that end with `_head`."""


def hidden_matrices(model: nn.Module, head: str | Iterable[str] | None = None) -> Callable[[str, Tensor], bool]:
    """Return a function `select(name, param)` that tells which parameters are matrices of hidden layers.

    These are the parameters of two dimensions or more, two of which are longer than 1, except

    - weights of `Embedding` and `EmbeddingBag`, also where another layer shares them;
    - those of the output layer;
    - those of norms, and what is called an embedding (a word of the name has `embed`, `embd` or `token` in it, or is
      `wte` or `wpe`) and stands outside of the model's repeated blocks.

    Args:
        model: the model, whose parameters `select` is asked about.
        head: patterns of the names of the output layer's parameters, as of file names; empty if there is none.  By
            default it is what shares its weight with an embedding, and outside of the repeated blocks, which
            `parameter_groups` explains, what is called `head`, `..._head`, `output`, `classifier`, `fc` or the like.

    Raises:
        TypeError: `model` is not a module.
        ValueError: by default there is nothing of which that holds; or a pattern matches no parameter.

    Example:
        >>> model = torch.nn.Sequential()
        >>> model.body, model.head = torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)
        >>> select = surefoot.hidden_matrices(model)
        >>> [name for name, param in model.named_parameters() if select(name, param)]
        ['body.weight']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, but got {type(model).__name__}; give the model itself")
    owners = _owners(model)
    inside = {param for block in _repeated_blocks(model) for param in block.parameters()}
    outer = {name: param for name, param in model.named_parameters(remove_duplicate=False) if param not in inside}
    called = {param for name, param in outer.items() if any(map(_is_embedding, name.split(".")))}
    spared = called | _head(model, outer, owners, head)
    kinds = (*_NORMS, *_EMBEDDINGS)
    matrices = {param for param in owners if sum(size > 1 for size in param.shape) > 1}
    found = {param for param in matrices if not any(isinstance(module, kinds) for module in owners[param])}

    def hidden_matrix(name: str, param: Tensor) -> bool:  # noqa: ARG001
        return param in found and param not in spared

    return hidden_matrix


def _is_embedding(word: str) -> bool:
    return any(part in word for part in ("embed", "embd", "token")) or word in ("wte", "wpe")


def _is_head(word: str) -> bool:
    return word in _HEADS or word.endswith("_head")


def _head(
    model: nn.Module,
    outer: Mapping[str, nn.Parameter],
    owners: Mapping[nn.Parameter, list[nn.Module]],
    patterns: str | Iterable[str] | None,
) -> set[nn.Parameter]:
    """Return the parameters of the output layer."""
    if patterns is not None:
        named = dict(model.named_parameters(remove_duplicate=False))
        found: set[nn.Parameter] = set()
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            matching = {param for name, param in named.items() if fnmatchcase(name, pattern)}
            if not matching:
                raise ValueError(f"`head`: no parameter of the {type(model).__name__} is called {pattern!r}")
            found |= matching
        return found
    tied = {
        param
        for param, modules in owners.items()
        if len(modules) > 1 and any(isinstance(module, _EMBEDDINGS) for module in modules)
    }
    found = tied | {param for name, param in outer.items() if any(map(_is_head, name.split(".")))}
    if not found:
        raise ValueError(
            f"which parameters of the {type(model).__name__} are the output layer's is not to be told by their names; "
            f"say so: head='last.*' for instance, or head=() if there is none"
        )
    return found
