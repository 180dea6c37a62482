"""What a camera sees of a room, exactly: every pixel's ray meets the nearest wall or box.

Legend: N frames, H, W sizes. Pixel (u, v) is seen along ((u - cx) / fx, (v - cy) / fy, 1), as the network is told.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from longtake.training.data.rooms.scene import Picture, Room
from longtake.training.models.sana_wm.camera import ray_directions

FRAME = 0.06  # metres of a picture's frame
LIGHT = {"left": 0.86, "right": 0.80, "far": 0.92, "near": 0.74, "floor": 0.70, "ceiling": 1.0}  # of each wall
FAR = 1e6


def render(room: Room, poses: Tensor, intrinsics: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Frames fp32 [N,3,H,W] in [-1,1] and depth along the camera's axis [N,H,W], of poses [N,4,4] in the room.

    intrinsics: fx, fy, cx, cy in pixels, [4].
    """
    rays = ray_directions(intrinsics.double().expand(len(poses), 4), (height, width)) @ poses[:, :3, :3].double().mT
    origin = poses[:, None, :3, 3].double().expand_as(rays)
    distance, colour = _walls(room, origin, rays)
    for box in room.boxes:
        nearer, seen = _box(box, origin, rays)
        colour = torch.where((nearer < distance)[..., None], seen, colour)
        distance = torch.minimum(distance, nearer)
    # rays have depth 1 along the camera's axis, so that the distance along them is the depth
    frames = colour.float().mT.unflatten(-1, (height, width))
    return frames * 2 - 1, distance.float().unflatten(-1, (height, width))


def _walls(room: Room, origin: Tensor, rays: Tensor) -> tuple[Tensor, Tensor]:
    """From inside: the first of the six planes that each ray meets."""
    half = torch.tensor([room.width / 2, 0.0, room.depth / 2], dtype=rays.dtype)
    low, high = -half, half.clone()
    low[1] = -room.height
    toward = torch.where(rays > 0, high, low)
    reach = torch.where(rays.abs() < 1e-9, FAR, (toward - origin) / torch.where(rays.abs() < 1e-9, 1.0, rays))
    distance, axis = reach.min(-1)
    place = origin + distance[..., None] * rays
    x, y, z = place.unbind(-1)
    names = ("left", "right", "far", "near", "floor", "ceiling")
    positive = torch.gather(rays, -1, axis[..., None])[..., 0] > 0
    hit = {
        "left": (axis == 0) & ~positive,
        "right": (axis == 0) & positive,
        "far": (axis == 2) & positive,
        "near": (axis == 2) & ~positive,
        "floor": (axis == 1) & positive,
        "ceiling": (axis == 1) & ~positive,
    }
    colour = torch.zeros(*rays.shape)
    for name, wall in zip(names, room.walls):
        along, up = {"left": (z, -y), "right": (z, -y), "far": (x, -y), "near": (x, -y)}.get(name, (x, z))
        seen = _sampled(wall, along / 2 % 1, up / 2 % 1)
        for picture in room.pictures:
            if picture.side == name:
                seen = _framed(picture, along, up, seen)
        colour = torch.where(hit[name][..., None], seen * LIGHT[name], colour)
    return distance, colour


def _framed(picture: Picture, along: Tensor, up: Tensor, wall: Tensor) -> Tensor:
    """The wall with a picture on it."""
    u, v = (along - picture.along) / picture.half, (picture.up - up) / picture.half
    far = torch.maximum(u.abs(), v.abs())
    seen = _sampled(picture.texture, (u + 1) / 2, (v + 1) / 2)
    framed = torch.where((far < 1)[..., None], seen, torch.full_like(seen, 0.12))
    return torch.where((far < 1 + FRAME / picture.half)[..., None], framed, wall)


def _box(box: object, origin: Tensor, rays: Tensor) -> tuple[Tensor, Tensor]:
    """From outside: where rays enter it, FAR if they do not."""
    low, high = (torch.tensor(corner, dtype=rays.dtype) for corner in (box.low, box.high))  # type: ignore[attr-defined]
    safe = torch.where(rays.abs() < 1e-9, 1e-9, rays)
    one, other = (low - origin) / safe, (high - origin) / safe
    enter, axis = torch.minimum(one, other).max(-1)
    leave = torch.maximum(one, other).min(-1).values
    distance = torch.where((enter < leave) & (enter > 0), enter, FAR)
    place = origin + enter[..., None] * rays
    x, y, z = place.unbind(-1)
    along, up = torch.where(axis == 0, z, x), torch.where(axis == 1, z, -y)
    shade = torch.tensor([0.75, 1.0, 0.88])[axis][..., None]
    return distance, _sampled(box.texture, along % 1, up % 1) * shade  # type: ignore[attr-defined]


def _sampled(texture: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """A texture [3, S, S] at u to the right and v down (0..1), [N, pixels] to [N, pixels, 3]."""
    grid = torch.stack((u, v), -1).float() * 2 - 1
    seen = functional.grid_sample(
        texture[None], grid[None].flatten(1, 2)[:, None], padding_mode="border", align_corners=False
    )
    return seen[0, :, 0].T.unflatten(0, tuple(u.shape))
