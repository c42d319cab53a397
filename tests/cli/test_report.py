"""`surefoot report`: the command, and the page in a real browser."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from surefoot.cli import app
from surefoot.telemetry import JsonLines, RawStep, Telemetry

NAMES = ("embed.weight", "blocks.0.weight", "blocks.0.bias", "head.weight")
STEPS = 400
BROKEN = 300


def write_run(path):
    """Write a run in which `blocks.0.weight` alone turns to NaN in one step."""
    telemetry = Telemetry(sinks=JsonLines(path))
    generator = torch.Generator().manual_seed(0)
    for step in range(1, STEPS + 1):
        noise = torch.exp(0.2 * torch.randn(4, 1, generator=generator, dtype=torch.float64))
        sums = torch.tensor([[4.0, 100.0, 1e-4, 0.5, 0.0]] * 4, dtype=torch.float64) * noise / (1 + step / 50)
        sums[:, 1] = 100
        sums[:, 4] = 0
        if step == BROKEN:
            sums[1, 0] = sums[1, 2] = math.nan
            sums[1, 3], sums[1, 4] = math.inf, 5
        clip = 0.5 if step < 100 else 1.0
        telemetry.record(RawStep(step, NAMES, sums, (1e-3 * step,), clip, skipped=step // 100, seconds=0.001))
    telemetry.close()


def report(*arguments):
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, ["report", *map(str, arguments)])


# The command


def test_it_writes_a_page_and_says_what_it_says(tmp_path):
    write_run(tmp_path / "run.jsonl")
    result = report(tmp_path / "run.jsonl")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == "● Which layer blew up first?"
    assert lines[1].startswith(
        "  None for good: gradients were inf or NaN in one step, and the run went on. The first ti"
    )
    assert lines[1].endswith(
        "Layer `blocks.0` (its `weight`): in step 300 its gradient was the first to be inf or NaN."
    )
    assert "99 of 400 steps (24.8%) were clipped, by a factor of 0.5 on average and 0.5 at most." in result.output
    assert lines[-1].startswith(str(tmp_path / "run.html"))
    assert "<title>run.jsonl" in (tmp_path / "run.html").read_text(encoding="utf-8")


def test_the_page_can_be_elsewhere(tmp_path):
    write_run(tmp_path / "run.jsonl")
    assert report(tmp_path / "run.jsonl", "-o", tmp_path / "page.html").exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "run.jsonl"]


@pytest.mark.parametrize(
    ("content", "out", "code", "message"),
    [
        (None, "x.html", 1, "run.jsonl: No such file or directory"),
        ("step 1 loss 2\n", "x.html", 1, "is not a telemetry file: it must begin with a header that holds `names`"),
        ("", "run.jsonl", 2, "is the run itself; name another file"),
        ('{"names":["w"],"format":1,"surefoot":"0.1"}\n', "x.html", 1, "has no step yet"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, content, out, code, message):
    if content is not None:
        (tmp_path / "run.jsonl").write_text(content)
    result = report(tmp_path / "run.jsonl", "-o", tmp_path / out)
    assert result.exit_code == code
    assert message in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("run", "message"),
    [(".", ". is a folder; name a file of JSON Lines in it"), ("folder.jsonl", "is a folder; name a")],
)
def test_a_folder_is_no_run(tmp_path, monkeypatch, run, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.jsonl").mkdir()
    result = report(run)
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_page_that_does_not_fit_is_named(tmp_path):
    write_run(tmp_path / "run.jsonl")
    result = report(tmp_path / "run.jsonl", "-o", "/dev/full")
    assert (result.exit_code, result.output) == (1, "surefoot report: /dev/full: No space left on device\n")
    assert Path("/dev/full").is_char_device()


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write_run(tmp_path / "run.jsonl")
    (tmp_path / "run.html").write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("surefoot.files.os.replace", full)
    result = report(tmp_path / "run.jsonl")
    assert (result.exit_code, result.output) == (1, f"surefoot report: {tmp_path}/run.html: No space left on device\n")
    assert (tmp_path / "run.html").read_text() == "old"
    assert len([*tmp_path.iterdir()]) == 2


@pytest.mark.parametrize("variables", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_what_it_says_fits_a_terminal_of_ascii(tmp_path, variables):
    """Nor does a name in the file reach the terminal as a command, nor need anybody wait for torch."""
    lines = (tmp_path / "run.jsonl").open("w")
    with lines:
        lines.write('{"names":["w","h\\u00f6he\\ud800[/x]\\u001b[31m"],"format":1,"surefoot":"0.1"}\n')
        for step in (1, 2):
            lines.write(
                f'{{"step":{step},"seconds":1,"clip":1,"skipped":0,"lr":1,"grad":[1,"nan"],"param":[1,1],'
                '"update":[1,1],"max":[1,1],"nonfinite":{}}\n'
            )
    environment = os.environ | {"PYTHONCOERCECLOCALE": "0", "NO_COLOR": "1", "COLUMNS": "200"} | variables
    code = "import sys; from surefoot.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, "report", str(tmp_path / "run.jsonl")]
    done = subprocess.run(command, capture_output=True, env=environment, check=False)  # noqa: S603
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"* Which layer blew up first?" in done.stdout
    assert b"h\\xf6he\\ud800[/x]\\x1b[31m" in done.stdout
    assert b"\x1b" not in done.stdout


# The page


def chromium():
    """Find a Chromium, or skip and say what was not tested."""
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"):
        if path := shutil.which(name):
            return path
    sync_api = pytest.importorskip("playwright.sync_api", reason="THE REPORT'S PAGE WAS NOT TESTED: no playwright")
    with sync_api.sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    if not Path(path).exists():
        pytest.skip("THE REPORT'S PAGE WAS NOT TESTED: no Chromium; `playwright install chromium` gets one")
    return path


@pytest.fixture(scope="module")
def browser():
    path = chromium()
    sync_api = pytest.importorskip("playwright.sync_api", reason="THE REPORT'S PAGE WAS NOT TESTED: no playwright")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "run.jsonl"
    write_run(path)
    assert report(path).exit_code == 0
    return path.with_suffix(".html")


@pytest.fixture
def page(browser, file):
    """Open the page; in the end there must have been no error and no request but for the file."""
    page = browser.new_page(viewport={"width": 1280, "height": 1400}, color_scheme="light")
    errors, requests = [], []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on(
        "console", lambda message: errors.append(message.text) if "willReadFrequently" not in message.text else None
    )
    page.on("request", lambda request: requests.append(request.url))
    page.goto(file.as_uri())
    yield page
    page.close()
    assert errors == []
    assert requests == [file.as_uri()]


def point_at(page, selector, x, y):
    """Move the mouse to a place within an element, given in shares of its size; give the place in pixels."""
    box = page.locator(selector).first.bounding_box()
    place = box["x"] + x * box["width"], box["y"] + y * box["height"]
    page.mouse.move(*place)
    return place


def drag(page, selector, start, end):
    point_at(page, selector, start, 0.5)
    page.mouse.down()
    point_at(page, selector, end, 0.5)
    page.mouse.up()


def pixel(page, x, y):
    """Colour of the heat map at a place in CSS pixels."""
    read = "([x, y]) => [...byId('map').getContext('2d').getImageData(x, y, 1, 1).data].slice(0, 3)"
    return tuple(page.evaluate(read, [x, y]))


def test_the_words_and_all_charts_are_there(page):
    text = page.locator("#findings li").first.inner_text()
    assert text.startswith("Which layer blew up first?\n\nNone for good")
    assert text.endswith("Layer blocks.0 (its weight): in step 300 its gradient was the first to be inf or NaN.")
    assert page.locator("figcaption span").all_inner_texts() == [
        *("gradient norm, before clipping", "update / weights", "learning rate"),
        *("clip factor", "steps skipped so far", "step time, seconds"),
    ]
    for chart in page.locator("path.curve").all():
        assert chart.get_attribute("d").startswith("M")
    assert page.locator("figure").first.locator(".broken").count() == 1
    assert page.locator("figure").nth(1).locator(".guide-text").text_content() == "0.001 is usual"


def test_pointing_shows_values_on_every_chart(page):
    point_at(page, "svg", 0.5, 0.5)
    step = int(page.locator("#pointed").inner_text().removeprefix("Pointed at: step ").rstrip("."))
    assert 150 < step < 230
    readings = page.locator("figcaption output").all_inner_texts()
    assert float(readings[2]) == pytest.approx(1e-3 * step, rel=1e-3)
    assert readings[3:5] == ["1", str(step // 100)]
    page.mouse.move(2, 2)
    assert page.locator("figcaption output").first.inner_text() == ""


def test_dragging_looks_closely_and_the_button_goes_back(page):
    drag(page, "svg", 0.5, 0.75)
    low, high = page.evaluate("[view.low, view.high]")
    assert 150 < low < 230
    assert 265 < high < 330
    assert page.locator("#range").inner_text() == f"Steps {round(low)} to {round(high)}."
    labels = [int(text) for text in page.locator("svg >> nth=0 >> text").all_text_contents() if text.isdigit()]
    assert all(low <= label <= high for label in labels if label > 10)
    page.locator("#all").click()
    assert page.evaluate("[view.low, view.high]") == [1, STEPS]
    drag(page, "#map", 0.5, 0.75)
    assert page.evaluate("view.low") > 100
    page.locator("#map").dblclick()
    assert page.evaluate("[view.low, view.high]") == [1, STEPS]


def test_the_scale_can_be_logarithmic(page):
    figure = page.locator("figure").nth(2)
    before = figure.locator("path.curve").get_attribute("d")
    figure.locator("button").click()
    assert figure.locator("button").get_attribute("aria-pressed") == "true"
    assert figure.locator("path.curve").get_attribute("d") != before
    figure.locator("button").click()
    assert figure.locator("path.curve").get_attribute("d") == before


def test_the_map_shows_what_is_not_finite(page):
    place = page.evaluate(f"[heat.x({BROKEN}) + 1, heat.top + 1.5 * heat.rowHeight]")
    assert pixel(page, *place) == (0xE0, 0x11, 0x9D)
    assert pixel(page, place[0], place[1] + page.evaluate("heat.rowHeight")) != (0xE0, 0x11, 0x9D)
    assert pixel(page, place[0] - 100, place[1]) != (0xE0, 0x11, 0x9D)
    box = page.locator("#map").bounding_box()
    page.mouse.move(box["x"] + place[0], box["y"] + place[1])
    assert page.locator("#tip").inner_text().splitlines()[0] == "blocks.0.weight"
    assert page.locator("#tip").inner_text().endswith("gradient norm inf or NaN")
    page.locator("#quantity").select_option(label="weight norm")
    assert pixel(page, *place) != (0xE0, 0x11, 0x9D)


def test_the_map_tells_values_and_filters_names(page):
    page.locator("#quantity").select_option(label="weight norm")
    point_at(page, "#map", 0.5, 0.1)
    assert page.locator("#tip").inner_text().endswith("weight norm 10")
    page.locator("#filter").fill("BLOCKS")
    assert page.evaluate("heat.rows.map((row) => row[0])") == ["blocks.0.weight", "blocks.0.bias"]
    page.locator("#filter").fill("nothing like it")
    assert page.locator("#nothing").is_visible()
    page.locator("#filter").fill("")
    assert page.locator("#map").is_visible()


def test_the_map_gets_finer_where_one_looks_closely(browser, tmp_path):
    telemetry = Telemetry(sinks=JsonLines(tmp_path / "run.jsonl"))
    for step in range(1, 1801):
        sums = torch.full((2, 5), 1e6 if step == 901 else 1 + step % 3, dtype=torch.float64)
        sums[:, 4] = 0
        telemetry.record(RawStep(step, NAMES[:2], sums, (0.1,)))
    telemetry.close()
    assert report(tmp_path / "run.jsonl").exit_code == 0
    page = browser.new_page(viewport={"width": 900, "height": 1400})
    page.goto((tmp_path / "run.html").as_uri())
    tip = "(step) => heat.cellText(0, heat.columnsAt(step))"
    assert page.evaluate("heat.bins().length - 1") < page.evaluate("heat.width")
    bright = "(place) => [...byId('map').getContext('2d').getImageData(...place, 1, 1).data][0] > 240"
    over = page.evaluate("[heat.x(901), heat.top + 2]")
    assert page.evaluate(tip, 901).startswith("steps ")
    assert page.evaluate(tip, 901).endswith(", the greatest: gradient norm 1000")
    assert any(page.evaluate(bright, [over[0] + shift, over[1]]) for shift in (-1, 0, 1))
    page.evaluate("show(890, 910)")
    assert page.evaluate(tip, 901.5) == "step 901: gradient norm 1000"
    assert page.evaluate(tip, 902.5) == "step 902: gradient norm 1.73"
    places = page.evaluate("[900, 901, 902].map((step) => [heat.x(step + 0.5), heat.top + 2])")
    assert [page.evaluate(bright, place) for place in places] == [False, True, False]
    page.close()


def test_light_and_dark(browser, file, page):
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(247, 247, 245)"
    page.locator("#theme").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
    at_night = browser.new_page(color_scheme="dark")
    at_night.goto(file.as_uri())
    assert at_night.evaluate("document.documentElement.dataset.theme") == "dark"
    at_night.close()


def test_numbers_are_written_as_people_read_them(page):
    wanted = {0: "0", 1: "1", 0.001: "0.001", 12345: "12345", 123456: "1.23e5", 1e-7: "1e-7", 2.5e-4: "2.5e-4"}
    assert page.evaluate("(values) => values.map(short)", list(wanted)) == list(wanted.values())
    assert page.evaluate("niceTicks(0, 10, 5)") == [0, 2, 4, 6, 8, 10]
    assert page.evaluate("logTicks(0.5, 2000)") == [1, 10, 100, 1000]
