"""Chat templates in the manner of the families in use, and conversations to render with them."""

from __future__ import annotations

from typing import Any

CHATML = """\
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou are a stoker.<|im_end|>\\n' }}
{%- endif %}
{% for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

#: Tools as JSON lines, calls and answers as tags; consecutive answers share a turn.
CHATML_TOOLS = """\
{%- macro call(one) -%}
<tool_call>
{"name": "{{ one.name }}", "arguments": {{ one.arguments | tojson }}}
</tool_call>
{%- endmacro -%}
{%- set ns = namespace(answers=0, last='') -%}
{%- if tools %}
<|im_start|>system
{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}

{% endif %}
# Tools
{% for tool in tools %}
{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{% for message in messages %}
{% if message.role == 'system' and tools %}{% continue %}{% endif %}
{% if message.role == 'tool' %}
{% set ns.answers = ns.answers + 1 %}
{% if ns.last != 'tool' %}<|im_start|>user{% endif %}

<tool_response>
{{ message.content }}
</tool_response>
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>
{% endif %}
{% else %}
<|im_start|>{{ message.role }}
{{ message.content or '' }}
{%- for one in message.tool_calls or [] %}

{{ call(one.function) }}
{%- endfor %}<|im_end|>
{% endif %}
{% set ns.last = message.role %}
{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}
"""

LLAMA3 = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools is not none and tools is defined %}
    {{- 'Environment: ipython\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) + '\\n\\n' }}
    {%- endfor %}
{%- endif %}
{{- system + '<|eot_id|>' }}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception('This model takes single tool calls at once!') }}
        {%- endif %}
        {%- set one = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + one.name + '", "parameters": ' }}
        {{- one.arguments | tojson + '}<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

#: Strict about turns; tools stand before the last user message.
MISTRAL = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
{%- set users = turns | selectattr('role', 'equalto', 'user') | list %}
{%- set ns = namespace(index=0) %}
{%- for message in turns %}
    {%- if message.role in ('user', 'assistant') and message.tool_calls is undefined %}
        {%- if (message.role == 'user') != (ns.index % 2 == 0) %}
            {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in turns %}
    {%- if message.role == 'user' %}
        {%- if tools is not none and message == users[-1] %}
            {{- '[AVAILABLE_TOOLS] [' }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, value in tool.items() if key != 'return' %}
                    {%- if value is string %}
                        {{- '"' + key + '": "' + value + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + value | tojson }}
                    {%- endif %}
                    {%- if not loop.last %}{{- ', ' }}{%- endif %}
                {%- endfor %}
                {{- '}}' }}{%- if not loop.last %}{{- ', ' }}{%- endif %}
            {%- endfor %}
            {{- '][/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {%- if loop.last and system is defined %}
            {{- '[INST] ' + system + '\\n\\n' + message.content + '[/INST]' }}
        {%- else %}
            {{- '[INST] ' + message.content + '[/INST]' }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- '[TOOL_CALLS] ' + message.tool_calls | map(attribute='function') | list | tojson + eos_token }}
    {%- elif message.role == 'assistant' %}
        {{- ' ' + message.content | trim + eos_token }}
    {%- elif message.role == 'tool' %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content | string + '}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception('Only user, assistant and tool roles are supported!') }}
    {%- endif %}
{%- endfor %}
"""

#: Odd features at once: generation blocks, slices, joins, dict and string methods, breaks.
ODDS = """\
{% set names = ['a', 'b', 'c'] %}
{{ names[::-1] | join('-') }} {{ names[1:] | join(', ') | upper }} {{ '%s!' | format('done') }}
{% for message in messages %}
    {% generation %}
{{ loop.index }}/{{ loop.length }} {{ message.content.split()[0] if message.content else '?' }}
    {% endgeneration %}
    {% if loop.index == 2 %}{% break %}{% endif %}
{% endfor %}
{{ {'z': 1, 'a': '<é>'} | tojson }} {{ {'z': 1, 'a': 2} | tojson(sort_keys=true, separators=(',', ':')) }}
{{ {'one': 1}.get('two', 'none') }} {{ 'ab'.replace('a', 'x').startswith('x') }} {{ range(3) | list }}
{{ dict(one=1).items() | list }} {{ messages | map(attribute='role') | unique | list }} {{ undefined_name }}|
{{ flag if flag is defined else 'no flag' }}
"""

TEMPLATES = {
    "chatml": CHATML,
    "chatml_tools": CHATML_TOOLS,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "odds": ODDS,
}

_TOOL = {
    "type": "function",
    "function": {
        "name": "temperature",
        "description": "Temperature of a furnace, in °C; \"quoted\" <and> 'so on'.",
        "parameters": {"type": "object", "properties": {"furnace": {"type": "string"}}, "required": ["furnace"]},
    },
}
_CALL = {"type": "function", "function": {"name": "temperature", "arguments": {"furnace": "№ 2", "deep": [1, None]}}}
_USER = {"role": "user", "content": "  How hot is it? 漢字 <|im_end|>\n"}

CASES: dict[str, dict[str, Any]] = {
    "one": {"conversation": [_USER], "add_generation_prompt": True},
    "system": {
        "conversation": [
            {"role": "system", "content": "Be brief."},
            _USER,
            {"role": "assistant", "content": " Hot. "},
            {"role": "user", "content": "How hot?"},
        ],
        "add_generation_prompt": False,
    },
    "tools": {
        "conversation": [
            {"role": "system", "content": "Use tools."},
            _USER,
            {"role": "assistant", "content": "", "tool_calls": [_CALL]},
            {"role": "tool", "content": "812"},
            {"role": "tool", "content": "813"},
        ],
        "tools": [_TOOL, _TOOL],
        "add_generation_prompt": True,
    },
    "two_calls": {
        "conversation": [_USER, {"role": "assistant", "content": None, "tool_calls": [_CALL, _CALL]}],
        "add_generation_prompt": True,
    },
    "wrong_turns": {"conversation": [_USER, _USER], "add_generation_prompt": True},
}
