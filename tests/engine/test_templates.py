"""Chat templates: what transformers makes of them, and an end to every hostile one."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoints.loading import LoadedModel
from engine.platform import limited
from engine.text import chat
from engine.text.chat import ChatLimits, render
from stoker.errors import InvalidRequest, ModelError

GOLDENS = Path(__file__).parents[1] / "goldens" / "text"
CHATS = json.loads((GOLDENS / "chats.json").read_text())["cases"]
ENDS = {"bos_token": "<s>", "eos_token": "</s>"}
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def golden_inputs() -> Any:
    sys.path.insert(0, str(GOLDENS))
    try:
        import templates
    finally:
        sys.path.remove(str(GOLDENS))
    return templates


@pytest.mark.parametrize("golden", CHATS, ids=lambda golden: f"{golden['template']}-{golden['case']}")
def test_templates_render_as_in_transformers(golden_inputs: Any, golden: dict[str, str]) -> None:
    arguments = dict(golden_inputs.CASES[golden["case"]])
    messages = arguments.pop("conversation")
    template = golden_inputs.TEMPLATES[golden["template"]]
    if "error" in golden:
        with pytest.raises(InvalidRequest) as caught:
            render(template, messages, names=ENDS, **arguments)
        assert golden["error"] in str(caught.value)
    else:
        assert render(template, messages, names=ENDS, **arguments) == golden["text"]


def test_the_template_of_a_real_model(smollm2: LoadedModel) -> None:
    assert render(smollm2.tokenizer.templates["default"], HELLO) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )


def test_variables_reach_the_template() -> None:
    template = (
        "{{ enable_thinking }}{{ bos_token }}|{{ tools[0].name }}|{{ strftime_now('%Y') | length }}|{{ eos_token }}"
    )
    text = render(template, HELLO, tools=[{"name": "t"}], names={"bos_token": "<b>"}, extra={"enable_thinking": False})
    assert text == "False<b>|t|4|"


def test_documents_among_the_variables_reach_the_template_and_are_none_where_they_are_not_given() -> None:
    """As Granite's and Command's templates take them."""
    template = "{% if documents is none %}nothing{% else %}{{ documents[0].text }}{% endif %}"
    assert render(template, HELLO) == "nothing"
    assert render(template, HELLO, extra={"documents": [{"text": "read me"}]}) == "read me"


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt"])
def test_a_variable_that_a_request_has_a_field_for_is_refused_and_not_passed_over(name: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"template: {name} given"):
        render("", HELLO, extra={name: None})


def test_what_has_no_value_is_left_out_as_in_transformers() -> None:
    template = "{{ 'tool_calls' in messages[0] }}{{ messages[0].keys() | list }}{{ bos_token is defined }}"
    assert render(template, [{"role": "user", "tool_calls": None}]) == "False['role']False"


@pytest.mark.parametrize("asked", [True, False])
def test_a_template_knows_whether_the_answer_begins(asked: bool) -> None:
    assert render("{{ add_generation_prompt }}", HELLO, add_generation_prompt=asked) == str(asked)


LOOP = "{% for a in range(99999) %}"
FOREVER = LOOP * 3 + "{% endfor %}" * 3
SHARED = "{% set n = namespace(s='xxxxxxxx') %}"
DOUBLING = SHARED + "{% for i in range(64) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s | length }}"
HOSTILE = {
    "endless loop": (FOREVER, "1 s"),
    "endless recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    "huge range": ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
    "giant string": ("{{ 'x' * 10**12 }}", "product of more than"),
    "giant list": ("{{ (10**12 * [0]) | length }}", "product of more than"),
    "giant power": ("{{ 9**(9**9) }}", "power of more than"),
    "giant padding": ("{{ '%1000000000000d' | format(1) }}", ""),
    "giant centre": ("{{ 'x' | center(10**12) | length }}", ""),
    "giant format": ("{{ '{:>100000000000}'.format(1) | length }}", ""),
    "giant indent": ("{{ [1] | tojson(indent=10**12) | length }}", "indent of"),
    "doubling": (DOUBLING, ""),
    "long output": ("{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "more than 4000000 characters"),
    "attributes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "attribute filter": ("{{ (messages | attr('__class__')).x }}", "unsafe"),
    "globals": ("{{ raise_exception.__globals__ }}{{ cycler.__init__.__globals__.os.getcwd() }}", "unsafe"),
    "mutation": ("{{ messages.append(1) }}", "SecurityError"),
    "namespace": ("{% set n = namespace(__class__=1) %}", "underscore"),
    "syntax": ("{% if %}", "line 1"),
    "include": ("{% include '/etc/passwd' %}", ""),
    "import": ("{% import 'os' as os %}", ""),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_in_one_error_within_seconds(name: str) -> None:
    template, cause = HOSTILE[name]
    began = time.monotonic()
    with pytest.raises((ModelError, InvalidRequest)) as caught:
        render(template, HELLO, limits=ChatLimits(seconds=1.0))
    assert cause in str(caught.value)
    assert len(str(caught.value)) < 700
    assert time.monotonic() - began < 10
    assert render("{{ messages[0].content }}", HELLO) == "Hello", "the next call is served"


def test_a_format_reaches_no_attribute() -> None:
    assert render("{{ '{0.__class__}'.format(messages) }}!", HELLO) == "!"


def test_a_template_that_is_too_long_is_refused() -> None:
    with pytest.raises(ModelError, match="1000001 characters; 1000000 are allowed"):
        render("x" * 1_000_001, HELLO)


def test_what_is_no_json_is_refused() -> None:
    for content in (object(), float("nan"), {1, 2}):
        with pytest.raises(InvalidRequest, match="must be JSON"):
            render("", [{"content": content}])


def test_lone_surrogates_and_megabytes_pass_through() -> None:
    long = "é\ud800" * 500_000
    assert render("{{ messages[0].content }}", [{"content": long}]) == long


def test_threads_share_one_process() -> None:
    texts: dict[int, str] = {}

    def ask(number: int) -> None:
        for _ in range(20):
            texts[number] = render("{{ messages[0].content }}", [{"content": str(number)}])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {number: str(number) for number in range(4)}


def test_a_process_that_was_killed_is_replaced() -> None:
    render("", HELLO)
    process = chat.renderer.process
    assert process is not None
    os.kill(process.pid, 9)
    process.wait()
    assert render("{{ messages[0].content }}", HELLO) == "Hello"


@pytest.mark.parametrize("moment", ["_write", "_read_line"])
def test_the_answer_of_an_interrupted_call_is_not_the_next_calls(monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Ctrl-C, or an exception that another thread raises here, while the process is at work."""
    render("", HELLO)
    whole = getattr(limited, moment)

    def interrupted(*arguments: Any) -> Any:
        if moment == "_write":
            whole(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(limited, moment, interrupted)
    with pytest.raises(KeyboardInterrupt):
        render("the first call's", HELLO)
    monkeypatch.undo()
    assert render("the second call's", HELLO) == "the second call's"
