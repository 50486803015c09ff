"""One function per published run. A variant is a `replace` of another; a docstring names the table row it makes.

Each paper has a file, `recipes_gad` and so on; here they all have their names. Our measured numbers stand in
docs/experiments.md and the README, beside the command that made them.
"""

from collections.abc import Callable

from enfilade.errors import unknown
from enfilade.recipes_gad import (
    ABLATION,
    fpn_peer,
    gad_ablation,
    gad_after_rooms,
    gad_nyuv2,
    gad_paper,
    gad_rooms,
    gad_semi,
    gad_slim,
)
from enfilade.recipes_imenet import (
    IMENET_ROWS,
    imenet_over_sscnet,
    imenet_paper,
    imenet_rooms,
    imenet_row,
    sscnet_rooms,
    sscnet_row,
)
from enfilade.recipes_joint import JOINT_ROWS, joint_nyuv2, joint_paper, joint_rooms, joint_row
from enfilade.recipes_lrn import CAMVID_ROWS, camvid_row, lrn_camvid, lrn_paper
from enfilade.recipes_rsn import RSN_ROWS, rsn_nyuv2, rsn_paper, rsn_row
from enfilade.stages import Recipe

RECIPES: dict[str, Callable[..., Recipe]] = {
    "gad-nyuv2": gad_nyuv2,
    "gad-after-rooms": gad_after_rooms,
    "gad-rooms": gad_rooms,
    "gad-slim": gad_slim,
    "gad-paper": gad_paper,
    "fpn-peer": fpn_peer,
    **{f"gad-{row}": (lambda weights=None, row=row: gad_ablation(row, weights)) for row in ABLATION},
    "joint-nyuv2": joint_nyuv2,
    "joint-rooms": joint_rooms,
    "joint-paper": joint_paper,
    **{name: (lambda weights=None, name=name: joint_row(name, weights)) for name in JOINT_ROWS},
    "rsn-paper": rsn_paper,
    "rsn-nyuv2": rsn_nyuv2,
    **{name: (lambda weights=None, name=name: rsn_row(name, weights)) for name in RSN_ROWS},
    "imenet-paper": imenet_paper,
    **{name: (lambda weights=None, name=name: imenet_row(name, weights)) for name in IMENET_ROWS},
    "imenet-rooms": imenet_rooms,
    "imenet-over-sscnet": imenet_over_sscnet,
    "imenet-sscnet": sscnet_row,
    "sscnet-rooms": sscnet_rooms,
    "lrn-camvid": lrn_camvid,
    "lrn-paper": lrn_paper,
    **{name: (lambda weights=None, name=name: camvid_row(name, weights)) for name in CAMVID_ROWS},
    **{f"gad-depth-{p}": (lambda weights=None, p=p: gad_semi(p, weights)) for p in (0, 20, 40, 60, 80, 100)},
}


def get(name: str, weights: str | None = None) -> Recipe:
    """The recipe of that name, with its encoder's weights (None: random, except where the recipe names some)."""
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name](weights) if weights is not None else RECIPES[name]()
