"""Blocks of random networks: what the dry run knows, and a little that it does not."""

import random
from typing import Any, Callable, Dict, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = ['BLOCKS', 'WIDTHS', 'parameter', 'shape_of']

WIDTHS = (4, 6, 8, 12)

# kind -> (rank of its input and output, maker of the module from width and generator); all keep the width.
BLOCKS: Dict[str, Tuple[str, Callable[[int, random.Random], nn.Module]]] = {}


def block(name: str, rank: str) -> Callable[[Callable], Callable]:
    """Registers a kind of block for ``'map'`` (B, C, H, W), ``'tokens'`` (B, N, C) or ``'any'``."""

    def register(make: Callable) -> Callable:
        BLOCKS[name] = (rank, make)
        return make

    return register


class Apply(nn.Module):
    """A function of the input and of modules, parameters and buffers."""

    def __init__(self, function: Callable, **members: Any) -> None:
        super().__init__()
        self.function = function
        for name, member in members.items():
            if isinstance(member, torch.Tensor) and not isinstance(member, nn.Parameter):
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


def parameter(*shape: int, trained: bool = True) -> nn.Parameter:
    """Values that differ from entry to entry, and from 0."""
    return nn.Parameter(torch.rand(shape) + 0.5, requires_grad=trained)


def shape_of(rank: str, width: int) -> Tuple[int, ...]:
    """The shape of one number for each channel."""
    return (width, 1, 1) if rank == 'map' else (width,)


# -- any rank ----------------------------------------------------------------------------------------------------------

ELEMENTWISE = {
    'x * p': lambda x, p: x * p,
    'x + p': lambda x, p: x + p,
    'p - x': lambda x, p: p - x,
    'x / p': lambda x, p: x / (p.abs() + 1),
    'torch.multiply': torch.multiply,
    'torch.mul(out of order)': lambda x, p: torch.mul(p, x),
    'torch.subtract': torch.subtract,
    'torch.sub alpha': lambda x, p: torch.sub(x, p, alpha=0.3),
    'torch.rsub': lambda x, p: torch.rsub(x, p),
    'torch.divide': lambda x, p: torch.divide(x, p.abs() + 1),
    'torch.true_divide': lambda x, p: torch.true_divide(input=x, other=p.abs() + 1),
    'torch.pow': lambda x, p: torch.pow(x.sigmoid(), p.sigmoid()),
    'p ** x': lambda x, p: p.sigmoid() ** x.sigmoid(),
    'torch.float_power': lambda x, p: torch.float_power(x.sigmoid(), p.sigmoid()).to(x.dtype),
    'torch.addcdiv': lambda x, p: torch.addcdiv(x, p, x.abs() + 1),
    'torch.addcmul': lambda x, p: torch.addcmul(p, x, x, value=0.2),
    'torch.lerp': lambda x, p: torch.lerp(x, p, p.sigmoid()),
    'torch.where': lambda x, p: torch.where(x > 0, x, x * p),
    'torch.maximum': torch.maximum,
    'torch.fmin': torch.fmin,
    'torch.max of two': torch.max,
    'torch.clamp': lambda x, p: x.clamp(min=-p.abs()),
    'torch.hypot': torch.hypot,
    'torch.atan2': torch.atan2,
    'torch.logaddexp': torch.logaddexp,
    'torch.copysign': lambda x, p: torch.copysign(x, p - 1),
    'in place': lambda x, p: (x + 0).mul_(p).add_(p).sub_(p),
    'iadd': lambda x, p: sum_in_place(x, p),
    'expand_as': lambda x, p: x + p.expand_as(x),
    'expand': lambda x, p: x * p.expand(x.shape),
    'broadcast_tensors': lambda x, p: torch.stack(torch.broadcast_tensors(x, p)).sum(0),
    'stack': lambda x, p: torch.stack([x, p.expand_as(x)], -1).mean(-1),
    'gate of p': lambda x, p: x * p.sigmoid() + (1 + p) * x,
    'softplus gate': lambda x, p: x * F.softplus(p),
    'norm by p': lambda x, p: x * torch.rsqrt(p * p + 1e-6),
}


def sum_in_place(x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    x = x * 2
    x += p
    x *= p
    return x


for _name, _function in ELEMENTWISE.items():
    for _rank in ('map', 'tokens'):

        def _make(width: int, rng: random.Random, function: Any = _function, rank: str = _rank) -> nn.Module:
            p = parameter(*shape_of(rank, width), trained=rng.random() > 0.2)
            p = p if rng.random() > 0.2 else p.detach()  # a buffer
            return Apply(lambda self, x: function(x, self.p), p=p)

        block(f'{_name} ({_rank})', _rank)(_make)


@block('scale by one number', 'any')
def _(width: int, rng: random.Random) -> nn.Module:
    return Apply(lambda self, x: x * self.p, p=parameter(1))


@block('tied scales', 'any')
def _(width: int, rng: random.Random) -> nn.Module:
    linear = nn.Linear(1, 1)
    return nn.Sequential(
        Apply(lambda self, x: x * self.p, p=linear.bias), nn.GELU(), Apply(lambda self, x: x + self.p, p=linear.bias)
    )


@block('activation', 'any')
def _(width: int, rng: random.Random) -> nn.Module:
    return rng.choice([nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Hardswish, nn.LeakyReLU, nn.Identity])()


# -- maps --------------------------------------------------------------------------------------------------------------


@block('conv', 'map')
def _(width: int, rng: random.Random) -> nn.Module:
    hidden, kernel = rng.choice(WIDTHS), rng.choice((1, 3))
    return nn.Sequential(
        nn.Conv2d(width, hidden, kernel, padding=kernel // 2, bias=rng.random() > 0.5),
        nn.BatchNorm2d(hidden),
        nn.ReLU(),
        nn.Conv2d(hidden, width, 1),
    )


@block('grouped conv', 'map')
def _(width: int, rng: random.Random) -> nn.Module:
    return nn.Conv2d(width, width, 3, padding=1, groups=2, bias=rng.random() > 0.5)


@block('depthwise conv', 'map')
def _(width: int, rng: random.Random) -> nn.Module:
    return nn.Sequential(nn.Conv2d(width, width, 3, padding=1, groups=width), nn.Conv2d(width, width, 1))


@block('norm of maps', 'map')
def _(width: int, rng: random.Random) -> nn.Module:
    return rng.choice(
        [
            nn.BatchNorm2d(width),
            nn.GroupNorm(2, width),
            nn.GroupNorm(1, width),
            nn.InstanceNorm2d(width, affine=True),
            nn.BatchNorm2d(width, affine=False),
        ]
    )


@block('prelu', 'map')
def _(width: int, rng: random.Random) -> nn.Module:
    choice = rng.randrange(4)
    if choice == 0:
        return nn.PReLU(width)
    if choice == 1:
        return nn.PReLU()
    if choice == 2:
        return Apply(lambda self, x: F.prelu(x, self.p), p=parameter(width))
    return Apply(lambda self, x: x.prelu(self.p.abs()), p=parameter(width))


@block('squeeze and excitation', 'map')
def _(width: int, rng: random.Random) -> nn.Module:
    return Apply(
        lambda self, x: x * self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid(),
        fc1=nn.Conv2d(width, width // 2, 1),
        fc2=nn.Conv2d(width // 2, width, 1),
    )


@block('spatial mask', 'map')
def _(width: int, rng: random.Random) -> nn.Module:
    return Apply(lambda self, x: x * self.mask(x).sigmoid(), mask=nn.Conv2d(width, 1, 3, padding=1))


@block('conv GLU', 'map')
def _(width: int, rng: random.Random) -> nn.Module:
    return Apply(lambda self, x: F.glu(self.conv(x), dim=1), conv=nn.Conv2d(width, 2 * width, 1))


@block('halves of a map', 'map')
def _(width: int, rng: random.Random) -> nn.Module:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, dim=1)
        return torch.cat([self.conv(a), b], dim=1)

    return Apply(forward, conv=nn.Conv2d(width // 2, width // 2, 3, padding=1))


@block('shuffled halves', 'map')
def _(width: int, rng: random.Random) -> nn.Module:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        a, b = x.split(x.shape[1] // 2, dim=1)
        return self.conv(torch.concat((b, a), dim=1))

    return Apply(forward, conv=nn.Conv2d(width, width, 1))


@block('dense', 'map')
def _(width: int, rng: random.Random) -> nn.Module:
    join = rng.choice(
        [
            lambda a, b: torch.cat([a, b], 1),
            lambda a, b: torch.concatenate((a, b), dim=1),
            lambda a, b: torch.concat(tensors=(a, b), dim=-3),
        ]
    )
    grow = nn.Conv2d(width, 4, 3, padding=1)
    return Apply(lambda self, x: self.shrink(join(x, self.grow(x))), grow=grow, shrink=nn.Conv2d(width + 4, width, 1))


@block('weight norm by hand', 'map')
def _(width: int, rng: random.Random) -> nn.Module:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        norm = self.weight.square().sum((1, 2, 3), keepdim=True).sqrt()
        return F.conv2d(x, self.gain * self.weight / norm, self.bias, padding=1)

    return Apply(forward, weight=parameter(width, width, 3, 3), gain=parameter(width, 1, 1, 1), bias=parameter(width))


@block('weight standardised', 'map')
def _(width: int, rng: random.Random) -> nn.Module:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / (weight.std((1, 2, 3), keepdim=True, correction=0) + 1e-5), padding=1)

    return Apply(forward, weight=nn.Parameter(torch.randn(width, width, 3, 3)))


@block('tied convs', 'map')
def _(width: int, rng: random.Random) -> nn.Module:
    first, second = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
    second.weight = first.weight
    return nn.Sequential(first, nn.GELU(), second)


@block('conv used twice', 'map')
def _(width: int, rng: random.Random) -> nn.Module:
    return Apply(lambda self, x: self.conv(self.conv(x).relu()), conv=nn.Conv2d(width, width, 3, padding=1))


@block('conv by keyword', 'map')
def _(width: int, rng: random.Random) -> nn.Module:
    return Apply(
        lambda self, x: self.norm(input=self.conv(input=x)),
        conv=nn.Conv2d(width, width, 3, padding=1),
        norm=nn.BatchNorm2d(width),
    )


@block('einsum over maps', 'map')
def _(width: int, rng: random.Random) -> nn.Module:
    equation = rng.choice(['bchw,oc->bohw', 'b...,...->b...', 'oc,bchw->bohw', 'bchw, c o -> bohw'])
    if equation.startswith('b.'):
        return Apply(lambda self, x: torch.einsum('bchw,c->bchw', x, self.p), p=parameter(width))
    return Apply(
        lambda self, x: torch.einsum(equation, self.p, x) if equation[0] == 'o' else torch.einsum(equation, x, self.p),
        p=parameter(width, width),
    )


@block('transposed conv', 'map')
def _(width: int, rng: random.Random) -> nn.Module:
    return nn.ConvTranspose2d(width, width, 3, padding=1, groups=rng.choice((1, 2)))


@block('position map', 'map')
def _(width: int, rng: random.Random) -> nn.Module:
    return Apply(lambda self, x: x + F.interpolate(self.p, x.shape[-2:], mode='nearest'), p=parameter(1, width, 2, 2))


@block('shuffle channels', 'map')
def _(width: int, rng: random.Random) -> nn.Module:
    return Apply(lambda self, x: self.conv(x.flip(1)), conv=nn.Conv2d(width, width, 1))


@block('shift of channels', 'map')
def _(width: int, rng: random.Random) -> nn.Module:
    return Apply(lambda self, x: torch.roll(x, 1, dims=1), p=parameter(1))  # one entry is not one channel: refused


# -- tokens ------------------------------------------------------------------------------------------------------------


@block('linear', 'tokens')
def _(width: int, rng: random.Random) -> nn.Module:
    hidden = rng.choice(WIDTHS)
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width, bias=rng.random() > 0.5))


@block('norm of tokens', 'tokens')
def _(width: int, rng: random.Random) -> nn.Module:
    return rng.choice(
        [
            nn.LayerNorm(width),
            nn.LayerNorm(width, elementwise_affine=False),
            nn.RMSNorm(width),
            Apply(
                lambda self, x: F.layer_norm(x, x.shape[-1:], self.p, self.q), p=parameter(width), q=parameter(width)
            ),
            Apply(lambda self, x: F.layer_norm(x, x.shape[-1:], 1 + self.p), p=parameter(width)),
            Apply(
                lambda self, x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.p),
                p=parameter(width),
            ),
        ]
    )


@block('GLU', 'tokens')
def _(width: int, rng: random.Random) -> nn.Module:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)

    return Apply(forward, fc1=nn.Linear(width, 2 * width), fc2=nn.Linear(width, width))


@block('tokens and positions', 'tokens')
def _(width: int, rng: random.Random) -> nn.Module:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions[:, : x.shape[1] + 1]
        return tokens[:, 1:] + tokens[:, :1]

    return Apply(forward, token=parameter(1, 1, width), positions=parameter(1, 40, width))


@block('token broadcast by stored width', 'tokens')
def _(width: int, rng: random.Random) -> nn.Module:
    return Apply(
        lambda self, x: torch.cat([self.p.expand(x.shape[0], 1, width), x], 1)[:, 1:], p=parameter(1, 1, width)
    )


MATRICES = {
    'x @ W': (lambda x, w: x @ w, False),
    'x @ W.t()': (lambda x, w: x @ w.t(), True),
    'x @ W.mT': (lambda x, w: x @ w.mT, True),
    'matmul of a batch': (lambda x, w: torch.matmul(input=x, other=w[None]), False),
    'W on the left': (lambda x, w: (w @ x.transpose(1, 2)).transpose(1, 2), True),
    'einsum': (lambda x, w: torch.einsum('bnc,co->bno', x, w), False),
    'einsum with dots': (lambda x, w: torch.einsum('...c,oc->...o', [x, w]), True),
    'einsum without an arrow': (lambda x, w: torch.einsum('bnc,cz', x, w), False),
    'tensordot': (lambda x, w: torch.tensordot(x, w, dims=([2], [0])), False),
    'tensordot of 1': (lambda x, w: torch.tensordot(x, w, dims=1), False),
    'mm': (lambda x, w: torch.mm(x.flatten(0, 1), w).unflatten(0, x.shape[:2]), False),
    'bmm': (lambda x, w: torch.bmm(x, w.expand(x.shape[0], *w.shape)), False),
    'F.linear': (lambda x, w: F.linear(x, w), True),
    'F.linear of a transposed one': (lambda x, w: F.linear(x, w.t()), False),
    'W used again': (lambda x, w: (x @ w).relu() @ w, None),
    'W used again, transposed': (lambda x, w: (x @ w).relu() @ w.t(), None),
}
for _name, (_function, _rows) in MATRICES.items():

    def _make(width: int, rng: random.Random, function: Any = _function, rows: Any = _rows) -> nn.Module:
        hidden = width if rows is None else rng.choice(WIDTHS)
        w = parameter(hidden, width) if rows else parameter(width, hidden)
        return nn.Sequential(Apply(lambda self, x: function(x, self.w), w=w), nn.Linear(hidden, width))

    block(f'{_name} (matrix)', 'tokens')(_make)


@block('addmm', 'tokens')
def _(width: int, rng: random.Random) -> nn.Module:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if self.batched:
            return torch.baddbmm(self.b, x, self.w.expand(x.shape[0], *self.w.shape))
        rows = (
            torch.addmm(self.b, x.flatten(0, 1), self.w)
            if self.named
            else torch.addmm(input=self.b, mat1=x.flatten(0, 1), mat2=self.w)
        )
        return rows.unflatten(0, x.shape[:2])

    return Apply(
        forward, b=parameter(width), w=parameter(width, width), named=rng.random() < 0.5, batched=rng.random() < 0.3
    )


@block('bilinear', 'tokens')
def _(width: int, rng: random.Random) -> nn.Module:
    if rng.random() < 0.5:
        return Apply(lambda self, x: self.layer(x, x.mean(-1, keepdim=True)), layer=nn.Bilinear(width, 1, width))
    return Apply(lambda self, x: F.bilinear(x, x, self.w, self.b), w=parameter(width, width, width), b=parameter(width))


@block('low rank', 'tokens')
def _(width: int, rng: random.Random) -> nn.Module:
    members = dict(w=parameter(width, width), a=parameter(width, 2), b=parameter(2, width))
    return Apply(
        rng.choice(
            [
                lambda self, x: F.linear(x, self.w) + x @ self.b.t() @ self.a.t(),
                lambda self, x: F.linear(x, self.w + self.a @ self.b),
                lambda self, x: F.linear(x, self.a @ self.b) + x * self.w[0],
                lambda self, x: x @ (self.a @ self.b) + F.linear(x, self.w),
            ]
        ),
        **members,
    )


@block('linear by keyword', 'tokens')
def _(width: int, rng: random.Random) -> nn.Module:
    return Apply(
        lambda self, x: self.norm(input=self.fc(input=x)), fc=nn.Linear(width, width), norm=nn.LayerNorm(width)
    )


@block('token mixing', 'tokens')
def _(width: int, rng: random.Random) -> nn.Module:
    return Apply(lambda self, x: torch.einsum('bnc,mn->bmc', x, self.w), w=parameter(16, 16))


@block('tied embedding', 'tokens')
def _(width: int, rng: random.Random) -> nn.Module:
    codes = nn.Embedding(10, width)
    if rng.random() < 0.5:
        return Apply(lambda self, x: x + self.codes(torch.arange(x.shape[1], device=x.device) % 10), codes=codes)
    return Apply(  # the same table with and without a divisor: refused
        lambda self, x: (
            x
            + F.linear(x, self.codes.weight).softmax(-1).max(-1, keepdim=True)[0]
            + self.codes(torch.arange(x.shape[1], device=x.device) % 10)
        ),
        codes=codes,
    )
