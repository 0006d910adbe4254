"""Opens a notebook in JupyterLab or Notebook 7 with a headless Chromium, runs it and uses `explore` as a reader would.

    python scripts/try_in_jupyter.py --app lab --theme dark --out build/jupyter

A copy of the notebook is run whole. Then: click a cell of the heatmap, walk with the arrow keys, type the notebook's
own shortcuts (they must not reach the notebook), type a caption with a word that the model never saw, leave the foil
empty, pick heads, open the code. Screenshots are left in `--out`, to be looked at. It fails if something does not
answer, if the browser's console has an error, or if the page asks for anything that its own server does not have.

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


def main() -> None:
    arguments = parse()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        prepare(arguments, Path(folder))
        with server(arguments, Path(folder)) as address, browser() as driver:
            page = Page(driver, arguments)
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
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
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

    def __init__(self, driver: webdriver.Chrome, arguments: argparse.Namespace):
        self.driver, self.out = driver, arguments.out
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
        return self.driver.switch_to.active_element.get_attribute("data-set") or ""

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
    page.act("type a caption", lambda: page.write("Caption", "There is no dog."))
    page.act("type a foil", lambda: page.write("Foil", "There is a dog."))
    assert "never saw 'dog.'" in page.all(".cl-said")[0].text
    page.shoot("3-typed")
    page.act("empty the foil", lambda: page.write("Foil", ""))
    assert page.all(".cl-said")[0].text == "the foil is empty; write a text"
    page.shoot("4-empty")
    page.act("next pair", lambda: page.all(".cl-steps button")[1].click())
    page.act("heads", lambda: Select(page.field("Patch")).select_by_value("head"))
    page.act("zeros", lambda: Select(page.field("with")).select_by_value("zeros"))
    page.act("a head", lambda: page.cell("direct", 1, 2).click())
    page.all(".clip-lens-explore summary")[0].click()
    assert 'encoder.sites("head")' in page.all(".cl-code")[0].text.replace("'", '"')
    page.shoot("5-heads")
    page.shoot("6-narrow", "400px")


if __name__ == "__main__":
    main()
