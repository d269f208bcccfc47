"""The monitor as browsers and programs meet it: a real process, a real broker, and no worker."""

from __future__ import annotations

import re
import stat
from contextlib import closing
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tornado import web

from stoker import Client, JobStatus
from stoker.broker import keys, registry
from stoker.broker.connection import connect
from stoker.errors import BrokerUnavailable, InvalidRequest, StokerError
from stoker.local.broker import EmbeddedBroker
from stoker.monitor.numbers import Numbers
from stoker.monitor.standard import REFUSED, refuse
from stoker.settings import Settings
from tests.conftest import wait_until
from tests.monitor.conftest import MODEL, Running
from tests.monitor.scraped import Scrape
from tests.monitor.test_overview import presence

PAGES = ["/", "/workers", "/tasks", "/broker", "/stoker"]


class Links(HTMLParser):
    """What a page loads by itself."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.ids: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        of = dict(attrs)
        self.ids += [of["id"] or ""] if "id" in of else []
        loads = {"script": "src", "link": "href", "img": "src", "iframe": "src"}.get(tag)
        self.loaded += [of[loads] or ""] if loads in of else []


@pytest.mark.parametrize("path", PAGES)
def test_each_page_has_stokers_tab_and_loads_nothing_from_elsewhere(running: Running, path: str) -> None:
    page = running.ask(path)
    assert page.status == 200
    assert '<a class="nav-link' in page.text
    assert re.search(r'href="/stoker"[^>]*>\s*Stoker|>Stoker</a>', page.text)
    loaded = Links(page.text).loaded
    assert any("/stoker/static/flower.css" in link for link in loaded)
    for link in loaded:
        assert link.startswith("/"), link
        assert running.ask(link).status == 200, link
    assert page.headers["x-frame-options"] == "DENY"


def test_stokers_page_may_load_nothing_from_elsewhere_and_has_all_its_parts(running: Running) -> None:
    page = running.ask("/stoker")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert {"queues", "running", "waiting", "runs", "workers", "adapters", "dead"} <= set(Links(page.text).ids)
    script = running.ask("/stoker/static/stoker.js").text
    assert "innerHTML" not in script
    assert set(re.findall(r"https?://[^\"']+", script)) == {"http://www.w3.org/2000/svg"}


@pytest.mark.parametrize("path", [*PAGES, "/stoker/data", "/api/workers", "/api/tasks", "/static/js/flower.js"])
def test_nothing_is_shown_without_the_password(running: Running, path: str) -> None:
    answer = running.ask(path, login=False)
    assert (answer.status, answer.text) == (401, "Access denied")
    assert answer.headers["www-authenticate"].startswith("Basic")


def test_health_and_metrics_are_open_to_monitoring_programs(running: Running) -> None:
    assert running.ask("/healthcheck", login=False).text == "OK"
    assert "flower_events_total" in running.ask("/metrics", login=False).text


def test_a_name_that_a_foreign_page_may_have_is_refused(running: Running) -> None:
    answer = running.ask("/healthcheck", Host="evil.example")
    assert answer.status == 421
    assert "--host" in answer.text


def test_waiting_jobs_are_seen_and_revoked_with_flowers_own_button(running: Running, jobs: Client) -> None:
    sent = [jobs.generate(f"a secret {number}", model=MODEL, priority=number % 10) for number in range(30)]
    wait_until(lambda: running.seen()["waiting_in_all"] == 30, "all are seen")
    found = Scrape.of(running.ask("/metrics", login=False).text)
    waiting = {priority: found.value("stoker_jobs_waiting", priority=str(priority)) for priority in range(10)}
    assert waiting == dict.fromkeys(range(10), 3.0)
    first = sent[0].id
    assert running.state(first) == "PENDING"
    assert 'id="task-revoke"' in running.ask(f"/task/{first}").text
    assert running.ask(f"/api/task/revoke/{first}", {"terminate": "false"}).status == 200
    wait_until(lambda: running.state(first) == "REVOKED", "it ends")
    assert running.seen()["waiting_in_all"] == 29
    lengths = {queue["name"]: queue["messages"] for queue in running.ask("/api/queues/length").json["active_queues"]}
    kinds = ("embed", "generate", "train", "adapters")
    assert lengths == {keys.queue(MODEL, kind): 29 * (kind == "generate") for kind in kinds}
    assert f"<td>{keys.queue(MODEL, 'generate')}</td>" in running.ask("/broker").text
    order = {"draw": "1", "start": "0", "length": "50", "order[0][column]": "0", "order[0][dir]": "desc"}
    table = running.ask("/tasks/datatable", {**order, "columns[0][data]": "sent", "search[value]": "state:PENDING"})
    assert [row["uuid"] for row in table.json["data"]] == [job.id for job in reversed(sent[1:])], "newest first"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", table.json["data"][0]["sent"])
    for path in (*PAGES, "/stoker/data", "/api/tasks", f"/task/{first}", "/metrics"):
        assert "secret" not in running.ask(path).text, path
    for job in sent[1:]:
        job.cancel()
    wait_until(lambda: running.seen()["waiting_in_all"] == 0, "all have ended")


@pytest.mark.parametrize("path", ["/api/task/revoke/{}", "/stoker/cancel"])
def test_a_foreign_page_cancels_nothing_though_the_browser_sends_the_password(
    running: Running, jobs: Client, path: str
) -> None:
    job = jobs.embed(["x"], model=MODEL)
    foreign: list[dict[str, Any]] = [{"Origin": "http://evil.example"}, {"Sec_Fetch_Site": "cross-site"}]
    for headers in foreign:
        assert running.ask(path.format(job.id), {"target": job.id}, **headers).status == 403
    assert job.status() == JobStatus.QUEUED
    assert running.ask(path.format(job.id), {"target": job.id}, Origin=running.url).status == 200
    assert job.status() == JobStatus.CANCELLED


def test_a_job_that_nobody_knows_is_one_clear_answer(running: Running) -> None:
    for answer in (running.ask("/api/task/revoke/nobody", {}), running.ask("/stoker/cancel", {"target": "nobody"})):
        assert answer.status == 409
        assert "the broker knows nothing of job nobody" in answer.text
    assert "no dead letter" in running.ask("/stoker/retry", {"target": "nobody"}).text
    assert running.ask("/stoker/cancel", {}).status == 400


@pytest.mark.parametrize("pattern", [pattern for pattern, _ in REFUSED])
def test_what_stokers_workers_cannot_do_is_answered_with_what_to_do(running: Running, pattern: str) -> None:
    path = re.sub(r"\(\?:([a-z-]+)[^)]*\)", r"\1", pattern).replace("(.+)", "it")
    answer = running.ask(path, {"n": "1"})
    assert answer.status == 403
    assert len(answer.text) > 40
    assert answer.headers["content-type"].startswith("text/plain")


def test_versions_are_promoted_and_rolled_back_on_the_page(running: Running, jobs: Client, monitored: Settings) -> None:
    for version in (1, 2):
        registry.register(jobs.redis, MODEL, "style", version, {"rank": 8, "loss": 1.5}, promote=True)

    def serving() -> int | None:
        (adapter,) = [entry for entry in running.seen()["adapters"] if entry["name"] == "style"]
        return next((version["number"] for version in adapter["versions"] if version["serves"]), None)

    wait_until(lambda: running.seen()["adapters"], "the adapter is seen")
    assert serving() == 2
    answer = running.ask("/stoker/rollback", {"target": "style", "model": MODEL})
    assert answer.json["message"] == "style: version 1 serves"
    assert serving() == 1
    assert running.ask("/stoker/promote", {"target": "style@2", "model": MODEL}).status == 200
    assert serving() == 2
    assert running.ask("/stoker/promote", {"target": "style@7", "model": MODEL}).status == 409


def test_the_history_and_the_password_outlive_the_monitor_and_are_closed_to_others(
    jobs: Client, monitored: Settings, tmp_path_factory: pytest.TempPathFactory
) -> None:
    settings = monitored.model_copy(update={"home": tmp_path_factory.mktemp("own")})
    first = Running(settings)
    try:
        job = jobs.generate("x", model=MODEL)
        other = jobs.generate("x", model=MODEL)
        wait_until(lambda: first.state(job.id) == first.state(other.id) == "PENDING", "both are seen")
        job.cancel()
        wait_until(lambda: first.state(job.id) == "REVOKED", "it has ended")
    finally:
        assert first.stop() == 0
    files = [*(settings.home / "flower").iterdir()]
    assert len(files) >= 3
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    other.cancel()
    again = Running(settings)
    try:
        wait_until(lambda: again.state(other.id) == "REVOKED", "what ended meanwhile has ended")
        assert again.state(job.id) == "REVOKED"
    finally:
        again.stop()
    log = settings.home.joinpath("flower.log").read_text()
    assert "WARNING" not in log
    assert "ERROR" not in log


@pytest.mark.parametrize(("error", "status"), [(BrokerUnavailable("away"), 503), (InvalidRequest("no such job"), 409)])
def test_a_broker_that_is_away_is_no_conflict(error: StokerError, status: int) -> None:
    with pytest.raises(web.HTTPError) as answer:
        refuse(error)
    assert (answer.value.status_code, answer.value.log_message) == (status, str(error))


def test_a_broker_that_is_away_is_a_number_and_no_error(tmp_path: Path) -> None:
    broker = EmbeddedBroker(Settings(home=tmp_path), port=0)
    settings = Settings(home=tmp_path, url=broker.start())
    with closing(connect(settings)) as redis:
        there = presence()
        redis.set(keys.worker(there.worker), there.model_dump_json(), ex=60)
        redis.zadd(keys.WORKERS, {there.worker: there.time})
        redis.set(keys.metrics(there.worker), Numbers().report(there.worker).model_dump_json(), ex=60)
    made = Running(settings)
    try:
        wait_until(lambda: made.seen()["workers"], "the worker is seen")
        assert Scrape.of(made.ask("/metrics", login=False).text).value("stoker_broker_up") == 1
        broker.stop()
        wait_until(
            lambda: not Scrape.of(made.ask("/metrics", login=False).text).value("stoker_broker_up"), "it is away"
        )
        assert made.ask("/metrics", login=False).status == 200
    finally:
        made.stop()
        broker.stop()
