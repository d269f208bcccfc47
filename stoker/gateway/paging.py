"""Lists that come a page at a time: `limit`, `after`, `order`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass

from starlette.datastructures import QueryParams

from stoker.contract.shown import brief
from stoker.gateway.errors import Refused

_OWN = ("limit", "after", "order")


@dataclass(frozen=True)
class Page:
    limit: int
    after: str | None
    newest_first: bool


def page_of(query: QueryParams, most: int, others: Iterable[str] = (), usual: int | None = None) -> Page:
    """`most`: of `limit`; `usual`: where it is not given. `others`: further parameters. Raises `Refused`."""
    allowed = (*_OWN, *others)
    for name in query:
        if name not in allowed:
            message = f"{brief(name)}: no such parameter. Allowed: {', '.join(allowed)}."
            raise Refused(400, message, param=name[:80], code="unknown_parameter")
    limit, order = query.get("limit", str(usual or most)), query.get("order", "desc")
    if not (limit.isascii() and limit.isdecimal() and len(limit) < 9 and 1 <= int(limit) <= most):
        raise _wrong("limit", limit, f"1 to {most}")
    if order not in ("asc", "desc"):
        raise _wrong("order", order, "asc, desc")
    return Page(int(limit), query.get("after"), order == "desc")


def _wrong(name: str, given: str, allowed: str) -> Refused:
    return Refused(400, f"{name}: {brief(given)} given; allowed: {allowed}.", param=name, code="invalid_value")


async def listing(found: AsyncIterator[dict[str, object]], page: Page) -> dict[str, object]:
    """The page of what was found, in OpenAI's form. Raises `Refused` where nothing is called `after`."""
    data, begun, more = list[dict[str, object]](), page.after is None, False
    async for item in found:
        if not begun:
            begun = item["id"] == page.after
        elif len(data) == page.limit:
            more = True
            break
        else:
            data.append(item)
    if not begun:
        raise _wrong("after", page.after or "", "the id of one that is listed")
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": data, **ends, "has_more": more}
