"""Pages of the documentation that are made from the code, and links that hold in a checkout and on the site.

Nothing here knows the program that makes the site; `site_hooks.py` does.
"""

import ast
import inspect
import json
import posixpath
import re
from collections.abc import Iterable, Iterator
from functools import cache, partial
from html import escape
from pathlib import Path
from textwrap import dedent
from typing import Any

import site_curves
import torch
import typer

import surefoot
from surefoot import explain
from surefoot.cli import app
from surefoot.constructor import EngineOptions
from surefoot.rule import Sparse
from surefoot.step.options import StepOptions

ROOT = Path(__file__).parents[1]
SHARED = tuple(name for name in EngineOptions.__annotations__ if name not in StepOptions.__annotations__)
"""Options that all rules have."""
SHORT = 60
"""Characters of arguments that fit on a line of a page, a telephone's aside."""

# Docstrings

SECTION = re.compile(r"^(Args|Attributes|Example|Raises|Returns|Yields):\n((?:[ ]{4}.*\n|\n)+)", re.MULTILINE)


def sections(docstring: str) -> tuple[list[str], dict[str, str]]:
    """Return the prose before and after the sections of a docstring, and the sections by their titles."""
    text = f"{docstring}\n"
    found = {match[1]: dedent(match[2]).strip("\n") for match in SECTION.finditer(text)}
    first, *_ = (prose := SECTION.split(text)[::3])
    rest = "\n\n".join(part.strip("\n") for part in prose[1:] if part.strip())
    return [markdown(first), markdown(rest)], found


def entries(section: str) -> dict[str, str]:
    """Return what a section says of each name, on one line each."""
    pairs = re.findall(r"^(\w+): ((?:.*)(?:\n[ ]{4}.*)*)", section, re.MULTILINE)
    return {name: re.sub(r"\s+", " ", text) for name, text in pairs}


def markdown(prose: str) -> str:
    """Return prose of a docstring as Markdown: one colon before code, and stars outside of it are stars."""
    blocks = re.sub(r"::\n\n", ":\n\n", prose).strip("\n").split("\n\n")
    return "\n\n".join(block if block.startswith("    ") else block.replace("*", "\\*") for block in blocks)


def table(head: str, rows: list[tuple[str, ...]]) -> str:
    """Return a table; cells may hold anything but line breaks."""
    cells = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    columns = head.count("|") + 1
    return "\n".join([f"| {head} |", "|" + "---|" * columns, *(f"| {row} |" for row in cells)])


# Optimizers


def page_of(name: str) -> str:
    """Return where on the site an optimizer's page stands."""
    return f"optimizers/{name.lower()}.md"


@cache
def optimizer_page(name: str) -> str:
    """Return the page of an optimizer: formula, options, cost and example, all of it from its class."""
    cls = getattr(surefoot, name)
    (formula, paper), found = sections(inspect.getdoc(cls) or "")
    arguments = entries(found["Args"])
    own = {option: text for option, text in arguments.items() if option not in (*SHARED, "options")}
    shared = {option: text for option, text in arguments.items() if option in SHARED}
    folded = f'??? note "Options of every rule: {", ".join(shared)}"\n\n{indented(options_table(cls, shared))}'
    around = [f"[`{option}`](../options.md#{option})" for option in step_options(cls) if option not in own]
    errors = [(f"`{kind}`", text) for kind, text in entries(found["Raises"]).items()]
    parts = [
        f"# {name}",
        formula,
        f"```python\nsurefoot.{name}({wrapped(signature(cls, own))})\n```",
        f"## Options\n\n{options_table(cls, own)}",
        folded if shared else "",
        f"Around the update: {', '.join(around)}.",
        cost(cls),
        curve(name),
        f"## Example\n\n```python\n{code_of(found['Example'])}\n```",
        f"## Errors\n\n{table('raised | when', errors)}",
        f"## Source\n\n{paper}" if paper else "",
    ]
    return joined(parts)


def joined(parts: Iterable[str]) -> str:
    """Return the parts of a page that are not empty, with a blank line between them."""
    return "\n\n".join(part for part in parts if part) + "\n"


def signature(cls: Any, own: dict[str, str]) -> Iterator[str]:
    """Yield the arguments of a constructor that are the algorithm's own."""
    for parameter in inspect.signature(cls).parameters.values():
        if parameter.name in own:
            bare = parameter.default is inspect.Parameter.empty
            yield parameter.name if bare else f"{parameter.name}={parameter.default!r}"
    yield "**options"


def wrapped(arguments: Iterable[str]) -> str:
    """Return arguments on one line, or each on its own where that would be too long for a page."""
    line = ", ".join(shown := list(arguments))
    return line if len(line) < SHORT else "".join(f"\n    {argument}," for argument in shown) + "\n"


def step_options(cls: Any) -> list[str]:
    """Return the options around the update that an optimizer takes, in the order of the page that explains them."""
    return [option for option in StepOptions.__annotations__ if option in cls.supported_step_options()]


def options_table(cls: Any, options: dict[str, str]) -> str:
    """Return a table of options, their defaults and what the docstring says of them."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(cls).parameters.items()}
    shown = {name: "" if defaults[name] is inspect.Parameter.empty else f"`{defaults[name]!r}`" for name in options}
    return table("option | default | what it is", [(f"`{name}`", shown[name], text) for name, text in options.items()])


def indented(text: str) -> str:
    """Return lines as they stand in a block that folds."""
    return "\n".join(f"    {line}" if line else line for line in text.splitlines())


def code_of(example: str) -> str:
    """Return a doctest as a script, its outputs as comments."""
    lines = [line[4:] if line.startswith((">>> ", "... ")) else f"# {line}" for line in example.splitlines()]
    return "\n".join(["import torch", "", "import surefoot", "", *lines])


STORAGE = {
    "float32": (torch.float32, {}),
    'float32, `state_dtype="float8"`': (torch.float32, {"state_dtype": "float8"}),
    "bfloat16": (torch.bfloat16, {}),
    'bfloat16, `master_weight_bits=24`, `state_dtype="float8"`': (
        torch.bfloat16,
        {"master_weight_bits": 24, "state_dtype": "float8"},
    ),
}
"""Ways to keep weights and state whose cost a page tells."""


CUSTOM = "Its step is its own, made of torch's operations. `surefoot memory` tells what its state takes for a model."
COST = "Bytes for each element of a parameter: the weight, the state, and what a step moves to and from memory."


def cost(cls: Any) -> str:
    """Return what an optimizer keeps and moves for each element of a parameter."""
    if not cls.is_rule() or cls.sparse is Sparse.ONLY:
        return f"## Cost\n\n{CUSTOM}"
    rows = []
    for title, (dtype, options) in STORAGE.items():
        param = torch.zeros(128, 128, dtype=dtype, requires_grad=True)
        # The eager engine compiles nothing.
        optimizer = cls([param], foreach=False, **options)
        group = optimizer.param_groups[0]
        param.grad = torch.zeros_like(param)
        optimizer.step()
        state = sum(value.nbytes for value in optimizer.state[param].values() if value.dim()) / param.numel()
        traffic = str(explain.traffic_of(optimizer, group, param)).replace(" bytes per element", "")
        rows.append((title, str(param.element_size()), f"{state:.4g}", traffic))
    return f"## Cost\n\n{COST}\n\n{table('kept as | weight | state | traffic', rows)}"


CURVE = """## Curve

A character transformer of 180 k parameters, 300 steps, each optimizer at its own best rate of a grid, three seeds:
settings to begin with, not a ranking. [How it was measured](../optimizers.md#curves)."""


def curve(name: str) -> str:
    """Return what an optimizer has learned beside the others, where that was measured."""
    picture = site_curves.picture_of(name)
    return f"{CURVE}\n\n{picture}" if picture else ""


OPTIONS = """# Options of every optimizer

Keywords of every constructor. Those around the update are for each optimizer, rules of your own included; `LBFGS` takes
`zero_grad_after_step` only. What an optimizer cannot do it refuses by name.

## Around the update"""
OF_RULES = """## Engines and storage

Of every rule, that is every algorithm that goes element by element; [Short numbers](short_numbers.md) says which
storage is for what."""


def options_page() -> str:
    """Return the page of the options that every optimizer takes."""
    around = entries(sections(inspect.getdoc(StepOptions) or "")[1]["Attributes"])
    engine = {name: entries_of_engine(name) for name in reversed(SHARED)}
    return joined(
        [
            OPTIONS,
            *(f"### {name}\n\n{text[0].upper()}{text[1:]}" for name, text in around.items()),
            OF_RULES,
            *(f"### {name}\n\n{text} Default: `{default!r}`." for name, (text, default) in engine.items()),
        ]
    )


def entries_of_engine(name: str) -> tuple[str, Any]:
    """Return what is said of an option of engines, and its default."""
    parameters = inspect.signature(surefoot.SGD).parameters
    text = entries(sections(inspect.getdoc(surefoot.SGD) or "")[1]["Args"])[name]
    return text[0].upper() + text[1:], parameters[name].default


def with_links_to_optimizers(text: str) -> str:
    """Return the page of all optimizers with each name that begins a row, or a line on its own, linked to its page."""
    names = "|".join(surefoot.optimizers.__all__)
    linked = partial(re.sub, rf"`({names})`", lambda match: f"[{match[0]}]({page_of(match[1])})")
    lines = [
        linked(line, count=1) if line.startswith("| `") else linked(line) if line.startswith("`") else line
        for line in text.splitlines()
    ]
    return "\n".join(lines)


# Functions, commands and messages

TELLING = 3
"""Words without which a message says nothing by itself, since it consists of reasons from elsewhere."""

FUNCTIONS = """# surefoot.functional

[Steps without an optimizer](../functional.md) explains both forms. Hyperparameters are those of the class; lists of
state are in the order of its slots and scalars."""
MESSAGES = """# All messages

Every error and warning that surefoot itself raises, as the code spells it; `...` stands for what is filled in.
[Troubleshooting](../troubleshooting.md) has more to say of those that are met most."""


def functions_page() -> str:
    """Return the reference of `surefoot.functional`, whose functions are made at run time."""
    parts = [FUNCTIONS]
    for name in surefoot.functional.__all__:
        function = getattr(surefoot.functional, name)
        (first, rest), found = sections(inspect.getdoc(function) or "")
        parameters = inspect.signature(function).parameters.values()
        shown = [str(parameter.replace(annotation=parameter.empty)) for parameter in parameters]
        tables = [
            table("name | what it is", [(f"`{key}`", text) for key, text in entries(found[title]).items()])
            for title in ("Args", "Raises")
            if title in found
        ]
        parts += [f"## {name}", f"```python\n{name}({wrapped(shown)})\n```", first, *tables, rest]
    return joined(parts)


def commands_page() -> str:
    """Return the reference of the command line, from the commands themselves."""
    parts = ["# Commands", "`surefoot --help` and `surefoot COMMAND --help` say the same."]
    for name, command in commands("surefoot", typer.main.get_command(app)):
        options = [
            (f"`{' '.join([*option.opts, *option.secondary_opts])}`", " ".join((option.help or "").split()))
            for option in command.params
            if "--help" not in option.opts
        ]
        paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
        parts += [
            f"## {name}",
            *(escape(" ".join(text.split()), quote=False) for text in paragraphs),
            table("option | what it does", options) if options else "",
        ]
    return joined(parts)


def commands(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    """Yield the commands below one, each with its whole name."""
    for key, below in sorted(getattr(command, "commands", {}).items()):
        inner = f"{name} {key}"
        yield from commands(inner, below) if hasattr(below, "commands") else [(inner, below)]


def messages_page() -> str:
    """Return every message of an error or a warning that the package has, by module."""
    parts = [MESSAGES]
    for path, found in messages_of_package().items():
        told = [(kind, " ".join(text.split())) for kind, text in found if len(re.findall("[a-z]{2,}", text)) >= TELLING]
        rows = [(f"`{kind}`", _without_emphasis(escape(text, quote=False))) for kind, text in told]
        if rows:
            name = path.relative_to(ROOT / "src").with_suffix("").as_posix().replace("/", ".")
            parts.append(f"## {name.removesuffix('.__init__')}\n\n{table('raised | message', rows)}")
    return joined(parts)


def _without_emphasis(text: str) -> str:
    """Return text whose asterisks are shown, in code and outside of it."""
    return re.sub(r"`[^`]*`|\*", lambda found: "\\*" if found[0] == "*" else found[0], text)


@cache
def messages_of_package() -> dict[Path, list[tuple[str, str]]]:
    """Return of each file of the package what its errors and warnings are called and say."""
    paths = sorted((ROOT / "src/surefoot").rglob("*.py"))
    return {path: list(messages(ast.parse(path.read_text(encoding="utf-8")))) for path in paths}


def messages(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield what errors and warnings in a module are called and say."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        kind = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if kind == "warn":
            kind = ast.unparse(node.args[1]) if len(node.args) > 1 else "UserWarning"
        if not re.fullmatch(r"[A-Z]\w*(Error|Warning|BadParameter)|BadParameter", kind):
            continue
        if re.search(r"\w", text := text_of(node.args[0])):
            yield kind, text


def text_of(node: ast.AST) -> str:
    """Return a string as the code spells it, with `...` for what is put in when it runs."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(value) for value in node.values)
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return "..."


# Notebooks


def notebook_page(path: Path) -> str:
    """Return a notebook as a page: its prose, its code, and the text that came out of it."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        parts += [f"``` {{ .text .wrap }}\n{''.join(output['text'])}```" for output in cell.get("outputs", ())]
    return joined(parts)


# Links

NOTEBOOK = re.compile(r"^examples/(\w+)\.ipynb$")
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")


def on_the_site(path: str) -> str:
    """Return where a file of the repository stands on the site: what is in docs/ at the top, notebooks as pages."""
    return NOTEBOOK.sub(r"notebooks/\1.md", path.removeprefix("docs/"))


def with_links_on_the_site(text: str, source: str) -> str:
    """Return a page with its links from one file of the repository to another made links from page to page.

    Args:
        text: the page, in Markdown.
        source: where it stands in the repository, such as `docs/gpu.md`.
    """
    here, there = posixpath.dirname(source), posixpath.dirname(on_the_site(source))

    def renewed(match: re.Match[str]) -> str:
        target = match[2]
        if ":" in target:
            return match[0]
        file = posixpath.normpath(posixpath.join(here, target))
        return f"{match[1]}{posixpath.relpath(on_the_site(file), there or '.')}{match[3] or ''}{match[4]}"

    return LINK.sub(renewed, text)
