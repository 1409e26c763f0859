"""The page of a service, used in headless Chromium as a person would use it."""

import contextlib
import shutil
import time

import pytest
import serving_of_adapters as eight

import visionpeft as vp
from visionpeft.backbones.preprocessing import preprocessing_of
from visionpeft.serving.service import Service, Settings

webdriver = pytest.importorskip("selenium.webdriver", reason="Selenium is not installed")
StaleElementReferenceException = pytest.importorskip("selenium.common.exceptions").StaleElementReferenceException
BROWSER, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="there is no Chromium with its chromedriver on this machine"),
]


@pytest.fixture
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for option in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=800,900",
    ):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield browser
    browser.quit()


@pytest.fixture
def address(tmp_path):
    """A service of two adapters and a learner, in a thread."""
    model = eight.backbone(classes=3)
    vp.attach(model, vp.LoRA(rank=2))
    vp.save(model, tmp_path / "served" / "colours", class_names=["red", "green", "<b>blue</b>"])
    clip, tokenizer = vp.create_clip("nano_clip")
    learner = vp.ZeroShot(clip, tokenizer, ["a cat", "a dog"])
    vp.save_learner(learner, tmp_path / "served" / "words", preprocessing=preprocessing_of(clip))
    service = Service([tmp_path / "served"], Settings(max_batch=2))
    with eight.in_thread(service) as address:
        yield address


def until(seen, seconds=30):
    """What `seen` gives, as soon as it is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(StaleElementReferenceException):  # the page was changed between two looks
            if found := seen():
                return found
        time.sleep(0.05)
    raise AssertionError("it has not come")


def test_drop_an_image_choose_an_adapter_and_see_its_classes(browser, address, tmp_path):
    (tmp_path / "image.png").write_bytes(eight.draw_files(1)[0])
    (tmp_path / "no image.png").write_bytes(b"nothing")
    browser.get(address)

    def at(selector):
        return browser.find_elements("css selector", selector)

    def names():
        return sorted(each.text for each in at("#classes li span:first-child"))

    until(lambda: [each.text for each in at("#adapter option")] == ["words", "colours"])
    until(lambda: at("#own")[0].is_displayed())  # a learner takes class names
    at("#file")[0].send_keys(str(tmp_path / "image.png"))
    until(lambda: names() == ["a cat", "a dog"])
    browser.execute_script(
        "const names = document.getElementById('names'); names.value = 'oak\\nelm\\n\\npine'; names.onchange()"
    )
    until(lambda: names() == ["elm", "oak", "pine"])
    at("#adapter option")[1].click()
    until(lambda: names() == ["<b>blue</b>", "green", "red"])  # as text, whatever it says
    assert not at("#own")[0].is_displayed()
    shares = [float(each.text.removesuffix(" %")) for each in at("#classes li span:last-child")]
    widths = [each.size["width"] for each in at(".bar div")]
    full = at(".bar")[0].size["width"]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.2)
    assert widths == pytest.approx([share / 100 * full for share in shares], abs=1)
    assert browser.save_screenshot(str(tmp_path / "page.png"))
    at("#file")[0].send_keys(str(tmp_path / "no image.png"))
    until(lambda: "wrong" in at("#said")[0].get_attribute("class"))
    assert "cannot be decoded" in at("#said")[0].text
    assert at("#classes li") == []
    # the one complaint is about the image that is none
    complaints = [entry["message"] for entry in browser.get_log("browser")]
    assert all(("/predict" in each and "422" in each) or "blob:" in each for each in complaints), complaints
    # what is dropped is taken, too
    browser.execute_script(
        """const data = new DataTransfer(); data.items.add(new File(["x"], "dropped.png"));
        document.getElementById("drop").dispatchEvent(new DragEvent("drop", {dataTransfer: data, cancelable: true}))"""
    )
    until(lambda: "dropped.png" in at("#drop")[0].get_attribute("innerHTML"))
