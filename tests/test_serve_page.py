"""The page of `cembed serve` in a browser: Chromium without a window, driven as a person would."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from serving import Server, sample_pages

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
SHOTS = os.environ.get("CEMBED_SHOTS")
QUERY = "pension seminar with emma foster"
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="chromium or chromedriver is not installed")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("page")
    with Server(folder / "log", index=folder / "shelf") as started:
        yield started


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,900", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Page:
    """What a person sees and does."""

    def __init__(self, driver: Any, server: Server) -> None:
        self.driver = driver
        driver.set_window_size(1280, 900)
        driver.get_log("browser")
        driver.get(server.url)

    def find(self, css: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def all(self, css: str) -> list[Any]:
        return list(self.driver.find_elements(By.CSS_SELECTOR, css))

    def wait(self, until: Callable[[], Any], seconds: float = 20) -> Any:
        return WebDriverWait(self.driver, seconds).until(lambda _: until())

    def search(self, text: str) -> None:
        box = self.find("#query")
        box.clear()
        box.send_keys(text, Keys.ENTER)
        self.wait(lambda: "best first" in self.find("#status").text)

    def names(self) -> list[str]:
        return [card.text for card in self.all("#results .name")]

    def shot(self, name: str) -> None:
        if SHOTS:
            self.driver.save_screenshot(str(Path(SHOTS) / f"{name}.png"))

    def close(self) -> None:
        """Nothing may have been refused by the browser, or have failed in the script."""
        complaints = [entry for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]
        assert complaints == []


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Page]:
    opened = Page(browser, server)
    yield opened
    opened.close()


def add(page: Page, *files: Path) -> None:
    page.find("#add").send_keys("\n".join(map(str, files)))


def test_first_there_is_nothing_then_pages_are_added(page: Page) -> None:
    page.wait(lambda: page.find("#empty").is_displayed())
    assert "Add pages" in page.find("#empty").text
    page.shot("empty")
    add(page, *sample_pages(12))
    page.wait(lambda: page.find("#count").text == "12 pages")
    page.shot("added")
    assert not page.find("#empty").is_displayed()


def test_a_search_shows_pictures_the_best_first(page: Page) -> None:
    page.search(QUERY)
    assert page.names()[0] == "00006.jpg"
    page.wait(lambda: all(picture.get_property("naturalWidth") for picture in page.all("#results img")))
    assert len(page.all("#results img")) == 12
    assert "q=pension" in page.driver.current_url
    page.shot("search")


def test_a_page_is_shown_with_where_it_matched(page: Page) -> None:
    page.search(QUERY)
    page.find("#results button").click()
    page.wait(lambda: "matched most" in page.find("#page-status").text)
    assert page.find("#picture").get_property("naturalWidth") > 200
    assert page.find("#map").get_property("width") > 1
    box, picture = page.find("#box").rect, page.find("#picture").rect
    assert box["y"] + box["height"] / 2 < picture["y"] + picture["height"] / 2  # its title is in the upper half
    page.shot("match")
    page.find("#heat-label").click()
    page.wait(lambda: not page.find("#box").is_displayed())
    page.find("#after").click()
    page.wait(lambda: page.find("#page-title").text != "00006.jpg, page 1")
    page.find("#close").click()
    assert not page.find("#page").is_displayed()


def test_by_keyboard_alone(page: Page) -> None:
    page.search(QUERY)
    keys = webdriver.ActionChains(page.driver)
    for _ in range(6):
        keys.send_keys(Keys.TAB).perform()
        if page.driver.switch_to.active_element.find_elements(By.CSS_SELECTOR, ".thumb"):
            break
    keys.send_keys(Keys.ENTER).perform()
    page.wait(lambda: page.find("#page").is_displayed())
    first = page.find("#page-title").text
    keys.send_keys(Keys.ARROW_RIGHT).perform()
    page.wait(lambda: page.find("#page-title").text != first)
    keys.send_keys(Keys.ESCAPE).perform()
    page.wait(lambda: not page.find("#page").is_displayed())
    assert page.driver.switch_to.active_element.find_elements(By.CSS_SELECTOR, ".thumb")  # back where one was


def test_pages_like_a_picture(page: Page) -> None:
    page.wait(lambda: page.find("#count").text)
    page.find("#like").send_keys(str(sample_pages(3)[2]))
    page.wait(lambda: page.names())
    assert page.names()[0] == sample_pages(3)[2].name


def test_what_cannot_be_read_is_told(page: Page, tmp_path: Path) -> None:
    page.wait(lambda: page.find("#count").text)
    broken = tmp_path / "broken.pdf"
    broken.write_bytes(b"%PDF-1.7 nothing")
    page.find("#add").send_keys(str(broken))
    page.wait(lambda: "0 pages added" in page.find("#adding").text)
    assert "broken.pdf" in page.find("#adding").text
    page.shot("error")
    page.driver.get_log("browser")  # the browser says that 422 was answered


@pytest.mark.parametrize(("name", "width", "height"), [("phone", 500, 800), ("kiosk", 1080, 1920)])
def test_sizes(page: Page, name: str, width: int, height: int) -> None:
    """Nothing is wider than the window, and all that is touched is at least 44 pixels high."""
    page.driver.set_window_size(width, height)
    page.search(QUERY)
    page.wait(lambda: all(picture.get_property("naturalWidth") for picture in page.all("#results img")))
    page.shot(name)
    assert page.driver.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    heights = [button.rect["height"] for button in page.all("button, label.button") if button.is_displayed()]
    assert min(heights) >= 44
    page.driver.execute_script("document.documentElement.style.fontSize = '200%'")
    assert page.driver.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    page.shot(f"{name}-200")
    page.find("#results button").click()
    page.wait(lambda: page.find("#picture").get_property("naturalWidth"))
    page.shot(f"{name}-page")


def test_everything_has_a_name_for_a_screen_reader(page: Page) -> None:
    page.search(QUERY)
    for control in page.all("button, input, a"):
        if control.is_displayed():
            assert control.accessible_name, control.get_attribute("outerHTML")
    assert page.find("#status").get_attribute("aria-live") == "polite"
    assert page.find("html").get_attribute("lang") == "en"


def test_a_token_is_asked_for_once(browser: Any, tmp_path: Path) -> None:
    with Server(tmp_path / "log", index=tmp_path / "shelf", token="a-token-of-tests") as server:
        page = Page(browser, server)
        page.wait(lambda: page.find("#login").is_displayed())
        page.shot("login")
        page.find("#token").send_keys("a-token-of-tests", Keys.ENTER)
        page.wait(lambda: page.find("#empty").is_displayed())
        add(page, *sample_pages(1))
        page.wait(lambda: page.find("#count").text == "1 page")


def test_dark(page: Page) -> None:
    page.driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    page.search(QUERY)
    page.wait(lambda: all(picture.get_property("naturalWidth") for picture in page.all("#results img")))
    colour = page.driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, colour[4:-1].split(","))) < 150
    page.shot("dark")
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
