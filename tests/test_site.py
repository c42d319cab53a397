"""The documentation: what is public is explained, what is quoted is what the code says, and links lead somewhere."""

import importlib
import inspect
import re
from pathlib import Path

import pytest
import site_pages
import torch
from site_curves import curves

import surefoot
from surefoot import checkpoint, errors, functional, lr_finder, lr_scheduler, swa_utils, telemetry
from surefoot.lr_scheduler import schedules
from surefoot.step.options import StepOptions

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
EVERY = surefoot.optimizers.__all__
MODULES = (lr_scheduler, swa_utils, telemetry, checkpoint)
NOT_ITEMS = {"schedules", "_LRScheduler", "EPOCH_DEPRECATION_WARNING", "CheckpointError"}
"""A module with a page of its own, a second name, a text, and an error that stands with the others."""


def read(path):
    return path.read_text(encoding="utf-8")


def directives():
    """Return what the pages of the reference show, by its whole name; test_integrations.py looks at integrations."""
    pages = [page for page in (DOCS / "reference").glob("*.md") if page.name != "integrations.md"]
    return re.findall(r"^::: ([\w.]+)", "\n".join(map(read, pages)), re.MULTILINE)


def public_items():
    """Return the public functions and classes that are no optimizers, by their whole names."""
    of_package = [
        name for name in surefoot.__all__ if name not in EVERY and not inspect.ismodule(getattr(surefoot, name))
    ]
    of_modules = [f"surefoot.{name}" for name in of_package if name not in ("load", "save")]
    for module in MODULES:
        of_modules += [f"{module.__name__}.{name}" for name in module.__all__ if name not in NOT_ITEMS]
    own = [name for name, value in vars(errors).items() if getattr(value, "__module__", "") == errors.__name__]
    of_modules += [f"surefoot.errors.{name}" for name in own]
    of_modules += [f"surefoot.lr_finder.{name}" for name in ("LRCurve", "find_lr")]
    for name, value in vars(schedules).items():
        if name.islower() and getattr(value, "__module__", "").startswith(
            ("surefoot.lr_scheduler.s", "surefoot.lr_scheduler.c")
        ):
            curve = isinstance(value, type)
            of_modules.append(f"surefoot.lr_scheduler.{'curves' if curve else 'schedules'}.{value.__name__}")
    return {name for name in of_modules if not name.rpartition(".")[2].startswith("_")}


def resolved(name):
    """Return what a whole name stands for."""
    value = surefoot
    for part in name.split(".")[1:]:
        value = getattr(value, part)
    return value


def test_every_public_name_has_a_place_in_the_reference():
    assert lr_finder.__name__ in "\n".join(directives())
    assert public_items() - set(directives()) == set()
    assert [name for name in directives() if resolved(name) is None] == []


@pytest.mark.parametrize("name", sorted(public_items()))
def test_every_argument_is_spoken_of(name):
    item = resolved(name)
    if item is StepOptions or (isinstance(item, type) and issubclass(item, BaseException)):
        return
    bases = item.__mro__[:-1] if isinstance(item, type) else [item]
    text = "\n".join(f"{base.__doc__}\n{getattr(base, '__init__', base).__doc__}" for base in bases)
    arguments = [key for key in inspect.signature(item).parameters if key not in ("args", "kwargs", "options")]
    assert [key for key in arguments if not re.search(rf"\b{key}\b", text)] == []


@pytest.mark.parametrize("name", EVERY)
def test_the_page_of_an_optimizer_says_what_each_option_is(name):
    page = site_pages.optimizer_page(name)
    rows = dict(re.findall(r"^ *\| `(\w+)` \| .*? \| ((?:[^|]|\\\|)+\.) \|$", page, re.MULTILINE))
    parameters = inspect.signature(getattr(surefoot, name)).parameters
    assert rows.keys() >= parameters.keys() - {"options"}
    assert page.startswith(f"# {name}\n")
    assert "\n    " in page.split("## Options")[0]  # its formula
    assert {"## Cost", "## Example", "## Errors"} <= set(re.findall("^## .*", page, re.MULTILINE))


def test_the_page_of_an_optimizer_has_its_curve():
    page = site_pages.optimizer_page("Lion")
    lion, adamw = (curves()[name] for name in ("Lion", "AdamW"))
    for curve in (lion, adamw):
        mean = sum(points[-1][1] for points in curve.seeds) / len(curve.seeds)
        assert f">{curve.title}, lr {curve.lr:g}: {mean:.3f}</text>" in page
    assert page.count("<polyline ") == len(curves()) + 1 + len(lion.seeds)
    assert "AdamW, cautious, lr " in site_pages.optimizer_page("AdamW")
    assert "<svg" not in site_pages.optimizer_page("LBFGS")  # which was not measured
    assert {curve.algorithm for curve in curves().values()} <= set(surefoot.optimizers.__all__)


def test_the_page_of_options_has_every_option():
    page = site_pages.options_page()
    names = [*StepOptions.__annotations__, *site_pages.SHARED]
    assert re.findall(r"^### (\w+)\n\n\S.{20,}", page, re.MULTILINE) == [
        *StepOptions.__annotations__,
        *reversed(site_pages.SHARED),
    ]
    assert len(names) == len(set(names))


def test_functions_commands_and_messages_are_all_there():
    functions = re.findall("^## (.*)", site_pages.functions_page(), re.MULTILINE)
    assert functions == functional.__all__
    commands = site_pages.commands_page()
    files = {path.stem for path in (ROOT / "src/surefoot/cli").glob("[a-z]*.py")} - {"ckpt", "lr"}
    assert {f"## surefoot {name}" for name in files} <= set(commands.splitlines())
    assert "`--state-dtype`" in commands
    assert "some parameters appear in more than one parameter group" in site_pages.messages_page()


def test_names_to_migrate_to_are_there():
    table = read(DOCS / "migrating.md").split("## From other libraries")[1].split("### Options by other names")[0]
    cells = [row.split(" | ")[2] for row in table.splitlines() if row.startswith("| ") and "`" in row]
    calls = [name for cell in cells for name in re.findall(r"`([A-Z][^`]*)`", cell)]
    for call in calls:
        name, options = re.fullmatch(r"(\w+)(?:\((.*)\))?", call).groups()
        params = [torch.ones(2, requires_grad=True)]
        eval(f"surefoot.{name}(params, {options or ''})", {"surefoot": surefoot, "params": params})  # noqa: S307 (ours)
    assert len(calls) > 30


def test_a_notebook_is_a_page_with_what_it_prints():
    page = site_pages.notebook_page(ROOT / "examples/five_minutes.ipynb")
    assert page.startswith("# From a training loop to surefoot in five minutes\n")
    assert "import surefoot as optim" in page
    assert "resumed at step 40: the same bits" in page


def said():
    """Return every message of the package with its kind, white space made one space."""
    files = site_pages.messages_of_package().values()
    return {f"{kind}: {squeezed(text)}" for found in files for kind, text in found}


def squeezed(text):
    return re.sub(r"\.{6,}", "...", " ".join(text.split()))


def quoted():
    """Yield the messages that the page about troubleshooting quotes."""
    for block in re.findall(
        r"^``` \{ \.text \.wrap \}\n(.*?)^```", read(DOCS / "troubleshooting.md"), re.MULTILINE | re.DOTALL
    ):
        yield from block.splitlines()


def test_messages_that_are_explained_are_those_of_the_code():
    messages = said()
    lost = [line for line in quoted() if not any(message.startswith(line.removesuffix(" ...")) for message in messages)]
    assert lost == []
    assert len(list(quoted())) > 50


@pytest.mark.parametrize(
    ("source", "link", "renewed"),
    [
        ("docs/run.md", "../README.md#x", "README.md#x"),
        ("docs/run.md", "gpu.md", "gpu.md"),
        ("docs/run.md", "https://example.org/d.md", "https://example.org/d.md"),
        ("docs/run.md", "../benchmarks/results/cpu.md", "benchmarks/results/cpu.md"),
        ("docs/run.md", "#here", "#here"),
        ("CHANGELOG.md", "docs/gpu.md#b", "gpu.md#b"),
        ("docs/reference/index.md", "../gpu.md", "../gpu.md"),
        ("docs/telemetry.md", "../examples/diverging_run.ipynb", "notebooks/diverging_run.md"),
    ],
)
def test_links_are_made_for_the_site(source, link, renewed):
    assert site_pages.with_links_on_the_site(f"![a]({link}) b", source) == f"![a]({renewed}) b"


def test_links_between_files_lead_somewhere():
    lost = []
    made = {"options.md", "reference/functional.md", "reference/commands.md", "reference/messages.md"}
    for page in [*DOCS.rglob("*.md"), *ROOT.glob("*.md")]:
        for _, target, _, _ in site_pages.LINK.findall(read(page)):
            file = (page.parent / target).resolve()
            if (
                ":" not in target
                and not file.exists()
                and not (file.is_relative_to(DOCS) and str(file.relative_to(DOCS)) in made)
            ):
                lost.append(f"{page.relative_to(ROOT)}: {target}")
    assert lost == []


@pytest.mark.filterwarnings("ignore")  # of Python's, in what makes the site
def test_the_site_is_built_without_a_warning(tmp_path):
    """As `mkdocs build --strict` does it, but where torch has been imported."""
    build = pytest.importorskip("mkdocs.commands.build", reason="the site was not built: no mkdocs (extra `docs`)")
    config = importlib.import_module("mkdocs.config").load_config(
        str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path)
    )
    config.plugins.on_startup(command="build", dirty=False)
    build.build(config)
    config.plugins.on_shutdown()
    assert (tmp_path / "optimizers/adamw.html").exists()
    pages = {path: path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")}
    loaded = {
        url
        for text in pages.values()
        for url in re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)', text)
    }
    assert loaded == set()  # nothing is asked of the network
    powers = r"\w<strong>[^<]*</strong>|<strong>[^<]*</strong>\w"  # 2**k, taken for emphasis
    assert [found for text in pages.values() for found in re.findall(powers, text)] == []
    assert "weight_decay" in pages[tmp_path / "reference/optimizer.html"] + pages[tmp_path / "optimizers/adamw.html"]
    assert not any("{arguments}" in text for path, text in pages.items() if path.parent.name == "reference")
