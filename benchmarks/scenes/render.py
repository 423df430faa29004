"""Table-top scenes: seeded, rendered with PyBullet's CPU renderer, with what is true of them from its own buffers.

Rendered, not photographed. A scene holds one to five different objects, each in one colour of a small palette, and is
drawn again until every object stands on the table and shows enough of itself.
"""

import importlib.util
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

SIZE = 224
"""pixels of a side"""
COLOURS = {
    "red": (0.85, 0.05, 0.05),
    "green": (0.05, 0.6, 0.1),
    "blue": (0.05, 0.15, 0.85),
    "yellow": (0.95, 0.85, 0.05),
    "purple": (0.5, 0.05, 0.6),
    "white": (0.95, 0.95, 0.95),
}
# name -> file, scale, roll that stands it up, height of its centre above the table
OBJECTS = {
    "duck": ("duck_vhacd.urdf", 2.2, math.pi / 2, 0.03),
    "bear": ("teddy_vhacd.urdf", 2.6, math.pi / 2, 0.03),
    "mug": ("objects/mug.urdf", 1.6, 0.0, 0.03),
    "brick": ("lego/lego.urdf", 4.0, 0.0, 0.08),
    "ball": ("soccerball.urdf", 0.17, 0.0, 0.09),
    "cube": ("cube_small.urdf", 2.6, 0.0, 0.07),
}
TABLE_TOP = 0.625
NEAR, FAR, FIELD_OF_VIEW = 0.1, 6.0, 50.0
ENOUGH = 200
"""pixels that an object has to show"""


@dataclass(frozen=True)
class Thing:
    """One object as the buffers show it."""

    name: str
    colour: str
    column: float
    """mean column of its pixels, 0 (left) to 1"""
    distance: float
    """median distance of its pixels along the camera's axis, metres"""


@dataclass(frozen=True)
class Scene:
    image: np.ndarray
    """(224, 224, 3) bytes"""
    things: tuple[Thing, ...]
    where: np.ndarray
    """(224, 224) which of `things` a pixel shows, or -1"""


def scenes(count: int, seed: int) -> Iterator[Scene]:
    """``count`` scenes, a pure function of the seed; as many with one object as with five."""
    bullet = _bullet()
    client = bullet.connect(bullet.DIRECT)
    try:
        bullet.setAdditionalSearchPath(_data_folder(), physicsClientId=client)
        for number in range(count):
            rng = random.Random(f"{seed} {number}")
            scene = None
            while scene is None:
                scene = _try(bullet, client, rng, 1 + number % 5)
            yield scene
    finally:
        bullet.disconnect(client)


def _bullet() -> Any:
    if importlib.util.find_spec("pybullet") is None:
        raise SystemExit(
            f"the scenes are rendered with pybullet, which this Python lacks: {sys.executable}\n"
            f"Run `{sys.executable} -m pip install 'polyrank[hf,scenes]'`; pybullet has wheels for Python 3.11, Linux."
        )
    import pybullet

    return pybullet


def _data_folder() -> str:
    import pybullet_data

    return pybullet_data.getDataPath()


def _try(bullet: Any, client: int, rng: random.Random, number: int) -> Scene | None:
    bullet.resetSimulation(physicsClientId=client)
    bullet.setGravity(0, 0, -10, physicsClientId=client)
    bullet.loadURDF("plane.urdf", physicsClientId=client)
    bullet.loadURDF("table/table.urdf", physicsClientId=client)
    bodies = _place(bullet, client, rng, number)
    if bodies is None:
        return None
    for _ in range(60):
        bullet.stepSimulation(physicsClientId=client)
    for body in bodies:
        if bullet.getBasePositionAndOrientation(body, physicsClientId=client)[0][2] < TABLE_TOP - 0.02:
            return None  # it fell
    return _look(bullet, client, rng, bodies)


def _place(bullet: Any, client: int, rng: random.Random, number: int) -> dict[int, tuple[str, str]] | None:
    """Bodies of different objects, well apart, as body -> (name, colour)."""
    bodies: dict[int, tuple[str, str]] = {}
    spots: list[tuple[float, float]] = []
    for name in rng.sample(list(OBJECTS), number):
        spot = rng.uniform(-0.42, 0.42), rng.uniform(-0.28, 0.28)
        if any(math.dist(spot, other) < 0.2 for other in spots):
            return None
        spots.append(spot)
        file, scale, roll, height = OBJECTS[name]
        turn = bullet.getQuaternionFromEuler([roll, 0, rng.uniform(0, 2 * math.pi)])
        place = [*spot, TABLE_TOP + height]
        body = bullet.loadURDF(file, place, turn, globalScaling=scale, physicsClientId=client)
        colour = rng.choice(list(COLOURS))
        for link in range(-1, bullet.getNumJoints(body, physicsClientId=client)):
            paint = dict(rgbaColor=[*COLOURS[colour], 1], textureUniqueId=-1, physicsClientId=client)
            bullet.changeVisualShape(body, link, **paint)
        bodies[body] = name, colour
    return bodies


def _look(bullet: Any, client: int, rng: random.Random, bodies: dict[int, tuple[str, str]]) -> Scene | None:
    """The picture, or None where an object shows too little of itself or is cut by the border."""
    camera = [0, 0, TABLE_TOP], rng.uniform(1.15, 1.45), rng.uniform(0, 360), rng.uniform(-50, -28), 0, 2
    view = bullet.computeViewMatrixFromYawPitchRoll(*camera)
    lens = bullet.computeProjectionMatrixFOV(FIELD_OF_VIEW, 1, NEAR, FAR)
    light = [rng.uniform(-1.5, 1.5), rng.uniform(-1.5, 1.5), 3]
    _, _, rgb, depth, owner = bullet.getCameraImage(
        SIZE, SIZE, view, lens, renderer=bullet.ER_TINY_RENDERER, shadow=1, lightDirection=light, physicsClientId=client
    )
    depth, owner = np.reshape(depth, (SIZE, SIZE)), np.reshape(owner, (SIZE, SIZE))
    distance = FAR * NEAR / (FAR - (FAR - NEAR) * depth)
    things, where = [], np.full((SIZE, SIZE), -1, np.int8)
    for index, (body, (name, colour)) in enumerate(bodies.items()):
        shown = owner == body
        border = shown[0].any() or shown[-1].any() or shown[:, 0].any() or shown[:, -1].any()
        if shown.sum() < ENOUGH or border:
            return None
        where[shown] = index
        column = float(np.nonzero(shown)[1].mean()) / SIZE
        things.append(Thing(name, colour, column, float(np.median(distance[shown]))))
    image = np.reshape(rgb, (SIZE, SIZE, 4))[..., :3].astype(np.uint8)
    return Scene(image, tuple(things), where)
