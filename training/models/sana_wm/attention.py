"""Self-attention of both kinds, each with its camera branch, and cross-attention.

Legend: F latent frames of a chunk, P tokens of a frame, H heads, D head_dim, E text length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from longtake.plugins.gdn_scan.reference import feature_map, normalised
from longtake.plugins.pointwise import apply_rope
from longtake.plugins.short_conv.reference import TAIL
from longtake.training.models.sana_wm.config import SanaWMConfig
from longtake.training.models.sana_wm.kit import Kit, full_precision

LayerAttend = Callable[[bool, Tensor, Tensor, Tensor], Tensor]
OPEN_GATE = 1.2785  # silu of it is 1
FIRST_BETA, FIRST_DECAY = 5.0, -5.0


@dataclass
class Camera:
    """rays, inverse: world to each token's ray and back, fp32 [..., F,P,4,4]. rope: of the camera's half, [F,P,D/4]."""

    rays: Tensor
    inverse: Tensor
    rope: tuple[Tensor, Tensor]


@dataclass
class Carried:
    """What a block leaves for the next chunk: ffn [..., P,dim]; of a gated delta network also state fp32 [..., 2,H,D,D]
    (main, camera), norm fp32 [..., H,D], conv [..., 1 or 2, 3,P,dim]."""

    ffn: Tensor
    state: Tensor | None = None
    norm: Tensor | None = None
    conv: Tensor | None = None


class RMSNorm(nn.Module):
    """In fp32, the weight too."""

    def __init__(self, dim: int, eps: float, weight: float = 1.0) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.full((dim,), weight))

    def forward(self, x: Tensor) -> Tensor:
        return normalised(x, self.weight, self.eps).to(x.dtype)


def rows(linear: nn.Module, x: Tensor) -> Tensor:
    """`linear` of the last dimension of x as of one matrix: what recipes quantize is a Gemm in the exported graph then."""
    out: Tensor = linear(x.flatten(0, -2))
    return out.unflatten(0, x.shape[:-1])


class ShortConv(nn.Module):
    """The filter [dim, 4] of a short convolution, the present frame's tap last."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim, 4))


class SelfAttention(nn.Module):
    """A gated delta network, or softmax attention; `forward` is told of which layer."""

    def __init__(self, config: SanaWMConfig, layer: int) -> None:
        super().__init__()
        dim = config.dim
        self.config, self.softmax, self.clip = config, config.softmax(layer), config.clips(layer)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj, self.output_gate = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = RMSNorm(dim, config.norm_eps), RMSNorm(dim, config.norm_eps)
        self.q_proj_cam, self.k_proj_cam, self.v_proj_cam, self.out_proj_cam = (nn.Linear(dim, dim) for _ in range(4))
        self.q_norm_cam, self.k_norm_cam = RMSNorm(dim, config.norm_eps), RMSNorm(dim, config.norm_eps)
        if not self.softmax:
            self.beta_proj, self.gate_proj = nn.Linear(dim, config.heads), nn.Linear(dim, config.heads)
            self.A_log, self.dt_bias = nn.Parameter(torch.zeros(config.heads)), nn.Parameter(torch.zeros(config.heads))
            self.conv_k, self.conv_k_cam = ShortConv(dim), ShortConv(dim)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Convolutions that pass the present frame, gates that are open, and a camera branch that adds nothing."""
        nn.init.zeros_(self.output_gate.weight)
        nn.init.constant_(self.output_gate.bias, OPEN_GATE)
        nn.init.zeros_(self.out_proj_cam.weight)
        for mine, part in zip((self.q_proj_cam, self.k_proj_cam, self.v_proj_cam), self.qkv.weight.chunk(3)):
            mine.weight.copy_(part)
        if not self.softmax:
            for conv in (self.conv_k, self.conv_k_cam):
                conv.weight.zero_()
                conv.weight[:, -1] = 1
            for linear, bias in ((self.beta_proj, FIRST_BETA), (self.gate_proj, 0.0)):
                nn.init.zeros_(linear.weight)
                nn.init.constant_(linear.bias, bias)
            nn.init.zeros_(self.A_log)
            nn.init.constant_(self.dt_bias, FIRST_DECAY)

    def split(self, x: Tensor) -> Tensor:
        """[..., dim] to [..., H, D]."""
        return x.unflatten(-1, (self.config.heads, -1))

    def forward(
        self, u: Tensor, rope: tuple[Tensor, Tensor], camera: Camera, attend: LayerAttend, carried: Carried, kit: Kit
    ) -> tuple[Tensor, Carried]:
        """u [..., F,P,dim]; the result, and what is left for the next chunk (its ffn is the block's to fill in)."""
        if self.softmax:
            main, turned, kept = *self._softmax(u, rope, camera, attend, kit), Carried(carried.ffn)
        else:
            main, turned, kept = self._delta(u, rope, camera, carried, kit)
        side = self.out_proj_cam(kit.ray_restore(turned, camera.rays, *camera.rope).flatten(-2))
        gate = functional.silu(rows(self.output_gate, u).float())
        return rows(self.proj, ((main.flatten(-2).float() + side.float()) * gate).to(u.dtype)), kept

    def _camera_qkv(
        self, u: Tensor, tail: Tensor | None, camera: Camera, kit: Kit
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """What ray_prepare makes of u, and the keys as projected; `tail`: of those before u, None: no short convolution."""
        k = raw = self.k_proj_cam(u)
        if tail is not None:
            k = kit.short_conv(k, tail, self.conv_k_cam.weight)
        prepare = kit.ray_prepare_softmax if self.softmax else kit.ray_prepare_gdn
        out: tuple[Tensor, ...] = prepare(
            self.split(self.q_proj_cam(u)),
            self.split(k),
            self.split(self.v_proj_cam(u)),
            self.q_norm_cam.weight,
            self.k_norm_cam.weight,
            camera.rays,
            camera.inverse,
            *camera.rope,
            self.clip,
        )
        return out, raw

    def _softmax(
        self, u: Tensor, rope: tuple[Tensor, Tensor], camera: Camera, attend: LayerAttend, kit: Kit
    ) -> tuple[Tensor, Tensor]:
        q, k, v = rows(self.qkv, u).chunk(3, -1)
        q, k = (apply_rope(self.split(norm(x)), *rope) for norm, x in ((self.q_norm, q), (self.k_norm, k)))
        (cq, ck, cv), _ = self._camera_qkv(u, None, camera, kit)
        return attend(False, q, k, self.split(v)), attend(True, cq, ck, cv)

    def _delta(
        self, u: Tensor, rope: tuple[Tensor, Tensor], camera: Camera, carried: Carried, kit: Kit
    ) -> tuple[Tensor, Tensor, Carried]:
        assert carried.state is not None and carried.norm is not None and carried.conv is not None
        q, raw, v = rows(self.qkv, u).chunk(3, -1)
        tails = carried.conv.unbind(-4)
        k = kit.short_conv(raw, tails[0], self.conv_k.weight)
        beta, gate = self._gates(u)
        scale = (self.config.head_dim * u.shape[-2]) ** -0.5
        q = self.split(feature_map(q, self.q_norm.weight, self.q_norm.eps))
        k = self.split(feature_map(k, self.k_norm.weight, self.k_norm.eps, scale))
        states = carried.state.unbind(-4)
        main, state, norm = kit.gdn_scan(q, k, self.split(v), beta, gate, *rope, states[0], carried.norm)
        tail = tails[1] if len(tails) > 1 else torch.zeros_like(tails[0])
        (cq, ck, cv, growth), camera_raw = self._camera_qkv(u, tail, camera, kit)
        beta = beta / growth.mean(-2, keepdim=True).clamp(min=1.0)
        turned, camera_state = kit.gdn_scan_camera(cq, ck, cv, beta, gate, states[1])
        last = [x[..., -TAIL:, :, :] for x in (raw, camera_raw)[: len(tails)]]
        return main, turned, Carried(carried.ffn, torch.stack((state, camera_state), -4), norm, torch.stack(last, -4))

    def _gates(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """How far each token corrects the state, fp32 [..., F,P,H], and what is left of it after a frame, [..., F,H]."""
        beta = torch.sigmoid(self.beta_proj(u).float())
        weight, bias = self.gate_proj.weight.float(), self.gate_proj.bias.float()
        with full_precision(u):
            wanted = functional.linear(u.float().mean(-2), weight, bias + self.dt_bias.float())
            return beta, torch.exp(-torch.exp(self.A_log.float()) * functional.softplus(wanted))


class CrossAttention(nn.Module):
    """Attention over the text, whose K and V are made once a prompt."""

    def __init__(self, config: SanaWMConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads = config.heads
        self.q_linear, self.kv_linear, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = RMSNorm(dim, config.eps), RMSNorm(dim, config.eps)

    def keys_values(self, text: Tensor) -> Tensor:
        """[..., E, dim] to [..., 2, E, H, D]."""
        k, v = self.kv_linear(text).chunk(2, -1)
        return torch.stack((self.k_norm(k), v), -3).unflatten(-1, (self.heads, -1))

    def forward(self, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """x [..., F,P,dim], context [..., 2,E,H,D], mask fp32 [..., E]."""
        q = self.q_norm(rows(self.q_linear, x)).flatten(-3, -2).unflatten(-1, (self.heads, -1)).transpose(-3, -2)
        k, v = (part.transpose(-3, -2) for part in context.to(q.dtype).unbind(-4))
        with full_precision(q):
            scores = (q.float() * q.shape[-1] ** -0.5) @ k.float().mT + mask[..., None, None, :]
            out = torch.softmax(scores, -1) @ v.float()
        return rows(self.proj, out.to(q.dtype).transpose(-3, -2).flatten(-2).unflatten(-2, x.shape[-3:-1]))
