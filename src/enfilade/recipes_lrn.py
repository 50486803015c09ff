"""LRN: the published run, the rows of its Tables 2 and 4 with those of its peers, and the shipped model."""

from dataclasses import replace

from enfilade.stages import Recipe, Stage


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
