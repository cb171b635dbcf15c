"""Cases that the fuzzer found wrong once, by what was wrong; they are run in every `make test`."""

from __future__ import annotations

from fuzz.case import Case

REGRESSIONS: dict[str, Case] = {}
