"""Counts and endings, as OpenAI's clients read them."""

from __future__ import annotations

from stoker.contract import FinishReason, GenerateResult


def finish_reason(reason: FinishReason) -> str:
    return "length" if reason in ("length", "context") else "stop"


def usage_of(result: GenerateResult) -> dict[str, object]:
    usage = result.usage
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }
