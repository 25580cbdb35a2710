"""The pages in a real Chromium, against a real hub that trains and takes corrections."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from millpond.hub import create_app

pytestmark = pytest.mark.browser

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
REVIEWS = [
    "I went in expecting the usual summer noise and came out wanting to see it again. The script trusts its audience, "
    "the two leads never push, and the last twenty minutes are as tense as anything I have seen this year.",
    "A long, beautiful bore. Every frame could hang in a gallery, and I would have left it after half an hour.",
    "If you can get past the accents (I could not), there is a decent thriller somewhere in here.",
    "My children loved it, I looked at my watch. The songs are fine. The jokes were old when I was young.",
    "Not bad at all! For once a sequel that knows why people liked the first one, and does not repeat it.",
    "The kind of film that people call brave because nobody can call it good.",
    "Slow to begin, yes, but it rewards patience: by the end I had forgotten that I was reading subtitles.",
    "I have seldom laughed so much at something that was meant to be sad.",
]
VERSIONS = [
    {"right": 9000, "of": 10000},
    {"right": 9050, "of": 10000, "champion_right": 9000},
    {"right": 8910, "of": 10000, "champion_right": 9050},
    {"right": 9110, "of": 10000, "champion_right": 9050},
    {"right": 9142, "of": 10000, "champion_right": 9110},
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=ARGUMENTS)
        yield found
        found.close()


@pytest.fixture
def page(browser: Browser, serve: Callable[..., Any]) -> Iterator[Page]:
    """A page that fails the test on any script error, refused resource or failed request of its own."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened = context.new_page()
    complaints: list[str] = []
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on(
        "console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None
    )
    yield opened
    context.close()
    assert complaints == []


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory, make_bench: Callable[..., Any]) -> Path:
    """The home of a hub that has made five versions, refused one of them, and heard of three edges."""
    bench = make_bench(tmp_path_factory.mktemp("history") / "home", retrain_after=0)
    client = create_app(bench.settings, bench.registry).test_client()
    bench.plan(*VERSIONS)
    number = 0
    for version in range(len(VERSIONS)):
        reviews = [correction(number + n) for n in range(6)]
        number += 6
        client.post("/api/v1/corrections", json={"edge": "berlin", "corrections": reviews[:4]})
        client.post("/api/v1/corrections", json={"edge": "lyon", "corrections": reviews[4:]})
        decisions = [{"id": review["id"], "decision": "accept"} for review in reviews]
        client.post("/api/v1/reviews", json={"reviewer": "ada", "decisions": decisions})
        client.post("/api/v1/jobs", json={"by": "ada"})
        bench.turn(lambda wanted=version + 1: len(client.get("/api/v1/promotions").json["promotions"]) == wanted)
    waiting = [correction(number + n) for n in range(8)]
    waiting.append(correction(number + 8, text=waiting[0]["text"], note="I agree with the other one."))
    client.post("/api/v1/corrections", json={"edge": "berlin", "corrections": waiting})
    champion = client.get("/api/v1/state").json["champion"]
    serving = {name: champion[name] for name in ("name", "version", "digest")}
    old = {"name": "sentiment", "version": "v2", "digest": "sha256:" + "2" * 64}
    refused = {"digest": serving["digest"], "version": "v5", "reason": "golden answer 3 is off by 0.2", "at": ""}
    for report in (
        {"edge": "berlin", "serving": serving, "outbox": 0, "predictions": 8123},
        {"edge": "lyon", "serving": serving, "outbox": 17, "predictions": 550},
        {"edge": "oslo", "serving": old, "refused": refused, "outbox": 0},
    ):
        assert client.post("/api/v1/edges", json=report).status_code == 200
    client.application.extensions["millpond.hub"].database.close()
    bench.close()
    return Path(bench.home)


@pytest.fixture
def hub(history: Path, bench: Any, serve: Callable[..., Any]) -> Iterator[Any]:
    """Serve a copy of that history."""
    bench.close()
    shutil.rmtree(bench.home)
    shutil.copytree(history, bench.home)
    served = serve(MILLPOND_HUB_RETRAIN_AFTER="0")
    with httpx.Client(base_url=served.url, timeout=20) as served.http:
        yield served


def correction(number: int, **changes: Any) -> dict[str, Any]:
    text = REVIEWS[number % len(REVIEWS)]
    positive = number % 2 == 0
    body = {
        "id": f"r-{number}",
        "text": text if number < 30 + len(REVIEWS) else f"{text} ({number})",
        "label": "positive" if positive else "negative",
        "predicted": "negative" if positive else "positive",
        "scores": {"negative": 0.64 if positive else 0.31, "positive": 0.36 if positive else 0.69},
        "model": {"name": "sentiment", "version": "v4", "digest": "sha256:" + "4" * 64},
    }
    if number < 30:
        body["text"] = f"{text} ({number})"
    return body | changes


def shoot(page: Page, name: str) -> None:
    """Keep a picture for people who ask for them with SCREENSHOTS."""
    if place := os.environ.get("SCREENSHOTS"):
        Path(place, f"{name}.png").write_bytes(page.screenshot(full_page=True))


def test_the_start_page_shows_the_loop(page: Page, hub: Any) -> None:
    page.goto(hub.url)
    loop = page.locator("#loop")
    expect(loop).to_contain_text("v5")
    expect(loop).to_contain_text("91.42 %")
    expect(loop).to_contain_text("2 of 3")
    expect(page.locator("#accuracy circle")).to_have_count(5)
    expect(page.locator("#accuracy circle.refused")).to_have_count(1)
    expect(page.locator("#decisions li").first).to_contain_text("v5")
    expect(page.locator("#edges")).to_contain_text("golden answer 3 is off by 0.2")
    shoot(page, "console")
    page.emulate_media(color_scheme="dark")
    shoot(page, "console-dark")
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways on a phone"
    shoot(page, "console-phone")


def test_an_empty_hub_says_what_comes_first(page: Page, serve: Callable[..., Any]) -> None:
    served = serve()
    page.goto(served.url)
    expect(page.locator("#training")).to_contain_text("Train now makes the first model")
    expect(page.locator("#retrain")).to_be_enabled()
    expect(page.locator("#rollback")).to_be_disabled()
    shoot(page, "console-empty")


def test_train_now_shows_progress_and_ends_in_a_decision(page: Page, bench: Any, serve: Callable[..., Any]) -> None:
    bench.plan({"right": 900, "of": 1000, "act": "wait"})
    served = serve()
    page.goto(served.url)
    page.get_by_role("button", name="Train now").click()
    expect(page.locator("#training")).to_contain_text("running")
    expect(page.locator("#training .now")).to_have_text("train")
    expect(page.locator("#training svg")).to_be_visible()
    expect(page.locator("#retrain")).to_be_disabled()
    shoot(page, "console-training")
    page.locator("#training").get_by_role("link", name="job-1").first.click()
    expect(page.locator("#log")).to_contain_text("attempt 1")
    expect(page.locator("#state")).to_have_text("running")
    shoot(page, "job")
    bench.recipe.with_name("go").touch()
    expect(page.locator("#state")).to_have_text("succeeded", timeout=15_000)
    page.goto(served.url)
    expect(page.locator("#decisions")).to_contain_text("promoted", timeout=15_000)
    page.locator("#decisions").get_by_role("link", name="v1").click()
    expect(page.locator("main")).to_contain_text("There is no champion yet, so v1 becomes it")


def test_roll_back_asks_first(page: Page, hub: Any) -> None:
    page.goto(hub.url)
    page.get_by_role("button", name="Roll back").click()
    expect(page.locator("#confirm")).to_be_visible()
    page.get_by_role("button", name="Keep it").click()
    assert hub.http.get("/api/v1/state").json()["champion"]["version"] == "v5"
    page.get_by_role("button", name="Roll back").click()
    page.locator("#confirm").get_by_role("button", name="Roll back").click()
    expect(page.locator("#said")).to_contain_text("Rolled back from v5 to v4")
    expect(page.locator("#loop")).to_contain_text("rolled back")
    assert hub.http.get("/api/v1/state").json()["champion"]["version"] == "v4"


def test_a_job_shows_its_accuracy_by_source(page: Page, hub: Any) -> None:
    number, result = next(
        (job["id"], job["result"])
        for job in hub.http.get("/api/v1/jobs").json()["jobs"]
        if job["champion"] and len(job["result"]["by_source"]) > 1
    )
    page.goto(f"{hub.url}/jobs/{number}")
    rows = result["heldout"]["rows"]
    expect(page.locator("#facts")).to_contain_text("· reviews.csv")
    expect(page.locator("#facts")).to_contain_text(f"· corrections, held out100.00 %champion 0.00 %{rows} rows")
    shoot(page, "job-finished")


def test_a_decision_has_its_page(page: Page, hub: Any) -> None:
    page.goto(f"{hub.url}/promotions/3")
    expect(page.locator("main")).to_contain_text("refused")
    expect(page.locator("main")).to_contain_text("90.50 %")
    shoot(page, "promotion")
    page.goto(f"{hub.url}/models")
    expect(page.locator("tbody tr")).to_have_count(5)
    expect(page.locator("tbody tr").first).to_contain_text("champion")
    shoot(page, "models")


def pending(hub: Any) -> int:
    return int(hub.http.get("/api/v1/corrections?limit=1").json()["counts"]["pending"])


def test_corrections_are_judged_by_keyboard(page: Page, hub: Any) -> None:
    page.goto(f"{hub.url}/review")
    expect(page.locator(".text")).to_contain_text(REVIEWS[30 % 8][:40])
    expect(page.locator("#current")).to_contain_text("2 corrections of this text")
    page.keyboard.press("a")
    expect(page.locator("#toast")).to_contain_text("Say who you are first")
    expect(page.locator("#reviewer")).to_be_focused()
    page.keyboard.type("grace")
    page.locator("h1").click()
    shoot(page, "review")
    page.keyboard.press("a")
    expect(page.locator("#counts")).to_contain_text("7 pending")
    assert pending(hub) == 7
    second = page.locator(".text").inner_text()
    page.keyboard.press("c")
    expect(page.locator(".labels button")).to_have_count(2)
    shoot(page, "review-change")
    page.keyboard.press("2")
    expect(page.locator("#counts")).to_contain_text("6 pending")
    page.keyboard.press("r")
    expect(page.locator("#counts")).to_contain_text("5 pending")
    page.keyboard.press("u")
    expect(page.locator("#counts")).to_contain_text("6 pending")
    found = hub.http.get("/api/v1/corrections?limit=1000").json()["corrections"]
    judged = {c["text"]: c for c in found if c["reviewer"] == "grace"}
    assert judged[second]["final_label"] == "positive"
    page.reload()
    expect(page.locator("#reviewer")).to_have_value("grace")


def test_j_and_k_move_without_judging(page: Page, hub: Any) -> None:
    page.goto(f"{hub.url}/review")
    text = page.locator(".text")
    expect(text).to_be_visible()
    first = text.inner_text()
    page.keyboard.press("j")
    expect(text).not_to_have_text(first)
    page.keyboard.press("k")
    expect(text).to_have_text(first)
    assert pending(hub) == 9


def test_a_reviewer_learns_that_another_was_faster(page: Page, hub: Any) -> None:
    page.goto(f"{hub.url}/review")
    page.locator("#reviewer").fill("grace")
    page.locator("h1").click()
    page.keyboard.press("j")
    text = page.locator(".text").inner_text()
    found = hub.http.get("/api/v1/corrections?state=pending&limit=100").json()["corrections"]
    [mine] = [c for c in found if c["text"] == text]
    decision = {"id": mine["id"], "decision": "reject"}
    hub.http.post("/api/v1/reviews", json={"reviewer": "bob", "decisions": [decision]})
    page.keyboard.press("a")
    expect(page.locator("#toast")).to_contain_text("bob has rejected it meanwhile")
    after = hub.http.get("/api/v1/corrections?limit=1000").json()["corrections"]
    assert next(c for c in after if c["id"] == mine["id"])["state"] == "rejected"


def test_the_review_page_fits_a_phone_and_the_dark(page: Page, hub: Any) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto(f"{hub.url}/review")
    expect(page.locator(".text")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways on a phone"
    shoot(page, "review-phone")
    page.set_viewport_size({"width": 1280, "height": 900})
    page.emulate_media(color_scheme="dark")
    shoot(page, "review-dark")


def test_hostile_text_is_shown_as_text(page: Page, hub: Any) -> None:
    evil = "<img src=x onerror=alert(1)><script>alert(2)</script> {{ 7*7 }}"
    items = [correction(900, text=evil, note=evil)]
    hub.http.post("/api/v1/corrections", json={"edge": "evil", "corrections": items})
    hub.http.post(
        "/api/v1/edges", json={"edge": "evil", "serving": None, "url": "javascript:alert(3)", "software": evil}
    )
    page.goto(f"{hub.url}/review")
    page.locator("#edge").select_option("evil")
    expect(page.locator(".text")).to_have_text(evil)
    page.goto(hub.url)
    expect(page.locator("#edges")).to_contain_text("evil")
    assert page.locator("#edges a[href^=javascript]").count() == 0


def test_pages_send_people_to_the_login_and_let_them_in_by_role(page: Page, serve: Callable[..., Any]) -> None:
    served = serve(
        MILLPOND_HUB_EDGE_TOKEN="e-token", MILLPOND_HUB_REVIEWER_TOKEN="r-token", MILLPOND_HUB_OPERATOR_TOKEN="o-token"
    )
    page.goto(served.url)
    expect(page).to_have_url(re.compile("/login"))
    page.get_by_label("Token").fill("r-token")
    page.get_by_role("button", name="Log in").click()
    expect(page).to_have_url(f"{served.url}/review")
    expect(page.locator("#current")).to_contain_text("Nothing waits for you.")
    shoot(page, "review-empty")
    page.get_by_role("button", name="Log out").click()
    page.goto(f"{served.url}/models")
    page.get_by_label("Token").fill("o-token")
    page.get_by_role("button", name="Log in").click()
    expect(page).to_have_url(f"{served.url}/models")
    expect(page.locator("main")).to_contain_text("There is none yet")
