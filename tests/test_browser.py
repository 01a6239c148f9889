"""Each notebook as a user runs it: in JupyterLab, in a browser, restarted and run through.

A copy of the repository is opened with ``run_all.sh lab``; what a run writes stays in that copy.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.common.exceptions import TimeoutException, WebDriverException
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

REPOSITORY = Path(__file__).resolve().parents[1]
NEEDED = ("data", "expected", "invertune", "notebooks", "params", "tools", "run_all.sh")
NOTEBOOKS = sorted(path.stem for path in (REPOSITORY / "notebooks").glob("*.ipynb"))
TOKEN = secrets.token_hex(16)
LOAD_S, RUN_S = 120, 900  # on a busy machine, and from an empty store
PACE_S = 2
RAN = re.compile(r"\[\d+\]:")
INSTALL = (
    "no browser to drive: install chromium and chromium-driver "
    "(apt-get install chromium chromium-driver), or Google Chrome and chromedriver"
)

IDLE = '.jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook-ExecutionIndicator[data-status="idle"]'
RESTART = '[data-command="notebook:restart-run-all"]'
ACCEPT = ".jp-Dialog .jp-mod-accept"
PROMPTS = ".jp-CodeCell .jp-InputPrompt"
OUTPUT = ".jp-CodeCell .jp-OutputArea-output"
ERROR = f'{OUTPUT}[data-mime-type="application/vnd.jupyter.error"]'
DRAWN = f"return [...document.querySelectorAll('{OUTPUT} img')].map(image => image.naturalWidth)"


@dataclass(frozen=True)
class Lab:
    """A running JupyterLab and a browser to look at it."""

    url: str
    browser: webdriver.Chrome

    def texts(self, selector: str) -> list[str]:
        """The texts of all elements that match."""
        found = self.browser.find_elements(By.CSS_SELECTOR, selector)
        return [element.get_attribute("textContent") or "" for element in found]

    def click(self, selector: str) -> None:
        """Clicks an element once it is there and can be clicked."""
        wait = WebDriverWait(self.browser, LOAD_S, ignored_exceptions=[WebDriverException])
        wait.until(lambda b: b.find_element(By.CSS_SELECTOR, selector).click() or True)

    def wait(self, selector: str) -> None:
        """Waits for an element."""
        WebDriverWait(self.browser, LOAD_S).until(lambda _: self.texts(selector))

    def run_through(self, name: str) -> None:
        """Opens a notebook, restarts it and runs all cells, until the last one or an error."""
        page = f"{self.url}/lab/tree/notebooks/{name}.ipynb?token={TOKEN}&reset"
        assert any(self.begin(page) for _ in range(3)), "no cell was run"
        WebDriverWait(self.browser, RUN_S).until(lambda _: self.texts(ERROR) or self.finished())
        self.wait(IDLE)

    def begin(self, page: str) -> bool:
        """Whether the first cell, which only sets names, was run after a restart.

        Lab loses a restart that comes while it still connects: hence a person's pace, and retries.
        """
        self.browser.get(page)
        self.wait(IDLE)
        time.sleep(PACE_S)
        self.click(RESTART)
        self.click(ACCEPT)
        wait = WebDriverWait(self.browser, LOAD_S / 2)
        try:
            return wait.until(lambda _: any(map(RAN.fullmatch, self.texts(PROMPTS))))
        except TimeoutException:
            return False

    def finished(self) -> bool:
        """Whether every code cell has a number: none has one in a committed notebook."""
        return all(map(RAN.fullmatch, self.texts(PROMPTS)))


def start_browser() -> webdriver.Chrome:
    """A headless Chromium or Chrome; where neither is in PATH, Selenium looks for an installed one.

    Raises ``WebDriverException`` when none starts.
    """
    os.environ |= {"SE_AVOID_BROWSER_DOWNLOAD": "true", "SE_AVOID_STATS": "true"}
    driver = shutil.which("chromedriver")
    found = [path for name in ("chromium", "google-chrome") if (path := shutil.which(name))]
    for path in found or [""]:
        options = webdriver.ChromeOptions()
        options.binary_location = path
        for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage"):
            options.add_argument(f"--{argument}")
        options.add_argument("--window-size=1400,1000")
        try:
            return webdriver.Chrome(options, webdriver.ChromeService(driver))
        except WebDriverException as error:
            failure = error
    raise failure


def start_lab(root: Path, port: int, store: Path) -> subprocess.Popen[bytes]:
    """JupyterLab on the copy in ``root``, with no settings of the user who runs the test."""
    folders = ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")
    own = {name: str(root / "home" / name) for name in folders}
    own |= {"INVERTUNE_VENV": sys.prefix, "INVERTUNE_STORE": str(store)}
    kept = {k: v for k, v in os.environ.items() if k not in ("INVERTUNE_PROGRESS", "PYTHONPATH")}
    options = ("--no-browser", "--allow-root", "--ServerApp.port_retries=0")
    command = [
        "./run_all.sh",
        "lab",
        *options,
        f"--port={port}",
        f"--IdentityProvider.token={TOKEN}",
    ]
    with (root / "lab.txt").open("wb") as log:
        return subprocess.Popen(command, cwd=root, env=kept | own, stdout=log, stderr=log)


def wait_for_lab(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + LOAD_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            ask(f"{url}/api/status")
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()}")


def ask(url: str, method: str = "GET") -> bytes:
    """The server's answer."""
    request = urllib.request.Request(
        url, headers={"Authorization": f"token {TOKEN}"}, method=method
    )
    with urllib.request.urlopen(request, timeout=LOAD_S) as answer:
        return answer.read()


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    try:
        started = start_browser()
    except WebDriverException as error:
        if os.environ.get("CI") == "true":
            raise RuntimeError(INSTALL) from error
        pytest.skip(INSTALL)
    yield started
    started.quit()


@pytest.fixture(scope="module")
def lab(browser: webdriver.Chrome, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    root = tmp_path_factory.mktemp("lab")
    for name in NEEDED:
        copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy2
        copy(REPOSITORY / name, root / name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = Path(os.environ.get("INVERTUNE_STORE") or root / "store")
    server = start_lab(root, port, store)
    try:
        wait_for_lab(server, f"http://127.0.0.1:{port}", root / "lab.txt")
        yield Lab(f"http://127.0.0.1:{port}", browser)
    finally:
        server.terminate()
        server.wait()


@pytest.mark.after_notebooks  # then the store holds every step
@pytest.mark.timeout(RUN_S + 4 * LOAD_S)
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_restarts_and_runs_through(lab: Lab, name: str, tmp_path: Path) -> None:
    cells = json.loads((REPOSITORY / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    drawing = [c for c in cells if "figures.save" in "".join(c["source"])]
    try:
        lab.run_through(name)
        assert lab.texts(ERROR) == [] and lab.finished()
        assert not [text for text in lab.texts(OUTPUT) if "Warning" in text]
        widths = lab.browser.execute_script(DRAWN)
        assert len(widths) >= len(drawing) > 0 and min(widths) > 0
        assert lab.texts(f"{OUTPUT} table")
    except BaseException:
        lab.browser.save_screenshot(str(tmp_path / f"{name}.png"))
        raise
    finally:
        for kernel in json.loads(ask(f"{lab.url}/api/kernels")):
            ask(f"{lab.url}/api/kernels/{kernel['id']}", "DELETE")
