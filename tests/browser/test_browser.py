"""Stoker's page and Flower's in a real browser, without a window: `make test-browser`.

With SCREENSHOTS=FOLDER it keeps pictures there, for the documentation.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from stoker import Client, JobStatus
from stoker.broker import keys, registry
from stoker.client import GenerateJob
from stoker.client_core import generate_request
from stoker.contract import encode
from stoker.local.stack import Stack
from stoker.monitor.access import USER, password
from tests.conftest import GENERATE_MODEL, assert_idle, wait_until
from tests.integration.test_training import ROWS
from tests.monitor.conftest import Running, monitor_of

sync = pytest.importorskip("playwright.sync_api", reason="make test-browser installs playwright")

pytestmark = [pytest.mark.browser, pytest.mark.timeout(240)]

#: Browsers that systems bring along; without one, playwright's own.
INSTALLED = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def monitor(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with monitor_of(stack, tmp_path_factory.mktemp("monitor")) as running:
        yield running


@pytest.fixture
def client(stack: Stack) -> Iterator[Client]:
    """Threads are not counted: playwright's come and go as it likes."""
    with Client(settings=stack.settings) as client:
        yield client
        assert_idle(client.redis)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, INSTALLED)), None)
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, monitor: Running) -> Iterator[Any]:
    """Stoker's page, logged in. All that it asks for, it asks of the monitor."""
    login = {"username": USER, "password": password(monitor.settings)}
    context = browser.new_context(http_credentials=login, viewport=DESK)
    page = context.new_page()
    asked: list[str] = []
    broken: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: broken.append(str(error)))
    page.goto(f"{monitor.url}/stoker")
    page.wait_for_selector("#stoker[data-loaded]")
    yield page
    context.close()
    assert not broken
    assert [url for url in asked if not url.startswith((monitor.url, "http://127.0.0.1:"))] == []


def endless(client: Client, priority: int = 5) -> GenerateJob:
    """A job that runs until it is cancelled."""
    return client.generate("Once", model=GENERATE_MODEL, max_tokens=2000, ignore_eos=True, priority=priority)


def keep(page: Any, name: str) -> None:
    """A picture for the documentation, where it is wanted."""
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=str(Path(folder) / f"{name}.png"))


def test_without_the_password_a_browser_sees_nothing(browser: Any, monitor: Running) -> None:
    context = browser.new_context()
    page = context.new_page()
    with pytest.raises(sync.Error, match="INVALID_AUTH"):
        page.goto(f"{monitor.url}/stoker")
    context.close()


def test_thirty_waiting_jobs_are_seen_and_one_is_cancelled(page: Any, client: Client, stack: Stack) -> None:
    jobs = [endless(client) for _ in range(stack.settings.generate_slots)]
    wait_until(lambda: all(job.status() == JobStatus.RUNNING for job in jobs), "the lane is full", 60)
    waiting = [endless(client, number % 10) for number in range(30)]
    try:
        sync.expect(page.locator("#waiting tbody tr")).to_have_count(30, timeout=15_000)
        sync.expect(page.locator("#running progress").first).to_have_js_property("max", 1)
        row = page.locator(f'#waiting tbody tr[data-key="{waiting[3].id}"]')
        keep(page, "monitor")
        row.get_by_role("button", name="Cancel").click()
        sync.expect(page.locator("#said")).to_contain_text("asked to stop")
        sync.expect(page.locator("#waiting tbody tr")).to_have_count(29, timeout=15_000)
        assert waiting[3].status() == JobStatus.CANCELLED
        page.goto(page.url.replace("/stoker", f"/task/{waiting[4].id}"))
        page.get_by_role("button", name="Revoke").click()
        wait_until(lambda: waiting[4].status() == JobStatus.CANCELLED, "Flower's own button revokes it")
    finally:
        for job in [*jobs, *waiting]:
            job.cancel()


def test_a_runs_curve_moves_and_its_button_ends_it_as_revoked(page: Any, client: Client, monitor: Running) -> None:
    run = client.train("in-the-browser", ROWS, model=GENERATE_MODEL, steps=5000, batch_size=1, max_length=32)
    card = page.locator(f'#runs [data-key="{run.id}"]')
    curve = card.locator("polyline.loss")
    curve.wait_for(timeout=60_000)
    first = curve.get_attribute("points")
    sync.expect(curve).not_to_have_attribute("points", first or "", timeout=15_000)
    sync.expect(card).to_contain_text(re.compile(r"step \d+/5000 · loss \d+\.\d\d · \d+ tokens/s"))
    keep(page, "monitor-run")
    card.get_by_role("button", name="Cancel").click()
    sync.expect(card).to_contain_text("ended", timeout=20_000)
    wait_until(lambda: monitor.state(run.id) == "REVOKED", "Flower says so too")
    page.goto(f"{monitor.url}/task/{run.id}")
    sync.expect(page.locator(".task-details-card")).to_contain_text("REVOKED")


def test_a_dead_letter_is_sent_again_and_a_version_promoted(page: Any, client: Client) -> None:
    request = generate_request(GENERATE_MODEL, "Once", 0, {"max_tokens": 2})
    letter_of = {
        "kind": "generate",
        "model": GENERATE_MODEL,
        "client": "default",
        "request": json.dumps(encode(request)),
    }
    history = [{"worker": "w", "time": 1, "trouble": "its disk is full"}]
    redis = client.redis
    redis.hset(keys.DEAD, "died", json.dumps(letter_of | {"history": history}))
    redis.expire(keys.DEAD, 600)
    for version in (1, 2):
        registry.register(redis, GENERATE_MODEL, "shown", version, {"rank": 8, "loss": 1.5}, promote=True)
    letter = page.locator('#dead tr[data-key="died"]')
    sync.expect(letter).to_contain_text("its disk is full", timeout=15_000)
    letter.get_by_role("button", name="Retry").click()
    sync.expect(page.locator("#said")).to_contain_text("sent again")
    wait_until(lambda: client.job("died").status() == JobStatus.DONE, "it has run", 60)
    sync.expect(letter).to_have_count(0, timeout=15_000)
    adapter = page.locator(f'#adapters tr[data-key="{GENERATE_MODEL}/shown"]')
    sync.expect(adapter).to_contain_text("2: lora, rank 8, loss 1.500,  · serves", timeout=15_000)
    adapter.get_by_role("button", name="Promote shown@1").click()
    sync.expect(page.locator("#said")).to_contain_text("version 1 serves")
    assert client.adapters.get("shown", GENERATE_MODEL).serving == 1
    client.adapters.deactivate("shown", GENERATE_MODEL)
    for version in (1, 2):
        client.adapters.unload(f"shown@{version}", GENERATE_MODEL)


def test_a_page_elsewhere_can_neither_cancel_nor_frame(page: Any, client: Client, monitor: Running) -> None:
    job = endless(client)
    wait_until(lambda: monitor.state(job.id), "it is seen")
    forged = f"""<iframe src="{monitor.url}/stoker"></iframe>
      <form id="forged" method="post" action="{monitor.url}/api/task/revoke/{job.id}" target="_blank"></form>"""

    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(forged.encode())

        def log_message(self, format: str, *args: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Elsewhere)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        framed = page.frames[1]
        assert framed.locator("#stoker").count() == 0
        with page.context.expect_page() as opened:
            page.evaluate("document.getElementById('forged').submit()")
        opened.value.wait_for_load_state()
        assert "a page of another site" in opened.value.locator("body").inner_text()
        code = (
            f"fetch('{monitor.url}/stoker/cancel', {{method: 'POST', mode: 'no-cors', credentials: 'include', "
            f"body: new URLSearchParams({{target: '{job.id}'}})}}).catch(() => 0)"
        )
        page.evaluate(code)
        assert job.status() != JobStatus.CANCELLED
    finally:
        server.shutdown()
        server.server_close()
        job.cancel()


def test_it_fits_a_phone_and_the_dark(page: Any, client: Client) -> None:
    job = endless(client)
    try:
        page.set_viewport_size(PHONE)
        page.emulate_media(color_scheme="dark")
        sync.expect(page.locator(f'#running [data-key="{job.id}"]')).to_have_count(1, timeout=15_000)
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, "nothing hangs over the side: tables scroll by themselves"
        parts = "getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).slice(0, 3)"
        brightness = f"{parts}.reduce((sum, one) => sum + Number(one), 0)"
        wait_until(lambda: page.evaluate(f"{brightness} < 200"), "it is dark")
        page.emulate_media(color_scheme="light")
        wait_until(lambda: page.evaluate(f"{brightness} > 500"), "it is light")
        page.emulate_media(color_scheme="dark")
        keep(page, "monitor-phone")
    finally:
        job.cancel()


def test_what_stokers_workers_cannot_do_has_no_button(page: Any, monitor: Running) -> None:
    (worker,) = monitor.seen()["workers"]
    page.goto(f"{monitor.url}/worker/{worker['node']}")
    sync.expect(page.locator("#workername")).to_contain_text(worker["node"])
    for hidden in ("#worker-pool-grow", "#worker-pool-autoscale", "#worker-tab-limits", "#worker-pool-restart"):
        sync.expect(page.locator(hidden)).to_be_hidden()
