"""`explore` in JupyterLab and a run's report, in a real browser: `make test-browser`.

Screenshots are kept in `working/browser/`.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from fixtures.datasets import use_folders
from PIL import Image

from kutils.system.paths import repository_root

pytestmark = pytest.mark.browser

ROOT = repository_root()
SCREENSHOTS = ROOT / "working" / "browser"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SMALL = [
    "epochs=1",
    "warmup_epochs=0",
    "freeze_epochs=0",
    "input_size=32",
    "num_workers=0",
    "device=cpu",
    "amp_dtype=float32",
]
RUNS = ("tiny_convnext_stage1_fold0", "tiny_vit_stage1_fold0")
VIEWPORT = {"width": 1400, "height": 1000}
RUN_ALL = "jupyterapp.commands.execute('notebook:run-all-cells')"
ERRORS = '[data-mime-type="application/vnd.jupyter.stderr"], [data-mime-type="application/vnd.jupyter.error"]'


def missing(problem: str) -> None:
    """Where a browser has to be there (CI), its absence is a failure, not a skip."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(problem)


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window."""
    found = next(filter(None, map(shutil.which, (os.environ.get("KUTILS_BROWSER", ""), *BROWSERS))), None)
    if found is None:
        missing(f"no browser: install chromium, or name one by KUTILS_BROWSER (looked for {', '.join(BROWSERS)})")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright is not installed: make env")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with `input/shapes` and two finished runs in `working/`, which kutils uses."""
    folder = tmp_path_factory.mktemp("browser")
    with pytest.MonkeyPatch.context() as patch:
        use_folders(patch, folder)
        command = [
            sys.executable,
            "-m",
            "kutils",
            "generate",
            "--shapes-dataset",
            "shapes",
            "--num-prompts",
            "300",
        ]
        subprocess.run([*command, "--images-per-prompt", "1"], check=True, capture_output=True, timeout=300)
        for model, fold in (("tiny_convnext", 0), ("tiny_vit", 0), ("tiny_vit", 1)):
            command = [sys.executable, "-m", "kutils", "train", "--config", f"conf/{model}_stage1.yaml"]
            command += ["--fold", str(fold), *SMALL]
            subprocess.run(command, check=True, capture_output=True, timeout=300)
    return folder


@pytest.fixture(scope="module")
def lab(folder):
    """JupyterLab as `make lab` starts it, on copies of the notebooks: its address."""
    notebooks = folder / "notebooks"
    shutil.copytree(ROOT / "notebooks", notebooks, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    settings = folder / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    news = {"fetchNews": "false", "checkForUpdates": False}  # the question covers the lower right corner
    (settings / "notification.jupyterlab-settings").write_text(json.dumps(news))
    settings = folder / "settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir()
    (settings / "tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}')  # cells out of sight stay there
    environment = os.environ | {
        "KUTILS_INPUT": str(folder / "input"),
        "KUTILS_WORKING": str(folder / "working"),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
    }
    command = [sys.executable, "-m", "jupyterlab", str(notebooks), "--no-browser", "--allow-root", "--port=0"]
    command += ["--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True"]
    with (folder / "lab.log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            yield wait_for(lambda: address(folder / "runtime"), "JupyterLab").rstrip("/")
        finally:
            server.terminate()
            server.wait(timeout=30)


def address(runtime: Path) -> str | None:
    """Of the server whose record lies in a runtime folder, as soon as it answers."""
    for record in runtime.glob("jpserver-*.json"):
        url = json.loads(record.read_text())["url"]
        try:
            urllib.request.urlopen(f"{url}api/status", timeout=5).close()
            return url
        except OSError:
            return None
    return None


def wait_for(look, what: str, seconds: float = 60):
    """The first true answer of `look`."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if answer := look():
            return answer
        time.sleep(0.1)
    raise TimeoutError(f"{what} is not there after {seconds:g} s")


def settle(page, promise: str, seconds: float = 300):
    """What a promise of the page comes to; the page keeps it, or its garbage collector could take it before."""
    page.evaluate(
        f"""() => {{
            window.settled = undefined;
            window.pending = ({promise}).then(value => window.settled = {{value}}, error => window.settled = {{error}});
        }}"""
    )
    page.wait_for_function("window.settled !== undefined", timeout=1000 * seconds)
    assert page.evaluate("window.settled.error === undefined"), page.evaluate("String(window.settled.error)")
    return page.evaluate("window.settled.value")


def open_notebook(page, lab: str, name: str) -> None:
    """Open a notebook in a fresh workspace and wait until its kernel is idle."""
    page.goto(f"{lab}/lab/workspaces/{name}/tree/{name}.ipynb?reset")
    page.wait_for_function("window.jupyterapp !== undefined")
    settle(page, "jupyterapp.restored.then(() => true)")
    page.wait_for_selector(".jp-Notebook .jp-RenderedMarkdown h1")
    page.wait_for_function(
        "jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'", timeout=60_000
    )


def shoot(page, name: str) -> Path:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")
    return SCREENSHOTS / f"{name}.png"


def test_every_notebook_opens_in_jupyterlab_with_the_right_kernel(browser, lab):
    with urllib.request.urlopen(f"{lab}/api/kernelspecs", timeout=10) as answer:
        found = json.load(answer)
    assert found["default"] == "python3"
    page = browser.new_page(viewport=VIEWPORT)
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        open_notebook(page, lab, path.stem)
        title = page.inner_text(".jp-Notebook .jp-RenderedMarkdown h1")
        assert title.startswith(json.loads(path.read_text())["cells"][0]["source"][0].strip("# \n")), path
        assert page.locator(".jp-Dialog").count() == 0, path
    kernel = "jupyterapp.shell.currentWidget.sessionContext.session.kernel"
    code = "import sys; print(sys.prefix)"
    prefix = settle(
        page,
        f"""(async () => {{
            let told = '';
            const future = {kernel}.requestExecute({{code: '{code}'}});
            future.onIOPub = message => {{ if (message.header.msg_type === 'stream') told += message.content.text; }};
            await future.done;
            return told;
        }})()""",
    )
    assert prefix.strip() == sys.prefix
    page.close()


def cell(page, code: str):
    """The code cell that holds a piece of code."""
    return page.locator(".jp-CodeCell", has=page.locator(".jp-InputArea", has_text=code))


def pictures(place) -> list[str]:
    """Sources of the figures of a cell."""
    return [image.get_attribute("src") for image in place.locator(".jp-OutputArea-output img").all()]


def changed(page, place, before: list[str]) -> list[str]:
    """The figures of a cell as soon as they are others than before."""

    def look() -> list[str] | None:
        page.wait_for_timeout(100)
        now = pictures(place)
        busy = place.get_by_text("working ...").count()
        return now if now != before and len(now) == len(before) and not busy else None

    return wait_for(look, "another figure")


def test_explore_runs_and_its_controls_show_other_results(browser, lab, folder):
    page = browser.new_page(viewport=VIEWPORT)
    open_notebook(page, lab, "explore")
    assert settle(page, RUN_ALL), "a cell raised"
    assert page.locator(ERRORS).all_inner_texts() == []
    figures = page.locator(".jp-OutputArea-output img")
    assert figures.count() >= 10
    for figure in figures.all():
        assert figure.evaluate("image => image.complete && image.naturalWidth > 500")

    # words to look for
    place = cell(page, "widgets.search(")
    place.scroll_into_view_if_needed()
    shoot(page, "explore_search")
    before = pictures(place)
    words = place.locator('.widget-text:has(label:text-is("search")) input')
    words.fill("a photo of two large green teapots")
    words.press("Enter")
    before = changed(page, place, before)
    place.locator('.widget-dropdown:has(label:text-is("fold")) select').select_option("3")
    before = changed(page, place, before)
    shoot(page, "explore_search_again")
    words.fill(" ")
    words.press("Enter")
    place.get_by_text("type some words to look for").wait_for()
    words.fill("a tree")
    words.press("Enter")
    changed(page, place, [""])

    # another model, and another order
    place = cell(page, "widgets.examples(")
    place.scroll_into_view_if_needed()
    before = pictures(place)
    models = place.locator('.widget-dropdown:has(label:text-is("model")) select')
    models.select_option(RUNS[0])  # which may be the best, and change nothing
    place.get_by_text(re.compile(r"^\d+\.\d s")).wait_for()
    before = pictures(place)
    models.select_option(RUNS[1])
    before = changed(page, place, before)
    place.locator('.widget-dropdown:has(label:text-is("sort")) select').select_option("best")
    changed(page, place, before)
    cosines = [float(value) for value in place.locator("table tbody td:nth-child(3)").all_inner_texts()]
    assert len(cosines) == 8 and cosines == sorted(cosines, reverse=True)
    for _ in range(2):  # tables are sorted by clicks, at first from high to low
        place.locator("table th", has_text="cosine").click()
    clicked = [float(value) for value in place.locator("table tbody td:nth-child(3)").all_inner_texts()]
    assert clicked == sorted(cosines)
    shoot(page, "explore_examples")

    # the models of another fold
    before = pictures(place)
    place.locator('.widget-dropdown:has(label:text-is("fold")) select').select_option("1")
    changed(page, place, before)
    assert models.locator("option").all_inner_texts()[1:] == ["tiny_vit_stage1_fold1"]

    # an image of one's own
    place = cell(page, "widgets.own_image(")
    place.scroll_into_view_if_needed()
    before = pictures(place)
    own = folder / "own picture.png"
    Image.new("RGB", (90, 60), "red").save(own)
    with page.expect_file_chooser() as chooser:
        place.locator("button.widget-upload, .jupyter-widget-upload").click()
    chooser.value.set_files(own)
    before = changed(page, place, before)
    shoot(page, "explore_own_image")
    path = place.locator('.widget-text:has(label:text-is("path")) input')
    assert path.input_value().endswith("/own picture.png")
    path.fill("/nowhere/none.png")
    path.press("Enter")
    place.get_by_text(re.compile("none.png")).wait_for()

    assert page.locator(ERRORS).all_inner_texts() == []
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_report_opens_without_network_and_without_complaints(browser, folder, scheme):
    path = folder / "working" / "runs" / RUNS[0] / "report.html"
    context = browser.new_context(viewport=VIEWPORT, color_scheme=scheme, offline=True)
    page, said, asked = context.new_page(), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    score = json.loads((path.parent / "result.json").read_text())["cosine_similarity"]
    assert f"{score:.4f}" in page.inner_text("body")
    images = page.locator("img")
    assert images.count() >= 5
    for image in images.all():
        assert image.get_attribute("alt").strip()
        assert image.evaluate("image => image.complete && image.naturalWidth > 0")
    table = page.locator("table", has=page.locator("caption", has_text="By words"))
    before = table.locator("tbody tr").all_inner_texts()
    for descending in (True, False):  # of a click, and another
        table.locator("th", has_text="images").click()
        rows = table.locator("tbody tr").all_inner_texts()
        counts = [int(row.split("\t")[1].replace(",", "")) for row in rows]
        assert counts == sorted(counts, reverse=descending) and len(set(counts)) > 1
        assert sorted(rows) == sorted(before)
    page.screenshot(path=SCREENSHOTS / f"report_{scheme}.png", full_page=True)
    assert said == [] and [url for url in asked if not url.startswith(("file:", "data:"))] == []
    context.close()
