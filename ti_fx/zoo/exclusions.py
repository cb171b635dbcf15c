"""Some model types have no softmax attention; a table says what mixes their positions instead, and where.

Counted at run time (``ti_fx.zoo.count``), written down here with transformers 5.23.0. A type that can't be built at
all says why itself: ``ti_fx.zoo.build`` raises DataError.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Exclusion:
    """Why a model type is not among those with attention.

    Attributes:
        op: what mixes positions.
        reason: why that is no softmax of a product of two activations.
        source: file and line, below ``transformers/models``.
    """

    op: str
    reason: str
    source: str


_CONVOLUTION = "the model has convolutions and linears only"
_STATE = "a state is carried from step to step; there are no scores"
_LEARNED = "the softmax is over one linear's output, not over a product of two activations"

EXCLUSIONS: dict[str, Exclusion] = {
    "autoformer": Exclusion(
        "fft_rfft",
        "lags are weighed by autocorrelation, a product of spectra",
        "autoformer/modeling_autoformer.py:497",
    ),
    "bit": Exclusion("conv2d", _CONVOLUTION, "bit/modeling_bit.py:82"),
    "convnext": Exclusion("conv2d", _CONVOLUTION, "convnext/modeling_convnext.py:130"),
    "convnextv2": Exclusion("conv2d", _CONVOLUTION, "convnextv2/modeling_convnextv2.py:150"),
    "dac": Exclusion("conv1d", _CONVOLUTION, "dac/modeling_dac.py:119"),
    "dinov3_convnext": Exclusion("conv2d", _CONVOLUTION, "dinov3_convnext/modeling_dinov3_convnext.py:106"),
    "efficientnet": Exclusion("conv2d", _CONVOLUTION, "efficientnet/modeling_efficientnet.py:96"),
    "encodec": Exclusion("lstm", _STATE, "encodec/modeling_encodec.py:243"),
    "falcon_mamba": Exclusion("selective scan", _STATE, "falcon_mamba/modeling_falcon_mamba.py:299"),
    "fnet": Exclusion("fft_fftn", "tokens are mixed by a Fourier transform", "fnet/modeling_fnet.py:67"),
    "focalnet": Exclusion("conv2d", "contexts are gated convolutions", "focalnet/modeling_focalnet.py:245"),
    "hgnet_v2": Exclusion("conv2d", _CONVOLUTION, "hgnet_v2/modeling_hgnet_v2.py:80"),
    "mamba": Exclusion("selective scan", _STATE, "mamba/modeling_mamba.py:284"),
    "mamba2": Exclusion("selective scan", _STATE, "mamba2/modeling_mamba2.py:373"),
    "mobilenet_v1": Exclusion("conv2d", _CONVOLUTION, "mobilenet_v1/modeling_mobilenet_v1.py:29"),
    "mobilenet_v2": Exclusion("conv2d", _CONVOLUTION, "mobilenet_v2/modeling_mobilenet_v2.py:51"),
    "mobilevitv2": Exclusion("softmax", _LEARNED, "mobilevitv2/modeling_mobilevitv2.py:241"),
    "patchtsmixer": Exclusion("softmax", _LEARNED, "patchtsmixer/modeling_patchtsmixer.py:50"),
    "poolformer": Exclusion(
        "avg_pool2d", "patches are mixed by pooling", "poolformer/modeling_poolformer.py:64"
    ),
    "regnet": Exclusion("conv2d", _CONVOLUTION, "regnet/modeling_regnet.py:47"),
    "resnet": Exclusion("conv2d", _CONVOLUTION, "resnet/modeling_resnet.py:52"),
    "rwkv": Exclusion("exp", "a linear recurrence over exponentials of keys", "rwkv/modeling_rwkv.py:162"),
    "swiftformer": Exclusion("softmax", _LEARNED, "swiftformer/modeling_swiftformer.py:183"),
    "timm_backbone": Exclusion(
        "conv2d", "without timm its stand-in is a ResNet", "resnet/modeling_resnet.py:52"
    ),
    "univnet": Exclusion("conv1d", _CONVOLUTION, "univnet/modeling_univnet.py:72"),
    "xlstm": Exclusion("recurrence", _STATE, "xlstm/modeling_xlstm.py:73"),
    "yoso": Exclusion(
        "acos", "weights are expected hash collisions, a power of an angle", "yoso/modeling_yoso.py:109"
    ),
}
