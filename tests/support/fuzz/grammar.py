"""The grammar of random transformers, as a hypothesis strategy: every case that it draws is a module that runs."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from fuzz.case import WIDTH, Case

EXTRAS = (
    "batch-norm",
    "batch-norm-mean",
    "counter",
    "centre",
    "pad-4",
    "long-10",
    "even",
    "batch-3",
    "by-value",
    "check",
    "no-grad",
    "detach",
    "mean-of-batch",
    "layer-drop-0",
)


@st.composite
def cases(draw: st.DrawFn, until: str | None = None) -> Case:
    """Draw a case.

    Args:
        draw: hypothesis' own.
        until: the last step; None draws it.
    """

    def one(*choices: str) -> str:
        return draw(st.sampled_from(choices))

    kernel = one("hand", "hand", "einsum", "bmm", "float32", "sdpa", "sdpa", "multihead")
    whole = kernel == "multihead"
    heads = draw(st.sampled_from([1, 2, 4]))
    head_width = WIDTH // heads if whole else draw(st.sampled_from([4, 8]))
    projection = "separate" if whole else one("separate", "separate", "qkv", "kv", "conv1d", "interleaved")
    shared = not whole and projection != "interleaved" and draw(st.booleans())
    ids = one("int64", "int64", "int32", "none")
    masks = ["none", "none", "bool", "int", "float", "ignore", "bool4"]
    mask = draw(st.sampled_from(masks if whole else [*masks, "additive4"]))
    places = ["none", "learned", "parameter", "sinusoidal"]
    positions = draw(st.sampled_from(places if whole else [*places, "rotary", "alibi", "relative"]))
    pool = ["none", "first", "mean", "last", "dense"]
    if mask in ("bool", "int", "float", "ignore"):
        pool += ["masked", "last-kept"]
    pooling = draw(st.sampled_from(pool))
    head = one("classes", "number", *(["tokens"] if pooling == "none" else []))
    tied = head == "tokens" and ids != "none" and draw(st.booleans())
    prompts = pooling != "none" and draw(st.integers(0, 7)) == 0
    extra = draw(st.one_of(st.just("none"), st.sampled_from(EXTRAS)))
    if ids == "none" and extra in ("check", "no-grad"):
        extra = "none"
    norm, feed_forward = one("post", "pre", "none", "sandwich"), one("plain", "gated", "none")
    bare = (
        norm == "pre" and feed_forward == "none"
    )  # its final norm may be the block's as well as the model's
    wide = one("float32", "float32", "float64")
    dropout = draw(st.sampled_from([0.0, 0.0, 0.1]))
    # a row that sees nothing is NaN where attention says so, and that is all there is to compare
    sees = not whole and not (kernel == "float32" and wide == "float64")
    case = Case(
        seed=draw(st.integers(0, 999)),
        batch=draw(st.sampled_from([2, 2, 3])),
        length=draw(st.sampled_from([6, 7, 8, 9])),
        dtype=wide,
        ids=ids,
        layers=draw(st.sampled_from([1, 1, 2])),
        heads=heads,
        key_heads=draw(st.sampled_from([n for n in (1, 2) if n <= heads])) if shared else heads,
        head_width=head_width,
        norm=norm,
        rms=draw(st.booleans()),
        projection=projection,
        bias=draw(st.booleans()),
        kernel=kernel,
        scale=one("scores", "scores", "query", "none"),
        query_norm=not whole and draw(st.integers(0, 3)) == 0,
        mask=mask,
        causal=one("none", "none", "places", "tril", "buffer", "flag"),
        window=draw(st.sampled_from([0, 0, 2])) if sees or mask == "none" else 0,
        masking="fill" if whole else one("fill", "fill", "add", "add-10000", "where"),
        empty_rows=sees and mask not in ("none", "additive4") and draw(st.integers(0, 3)) == 0,
        positions=positions,
        feed_forward=feed_forward,
        activation=one("gelu", "tanh-gelu", "relu", "silu", "tanh", "square", "quick"),
        memory=draw(st.integers(0, 5)) == 0,
        pooling=pooling,
        head="vector" if prompts else head,
        tied=tied,
        prompts=prompts,
        outputs=one("dict", "dict", "tensor", "tuple", "model-output", "nested"),
        dropout=0.0 if extra == "layer-drop-0" else dropout,  # which draws a number that decides nothing
        extra=extra,
        encoding=one("float", "float", "int8-token", "int8-tensor", "reference"),
        attention=draw(st.integers(0, 4)) == 0,
        weights=one("tensor", "tensor", "row"),
        tables=draw(st.booleans()),
        at=one("none", "none", "map", "context", "output"),
        variant="paper" if bare else one("paper", "paper", "reference"),
        layer_outputs=draw(st.booleans()) and not bare,
        until=one("capture", "prepare", "export") if until is None else until,
    )
    if until is None and case.until == "export" and wide == "float64":  # of which no file is written
        return replace(case, until="prepare")
    return case
