"""One function per published run. A variant is a `replace` of another; a docstring names the table row it makes.

Our measured numbers stand in docs/experiments.md and the README, beside the command that made them.
"""

from collections.abc import Callable
from dataclasses import replace

from enfilade.errors import unknown
from enfilade.stages import Recipe, Stage

NYU_FOCAL = 518.8579  # pixels at 640 x 480


def gad_paper(weights: str | None = "timm") -> Recipe:
    """GAD as published: ResNet-50, 320x240, Adam, 1e-5 trunk / 1e-2 rest, /10 every 40 epochs, batch 8, focal +
    berHu + side losses, clipping of the semantic branch and SPF. Table 1 and the last row of Table 4. Not run here
    at full size. The paper gives neither the number of epochs nor the clipping norm: 120 and 1 are our choice."""
    stage = Stage(
        name="joint",
        epochs=120,
        losses={"focal": 1.0, "depth_berhu": 1.0, "side_focal": 1.0},
        size=(240, 320),
        zoom=(1.0, 1.5),
        optimiser="adam",
        lr=1e-2,
        lr_parts={"trunk": 1e-3},
        schedule="step",
        step_epochs=40,
        clip={"semantic": 1.0, "spf": 1.0},
    )
    return Recipe(
        name="gad-paper",
        model="gad",
        arguments={"classes": 40, "encoder": "resnet50", "weights": weights},
        stages=(stage,),
        precision="no",
    )


# Table 4, in the paper's order: what each row has.
ABLATION: dict[str, dict] = {
    "sem-only": {"depth": False, "fusion": "none", "skip": False},
    "Ls": {"depth": False, "fusion": "none", "skip": False},
    "Ls-hha": {"depth": False, "fusion": "none", "skip": False, "hha": True},
    "depem": {"propagate": False, "fusion": "none", "skip": False},
    "featprop": {"fusion": "none", "skip": False},
    "vanconv": {"fusion": "vanilla", "skip": False},
    "gap": {"skip": False},
    "spf": {},
}


def gad_ablation(row: str, weights: str | None = None) -> Recipe:
    """A row of GAD Table 4 with a MobileNetV2 encoder and decoders of 96-64-64 channels (to a quarter of the image), at
    a budget that two cores can pay: 3 epochs of 256x192 crops, AdamW with one cycle. All rows share seed, order,
    augmentation and budget. `sem-only` has cross-entropy, the others L_s (focal)."""
    arguments = ABLATION[row]
    semantic = "cross_entropy" if row == "sem-only" else "focal"
    losses = {semantic: 1.0}
    if arguments.get("depth", True):
        losses["depth_berhu"] = 1.0
    if arguments.get("skip", True):
        losses["side_focal"] = 1.0
    stage = Stage(
        name="joint",
        epochs=3,
        losses=losses,
        size=(192, 256),
        zoom=(1.0, 1.4),
        lr=1e-3,
        lr_parts={"trunk": 0.3},
        weight_decay=0.01,
        clip={"semantic": 5.0, **({"spf": 5.0} if arguments.get("skip", True) else {})},
        evaluate_every=100,
    )
    small = {"encoder": "mobilenetv2_100", "weights": weights, "bottleneck": 96, "widths": (96, 64, 64)}
    return Recipe(
        name=f"gad-{row}",
        model="gad",
        arguments={"classes": 40, **small, **arguments},
        stages=(stage,),
        scale=0.45,
        focal=NYU_FOCAL * 0.45,
    )


def gad_semi(percent: int, weights: str | None = None) -> Recipe:
    """A column of GAD Table 5: depth supervision for `percent` of the training samples. 0 % is the row +L_s of
    Table 4, "only the semantic branch"; otherwise the whole model."""
    base = gad_ablation("Ls" if percent == 0 else "spf", weights)
    return base.replace(name=f"gad-depth-{percent}", depth_fraction=percent / 100)


def gad_nyuv2(weights: str | None = None) -> Recipe:
    """The default model (`enfilade.load()`): GAD with MobileNetV2, sized to ship in the package.

    # Differs from paper: cross-entropy with softened class weights (focal without them scores lower at this size),
    scale-invariant and gradient terms beside berHu, AdamW with one cycle, a moving average of the weights, zoom, and
    stages: crops of 288x224 first, then the full frame at 416x320, twice.
    """
    losses = {
        "cross_entropy": 1.0,
        "side_cross_entropy": 0.15,
        "depth_berhu": 0.5,
        "depth_scale_invariant": 0.5,
        "depth_gradient": 0.25,
    }
    small = Stage(
        name="small",
        epochs=36,
        losses=losses,
        size=(224, 288),
        zoom=(0.6, 1.25),
        lr=1e-3,
        lr_parts={"trunk": 0.4},
        weight_decay=0.05,
        warmup=0.04,
        clip={"trunk": 5.0, "semantic": 5.0, "depth": 5.0, "fusion": 5.0, "spf": 5.0},
        ema=0.998,
        evaluate_every=12,
    )
    full = Stage(
        name="full",
        epochs=10,
        losses=losses | {"depth_berhu": 1.0},
        size=(320, 416),
        zoom=(0.75, 1.5),
        lr=5e-4,
        lr_parts={"trunk": 0.4},
        weight_decay=0.05,
        warmup=0.04,
        clip=small.clip,
        ema=0.998,
        evaluate_every=5,
    )
    return Recipe(
        name="gad-nyuv2",
        model="gad",
        arguments={
            "classes": 40,
            "encoder": "mobilenetv2_100",
            "weights": weights,
            "bottleneck": 96,
            "widths": (96, 64, 64),
            "dropout": 0.1,
        },
        stages=(small, full, replace(full, name="again", epochs=7, evaluate_every=7)),
        scale=0.65,
        focal=NYU_FOCAL * 0.65,
        class_weighting=0.5,
    )


def fpn_peer(weights: str | None = None) -> Recipe:
    """The peer of the default model: segmentation_models_pytorch's FPN, same encoder and data, 20 epochs of batch 8
    at 320x256, bf16, cross-entropy, random crop and flip, AdamW with one cycle."""
    stage = Stage(
        name="semantic",
        epochs=20,
        losses={"cross_entropy": 1.0},
        size=(256, 320),
        zoom=(1.0, 1.3),
        lr=1e-3,
        lr_parts={"trunk": 0.3},
        weight_decay=0.01,
        evaluate_every=20,
    )
    arguments = {"architecture": "FPN", "classes": 40, "encoder": "mobilenetv2_100", "weights": weights}
    return Recipe(name="fpn-peer", model="peer", arguments=arguments, stages=(stage,), scale=0.54, focal=None)


# --- label refinement -------------------------------------------------------------------------------------------------


def scales(count: int, term: str = "cross_entropy", weight: float = 1.0) -> dict[str, float]:
    """Deep supervision: the same loss on each of `count` label maps, from the coarsest (LRN Section 4)."""
    return {f"{term}/s{k}": weight for k in range(1, count + 1)}


def lrn_paper(weights: str | None = "timm") -> Recipe:
    """LRN on CamVid as published: VGG-16 with batch norm, whole images of 480x360, six cross-entropies of one weight,
    median-frequency class weights, SGD, batch 10, lr 1e-3, /10 after 50k of 80k updates (36 an epoch).
    Table 2, last row. Not run here: VGG-16 takes 55 times the arithmetic of MobileNetV2."""
    stage = Stage(
        name="deep",
        epochs=2223,
        losses=scales(6),
        size=(360, 480),
        batch=10,
        optimiser="sgd",
        lr=1e-3,
        weight_decay=5e-4,
        schedule="step",
        step_epochs=1389,
        colour=0.0,
    )
    arguments = {"classes": 11, "encoder": "vgg16_bn", "weights": weights}
    return camvid("lrn-paper", "lrn", arguments, stage).replace(precision="no", class_weighting=1.0)


def camvid(name: str, model: str, arguments: dict, *stages: Stage) -> Recipe:
    """A run on CamVid's 480x360 images at their own size; class weights are the square root of median-frequency ones,
    which cost less pixel accuracy."""
    common = {"scale": 1.0, "source": (360, 480), "focal": None, "space": "camvid11", "class_weighting": 0.5}
    return Recipe(name=name, model=model, arguments=arguments, stages=stages, **common)


# LRN Table 2, and the peer of the speed comparison: model, its own arguments, its losses.
CAMVID_ROWS: dict[str, tuple[str, dict, dict[str, float]]] = {
    "segnet-camvid": ("segnet", {"depth": (2, 2, 2, 2)}, {"cross_entropy": 1.0}),
    "segnet-ds-camvid": ("segnet", {"depth": (2, 2, 2, 2), "supervise": True}, scales(5)),
    "lrn-camvid-plain": ("lrn", {}, scales(6)),
    "lrn-camvid-majority": ("lrn", {}, scales(6)),
    "fcn8s-camvid": ("fcn8s", {"hidden": 0}, {"cross_entropy": 1.0}),
    "unet-camvid": ("peer", {"architecture": "Unet"}, {"cross_entropy": 1.0}),
}


def camvid_row(name: str, weights: str | None = None) -> Recipe:
    """A row of LRN Table 2 on CamVid with the MobileNetV2 encoder, at a budget that two cores can pay: 8 epochs of
    352x256 crops, AdamW with one cycle. All rows share encoder, seed, order, augmentation and budget.
    `lrn-camvid-majority` differs from `lrn-camvid-plain` in how the truth is brought to the coarse scales only."""
    model, own, losses = CAMVID_ROWS[name]
    stage = Stage(
        name="semantic",
        epochs=8,
        losses=losses,
        resize="majority" if name.endswith("majority") else "nearest",
        size=(256, 352),
        zoom=(0.75, 1.5),
        lr=1e-3,
        lr_parts={"trunk": 0.4},
        weight_decay=0.01,
        ema=0.99,
        evaluate_every=8,
    )
    return camvid(name, model, {"classes": 11, "encoder": "mobilenetv2_100", "weights": weights, **own}, stage)


def lrn_camvid(weights: str | None = None) -> Recipe:
    """The shipped model `enfilade.load("lrn-camvid")`: LRN with MobileNetV2, 480x360.

    # Differs from paper: MobileNetV2; wider skip features; a Lovász term on the last map beside the six
    cross-entropies, whose coarse ones weigh less; AdamW with one cycle, moving average, zoom and colour changes;
    square roots of the class weights.
    """
    crops = Stage(
        name="crops",
        epochs=34,
        losses=scales(5, weight=0.3) | {"cross_entropy/s6": 1.0, "lovasz/s6": 0.5},
        size=(256, 352),
        zoom=(0.6, 1.7),
        colour=1.3,
        lr=1.5e-3,
        lr_parts={"trunk": 0.4},
        weight_decay=0.03,
        ema=0.995,
        evaluate_every=17,
    )
    whole = replace(crops, name="whole", epochs=8, size=(352, 480), zoom=(0.75, 1.5), lr=5e-4, evaluate_every=2)
    exact = replace(
        whole, name="exact", epochs=3, zoom=(0.85, 1.3), lr=1.5e-4, ema=0.99, precision="no", evaluate_every=1
    )
    arguments = {"classes": 11, "encoder": "mobilenetv2_100", "weights": weights, "widths": (96, 64, 48, 24, 16)}
    return camvid("lrn-camvid", "lrn", arguments, crops, whole, exact)


# --- joint segmentation and depth with a CRF --------------------------------------------------------------------------

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


# --- region support ---------------------------------------------------------------------------------------------------


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
    """RSN with MobileNetV2, sized to ship in the package (it does not: the default model measures better still); it
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


# --- completion -------------------------------------------------------------------------------------------------------

# IMENet's Table 3, and its upper bounds: the network's arguments, and whether both branches are trained once more.
IMENET_ROWS: dict[str, tuple[dict, bool]] = {
    "imenet-a": ({"dcp": False, "dda": False}, False),
    "imenet-b": ({"dcp": False, "dda": False}, True),
    "imenet-c": ({"dcp": True, "dda": False}, True),
    "imenet-d": ({"dcp": False, "dda": True}, True),
    "imenet-e": ({"dcp": True, "dda": True, "train_iterations": 1}, True),
    "imenet-2dgt": ({"dcp": True, "dda": True, "truth": "2d"}, True),
    "imenet-3dgt": ({"dcp": True, "dda": True, "truth": "3d"}, True),
}
SKETCH = {"sketch": 1.0, "sketch_prior": 1.5, "sketch_kl": 2.0}  # TorchSSC's weights


def imenet_paper(weights: str | None = "timm") -> Recipe:
    """IMENet on NYUCAD as published: ResNet-101 with DUC at 640x480, SSCNet, T = 3, SGD with momentum 0.9, weight decay
    1e-4, batch 4, from 0.005; the branches in turn. Table 3, row E. Not run here. The paper gives neither epochs nor
    schedule, and leaves all empty voxels out of the loss, which never teaches a network to leave one empty: 30 epochs
    of each branch, twice, a poly schedule, and the empty voxels of the scored ones are our choice."""
    base = Stage(
        name="2d",
        epochs=30,
        losses={"cross_entropy": 1.0},
        train=("trunk", "2d"),
        size=(480, 640),
        colour=0.0,
        batch=4,
        optimiser="sgd",
        lr=5e-3,
        weight_decay=1e-4,
        schedule="poly",
    )
    stages = imenet_stages(base, {"volume": 1.0}, 30, 30, dcp=True, dda=True)
    return Recipe(
        name="imenet-paper",
        model="imenet",
        arguments={"encoder": "resnet101", "weights": weights},
        stages=stages,
        scale=1.0,
        focal=None,
        space="ssc12",
        volumes=True,
        precision="no",
    )


def imenet_stages(
    base: Stage, volume: dict[str, float], pixels: int, voxels: int, dcp: bool, dda: bool
) -> tuple[Stage, ...]:
    """Each branch by itself, `pixels` and `voxels` epochs; then, "to update the 2D SS branch weights with the 3D SSC
    weights fixed and vice versa", each once more with the correction that it has, the losses of what it corrects at
    0.3."""
    side_2d = {"side_cross_entropy": 0.3} if dcp else {}
    side_3d = {"side_volume": 0.3} if dda else {}
    first = replace(base, name="2d", epochs=pixels, losses={"cross_entropy": 1.0}, train=("trunk", "2d"))
    second = replace(base, name="3d", epochs=voxels, losses=volume, train=("3d",))
    losses = {"cross_entropy": 1.0, **side_2d}
    third = replace(first, name="2d-again", losses=losses, train=("trunk", "2d", *["dcp"] * dcp))
    losses = {**volume, **side_3d}
    fourth = replace(second, name="3d-again", losses=losses, train=("3d", *["dda"] * dda))
    return first, second, third, fourth


def imenet_row(name: str, weights: str | None = None) -> Recipe:
    """A row of IMENet's Table 3, or one of its upper bounds, at a budget that two cores can pay: MobileNetV2 at 320x240
    with scores for every fourth pixel, the sketch network at a quarter of its width; 3 epochs of pixels, 2 of voxels,
    then 300 rooms of each again. Rows share seed, order, augmentation, and what they begin with.

    # Differs from paper: both backbones (Table 3's are ResNet-101 and SSCNet, Table 2's 3-D one is the sketch network),
    AdamW with one cycle, the sketch's losses beside that of the labels, T = 1 in training and 3 in tests.
    """
    arguments, again = IMENET_ROWS[name]
    base = Stage(
        name="2d",
        epochs=3,
        losses={"cross_entropy": 1.0},
        train=("trunk", "2d"),
        size=(240, 320),
        batch=4,
        lr=1e-3,
        lr_parts={"trunk": 0.4},
        weight_decay=0.02,
        ema=0.99,
        evaluate_every=100,
    )
    stages = imenet_stages(base, {"volume": 1.0, **SKETCH}, 3, 2, arguments["dcp"], arguments["dda"])
    short = {"epochs": 1, "samples": 300, "lr": 5e-4}
    stages = *stages[:2], *(replace(stage, **short) for stage in stages[2:])
    return Recipe(
        name=name,
        model="imenet",
        arguments={
            "encoder": "mobilenetv2_100",
            "weights": weights,
            "stride": 4,
            "backbone_3d": "sketch",
            "width": 0.25,
            "samples": 1,
            **arguments,
        },
        stages=stages if again else stages[:2],
        scale=0.5,
        focal=None,
        space="ssc12",
        volumes=True,
    )


def imenet_rooms(weights: str | None = None) -> Recipe:
    """The shipped completion model: row A, and 500 rooms more for the voxels' branch in which what lies behind the
    walls counts as empty, as it does in the real volumes of NYU."""
    row = imenet_row("imenet-a", weights)
    last = replace(
        row.stages[1],
        name="outside",
        epochs=1,
        samples=500,
        losses={"volume_outside": 1.0, **SKETCH},
        lr=5e-4,
    )
    return row.replace(name="imenet-rooms", stages=(*row.stages, last))


def sscnet_rooms(weights: str | None = None) -> Recipe:
    """SSCNet alone, the baseline of IMENet's Table 1, at a quarter of its width with batch norm: 2 epochs, twice as
    many empty voxels as full ones.

    # Differs from paper: batch norm, a quarter of the channels, AdamW with one cycle.
    """
    stage = replace(imenet_row("imenet-a").stages[1], name="3d", losses={"volume_balanced": 1.0}, lr=2e-3, lr_parts={})
    return imenet_row("imenet-a", weights).replace(
        name="sscnet-rooms",
        model="completion",
        arguments={"backbone": "sscnet", "width": 0.25, "bn": True, "weights": weights},
        stages=(stage,),
    )


RECIPES: dict[str, Callable[..., Recipe]] = {
    "gad-nyuv2": gad_nyuv2,
    "gad-paper": gad_paper,
    "fpn-peer": fpn_peer,
    **{f"gad-{row}": (lambda weights=None, row=row: gad_ablation(row, weights)) for row in ABLATION},
    "joint-paper": joint_paper,
    **{name: (lambda weights=None, name=name: joint_row(name, weights)) for name in JOINT_ROWS},
    "rsn-paper": rsn_paper,
    "rsn-nyuv2": rsn_nyuv2,
    **{name: (lambda weights=None, name=name: rsn_row(name, weights)) for name in RSN_ROWS},
    "imenet-paper": imenet_paper,
    **{name: (lambda weights=None, name=name: imenet_row(name, weights)) for name in IMENET_ROWS},
    "imenet-rooms": imenet_rooms,
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
