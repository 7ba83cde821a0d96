"""Make the pictures of the READMEs anew, from what the demo left.

    make demo
    .venv/bin/pip install '.[integration]'
    .venv/bin/python docs/make_pictures.py demo-output

Needs Debian's packages chromium and chromium-driver, and for its type fonts-noto-core and fonts-wqy-microhei. Writes
`results.png`, the head of the demo's `search.html`, and `ui.png`, the page of `vipyloqwen ui` with a picture and a text
asked for, beside this file.
"""

from __future__ import annotations

import base64
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from sentence_vipyloqwen import VectorIndex, ViPyloQwen
from sentence_vipyloqwen.index.ui import create_app

DOCS = Path(__file__).parent
CHROMIUM, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
WIDTH = 1200  # pixels
SECTIONS_SHOWN = 3
CARDS_SHOWN = 8
TEXT = "hóa đơn của Đỗ Anh Khánh"
PICTURE = "data/images/invoice/eval-00000.png"
PATIENCE = 60  # seconds

ARE_SHOWN = """
const pictures = [...document.querySelectorAll(".card img")];
for (const picture of pictures) picture.loading = "eager";
const done = document.getAnimations().every((animation) => animation.playState === "finished");
return done && pictures.length > 0 && pictures.every((picture) => picture.complete && picture.naturalWidth > 0);
"""


@contextmanager
def browser(language: str = "en") -> Iterator[webdriver.Chrome]:
    """A Chromium without a window."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--hide-scrollbars", "--force-color-profile=srgb"):
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"intl.accept_languages": language})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


@contextmanager
def served(index: VectorIndex) -> Iterator[str]:
    """The search page of an index at a free port; its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(index), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.05)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()


def take(driver: webdriver.Chrome, path: Path, last: str) -> None:
    """Picture a page from its top to the end of the last element that a CSS selector finds."""
    bottom = driver.execute_script(
        "const all = document.querySelectorAll(arguments[0]);"
        "return all[all.length - 1].getBoundingClientRect().bottom + window.scrollY",
        last,
    )
    clip = {"x": 0, "y": 0, "width": WIDTH, "height": bottom + 16, "scale": 1}
    taken = driver.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
    path.write_bytes(base64.b64decode(taken["data"]))


def make_results(driver: webdriver.Chrome, demo: Path) -> None:
    """The head of the demo's page of results."""
    driver.set_window_size(WIDTH, 1000)
    driver.get((demo / "search.html").resolve().as_uri())
    take(driver, DOCS / "results.png", f"section:nth-of-type({SECTIONS_SHOWN})")


def make_ui(driver: webdriver.Chrome, demo: Path) -> None:
    """The search page, asked by a text and a picture."""
    index = VectorIndex.load(demo / "index", ViPyloQwen(str(demo / "training" / "model"), device="cpu"))
    with served(index) as address:
        driver.set_window_size(WIDTH, 1000)
        driver.get(address)
        driver.find_element(By.NAME, "text").send_keys(TEXT)
        driver.find_element(By.NAME, "image").send_keys(str((demo / PICTURE).resolve()))
        count = driver.find_element(By.NAME, "k")
        count.clear()
        count.send_keys(str(CARDS_SHOWN))
        driver.find_element(By.CSS_SELECTOR, "button[type=submit]").click()
        WebDriverWait(driver, PATIENCE).until(lambda page: page.execute_script(ARE_SHOWN))
        take(driver, DOCS / "ui.png", ".card")


if __name__ == "__main__":
    with browser() as chromium:
        make_results(chromium, Path(sys.argv[1]))
        make_ui(chromium, Path(sys.argv[1]))
