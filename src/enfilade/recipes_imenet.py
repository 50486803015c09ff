"""IMENet: the published run, the rows of its Table 3, its upper bounds, and Table 1's SSCNet."""

from dataclasses import replace

from enfilade.stages import Recipe, Stage

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


def imenet_over_sscnet(weights: str | None = None) -> Recipe:
    """IMENet over SSCNet, the 3-D network of the paper's Table 3, from branches that were trained apart (`--init
    imenet-rooms sscnet-rooms`): the pixels' branch with DCP on 300 rooms, the voxels' with DDA on 600, where what lies
    behind the walls counts as empty.

    # Differs from paper: as `imenet_row` and `sscnet_rooms`.
    """
    row = imenet_row("imenet-e", weights)
    pixels, voxels = row.stages[2:]
    losses = {"volume_outside": 1.0, "side_volume": 0.3}
    return row.replace(
        name="imenet-over-sscnet",
        arguments=row.arguments | {"backbone_3d": "sscnet", "bn": True},
        stages=(pixels, replace(voxels, losses=losses, samples=600, lr=1e-3)),
    )


def sscnet_row(weights: str | None = None) -> Recipe:
    """SSCNet alone, the baseline of IMENet's Table 1, at a quarter of its width with batch norm: 2 epochs, twice as
    many empty voxels as full ones.

    # Differs from paper: batch norm, a quarter of the channels, AdamW with one cycle.
    """
    stage = replace(imenet_row("imenet-a").stages[1], name="3d", losses={"volume_balanced": 1.0}, lr=2e-3, lr_parts={})
    return imenet_row("imenet-a", weights).replace(
        name="imenet-sscnet",
        model="completion",
        arguments={"backbone": "sscnet", "width": 0.25, "bn": True, "weights": weights},
        stages=(stage,),
    )


def sscnet_rooms(weights: str | None = None) -> Recipe:
    """The default completion model: SSCNet, and 600 rooms more in which what lies behind the walls counts as empty, as
    `imenet_rooms` has it."""
    row = sscnet_row(weights)
    last = replace(row.stages[0], name="outside", epochs=1, samples=600, losses={"volume_outside": 1.0}, lr=1e-3)
    return row.replace(name="sscnet-rooms", stages=(*row.stages, last))
