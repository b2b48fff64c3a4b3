"""Bytes of a request to JSON, without trusting them."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from lt4rec_sparse.errors import shown
from lt4rec_sparse.serve.settings import RequestError


def parse(data: bytes, depth: int) -> dict[str, Any]:
    """Return a JSON object of at most `depth` levels, in which no key is given twice.

    Numbers may be spelled NaN and Infinity, as many clients write them.

    Raises:
        RequestError: If it is anything else.
    """
    too_deep = RequestError(f"body: got JSON nested more than {depth} levels deep, wanted at most {depth}")
    try:
        content = json.loads(data.decode(), object_pairs_hook=_object)
    except RequestError:
        raise
    except UnicodeDecodeError as error:
        raise RequestError(f"body: got bytes that are no UTF-8 at {error.start}, wanted JSON") from None
    except RecursionError:
        raise too_deep from None
    except ValueError as error:  # no JSON, or an int of more digits than Python converts
        raise RequestError(f"body: got no JSON ({error}), wanted a JSON object") from None
    if not isinstance(content, dict):
        raise RequestError(f"body: got JSON of type {type(content).__name__}, wanted an object")
    level: list[Any] = [content]
    for _ in range(depth):
        nested = [item.values() if isinstance(item, dict) else item for item in level]
        level = [x for items in nested for x in items if isinstance(x, dict | list)]
        if not level:
            return content
    raise too_deep


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise RequestError(f"{shown(twice)}: got it twice in one object, wanted it once")
    return content
