"""Joint segmentation and depth (Mousavian et al.): the published run and the rows of its Tables 2 and 3."""

from dataclasses import replace

from enfilade.recipes_gad import NYU_FOCAL
from enfilade.stages import Recipe, Stage

# Table 3 of Mousavian et al.: how many of the three stages a row passes, and its CRF.
JOINT_ROWS: dict[str, tuple[int, str]] = {
    "joint-sem": (1, "none"),
    "joint-sem-depth": (2, "none"),
    "joint-crf": (3, "rgb"),
    "joint-crf-depth": (3, "rgbd"),
}


def joint_paper(weights: str | None = "timm") -> Recipe:
    """Joint segmentation and depth as published: the five branches of Table 1 from a VGG-16, 513x513, SGD with momentum
    0.99 and summed losses, hence the tiny rates; stages of 160k, 10k and 10k updates; six fixed crops of each image.
    Tables 2 and 3, last row. Not run here. The paper gives neither the batch (10 here, 477 updates an epoch) nor the
    schedule (constant here); it starts from weights trained on MS-COCO and VOC, this from ImageNet's."""
    semantic = Stage(
        name="semantic",
        epochs=335,
        losses={"cross_entropy_sum": 1.0},
        train=("trunk", "semantic"),
        size=(513, 513),
        augmentation="offline",
        zoom=(1.0, 1.5),
        colour=0.0,
        batch=10,
        optimiser="sgd",
        lr=1e-10,
        momentum=0.99,
        weight_decay=5e-4,
        schedule="constant",
    )
    losses = {"cross_entropy_sum": 1e-6, "depth_pairwise": 1.0}  # Eq. (1)
    depth = replace(semantic, name="depth", epochs=21, losses=losses, train=("*",))
    crf = replace(depth, name="crf", lr=1e-16, lr_parts={"crf": 1e3})
    return Recipe(
        name="joint-paper",
        model="joint",
        arguments={"classes": 40, "encoder": "table1", "weights": weights, "crf": "rgbd"},
        stages=(semantic, replace(depth, train=("trunk", "semantic", "depth")), crf),
        scale=1.0,
        focal=NYU_FOCAL,
        precision="no",
    )


def joint_row(name: str, weights: str | None = None) -> Recipe:
    """A row of Table 3 of Mousavian et al. with the MobileNetV2 encoder at a budget that two cores can pay: 30 epochs
    of 320x256 for the labels, 8 with depth, 3 with the CRF. Rows share what they have in common: seed, order,
    augmentation, and the stages themselves.

    # Differs from paper: MobileNetV2; AdamW with one cycle; means, not sums; softened class weights; berHu beside the
    pairwise loss, which leaves the scale of depth open; zoom and colour changes drawn anew in each epoch; the CRF on
    every second pixel, its unaries supervised as well.
    """
    count, crf = JOINT_ROWS[name]
    semantic = Stage(
        name="semantic",
        epochs=30,
        losses={"cross_entropy": 1.0},
        train=("trunk", "semantic"),
        size=(256, 320),
        zoom=(0.65, 1.4),
        lr=1e-3,
        lr_parts={"trunk": 0.4},
        weight_decay=0.05,
        warmup=0.04,
        ema=0.998,
        evaluate_every=15,
    )
    depth = replace(
        semantic,
        name="depth",
        epochs=8,
        losses={"cross_entropy": 1.0, "depth_pairwise": 1.0, "depth_berhu": 0.5},
        train=("trunk", "semantic", "depth"),
        lr=7e-4,
        evaluate_every=8,
    )
    last = replace(
        depth,
        name="crf",
        epochs=3,
        losses={"cross_entropy/s1": 0.5, "cross_entropy/s2": 1.0, "depth_pairwise": 1.0, "depth_berhu": 0.5},
        train=("*",),
        lr=2e-4,
        lr_parts={"trunk": 0.4, "crf": 20.0},
        evaluate_every=3,
    )
    arguments: dict = {"classes": 40, "encoder": "mobilenetv2_100", "weights": weights}
    if count == 1:
        arguments["depth"] = False
    if crf != "none":
        # Those of `refine.CRF`, in pixels of the network: wider in colour than the paper's (160, 3), lighter weights
        theta = ((86, 8), (54, 0.2), (2,))
        arguments |= {"crf": crf, "theta": theta, "crf_weights": (4, 1, 1), "crf_stride": 2}
    return Recipe(
        name=name,
        model="joint",
        arguments=arguments,
        stages=(semantic, depth, last)[:count],
        scale=0.54,
        focal=NYU_FOCAL * 0.54,
        class_weighting=0.5,
    )


def joint_rooms(weights: str | None = None) -> Recipe:
    """What `joint_nyuv2` learns before it sees a photo: the labels of 1,000 rendered rooms, 8 epochs (`enfilade data
    render rooms`, `--data room-files`)."""
    recipe = joint_row("joint-sem", weights)
    return recipe.replace(name="joint-rooms", stages=(replace(recipe.stages[0], name="rooms", epochs=8),))


def joint_nyuv2(weights: str | None = None) -> Recipe:
    """The shipped model: the last row of Table 3, started from what `joint_rooms` has learned (`--init`), with 20
    epochs for the labels instead of 30."""
    row = joint_row("joint-crf-depth", weights)
    semantic, *others = row.stages
    return row.replace(name="joint-nyuv2", stages=(replace(semantic, epochs=20, evaluate_every=10), *others))
