# SPDX-License-Identifier: Apache-2.0
"""Torch's layers and losses in parallel passes: each trains as in sequential ones, or is refused in a sentence."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.optim import SGD

from msam_kernels import MicroBatchSAM
from msam_kernels.parallel import Refused
from plain import DEVICE

# Where vmap has no rule it runs one micro-batch after the other, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")

DOUBLE = torch.float64
TOLERANCE = 1e-9


class Calls(nn.Module):
    """A layer, called by a function."""

    def __init__(self, call, *layers):
        super().__init__()
        self.layers, self.call = nn.ModuleList(layers), call

    def forward(self, x):
        return self.call(x, *self.layers)


class After(nn.Module):
    """A layer after a linear one, so that something is trained, and its input depends on it."""

    def __init__(self, layer, shape):
        super().__init__()
        self.first, self.layer, self.shape = nn.Linear(8, torch.Size(shape).numel()), layer, shape

    def forward(self, x):
        out = self.layer(self.first(x).unflatten(1, self.shape))
        return out[0] if isinstance(out, tuple) else out


def attention(forward=lambda x, layer: layer(x, x, x)[0], **options):
    return lambda: Calls(forward, nn.MultiheadAttention(8, 2, batch_first=True, **options))


def masked(x, layer):
    padding = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    padding[:, 6:] = True
    causal = torch.ones(8, 8, dtype=torch.bool, device=x.device).triu(1)
    return layer(x, x, x, need_weights=False, key_padding_mask=padding, attn_mask=causal)[0]


def translated(x, layer):
    mask = nn.Transformer.generate_square_subsequent_mask(8, dtype=DOUBLE, device=x.device)
    return layer(x, x.flip(1), tgt_mask=mask)


ROWS, SEQUENCE, IMAGE = (8,), (8, 8), (4, 4, 4)
INPUTS = {1: (4, 8), 2: IMAGE, 3: (2, 4, 4, 4)}

# Name -> (what makes the layer, the shape of a sample).
LAYERS = {
    **{
        name: (getattr(nn, name), ROWS)
        for name in (
            *("ELU", "Hardshrink", "Hardsigmoid", "Hardtanh", "Hardswish", "LeakyReLU", "LogSigmoid", "PReLU", "ReLU"),
            *("ReLU6", "SELU", "CELU", "GELU", "Sigmoid", "SiLU", "Mish", "Softplus", "Softshrink", "Softsign", "Tanh"),
            *("Tanhshrink", "GLU"),
        )
    },
    **{name: (lambda name=name: getattr(nn, name)(1), ROWS) for name in ("Softmin", "Softmax", "LogSoftmax")},
    "Threshold": (lambda: nn.Threshold(0.1, 0.0), ROWS),
    "RReLU, evaluating": (lambda: nn.RReLU().eval(), ROWS),
    **{
        name.format(d): (lambda make=make, d=d: make(d, INPUTS[d][0]), INPUTS[d])
        for d in (1, 2, 3)
        for name, make in {
            "Conv{}d": lambda d, c: getattr(nn, f"Conv{d}d")(c, 4, 3, padding=1),
            "Conv{}d, reflected": lambda d, c: getattr(nn, f"Conv{d}d")(c, 4, 3, padding=1, padding_mode="reflect"),
            "Conv{}d, dilated": lambda d, c: getattr(nn, f"Conv{d}d")(c, 4, 3, padding="same", dilation=2, bias=False),
            "ConvTranspose{}d": lambda d, c: getattr(nn, f"ConvTranspose{d}d")(
                c, 4, 3, stride=2, groups=2, output_padding=1
            ),
            "MaxPool{}d": lambda d, c: getattr(nn, f"MaxPool{d}d")(2),
            "AvgPool{}d": lambda d, c: getattr(nn, f"AvgPool{d}d")(2),
            "AdaptiveAvgPool{}d": lambda d, c: getattr(nn, f"AdaptiveAvgPool{d}d")(3),
            "AdaptiveMaxPool{}d": lambda d, c: getattr(nn, f"AdaptiveMaxPool{d}d")(2),
            "LPPool{}d": lambda d, c: getattr(nn, f"LPPool{d}d")(2, 2),
            "BatchNorm{}d": lambda d, c: getattr(nn, f"BatchNorm{d}d")(c),
            "BatchNorm{}d, without statistics": lambda d, c: getattr(nn, f"BatchNorm{d}d")(
                c, track_running_stats=False
            ),
            "BatchNorm{}d, evaluating": lambda d, c: getattr(nn, f"BatchNorm{d}d")(c).eval(),
            "InstanceNorm{}d": lambda d, c: getattr(nn, f"InstanceNorm{d}d")(c, affine=True),
            "InstanceNorm{}d, with statistics": lambda d, c: getattr(nn, f"InstanceNorm{d}d")(
                c, affine=True, track_running_stats=True
            ),
            "ZeroPad{}d": lambda d, c: getattr(nn, f"ZeroPad{d}d")(1),
            "ReflectionPad{}d": lambda d, c: getattr(nn, f"ReflectionPad{d}d")(1),
            "ReplicationPad{}d": lambda d, c: getattr(nn, f"ReplicationPad{d}d")(1),
            "CircularPad{}d": lambda d, c: getattr(nn, f"CircularPad{d}d")(1),
            "ConstantPad{}d": lambda d, c: getattr(nn, f"ConstantPad{d}d")(1, 0.3),
        }.items()
    },
    "InstanceNorm twice": (
        lambda: Calls(lambda x, norm: norm(x) + norm(2 * x + 1), nn.InstanceNorm1d(4, track_running_stats=True)),
        INPUTS[1],
    ),
    "MaxUnpool2d": (lambda: Calls(lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2)), IMAGE),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), IMAGE),
    "LayerNorm": (lambda: nn.LayerNorm(8), SEQUENCE),
    "RMSNorm": (lambda: nn.RMSNorm(8), SEQUENCE),
    "LocalResponseNorm": (lambda: nn.LocalResponseNorm(2), IMAGE),
    "Unfold": (lambda: nn.Unfold(2), IMAGE),
    "Fold": (lambda: nn.Fold((3, 3), (2, 2)), (16, 4)),
    **{
        f"Upsample, {mode}": (lambda mode=mode: nn.Upsample(scale_factor=2, mode=mode), shape)
        for mode, shape in {
            **dict.fromkeys(("nearest", "bilinear", "bicubic", "area"), IMAGE),
            **{"linear": INPUTS[1], "trilinear": INPUTS[3]},
        }.items()
    },
    "PixelShuffle": (lambda: nn.PixelShuffle(2), IMAGE),
    "PixelUnshuffle": (lambda: nn.PixelUnshuffle(2), IMAGE),
    "ChannelShuffle": (lambda: nn.ChannelShuffle(2), IMAGE),
    "RNNCell": (lambda: nn.RNNCell(8, 6), ROWS),
    "RNNCell, relu": (lambda: nn.RNNCell(8, 6, nonlinearity="relu"), ROWS),
    "GRUCell": (lambda: nn.GRUCell(8, 6), ROWS),
    "LSTMCell": (lambda: nn.LSTMCell(8, 6), ROWS),
    "LSTMCell, twice": (lambda: Calls(lambda x, cell: cell(x, cell(x)), nn.LSTMCell(8, 6, bias=False)), ROWS),
    "Bilinear": (lambda: Calls(lambda x, layer: layer(x, x.flip(1)), nn.Bilinear(8, 8, 5)), ROWS),
    "Flatten and Unflatten": (lambda: nn.Sequential(nn.Identity(), nn.Flatten(), nn.Unflatten(1, (4, 16))), SEQUENCE),
    **{
        f"{name}, p = 0": (lambda name=name: getattr(nn, name)(0.0), IMAGE)
        for name in ("Dropout", "Dropout2d", "AlphaDropout", "FeatureAlphaDropout")
    },
    "MultiheadAttention": (attention(), SEQUENCE),
    "MultiheadAttention, without its weights": (attention(lambda x, m: m(x, x, x, need_weights=False)[0]), SEQUENCE),
    "MultiheadAttention, masked": (attention(masked), SEQUENCE),
    "MultiheadAttention, without biases": (attention(bias=False), SEQUENCE),
    "MultiheadAttention, more keys": (attention(add_bias_kv=True, add_zero_attn=True), SEQUENCE),
    "MultiheadAttention, of three widths": (
        attention(lambda x, m: m(x, x[..., :4], x[..., :6])[0], kdim=4, vdim=6),
        SEQUENCE,
    ),
    "TransformerEncoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2),
        SEQUENCE,
    ),
    "Transformer": (lambda: Calls(translated, nn.Transformer(8, 2, 1, 1, 16, 0.0, batch_first=True)), SEQUENCE),
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(8, 5)), ROWS),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(8, 5)), ROWS),
    "ParameterList": (
        lambda: Calls(lambda x, p: x * p[0] + p[1], nn.ParameterList([torch.ones(8), torch.ones(8)])),
        ROWS,
    ),
    "ParameterDict": (lambda: Calls(lambda x, p: x * p["a"], nn.ParameterDict({"a": torch.ones(8)})), ROWS),
}


def words(**options):
    return lambda: nn.Embedding(11, 4, **options)


WORDS = {
    "Embedding": words(),
    "Embedding, padded": words(padding_idx=2),
    "Embedding, by frequency": words(scale_grad_by_freq=True),
    **{f"EmbeddingBag, {mode}": lambda mode=mode: nn.EmbeddingBag(11, 4, mode=mode) for mode in ("sum", "mean", "max")},
    "EmbeddingBag, padded": lambda: nn.EmbeddingBag(11, 4, padding_idx=2),
}

W = torch.linspace(0.5, 1.5, 5, dtype=DOUBLE)


def cross_entropy(of=lambda x, y: (x, y), **options):
    def loss(x, y):
        o = {k: v.to(x.device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        return F.cross_entropy(*of(x, y), **o).mean()

    return loss


def soft(x, y):
    return x, F.one_hot(y, 5).to(x) * 0.9 + 0.02


def pixels(x, y):
    return torch.stack([x, 2 * x], 2).unsqueeze(3), torch.stack([y, y.flip(0)], 1).unsqueeze(2)


def nll(**options):
    return lambda x, y: F.nll_loss(x.log_softmax(1), y, **options)


# Of outputs [samples, 5] and classes.
OF_CLASSES = {
    **{
        f"cross_entropy{name}": cross_entropy(**options)
        for name, options in {
            "": {},
            ", weighted": {"weight": W},
            ", smoothed": {"label_smoothing": 0.1},
            ", weighted and smoothed": {"weight": W, "label_smoothing": 0.1},
            ", with ignored": {"ignore_index": 2},
            ", smoothed, with ignored": {"label_smoothing": 0.1, "ignore_index": 2},
            ", weighted and smoothed, with ignored": {"weight": W, "label_smoothing": 0.1, "ignore_index": 2},
            ", weighted and smoothed, summed": {"weight": W, "label_smoothing": 0.1, "reduction": "sum"},
            ", weighted and smoothed, by sample": {"weight": W, "label_smoothing": 0.1, "reduction": "none"},
            ", by sample": {"reduction": "none"},
            " of shares": {"of": soft},
            " of shares, weighted and smoothed": {"of": soft, "weight": W, "label_smoothing": 0.1},
            " of pixels": {"of": pixels},
            " of pixels, weighted": {"of": pixels, "weight": W},
            " of pixels, weighted and smoothed": {"of": pixels, "weight": W, "label_smoothing": 0.2, "ignore_index": 1},
        }.items()
    },
    "nll_loss": nll(),
    "nll_loss, with ignored": nll(ignore_index=1),
    "multi_margin_loss": F.multi_margin_loss,
    "multilabel_margin_loss": lambda x, y: F.multilabel_margin_loss(x, torch.stack([y, *[-torch.ones_like(y)] * 4], 1)),
    "ctc_loss": lambda x, y: F.ctc_loss(
        torch.stack([x, 2 * x, 3 * x]).log_softmax(-1), y[:, None] % 4 + 1, (3,) * len(y), (1,) * len(y)
    ),
}
# And of numbers [samples, 5].
OF_NUMBERS = {
    **{
        name: getattr(F, name)
        for name in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "pairwise_distance", "cosine_similarity")
    },
    "soft_margin_loss": lambda x, y: F.soft_margin_loss(x, y.sign()),
    "binary_cross_entropy": lambda x, y: F.binary_cross_entropy(x.sigmoid(), y.sigmoid(), W.to(x)),
    "binary_cross_entropy_with_logits": lambda x, y: F.binary_cross_entropy_with_logits(
        x, y.sigmoid(), W.to(x), pos_weight=W.to(x)
    ),
    "kl_div": lambda x, y: F.kl_div(x.log_softmax(1), y.softmax(1), reduction="batchmean"),
    "kl_div of logarithms": lambda x, y: F.kl_div(x.log_softmax(1), y.log_softmax(1), log_target=True, reduction="sum"),
    "poisson_nll_loss": lambda x, y: F.poisson_nll_loss(x, y.exp() * 2, full=True),
    "hinge_embedding_loss": lambda x, y: F.hinge_embedding_loss(x, y.sign()),
    "margin_ranking_loss": lambda x, y: F.margin_ranking_loss(x[:, 0], x[:, 1], y[:, 0].sign()),
    "multilabel_soft_margin_loss": lambda x, y: F.multilabel_soft_margin_loss(x, (y > 0).to(x)),
    "cosine_embedding_loss": lambda x, y: F.cosine_embedding_loss(x, y, y[:, 0].sign()),
    "triplet_margin_loss": lambda x, y: F.triplet_margin_loss(x, y, y.flip(0)),
    "triplet_margin_with_distance_loss": lambda x, y: F.triplet_margin_with_distance_loss(x, y, y.flip(0)),
    "cdist": torch.cdist,
    "pdist": lambda x, y: F.pdist(x),
    "normalize": lambda x, y: F.normalize(x) * y,
    "grid_sample": lambda x, y: F.grid_sample(
        x.view(-1, 1, 1, 5), y[:, :4].tanh().view(-1, 2, 1, 2), align_corners=False
    ),
}


def weighted(out):
    """A loss in which every element counts differently."""
    weights = torch.linspace(-1, 1, out[0].numel(), dtype=out.dtype, device=out.device)
    return (out.flatten(1) @ weights + 0.1).square().mean()


def assert_trains_as_sequentially(make, batches, loss):
    torch.manual_seed(0)
    model, found = make().to(DEVICE, DOUBLE), []
    for way in (False, True):
        twin = copy.deepcopy(model)
        opt = MicroBatchSAM(SGD(twin.parameters(), 0.1), 0.05, num_micro_batches=3, model=twin, parallel=way)
        losses = [opt.train_step(lambda *part, twin=twin: loss(twin, *part), *batch) for batch in batches]
        found.append([*losses, *twin.state_dict().values()])
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    for actual, expected in zip(*found, strict=True):
        assert (actual - expected).abs().max() <= TOLERANCE * expected.abs().max()


def numbers(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(12, *shape, generator=generator, dtype=DOUBLE).to(DEVICE) for _ in range(2)]


def integers(most, shape=(), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(most, (12, *shape), generator=generator).to(DEVICE) for _ in range(2)]


@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS)
def test_a_layer_trains_as_in_sequential_passes(layer, shape):
    batches = [(x,) for x in numbers((8,))]
    assert_trains_as_sequentially(lambda: After(layer(), shape), batches, lambda m, x: weighted(m(x)))


@pytest.mark.parametrize("layer", WORDS.values(), ids=WORDS)
def test_words_train_as_in_sequential_passes(layer):
    assert_trains_as_sequentially(layer, [(x,) for x in integers(11, (5,))], lambda m, x: weighted(m(x)))


@pytest.mark.parametrize("loss", OF_CLASSES.values(), ids=OF_CLASSES)
def test_a_loss_of_classes_trains_as_in_sequential_passes(loss):
    batches = list(zip(numbers((8,)), integers(5), strict=True))
    assert_trains_as_sequentially(lambda: nn.Linear(8, 5), batches, lambda m, x, y: loss(m(x), y))


@pytest.mark.parametrize("loss", OF_NUMBERS.values(), ids=OF_NUMBERS)
def test_a_loss_of_numbers_trains_as_in_sequential_passes(loss):
    batches = list(zip(numbers((8,)), numbers((5,), 1), strict=True))
    assert_trains_as_sequentially(lambda: nn.Linear(8, 5), batches, lambda m, x, y: loss(m(x), y).mean())


def test_a_leak_that_is_drawn_is_within_its_bounds_for_every_micro_batch():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.RReLU(0.2, 0.3)).to(DEVICE, DOUBLE)
    nn.init.constant_(model[0].weight, -1.0)
    seen = []
    opt = MicroBatchSAM(SGD(model.parameters(), 0.0), 0.0, num_micro_batches=2, model=model, parallel=True)
    losses = lambda x: (seen.append(model(x)), weighted(model(x)))[1]  # noqa: E731
    opt.train_step(losses, torch.ones(400, 1, dtype=DOUBLE, device=DEVICE))
    norms = opt.stats.grad_norm
    assert norms[0] != norms[1]

    def bounded(x):
        out = model(x)
        return F.relu(out + 0.2).sum() + F.relu(-0.3 - out).sum() + 0 * out.mean()

    assert opt.train_step(bounded, torch.ones(400, 1, dtype=DOUBLE, device=DEVICE)) == 0


# Name -> (layer, the shape of a sample, what the refusal says).
NOT = {
    **{
        name: (lambda name=name: getattr(nn, name)(8, 6, batch_first=True), SEQUENCE, f"layer, a {name}, cannot run")
        for name in ("RNN", "GRU", "LSTM")
    },
    "spectral_norm": (lambda: parametrizations.spectral_norm(nn.Linear(8, 5)), ROWS, "a _SpectralNorm, cannot run"),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(4), INPUTS[1], "layer, a SyncBatchNorm, cannot run"),
    "AdaptiveLogSoftmaxWithLoss": (
        lambda: Calls(
            lambda x, layer: layer(x, x.argmax(1)).loss.view(1, 1),
            nn.AdaptiveLogSoftmaxWithLoss(8, 10, [3, 6], div_value=2.0),
        ),
        ROWS,
        "a AdaptiveLogSoftmaxWithLoss, cannot run",
    ),
    "gaussian_nll_loss": (
        lambda: Calls(lambda x: F.gaussian_nll_loss(x, x.detach() + 1, (2 * x).exp()).view(1, 1)),
        ROWS,
        "cannot run .*data-dependent",
    ),
}


@pytest.mark.parametrize(("layer", "shape", "match"), NOT.values(), ids=NOT)
def test_what_no_vmap_can_is_refused_in_a_sentence(layer, shape, match):
    batches = [(x,) for x in numbers((8,))]
    with pytest.raises(Refused, match=match) as refusal:
        assert_trains_as_sequentially(lambda: After(layer(), shape), batches, lambda m, x: weighted(m(x)))
    assert str(refusal.value).endswith("train it sequentially, with parallel=False")
