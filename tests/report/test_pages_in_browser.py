"""Reports in a real browser: nothing is fetched, no error, tables sort, layers are chosen, by keyboard, in dark, on a phone."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import FinishedRun

from lowprec.report.html.sweep_page import write_sweep_report
from lowprec.report.sweep import TrialRecord

DRIVER = shutil.which("chromedriver")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.select import Select  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

pytestmark = pytest.mark.skipif(not (DRIVER and BROWSER), reason="no chromium and chromium-driver (Debian's packages)")


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1400,1000",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture
def show(browser: webdriver.Chrome) -> Callable[..., None]:
    def open_page(path: Path, width: int = 1400, scheme: str = "light") -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        # So high that all plots are in the window, and so are drawn.
        size = {"width": width, "height": 12000, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(path.as_uri())
        plots = browser.find_elements(By.CSS_SELECTOR, "[data-chart]")
        assert plots
        WebDriverWait(browser, 60).until(lambda _: all(plot.get_attribute("data-drawn") for plot in plots))

    return open_page


def complaints(browser: webdriver.Chrome) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] != "DEBUG"]


def column(browser: webdriver.Chrome, name: str) -> list[str]:
    """What the cells of the layers' table are sorted by, from top to bottom."""
    script = """
        const table = document.getElementById("layer-table");
        const heads = [...table.tHead.rows[0].cells];
        const index = heads.findIndex((head) => head.textContent.trim() === arguments[0]);
        return [...table.tBodies[0].rows].map((row) => row.cells[index].dataset.value ?? row.cells[index].textContent);
    """
    values: list[str] = browser.execute_script(script, name)
    return values


def bars(browser: webdriver.Chrome, chart: str) -> str:
    return browser.find_element(By.CSS_SELECTOR, f"#chart-{chart} svg").get_attribute("innerHTML") or ""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 390])
def test_it_fits_and_nothing_is_complained_of_or_fetched(
    width: int, scheme: str, browser: webdriver.Chrome, show: Callable[..., None], digits_run: FinishedRun
) -> None:
    browser.get_log("performance")
    show(digits_run.directory / "report.html", width, scheme)
    assert complaints(browser) == []
    requested = [
        entry["message"]
        for entry in browser.get_log("performance")
        if '"Network.requestWillBeSent"' in entry["message"]
    ]
    assert not [message for message in requested if '"url":"http' in message]
    assert browser.execute_script("return document.documentElement.scrollWidth") == width
    # Every plot has something in it.
    for plot in browser.find_elements(By.CSS_SELECTOR, "[data-chart]:not([hidden]) svg"):
        assert plot.size["height"] > 60
    text, page = (
        browser.execute_script(f"return getComputedStyle(document.body).{name}")
        for name in ("color", "backgroundColor")
    )
    assert (sum(map(int, text[4:-1].split(", "))) > sum(map(int, page[4:-1].split(", ")))) == (scheme == "dark")


def test_the_table_sorts_by_mouse_and_by_keyboard(
    browser: webdriver.Chrome, show: Callable[..., None], digits_run: FinishedRun
) -> None:
    show(digits_run.directory / "report.html")
    heads = browser.find_elements(By.CSS_SELECTOR, "#layer-table th[aria-sort]")
    macs = next(head for head in heads if head.text.strip().startswith("MACs"))
    button = macs.find_element(By.TAG_NAME, "button")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', inline: 'center'})", button)
    button.click()
    values = [int(value) for value in column(browser, "MACs")]
    assert values == sorted(values, reverse=True)
    assert values[0] > values[-1]
    assert macs.get_attribute("aria-sort") == "descending"
    button.send_keys(Keys.ENTER)
    assert [int(value) for value in column(browser, "MACs")] == values[::-1]
    assert macs.get_attribute("aria-sort") == "ascending"
    assert [head.get_attribute("aria-sort") for head in heads].count("none") == len(heads) - 1
    # What was not measured comes last, either way.
    rounding = next(head for head in heads if head.text.strip().startswith("rounding dB"))
    for _ in range(2):
        rounding.find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
        assert column(browser, "rounding dB")[-1] == ""


def test_a_layer_is_chosen_in_all_its_plots(
    browser: webdriver.Chrome, show: Callable[..., None], digits_run: FinishedRun
) -> None:
    show(digits_run.directory / "report.html")
    before = {name: bars(browser, name) for name in ("weights", "scales", "flips", "sparsity")}
    Select(browser.find_element(By.ID, "layer")).select_by_visible_text("stage3.0.conv2")
    drawn = [browser.find_element(By.ID, f"chart-{name}") for name in before]
    WebDriverWait(browser, 30).until(
        lambda _: all(plot.get_attribute("data-drawn") == "stage3.0.conv2" for plot in drawn)
    )
    assert {name: bars(browser, name) != content for name, content in before.items()} == {
        **dict.fromkeys(before, True),
        # Both layers may have changed no code at all.
        "flips": bars(browser, "flips") != before["flips"],
    }
    assert browser.find_element(By.ID, "caption-weights").text.startswith("stage3.0.conv2: ternary")
    assert Select(browser.find_element(By.ID, "layer-of-curves")).first_selected_option.text == "stage3.0.conv2"
    # An 8-bit layer has no clusters to draw; from the table, its name leads to its weights.
    button = browser.find_element(By.CSS_SELECTOR, "#layer-table button[data-layer='conv1']")
    button.send_keys(Keys.ENTER)
    WebDriverWait(browser, 30).until(lambda _: browser.find_element(By.ID, "chart-scales").get_attribute("hidden"))
    assert "no clusters" in browser.find_element(By.ID, "caption-scales").text
    assert browser.switch_to.active_element.get_attribute("id") == "layer"
    assert complaints(browser) == []


def test_a_tensor_is_chosen(browser: webdriver.Chrome, show: Callable[..., None], digits_run: FinishedRun) -> None:
    show(digits_run.directory / "report.html")
    before = bars(browser, "activations")
    Select(browser.find_element(By.ID, "tensor")).select_by_visible_text("stage2.0.add")
    WebDriverWait(browser, 30).until(
        lambda _: browser.find_element(By.ID, "chart-activations").get_attribute("data-drawn") == "stage2.0.add"
    )
    assert bars(browser, "activations") != before
    assert browser.find_element(By.ID, "caption-activations").text.startswith("stage2.0.add: exponent")


def test_the_first_key_leads_past_the_links(
    browser: webdriver.Chrome, show: Callable[..., None], digits_run: FinishedRun
) -> None:
    show(digits_run.directory / "report.html")
    browser.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    skip = browser.switch_to.active_element
    assert skip.text == "Skip to the report"
    skip.send_keys(Keys.ENTER)
    assert browser.switch_to.active_element.get_attribute("id") == "main"


@pytest.mark.parametrize("width", [1400, 390])
def test_the_page_of_a_sweep(width: int, browser: webdriver.Chrome, show: Callable[..., None], tmp_path: Path) -> None:
    records = [
        TrialRecord(
            number,
            f"runs/{number}",
            {"n": str(4**number)},
            "finished",
            multiplications_replaced=0.6 + number / 10,
            fine_tuned=top1,
        )
        for number, top1 in enumerate([0.9, 0.93, 0.88])
    ]
    write_sweep_report(records, "sweep", tmp_path / "report.html")
    show(tmp_path / "report.html", width)
    assert complaints(browser) == []
    assert browser.execute_script("return document.documentElement.scrollWidth") == width
    assert len(browser.find_elements(By.CSS_SELECTOR, "#chart-pareto .mark-symbol path")) >= 3
