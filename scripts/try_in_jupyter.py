"""Opens a notebook in JupyterLab or Notebook 7 with a headless Chromium, runs it and uses `explore` as a reader would.

    python scripts/try_in_jupyter.py --app lab --theme dark --out build/jupyter

A copy of the notebook is run whole. Then: click a cell of the heatmap, walk with the arrow keys, type the notebook's
own shortcuts (they must not reach the notebook), type a caption with a word that the model never saw, make a mistake
(the last picture stays), patch cells together, look at one text alone and without an image, pick heads, step faster
than the kernel answers, save the picture, open the code. Screenshots are left in `--out`, to be looked at. It fails if
something does not answer or is cut off, if the browser's console has an error, or if the page asks for anything that
its own server does not have. `--times 10` does all of it ten times, each in a Jupyter of its own.

Needs Chromium with its driver, selenium, and a Jupyter that has ipywidgets and anywidget (`--jupyter` names it where it
is not the one of this Python; `--kernel` a kernel that has clip_lens, where that is not "python3").
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter, sleep
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

TUTORIAL = Path(__file__).parents[1] / "tutorials" / "1_first_look.ipynb"
ADDRESSES = {"lab": "lab/tree", "notebook": "notebooks"}
THEMES = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}
SHORTCUTS = ("b", "x", "a")  # a cell below, cut, a cell above
PATIENCE = 240  # seconds
WIDTHS = (1100, 840, 700, 560, 400)  # pixels, as notebooks are wide
SPINS = """
const [done, root] = [arguments[arguments.length - 1], document.querySelector(".clip-lens-explore")];
const seen = [], look = () => seen.push(getComputedStyle(root.querySelector(".cl-busy span")).visibility);
root.classList.add("waiting");
look();
setTimeout(look, 150);
setTimeout(() => { look(); root.classList.remove("waiting"); look(); done(seen); }, 1200);
"""
"""Whether the ring is seen at once, after 150 ms, after 1.2 s of waiting, and behind it."""
CUT = """
const outside = (node) => {
  const box = node.parentElement.closest(".cl-scroll, .clip-lens-explore").getBoundingClientRect();
  const held = node.closest(".cl-scroll") ? Infinity : box.right + 1;
  return node.scrollWidth > node.clientWidth + 1 && node.clientWidth > 0 || node.getBoundingClientRect().right > held;
};
const said = "th, td, p, h4, li, label, button, .cl-cell, .cl-name, .cl-chip, .cl-panels";
return [...document.querySelectorAll(`.clip-lens-explore :is(${said})`)].filter(outside)
  .map((node) => `${node.tagName}.${node.className}: ${node.textContent.slice(0, 60)}`);
"""
"""The words of the explorer that are cut off, or that stand out of it."""


def main() -> None:
    arguments = parse()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for number in range(arguments.times):
        once(arguments)
        print(f"run {number + 1} of {arguments.times}: well", flush=True)


def once(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        prepare(arguments, Path(folder))
        with server(arguments, Path(folder)) as address, browser(Path(folder)) as driver:
            page = Page(driver, arguments, Path(folder))
            page.open(f"{address}/{ADDRESSES[arguments.app]}/{arguments.notebook.name}")
            use(page)
            page.check(address)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--notebook", type=Path, default=TUTORIAL)
    parser.add_argument("--app", choices=ADDRESSES, default="lab")
    parser.add_argument("--theme", choices=THEMES, default="light")
    parser.add_argument("--out", type=Path, default=Path("build/jupyter"), help="where screenshots go")
    parser.add_argument("--jupyter", default="jupyter", help="the command")
    parser.add_argument("--kernel", default="python3")
    parser.add_argument("--times", type=int, default=1)
    return parser.parse_args()


def prepare(arguments: argparse.Namespace, folder: Path) -> None:
    """A copy of the notebook with the kernel, and Jupyter's settings with the theme."""
    notebook = json.loads(arguments.notebook.read_text(encoding="utf-8"))
    notebook["metadata"]["kernelspec"] = {"name": arguments.kernel, "display_name": arguments.kernel}
    (folder / arguments.notebook.name).write_text(json.dumps(notebook), encoding="utf-8")
    settings = folder / ".settings" / "@jupyterlab"
    for plugin, choice in {
        "apputils-extension/themes": {"theme": THEMES[arguments.theme]},
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    }.items():
        file = settings / f"{plugin}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(choice), encoding="utf-8")


@contextmanager
def server(arguments: argparse.Namespace, folder: Path) -> Iterator[str]:
    """The address of a Jupyter that serves the folder, without a password, on this machine only."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {
        "ServerApp.port": port,
        "ServerApp.ip": "127.0.0.1",
        "IdentityProvider.token": "",
        "ServerApp.root_dir": folder,
        "LabApp.user_settings_dir": folder / ".settings",
        "JupyterNotebookApp.user_settings_dir": folder / ".settings",
    }
    given = [f"--{name}={value}" for name, value in options.items()]
    command = [arguments.jupyter, arguments.app, "--no-browser", "--allow-root", *given]
    with (arguments.out / "server.log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            address = f"http://127.0.0.1:{port}"
            until(lambda: answers(address))
            yield address
        finally:
            process.terminate()


def answers(address: str) -> bool:
    try:
        return bool(urlopen(f"{address}/api").status == 200)
    except URLError:
        return False


def until(holds: Callable[[], Any]) -> None:
    start = perf_counter()
    while not holds():
        if perf_counter() - start > PATIENCE:
            raise TimeoutError(f"nothing happened in {PATIENCE} s")
        sleep(0.2)


@contextmanager
def browser(folder: Path) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.add_experimental_option("prefs", {"download.default_directory": str(folder)})
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for option in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1500"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """The notebook in the browser."""

    def __init__(self, driver: webdriver.Chrome, arguments: argparse.Namespace, folder: Path):
        self.driver, self.out, self.folder = driver, arguments.out, folder
        self.name = f"{arguments.app}-{arguments.theme}"

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def wait(self, holds: Callable[[], Any]) -> None:
        changing = [StaleElementReferenceException]  # the page draws itself anew while one looks
        WebDriverWait(self.driver, PATIENCE, 0.05, changing).until(lambda _: holds())

    def open(self, address: str) -> None:
        """Opens the notebook and runs all its cells, by the menu."""
        self.driver.get(address)
        self.wait(lambda: self.all(".jp-Notebook .jp-Cell"))
        sleep(3)  # the kernel connects
        self.driver.get_log("browser")  # what Jupyter itself has to complain of
        for entry in ("Run", "Run All Cells"):
            self.wait(lambda: self.choose(entry))  # noqa: B023
        self.wait(lambda: self.all(".clip-lens-explore .cl-grid"))

    def choose(self, entry: str) -> bool:
        """Clicks an entry of the menu, once it is there."""
        found = [item for item in self.all(".lm-MenuBar-itemLabel, .lm-Menu-itemLabel") if item.text == entry]
        for item in found[:1]:
            item.click()
        return bool(found)

    def act(self, what: str, action: Callable[[], Any]) -> None:
        """Does something and waits for the answer."""
        start = perf_counter()
        action()
        self.wait(lambda: not self.all(".cl-panels.busy"))
        print(f"{what}: {1000 * (perf_counter() - start):.0f} ms, the browser's part and the driver's included")

    def shoot(self, what: str, width: str = "") -> None:
        """A screenshot with the explorer on top, this wide ("" = as it is)."""
        self.driver.execute_script("arguments[0].style.width = arguments[1]", self.all(".clip-lens-explore")[0], width)
        self.driver.execute_script("arguments[0].scrollIntoView()", self.all(".clip-lens-explore")[0])
        sleep(0.5)
        self.driver.save_screenshot(str(self.out / f"{self.name}-{what}.png"))

    def spins(self, action: Any) -> None:
        """Fails unless a click has the page wait, with a ring that turns from 300 ms on and not before."""
        waiting = "document.querySelector('.clip-lens-explore').classList"
        assert self.driver.execute_script(f"arguments[0].click(); return {waiting}.contains('waiting')", action)
        self.wait(lambda: not self.all(".cl-panels.busy"))
        seen = self.driver.execute_async_script(SPINS)
        assert seen == ["hidden", "hidden", "visible", "hidden"], seen

    def uncut(self, width: str) -> None:
        """Fails where words are wider than what holds them, at a width of the explorer; a panel may be scrolled."""
        self.driver.execute_script("arguments[0].style.width = arguments[1]", self.all(".clip-lens-explore")[0], width)
        cut = self.driver.execute_script(CUT)
        assert not cut, f"cut off at {width}: {cut}"

    def saved(self) -> Path:
        """The picture that was saved last."""
        self.wait(lambda: list(self.folder.glob("explore*.png")))
        return max(self.folder.glob("explore*.png"))

    def cell(self, grid: str, row: int, column: int) -> Any:
        return self.all(f'[data-grid="{grid}"] tbody tr')[row].find_elements(By.CSS_SELECTOR, "button")[column]

    def field(self, label: str) -> Any:
        found = next(entry for entry in self.all(".cl-controls label") if entry.text.startswith(label))
        return found.find_element(By.CSS_SELECTOR, "input, select")

    def write(self, label: str, text: str) -> None:
        self.field(label).send_keys(Keys.CONTROL + "a")
        self.field(label).send_keys(text or Keys.BACKSPACE, Keys.ENTER)

    def press(self, key: str) -> str:
        """Presses a key where the focus is, and gives what is focused then."""
        ActionChains(self.driver).send_keys(key).perform()
        # In one step: what has the focus may be drawn anew between asking for it and asking what it sets.
        return str(self.driver.execute_script("return document.activeElement.dataset.set ?? ''"))

    def check(self, address: str) -> None:
        """Fails on errors in the console and on requests to elsewhere."""
        errors = [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = {
            entry["params"]["request"]["url"] for entry in messages if entry["method"] == "Network.requestWillBeSent"
        }
        elsewhere = [url for url in sent if not url.startswith((address, "data:", "blob:", "chrome"))]
        assert not errors and not elsewhere, (errors, elsewhere)
        print(f"no errors, nothing asked of others; look at {self.out}/{self.name}-*.png")


def use(page: Page) -> None:
    """What a reader does."""
    page.shoot("1-start")
    click_and_walk(page)
    type_texts(page)
    patch_together(page)
    look_at_one_text(page)
    pick_heads(page)
    save_and_measure(page)


def click_and_walk(page: Page) -> None:
    page.act("click a cell", lambda: page.cell("effects", 4, 2).click())
    pressed = page.cell("effects", 4, 2)
    assert pressed.get_attribute("aria-pressed") == "true"
    cells = len(page.all(".jp-Notebook .jp-Cell"))
    assert {page.press(key) for key in SHORTCUTS} == {pressed.get_attribute("data-set")}
    assert len(page.all(".jp-Notebook .jp-Cell")) == cells
    assert page.press(Keys.ARROW_RIGHT) == page.cell("effects", 4, 3).get_attribute("data-set")
    page.act("enter", lambda: page.press(Keys.ENTER))
    assert page.cell("effects", 4, 3).get_attribute("aria-pressed") == "true"
    page.shoot("2-cell")


def type_texts(page: Page) -> None:
    page.act("type a caption", lambda: page.write("Caption", "There is no dog."))
    page.act("type a foil", lambda: page.write("Foil", "There is a dog."))
    assert "never saw 'dog.'" in page.all(".cl-said")[0].text
    page.shoot("3-typed")
    page.act("the same text", lambda: page.write("Foil", "There is no dog."))
    assert "the same tokens" in page.all(".cl-said")[0].text
    assert page.all('[data-grid="effects"]'), "the last picture stays"
    page.shoot("4-mistake")
    page.act("no negation", lambda: page.write("Foil", "There is the dog."))
    page.act("no negation", lambda: page.write("Caption", "There is a dog."))
    assert "the foil is run" in page.all(".cl-said")[0].text


def patch_together(page: Page) -> None:
    def hold(cell: Any) -> None:
        ActionChains(page.driver).key_down(Keys.CONTROL).click(cell).key_up(Keys.CONTROL).perform()

    page.act("next pair", lambda: page.all(".cl-steps button")[1].click())
    page.act("a cell", lambda: hold(page.cell("effects", 3, 1)))
    page.act("another cell with it", lambda: hold(page.cell("effects", 4, 2)))
    assert len(page.all(".cl-chip")) == 2 and len(page.all(".cl-cell.joined")) == 2
    assert "Patched together" in page.all(".cl-together")[0].text
    page.shoot("5-together")
    page.act("leave one out", lambda: page.all(".cl-chip button")[0].click())
    assert len(page.all(".cl-chip")) == 1


def look_at_one_text(page: Page) -> None:
    page.act("empty the foil", lambda: page.write("Foil", ""))
    assert "one text alone" in page.all(".cl-said")[0].text and len(page.all('[data-grid="lens"] tbody tr')) == 1
    page.act("no image", lambda: page.write("Image", ""))
    assert "Cosine" in page.all(".cl-side")[0].text
    page.shoot("6-alone")


def pick_heads(page: Page) -> None:
    page.act("next pair", lambda: page.all(".cl-steps button")[1].click())
    page.act("heads", lambda: Select(page.field("Patch")).select_by_value("head"))
    page.act("zeros", lambda: Select(page.field("with")).select_by_value("zeros"))
    page.act("a head", lambda: page.cell("direct", 1, 2).click())
    page.act("one block by token", lambda: Select(page.field("Rows")).select_by_value("token"))
    assert len(page.all('[data-grid="effects"] thead th')) == len(page.all('[data-grid="heads caption"] button'))
    page.act("another head", lambda: page.all('[data-grid="heads caption"] button')[0].click())
    before = int(Select(page.field("Pair")).first_selected_option.get_attribute("value"))
    page.driver.execute_script("for (let n = 0; n < 5; n++) arguments[0].click()", page.all(".cl-steps button")[1])
    page.wait(lambda: not page.all(".cl-panels.busy"))
    assert int(Select(page.field("Pair")).first_selected_option.get_attribute("value")) == before + 5
    page.spins(page.all(".cl-steps button")[1])
    page.act("by head", lambda: Select(page.field("Rows")).select_by_value("head"))


def save_and_measure(page: Page) -> None:
    page.all(".clip-lens-explore summary")[0].click()
    assert 'encoder.sites("head")' in page.all(".cl-code")[0].text.replace("'", '"')
    page.shoot("7-heads")
    page.all(".cl-save")[0].click()
    shutil.copy(page.saved(), page.out / f"{page.name}-saved.png")
    for width in WIDTHS:
        page.uncut(f"{width}px")
    page.shoot("8-narrow", "400px")


if __name__ == "__main__":
    main()
