"""The search page in a real browser: Debian's chromium and chromium-driver, without a window.

Run by ``make test-integration``.
"""

from __future__ import annotations

import base64
import io
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from sentence_vipyloqwen import VectorIndex, ViPyloQwen
from sentence_vipyloqwen.index.ui import create_app

CHROMIUM, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
PATIENCE = 30  # seconds
ARGUMENTS = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900")

GIVE_FILES = """
const [kind, name, content] = arguments;
const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
const transfer = new DataTransfer();
transfer.items.add(new File([bytes], name, { type: "image/png" }));
const options = { bubbles: true, cancelable: true };
const event = kind === "paste"
  ? new ClipboardEvent("paste", { ...options, clipboardData: transfer })
  : new DragEvent(kind, { ...options, dataTransfer: transfer });
document.getElementById("text").dispatchEvent(event);
"""


def png(seed: int, size: tuple[int, int] = (84, 56)) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 20 + 40 * seed).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


PICTURES = [png(0), png(3)]


@pytest.fixture(scope="module")
def address(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page of a small index, served by this process."""
    place = tmp_path_factory.mktemp("ui")
    for number, picture in enumerate(PICTURES):
        (place / f"{number}.png").write_bytes(picture)
    items = [
        {"id": "bill", "text": "hóa đơn tiền điện", "metadata": {"lang": "vi", "year": 2024}},
        {"id": "note", "text": "Hà Nội là thủ đô", "metadata": {"lang": "vi", "year": 2025}},
        {"id": "first", "image": str(place / "0.png"), "metadata": {"lang": "en"}},
        {"id": "second", "image": str(place / "1.png"), "text": "ảnh thứ hai", "metadata": {"lang": "vi"}},
    ]
    index = VectorIndex.build(ViPyloQwen(folder, device="cpu"), items, place / "index")
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(index), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def chromium() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ARGUMENTS:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.execute_cdp_cmd("Network.enable", {})
    driver.execute_cdp_cmd("Network.setExtraHTTPHeaders", {"headers": {"Accept-Language": "vi"}})
    yield driver
    driver.quit()


@pytest.fixture
def page(chromium: webdriver.Chrome, address: str) -> Iterator[Page]:
    chromium.get(address)
    yield Page(chromium)
    assert [entry["message"] for entry in chromium.get_log("browser")] == []


class Page:
    """The page as its user sees it."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def type(self, name: str, text: str) -> None:
        field = self.find(f"[name={name}]")
        field.clear()
        field.send_keys(text)

    def give(self, kind: str, picture: bytes) -> None:
        """Drop or paste a picture."""
        self.driver.execute_script(GIVE_FILES, kind, "picture.png", base64.b64encode(picture).decode())

    def ids(self) -> list[str]:
        return self.driver.execute_script("return [...document.querySelectorAll('.card')].map((c) => c.dataset.id)")

    def wait(self, condition) -> None:
        WebDriverWait(self.driver, PATIENCE).until(lambda _: condition())

    def wait_for(self, *ids: str) -> None:
        """Wait until these results come first."""
        self.wait(lambda: self.ids()[: len(ids)] == list(ids))


def test_vietnamese_is_typed_and_found(page: Page) -> None:
    assert "Hỏi bằng chữ" in page.find("main").text
    page.type("text", "hóa đơn tiền điện" + Keys.ENTER)
    page.wait_for("bill")
    assert len(page.ids()) == 4
    assert page.find(".card .figure").text == "1.000"
    assert "4 kết quả" in page.find(".summary").text
    page.driver.refresh()  # the address asks again
    page.wait_for("bill")
    assert page.find("#text").get_property("value") == "hóa đơn tiền điện"


def test_a_word_that_is_being_composed_is_not_sent(page: Page) -> None:
    page.type("text", "hoa")
    page.driver.execute_script(
        "text.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true}))"
    )
    time.sleep(0.5)
    assert page.ids() == []


@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_an_image_is_given_and_found_then_removed(page: Page, kind: str) -> None:
    page.give(kind, PICTURES[0])
    page.wait_for("first")
    assert page.find(".card .figure").text == "1.000"
    page.wait(lambda: page.find(".chip.image img").get_property("naturalWidth") == 84)
    page.type("text", "ảnh thứ hai")
    page.give(kind, PICTURES[1])
    page.wait(lambda: len(page.all(".chip.image")) == 2)
    page.find(".chip.image button").click()
    page.wait_for("second")
    assert page.find(".card .figure").text == "1.000"


def test_results_are_filtered(page: Page) -> None:
    page.type("where", "lang = 'vi' AND year = 2025")
    page.type("text", "hóa đơn" + Keys.ENTER)
    page.wait(lambda: page.ids() == ["note"])
    page.type("where", "lang = ")
    page.find("button[type=submit]").click()
    page.wait(lambda: page.all("[role=alert]"))
    assert "where is" in page.find("[role=alert]").text
    assert "400" in page.driver.get_log("browser")[0]["message"]  # Chromium tells of it; nothing else may come


def test_a_fact_narrows_down_and_a_result_leads_on(page: Page) -> None:
    page.type("text", "hóa đơn tiền điện" + Keys.ENTER)
    page.wait_for("bill")
    page.find(".card [data-where='year = 2024']").click()
    page.wait(lambda: page.ids() == ["bill"])
    page.type("where", "")
    page.find(".card [data-like=bill]").click()
    page.wait(lambda: len(page.ids()) == 4)
    assert page.find("#like-chip").is_displayed()
    assert page.find("#text").get_property("value") == ""
    assert page.ids()[0] == "bill"


def test_a_picture_is_enlarged_by_keys(page: Page) -> None:
    page.give("drop", PICTURES[0])
    page.wait_for("first")
    page.find(".card [data-large]").send_keys(Keys.ENTER)
    page.wait(lambda: page.find("dialog img").get_property("naturalWidth") == 84)
    assert page.find("dialog p").text == "first"
    page.find("dialog").send_keys(Keys.ARROW_RIGHT)
    page.wait(lambda: page.find("dialog p").text == "second")
    page.find("dialog").send_keys(Keys.ESCAPE)
    page.wait(lambda: not page.find("dialog").is_displayed())


def test_light_and_dark(page: Page) -> None:
    def background() -> str:
        return page.driver.execute_script("return getComputedStyle(document.body).backgroundColor")

    before = background()
    page.find("#theme").click()
    assert background() != before
    page.driver.refresh()
    assert background() != before
    page.find("#theme").click()


def test_the_page_works_without_scripts(chromium: webdriver.Chrome, address: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PICTURES[0])
    chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        chromium.get(address)
        chromium.find_element(By.NAME, "image").send_keys(str(tmp_path / "a.png"))
        chromium.find_element(By.CSS_SELECTOR, "button[type=submit]").click()
        WebDriverWait(chromium, PATIENCE).until(lambda driver: driver.find_elements(By.CSS_SELECTOR, ".card"))
        assert chromium.find_element(By.CSS_SELECTOR, ".card").get_attribute("data-id") == "first"
    finally:
        chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
