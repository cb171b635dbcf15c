"""A zoo of transformers in plain PyTorch, one factory each: ``name() -> (model, example, another example)``.

``BLOCKS`` has each factory's number of attention blocks, counted by hand: 0 where what looks like attention is none
(no softmax, or no product with values).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import zoo_attention as variants
import zoo_blocks as towers
import zoo_parts as parts
from torch import Tensor, nn
from zoo_parts import HEADS, SIZE, Attention, Classifier, Features, LanguageModel, PostNorm, PreNorm

Zoo = tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]
Factory = Callable[[], Zoo]

FACTORIES: dict[str, Factory] = {}
BLOCKS: dict[str, int] = {}


def blocks(count: int) -> Callable[[Factory], Factory]:
    """List a factory with its number of attention blocks."""

    def listed(factory: Factory) -> Factory:
        FACTORIES[factory.__name__] = factory
        BLOCKS[factory.__name__] = count
        return factory

    return listed


def _text(make: Callable[[], nn.Module]) -> Zoo:
    return parts.drawn(make), parts.text(2, 7), parts.text(3, 10)


def _tokens(make: Callable[[], nn.Module]) -> Zoo:
    both = [{"tokens": parts.text(*sizes)["tokens"]} for sizes in ((2, 7), (3, 10))]
    return parts.drawn(make), both[0], both[1]


def _features(make: Callable[[], nn.Module], *lengths: int) -> Zoo:
    first, second = lengths or (6, 9)
    return parts.drawn(make), {"features": parts.features(2, first)}, {"features": parts.features(3, second)}


def _two(attention: Callable[..., nn.Module], **options: Any) -> Zoo:
    """A classifier of two pre-norm blocks with this attention."""
    return _text(lambda: Classifier(*(PreNorm(attention(**options)) for _ in range(2))))


# ---- torch.nn's own layers


def _encoder(nested: bool = False, **options: Any) -> Zoo:
    options = {"batch_first": True, **options}
    layer = nn.TransformerEncoderLayer
    return _text(
        lambda: parts.TorchEncoder(
            nn.TransformerEncoder(layer(SIZE, HEADS, 48, **options), 2, enable_nested_tensor=nested),
            **options,
        )
    )


@blocks(2)
def torch_encoder() -> Zoo:
    return _encoder()


@blocks(2)
def torch_encoder_fast_path() -> Zoo:
    return _encoder(nested=True)


@blocks(2)
def torch_encoder_norm_first() -> Zoo:
    return _encoder(norm_first=True, activation="gelu")


@blocks(2)
def torch_encoder_sequence_first() -> Zoo:
    return _encoder(batch_first=False, bias=False)


def _decoder(**options: Any) -> Zoo:
    options = {"batch_first": True, **options}
    causal = options.pop("causal", None)

    def make() -> nn.Module:
        layer = nn.TransformerDecoderLayer(SIZE, HEADS, 48, **options)
        tower = nn.TransformerDecoder(layer, 2, norm=nn.LayerNorm(SIZE))
        return parts.TorchDecoder(tower, causal=causal, **options)

    examples = [
        {"tokens": parts.text(*sizes)["tokens"], "memory": parts.features(sizes[0], sizes[1] + 2)}
        for sizes in ((2, 6), (3, 9))
    ]
    return parts.drawn(make), examples[0], examples[1]


@blocks(4)
def torch_decoder() -> Zoo:
    return _decoder()


@blocks(4)
def torch_decoder_norm_first() -> Zoo:
    return _decoder(norm_first=True)


@blocks(4)
def torch_decoder_sequence_first() -> Zoo:
    return _decoder(batch_first=False)


@blocks(4)
def torch_decoder_causal_flag() -> Zoo:
    return _decoder(causal=True)


@blocks(6)
def torch_transformer() -> Zoo:
    """nn.Transformer: encoder, decoder and their final norms."""
    examples = [
        {"source": parts.features(batch, length + 2), "target": parts.features(batch + 10, length)[:batch]}
        for batch, length in ((2, 6), (3, 9))
    ]
    return parts.drawn(variants.WholeTransformer), examples[0], examples[1]


@blocks(2)
def torch_attention() -> Zoo:
    """nn.MultiheadAttention with a packed in_proj, returning its map."""
    return _two(variants.TorchSelf)


@blocks(2)
def torch_attention_fused() -> Zoo:
    """The same without the map: scaled_dot_product_attention."""
    return _two(variants.TorchSelf, weights=False)


@blocks(2)
def torch_attention_extra_keys() -> Zoo:
    """With a learned key and value, and a zero one, appended."""
    return _two(variants.TorchSelf, add_bias_kv=True, add_zero_attn=True)


@blocks(2)
def torch_cross_attention() -> Zoo:
    """nn.MultiheadAttention with keys and values of other widths: three separate projections."""
    examples = [
        {
            "features": parts.features(batch, length),
            "keys": parts.features(batch, length + 3, 20),
            "values": parts.features(batch, length + 3, 12),
        }
        for batch, length in ((2, 5), (3, 7))
    ]
    return parts.drawn(variants.TorchCross), examples[0], examples[1]


# ---- where the block's norms are


@blocks(2)
def pre_norm() -> Zoo:
    return _two(Attention)


@blocks(2)
def post_norm() -> Zoo:
    return _text(lambda: Classifier(PostNorm(Attention()), PostNorm(Attention())))


@blocks(2)
def parallel() -> Zoo:
    return _text(lambda: Classifier(parts.Parallel(Attention()), parts.Parallel(Attention())))


@blocks(2)
def sandwich() -> Zoo:
    return _text(lambda: Classifier(parts.Sandwich(Attention()), parts.Sandwich(Attention())))


@blocks(2)
def rms_norm() -> Zoo:
    """Root mean square norms written by hand, as in Llama."""
    return _text(lambda: towers.with_rms_norms(Classifier(PreNorm(Attention()), PreNorm(Attention()))))


# ---- what is added to or done with the scores


@blocks(2)
def boolean_mask() -> Zoo:
    return _two(variants.BooleanMask)


@blocks(2)
def infinite_mask() -> Zoo:
    return _two(variants.InfiniteMask)


@blocks(2)
def alibi() -> Zoo:
    return _two(variants.Alibi)


@blocks(2)
def rotary() -> Zoo:
    return _two(variants.Rotary)


@blocks(2)
def relative_bias() -> Zoo:
    return _two(variants.RelativeBias)


@blocks(2)
def qk_norm() -> Zoo:
    return _two(variants.QueryKeyNorm)


@blocks(2)
def cosine() -> Zoo:
    """Cosine similarity times a learned temperature (Swin v2)."""
    return _two(variants.Cosine)


@blocks(2)
def softcapped() -> Zoo:
    return _two(variants.Softcapped)


@blocks(2)
def sinks() -> Zoo:
    return _two(variants.Sinks)


@blocks(2)
def talking_heads() -> Zoo:
    return _two(variants.TalkingHeads)


@blocks(2)
def disentangled() -> Zoo:
    return _two(variants.Disentangled)


@blocks(4)
def differential() -> Zoo:
    """Two maps a block, one subtracted from the other: two softmaxes, two blocks."""
    return _two(variants.Differential)


@blocks(2)
def float32_softmax() -> Zoo:
    return _two(variants.Float32Softmax)


@blocks(2)
def keys_first() -> Zoo:
    """The map is written transposed: softmax over dimension -2, and V's transpose times it."""
    return _two(variants.KeysFirst)


@blocks(2)
def handwritten_softmax() -> Zoo:
    """exp(x - max) / sum."""
    return _two(variants.HandwrittenSoftmax)


@blocks(0)
def softmax_one() -> Zoo:
    """exp(x) / (1 + sum): an attention that may read nothing, and no softmax."""
    return _two(variants.SoftmaxOne)


# ---- how the products are written


@blocks(2)
def einsum() -> Zoo:
    return _two(variants.Einsum)


@blocks(2)
def einsum_projections() -> Zoo:
    """Projections are einsums with three-dimensional weights (JAX style)."""
    return _two(variants.EinsumProjections)


@blocks(2)
def bmm() -> Zoo:
    return _two(variants.Bmm)


@blocks(2)
def baddbmm() -> Zoo:
    return _two(variants.Baddbmm)


@blocks(2)
def elementwise() -> Zoo:
    """The context as a sum over a broadcast product of map and V."""
    return _two(variants.Elementwise)


@blocks(2)
def sdpa_grouped() -> Zoo:
    return _tokens(lambda: LanguageModel(*(PreNorm(variants.Grouped(fused=True)) for _ in range(2))))


@blocks(2)
def grouped() -> Zoo:
    return _two(variants.Grouped)


@blocks(2)
def multi_query() -> Zoo:
    return _two(variants.Grouped, groups=1)


@blocks(2)
def grouped_by_reshape() -> Zoo:
    """Queries of a group are one batch of products; keys are never repeated."""
    return _two(variants.GroupedByReshape)


@blocks(2)
def sdpa_causal() -> Zoo:
    return _tokens(lambda: LanguageModel(*(PreNorm(variants.Fused(is_causal=True)) for _ in range(2))))


@blocks(2)
def sdpa_masked() -> Zoo:
    return _two(variants.Fused, dropout_p=0.1, scale=0.5)


# ---- how Q, K and V are projected


@blocks(2)
def fused_chunk() -> Zoo:
    return _two(variants.FusedProjection, way="chunk")


@blocks(2)
def fused_split() -> Zoo:
    return _two(variants.FusedProjection, way="split")


@blocks(2)
def fused_unbind() -> Zoo:
    return _two(variants.FusedProjection, way="unbind")


@blocks(2)
def fused_permute() -> Zoo:
    return _two(variants.FusedProjection, way="permute")


@blocks(2)
def fused_slices() -> Zoo:
    return _two(variants.FusedProjection, way="slices")


@blocks(2)
def fused_by_head() -> Zoo:
    """Each head's Q, K and V lie side by side (GPT-NeoX)."""
    return _two(variants.FusedProjection, way="by_head")


@blocks(2)
def fused_key_value() -> Zoo:
    return _two(variants.FusedKeyValue)


@blocks(2)
def transposed_linear() -> Zoo:
    """GPT-2's Conv1D: addmm with the weight as (inputs, outputs)."""
    return _two(variants.TransposedLinears)


@blocks(2)
def convolved() -> Zoo:
    """Projections are convolutions of width 1."""
    return _two(variants.Convolved)


@blocks(2)
def without_output() -> Zoo:
    return _two(variants.WithoutOutput)


@blocks(2)
def latent() -> Zoo:
    """Keys and values from one low-rank projection (MLA)."""
    return _two(variants.Latent)


@blocks(2)
def weight_norm() -> Zoo:
    return _two(variants.WeightNormed)


@blocks(2)
def lora() -> Zoo:
    return _two(variants.Lora)


# ---- what the blocks are made into


@blocks(2)
def tied_head() -> Zoo:
    return _tokens(lambda: LanguageModel(*(PreNorm(Attention(causal=True)) for _ in range(2)), tied=True))


@blocks(3)
def shared_layers() -> Zoo:
    """One layer, called three times (ALBERT)."""
    return _text(lambda: Classifier(*([PostNorm(Attention())] * 3)))


@blocks(2)
def windowed() -> Zoo:
    return _features(lambda: Features(*(towers.Windowed(shift=0) for _ in range(2))), 8, 8)


@blocks(2)
def shifted_windows() -> Zoo:
    return _features(lambda: Features(towers.Windowed(shift=0), towers.Windowed(shift=2)), 8, 8)


@blocks(1)
def learned_queries() -> Zoo:
    return _features(lambda: towers.LearnedQueries(projected=False))


@blocks(1)
def learned_queries_projected() -> Zoo:
    return _features(lambda: towers.LearnedQueries(projected=True))


@blocks(3)
def perceiver() -> Zoo:
    """Learned latents read the input, then each other, then the input again."""
    return _features(towers.Perceiver)


@blocks(2)
def cross_attention_stack() -> Zoo:
    both = [
        {"features": parts.features(batch, length), "memory": parts.features(batch + 10, length + 3)[:batch]}
        for batch, length in ((2, 5), (3, 7))
    ]
    return parts.drawn(towers.CrossStack), both[0], both[1]


@blocks(2)
def returns_maps() -> Zoo:
    """Every block's map is an output, too."""
    return _features(towers.ReturnsMaps)


@blocks(2)
def experts() -> Zoo:
    """A top-k softmax router over dense experts in the place of the feed-forward."""
    return _text(lambda: Classifier(*(towers.with_experts(PreNorm(Attention())) for _ in range(2))))


@blocks(2)
def softmax_pooling() -> Zoo:
    """A softmax over learned token weights pools the sequence: no product of two projections."""
    return _features(towers.SoftmaxPooling)


@blocks(0)
def linear_attention() -> Zoo:
    """elu(q) + 1 and elu(k) + 1 without softmax: there is no map."""
    return _two(towers.LinearAttention)


@blocks(0)
def mixer() -> Zoo:
    """Token mixing by a linear layer over positions: no attention."""
    return _features(lambda: Features(towers.Mixer(), towers.Mixer()), 6, 6)
