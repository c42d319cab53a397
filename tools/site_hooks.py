"""What the site needs beside the files of docs/: pages made from the code, files from elsewhere, and their links."""

import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

sys.path[:0] = [str(Path(__file__).parents[1] / "src"), str(Path(__file__).parent)]

import site_pages as pages  # noqa: E402

from surefoot import optimizers  # noqa: E402

FROM_ELSEWHERE = ("CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "SECURITY.md")
NOTEBOOKS = sorted((pages.ROOT / "examples").glob("*.ipynb"))
GENERATED = {
    "options.md": pages.options_page,
    "reference/functional.md": pages.functions_page,
    "reference/commands.md": pages.commands_page,
    "reference/messages.md": pages.messages_page,
}


def on_config(config: Any) -> Any:
    """Put the optimizers' pages into the navigation."""
    for section in config.nav:
        section.get("Optimizers", []).extend(pages.page_of(name) for name in optimizers.__all__)
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add what is made from the code and what stands elsewhere in the repository."""
    for uri, make in GENERATED.items():
        files.append(File.generated(config, uri, content=make()))
    for name in optimizers.__all__:
        files.append(File.generated(config, pages.page_of(name), content=pages.optimizer_page(name)))
    for path in NOTEBOOKS:
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=pages.notebook_page(path)))
    folders = (pages.ROOT / "benchmarks" / name for name in ("results", "history"))
    results = [path.relative_to(pages.ROOT) for folder in folders for path in folder.iterdir()]
    for path in [Path(name) for name in FROM_ELSEWHERE] + sorted(results):
        if (pages.ROOT / path).exists():
            files.append(File.generated(config, path.as_posix(), abs_src_path=str(pages.ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Make links between files of the repository links of the site."""
    source = page.file.src_uri
    if source == "optimizers.md":
        markdown = pages.with_links_to_optimizers(markdown)
    generated = source in GENERATED or source.startswith(("notebooks/", "optimizers/"))
    elsewhere = source in FROM_ELSEWHERE or source.startswith("benchmarks/")
    return markdown if generated else pages.with_links_on_the_site(markdown, source if elsewhere else f"docs/{source}")
