"""GAD: the published run, the rows of its Tables 4 and 5, the models that ship and their peer."""

from dataclasses import replace

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
    """The shipped model `enfilade.load("gad-nyuv2")`: GAD with MobileNetV2, sized to ship in the package.

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


def gad_after_rooms(weights: str | None = None) -> Recipe:
    """gad-nyuv2 with a wider view before its decoders, averages into SPF, and rooms before photos (`--init`
    from `gad_rooms`), at 352x256 throughout: seven tenths of the pixels. Nearer in depth than the shipped model, not
    better in labels."""
    recipe = gad_nyuv2(weights)
    photos = replace(
        recipe.stages[1],  # with its larger weight on depth
        name="photos",
        epochs=30,
        size=(256, 352),
        zoom=(0.65, 1.4),
        lr=1e-3,
        evaluate_every=10,
    )
    return recipe.replace(
        name="gad-after-rooms",
        arguments=recipe.arguments | {"context": 2, "average": True},
        stages=(photos,),
        scale=0.55,
        focal=NYU_FOCAL * 0.55,
    )


def gad_rooms(weights: str | None = None) -> Recipe:
    """What `gad_after_rooms` learns before it sees a photo: labels and depth of 3,000 rendered rooms, 5 epochs
    (`enfilade data render rooms`, `--data room-files`)."""
    recipe = gad_after_rooms(weights)
    return recipe.replace(name="gad-rooms", stages=(replace(recipe.stages[0], name="rooms", epochs=5),))


def gad_slim(weights: str | None = None) -> Recipe:
    """The GAD in the default model, `gad-joint-nyuv2`: decoders of a third of the size over the encoder of gad-nyuv2
    (`--init gad-nyuv2`), which stands still while they learn to answer as the whole network does."""
    recipe = gad_nyuv2(weights)
    heads = replace(
        recipe.stages[1],
        name="heads",
        epochs=13,
        losses=recipe.stages[1].losses | {"cross_entropy": 0.3, "side_cross_entropy": 0.2, "distillation": 2.0},
        teachers=("gad-nyuv2",),
        train=("semantic", "depth", "fusion", "spf"),
        size=(288, 384),
        zoom=(0.75, 1.4),
        lr=2e-3,
        evaluate_every=13,
    )
    slim = {"bottleneck": 48, "widths": (32, 32, 32), "embedding": 32, "spf_widths": (96, 64, 48, 32)}
    return recipe.replace(
        name="gad-slim", arguments=recipe.arguments | slim | {"average": True, "dropout": 0.0}, stages=(heads,)
    )


def fpn_peer(weights: str | None = None) -> Recipe:
    """The peer of gad-nyuv2: segmentation_models_pytorch's FPN, same encoder and data, 20 epochs of batch 8
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
