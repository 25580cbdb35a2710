"""The page in a real Chromium: try, correct, watch; by keyboard, in the dark, on a phone, behind a token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from edge_site import EdgeProcess, Site, StandInHub
from waiting import wait_for

pytestmark = pytest.mark.browser

ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
TEXT = "The film was good, the bad reviews notwithstanding: a good story."


@pytest.fixture
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def edge(make_edge: Callable[..., EdgeProcess], site: Site, hub: StandInHub) -> EdgeProcess:
    digest = site.publish("v1")
    edge = make_edge(name="lakeside")
    wait_for(lambda: edge.serving() == digest, what="v1")
    return edge


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Return a function that opens a page; anything that the browser complains of fails the test."""
    complaints: list[str] = []
    contexts = []

    def open_page(url: str, *, allow: str = "", **options: object) -> Page:
        context = browser.new_context(**options)  # type: ignore[arg-type]
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "console",
            lambda message: (
                complaints.append(message.text)
                if message.type in ("error", "warning") and not (allow and allow in message.text)
                else None
            ),
        )
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def test_a_person_tries_a_text_corrects_the_answer_and_sees_it_taken_in(
    edge: EdgeProcess, open_page: Callable[..., Page], hub: StandInHub, tmp_path: Path
) -> None:
    page = open_page(edge.url)
    expect(page.locator("#version")).to_have_text("sentiment v1")
    expect(page.locator("#none")).to_be_visible()
    page.fill("#text", TEXT)
    page.click("#ask")
    expect(page.locator("#verdict")).to_have_text("positive")
    expect(page.locator("#answered-by")).to_have_text("sentiment v1")
    expect(page.locator("#scores li")).to_have_count(2)
    expect(page.locator("#scores .share").first).to_contain_text("%")
    page.screenshot(path=tmp_path / "answer.png", full_page=True)
    page.click("#wrong")
    expect(page.get_by_label("negative", exact=True)).to_be_checked()
    page.fill("#note", "irony")
    page.click("#correct button")
    expect(page.locator("#thanks")).to_contain_text("should have been “negative”")
    expect(page.locator("#recent li").first).to_contain_text("positive → negative")
    expect(page.locator("#recent li").first).to_contain_text("the hub has it")
    expect(page.locator("#recent li").first).to_contain_text("irony")
    (correction,) = hub.corrections.values()
    assert (correction.text, correction.label, correction.predicted, correction.note) == (
        TEXT, "negative", "positive", "irony",
    )  # fmt: skip
    page.screenshot(path=tmp_path / "corrected.png", full_page=True)


def test_all_of_it_works_by_keyboard(edge: EdgeProcess, open_page: Callable[..., Page], hub: StandInHub) -> None:
    page = open_page(edge.url)
    expect(page.locator("#text")).to_be_focused()
    page.keyboard.type("good r w good")  # letters in the text are no commands
    page.keyboard.press("Control+Enter")
    expect(page.locator("#verdict")).to_have_text("positive")
    for _ in range(2):  # over the button that asks
        page.keyboard.press("Tab")
    expect(page.locator("#right")).to_be_focused()
    page.keyboard.press("w")
    expect(page.get_by_label("negative", exact=True)).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.type("by keyboard")
    page.keyboard.press("Enter")
    expect(page.locator("#thanks")).to_be_visible()
    page.locator("#text").focus()
    page.keyboard.type(" good")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#right")).to_be_visible()
    page.locator("#right").focus()
    page.keyboard.press("r")
    expect(page.locator("#thanks")).to_contain_text("confirmed")
    wait_for(lambda: len(hub.received) == 2, what="both at the hub")


def test_trouble_is_told_on_the_page(
    edge: EdgeProcess, open_page: Callable[..., Page], hub: StandInHub, site: Site, tmp_path: Path
) -> None:
    page = open_page(edge.url, allow="Failed to load resource")
    site.publish("v2", golden_lean=1.0)
    expect(page.locator("#refused")).to_contain_text("v2", timeout=15_000)
    expect(page.locator("#refused")).to_contain_text("golden")
    hub.stop()
    page.fill("#text", "good")
    page.click("#ask")
    page.click("#right")
    expect(page.locator("#thanks")).to_be_visible()
    expect(page.locator("#recent li").first).to_contain_text("waiting for the hub")
    expect(page.locator("#waiting")).to_have_text("1")
    expect(page.locator("#sync-trouble")).to_contain_text("cannot be reached", timeout=15_000)
    page.screenshot(path=tmp_path / "trouble.png", full_page=True)
    page.fill("#text", "x" * 1_100_000)
    page.click("#ask")
    expect(page.locator("#trouble")).to_contain_text("at most 1,048,576")
    edge.stop()
    page.fill("#text", "good")
    page.click("#ask")
    expect(page.locator("#trouble")).to_contain_text("does not answer")
    page.close()


def test_markup_in_texts_stays_text(edge: EdgeProcess, open_page: Callable[..., Page]) -> None:
    page = open_page(edge.url)
    nasty = '<img src=x onerror="document.title=1"><script>document.title=2</script> good'
    page.fill("#text", nasty)
    page.click("#ask")
    page.click("#wrong")
    page.fill("#note", nasty)
    page.click("#correct button")
    expect(page.locator("#recent .text").first).to_have_text(nasty)
    expect(page.locator("#recent img")).to_have_count(0)
    expect(page).to_have_title("Edge lakeside · Millpond")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_is_wider_than_the_screen(
    edge: EdgeProcess, open_page: Callable[..., Page], scheme: str, tmp_path: Path
) -> None:
    page = open_page(edge.url, viewport={"width": 360, "height": 740}, color_scheme=scheme, has_touch=True)
    page.fill("#text", "good " + "w" * 300)
    page.click("#ask")
    page.click("#wrong")
    page.click("#correct button")
    expect(page.locator("#recent li")).to_have_count(1)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.screenshot(path=tmp_path / f"phone-{scheme}.png", full_page=True)


def test_a_guarded_edge_asks_for_its_token_once(
    make_edge: Callable[..., EdgeProcess], site: Site, open_page: Callable[..., Page], tmp_path: Path
) -> None:
    site.publish("v1")
    edge = make_edge(token="a-long-secret")
    page = open_page(edge.url, allow="401")
    expect(page).to_have_title("Log in · Millpond")
    page.fill("#token", "wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("not known here")
    page.screenshot(path=tmp_path / "login.png", full_page=True)
    page.fill("#token", "a-long-secret")
    page.keyboard.press("Enter")
    expect(page.locator("#version")).to_have_text("sentiment v1", timeout=15_000)
    page.fill("#text", "good")
    page.click("#ask")
    page.click("#right")
    expect(page.locator("#thanks")).to_be_visible()
    assert "a-long-secret" not in page.content()
    page.click("text=Log out")
    expect(page).to_have_title("Log in · Millpond")
