"""RSN: the published run and the rows of its Tables 2 and 3."""

from dataclasses import replace

from enfilade.recipes_gad import NYU_FOCAL
from enfilade.stages import Recipe, Stage


def iterations(term: str, first: int = 2, share: float = 1.0) -> dict[str, float]:
    """L_i (RSN Eq. 3): a loss on each of the refinement's three depths, `first` the number of the first among all of a
    network's depth maps."""
    return {f"{term}/d{first + k}": share * weight for k, weight in enumerate((0.2, 0.3, 0.5))}


def combined(term: str) -> dict[str, float]:
    """L_c (RSN Eq. 4): the generated region support and the iterations together."""
    return {f"support_{term}/d1": 0.3, **iterations(f"region_{term}", share=0.7)}


# RSN's Table 3: what leaves the network out of a row, and the row's stages, keys of `rsn_stages`.
RSN_ROWS: dict[str, tuple[dict, tuple[str, ...]]] = {
    "rsn-generation": ({"refinement": False}, ("support-linear", "support-log")),
    "rsn-depth": ({"refinement": False}, ("depth-linear", "depth-log")),
    "rsn-linear": ({"refinement": False}, ("depth-linear", "depth-linear-on")),
    "rsn-l2": ({"refinement": False}, ("l2-linear", "l2-log")),
    "rsn-support": ({"generation": False, "refinement": False}, ()),
    "rsn-initialised": ({}, ("support-linear", "support-log", "refinement")),
    "rsn-coarse": ({}, ("depth-linear", "depth-log", "on-generated")),
    "rsn-semantic": ({"semantic": True}, ("support-linear", "support-log", "on-generated")),
    "rsn-freeze-refinement": ({}, ("support-linear", "support-log", "refinement", "freeze-refinement")),
    "rsn-freeze-generation": ({}, ("support-linear", "support-log", "refinement", "freeze-generation")),
    "rsn-end-to-end": (
        {},
        (
            *("support-linear", "support-log", "refinement", "freeze-generation", "freeze-refinement"),
            *("both-linear", "both-log"),
        ),
    ),
}
RSN_PAPER = {
    "support-linear": 17,
    "support-log": 23,
    "depth-linear": 17,
    "depth-log": 23,
    "depth-linear-on": 23,
    "l2-linear": 17,
    "l2-log": 23,
    "refinement": 120,
    "on-generated": 63,
    "freeze-generation": 5,
    "freeze-refinement": 3,
    "both-linear": 17,
    "both-log": 23,
}


def rsn_stages(base: Stage, epochs: dict[str, int], clip: float | None = None) -> dict[str, Stage]:
    """Every stage of RSN's Section 3.3 and its Table 3, as changes to `base`.

    "generation" and "refinement" are trained apart, the latter on true region support; then one learns while the other
    is frozen; then both. Errors are linear first, then of logarithms. `clip` is each part's largest gradient norm.
    """
    generation, refinement = ("trunk", "generation"), ("refinement",)
    log = "region_l2_log"
    settings: dict[str, dict] = {
        "support-linear": {"losses": {"support_l2/d1": 1.0}, "train": generation},
        "support-log": {"losses": {"support_l2_log/d1": 1.0}, "train": generation},
        "depth-linear": {"losses": {"region_l2/d1": 1.0}, "train": generation},
        "depth-log": {"losses": {f"{log}/d1": 1.0}, "train": generation},
        "depth-linear-on": {"losses": {"region_l2/d1": 1.0}, "train": generation},
        "l2-linear": {"losses": {"depth_l2/d1": 1.0}, "train": generation},
        "l2-log": {"losses": {"depth_l2_log/d1": 1.0}, "train": generation},
        "refinement": {"losses": iterations(log, 1), "train": refinement, "inputs": ("support",)},
        "on-generated": {"losses": iterations(log), "train": refinement},
        "freeze-generation": {"losses": iterations(log), "train": refinement},
        "freeze-refinement": {"losses": iterations(log), "train": generation},
        "both-linear": {"losses": combined("l2")},
        "both-log": {"losses": combined("l2_log")},
    }
    stages = {}
    for name, changes in settings.items():
        parts = changes.get("train", (*generation, *refinement))
        norms = {} if clip is None else dict.fromkeys(parts, clip)
        stages[name] = replace(base, name=name, epochs=epochs[name], clip=norms, **changes)
    return stages


def rsn_paper(weights: str | None = "timm") -> Recipe:
    """RSN as published: ResNet-34 sub-sampled once, 640x480, SGD with a fixed rate of 1e-3, batch norm, no
    augmentation; pre-training, freezing and end-to-end training as Section 3.3 has them. Tables 2 and 3, last row. Not
    run here: a frame takes 8.2 TFLOP. The paper gives neither the batch size nor the epochs of the end: 4, and 17
    linear and 23 logarithmic as in the pre-training, are our choice."""
    base = Stage(
        name="",
        epochs=1,
        losses={},
        size=(480, 640),
        flip=0.0,
        colour=0.0,
        batch=4,
        optimiser="sgd",
        lr=1e-3,
        schedule="constant",
    )
    stages = rsn_stages(base, RSN_PAPER)
    return Recipe(
        name="rsn-paper",
        model="rsn",
        arguments={"encoder": "resnet34-half", "weights": weights},
        stages=tuple(stages[name] for name in RSN_ROWS["rsn-end-to-end"][1]),
        scale=1.0,
        focal=NYU_FOCAL,
        regions=True,
        precision="no",
    )


def rsn_row(name: str, weights: str | None = None) -> Recipe:
    """A row of RSN's Table 3 with the MobileNetV2 encoder at a budget that two cores can pay: 256x192 crops, depth at
    half of that; 3 epochs linear and 5 logarithmic for the generation, 4 for the refinement, 2 with one of them frozen,
    2 linear and 3 logarithmic for both. Rows share seed, order, augmentation, and the stages that they have in common.

    # Differs from paper: MobileNetV2, a sixth to an eighth of the channels, half resolution; AdamW with one cycle;
    zoom, mirror images and colour changes; the refinement learns factors.
    """
    arguments, stages = RSN_ROWS[name]
    base = Stage(
        name="",
        epochs=1,
        losses={},
        size=(192, 256),
        zoom=(0.9, 1.4),
        lr=1e-3,
        lr_parts={"trunk": 0.4},
        weight_decay=0.02,
        ema=0.99,
        evaluate_every=100,
    )
    epochs = {"support-linear": 3, "depth-linear": 3, "l2-linear": 3, "refinement": 4, "on-generated": 4}
    epochs |= {"freeze-generation": 2, "freeze-refinement": 2, "both-linear": 2, "both-log": 3}
    known = rsn_stages(base, {k: epochs.get(k, 5) for k in RSN_PAPER}, clip=5.0)
    return Recipe(
        name=name,
        model="rsn",
        arguments={
            "encoder": "mobilenetv2_100",
            "weights": weights,
            "width": 80,
            "refine_width": 8,
            "residual": True,
            **arguments,
        },
        stages=tuple(known[stage] for stage in stages),
        scale=0.45,
        focal=NYU_FOCAL * 0.45,
        regions=True,
    )


def rsn_nyuv2(weights: str | None = None) -> Recipe:
    """RSN with MobileNetV2, sized to ship in the package (it does not: gad-nyuv2 measures better still); it
    starts from that model's encoder (`enfilade train rsn-nyuv2 --init gad-nyuv2`).

    # Differs from paper: as `rsn_row`; both modules learn together after the generation's pre-training; absolute log
    errors, with berHu, scale-invariant and gradient terms on the answer.
    """
    depth = {"depth_berhu": 0.5, "depth_scale_invariant": 0.5, "depth_gradient": 0.25}
    generation = Stage(
        name="generation",
        epochs=6,
        losses={"support_l1_log/d1": 0.5, **{f"{term}/d1": weight for term, weight in depth.items()}},
        train=("trunk", "generation"),
        size=(256, 320),
        zoom=(0.65, 1.4),
        lr=1e-3,
        lr_parts={"trunk": 0.3},
        weight_decay=0.05,
        clip={"trunk": 5.0, "generation": 5.0},
        ema=0.998,
        evaluate_every=3,
    )
    both = replace(
        generation,
        name="both",
        epochs=5,
        losses={"support_l1_log/d1": 0.3, **iterations("region_l1_log", share=0.7), **depth},
        train=("*",),
        size=(312, 416),
        zoom=(0.75, 1.5),
        lr=6e-4,
        clip={"trunk": 5.0, "generation": 5.0, "refinement": 5.0},
        evaluate_every=5,
    )
    return rsn_row("rsn-end-to-end", weights).replace(
        name="rsn-nyuv2", stages=(generation, both), scale=0.65, focal=NYU_FOCAL * 0.65
    )
