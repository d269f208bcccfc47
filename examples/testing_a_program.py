"""Tests of a program that uses Stoker, without a broker, a worker or a model: the double answers what a test says."""

from stoker import Client, JobStatus
from stoker.errors import TextTooLong
from stoker.testing import FakeClient


def headline(client: Client, article: str) -> str:
    """The program under test: a headline, or the first words of an article that is too long."""
    try:
        return client.generate(f"A headline for: {article}", max_tokens=16).result().text.strip()
    except TextTooLong:
        return " ".join(article.split()[:5])


def test_the_headline_is_what_the_model_says() -> None:
    client = FakeClient()
    client.script.generate("Coal is back")
    assert headline(client, "The mine opened again.") == "Coal is back"
    assert client.sent.generate[0].max_tokens == 16


def test_an_article_that_is_too_long_gets_its_own_first_words() -> None:
    client = FakeClient()
    client.script.generate(error=TextTooLong("the prompt has 9000 tokens."))
    assert headline(client, "one two three four five six") == "one two three four five"


def test_a_job_that_hangs_is_cancelled_from_elsewhere() -> None:
    client = FakeClient()
    client.script.generate(hangs=True)
    job = client.generate("x")
    client.job(job.id).cancel()
    assert job.status() == JobStatus.CANCELLED


for name, test in sorted(globals().items()):
    if name.startswith("test_"):
        test()
        print(f"{name}: passed")
