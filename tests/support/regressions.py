"""Cases that the fuzzer found wrong once, by what was wrong; they are run in every `make test`."""

from __future__ import annotations

from fuzz.case import Case

REGRESSIONS: dict[str, Case] = {
    "values that a head has beside its query and key are reshaped": Case(
        heads=4, key_heads=4, head_width=4, projection="interleaved", feed_forward="none"
    ),
}
