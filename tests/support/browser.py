"""A headless Chromium, as Debian packages it, over the server's pages."""

import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import TimeoutException, WebDriverException
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"


def missing() -> str:
    """What keeps this machine from having a browser, "" if nothing."""
    left = [path for path in (CHROMIUM, DRIVER) if shutil.which(path) is None]
    return f"{' and '.join(left)} not there: apt-get install chromium chromium-driver" if left else ""


class Browser:
    """Finding what a person would look for: by the text it shows."""

    def __init__(self, driver: webdriver.Chrome, address: str) -> None:
        self.driver, self.address = driver, address

    def open(self, path: str) -> None:
        self.driver.get(path if ":" in path else f"{self.address}{path}")

    def find(self, xpath: str, *, timeout_s: float = 60) -> WebElement:
        """The first visible element, once there is one."""

        def visible(driver: webdriver.Chrome) -> WebElement | None:
            return next((one for one in driver.find_elements(By.XPATH, xpath) if one.is_displayed()), None)

        try:
            return WebDriverWait(self.driver, timeout_s, ignored_exceptions=(WebDriverException,)).until(visible)
        except TimeoutException:
            raise AssertionError(f"not shown: {xpath}\n{self.what_is_shown()}") from None

    def click(self, xpath: str, *, timeout_s: float = 60) -> None:
        """Click what is found there; again where the page is drawn anew under the pointer."""

        def clicked(driver: webdriver.Chrome) -> bool:
            self.find(xpath, timeout_s=timeout_s).click()
            return True

        WebDriverWait(self.driver, timeout_s, ignored_exceptions=(WebDriverException,)).until(clicked)

    def what_is_shown(self) -> str:
        """The page's address and text, and the values of its fields."""
        fields = self.driver.find_elements(By.XPATH, "//textarea | //input")
        typed = [value for field in fields if (value := field.get_attribute("value"))]
        body = self.driver.find_element(By.TAG_NAME, "body").text
        return f"{self.driver.current_url}\n{body}\nfields: {typed}"

    def shoot(self, path: Path, *, height_px: int = 900) -> None:
        """Keep a picture of the page."""
        self.driver.set_window_size(1280, height_px)
        with Image.open(io.BytesIO(self.driver.get_screenshot_as_png())) as picture:
            picture.convert("RGB").quantize(128).save(path, optimize=True)


@contextmanager
def browser(address: str) -> Iterator[Browser]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--no-first-run"):
        options.add_argument(option)
    options.add_argument("--window-size=1280,900")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield Browser(driver, address)
    finally:
        driver.quit()
