"""The verbs under `enfilade data`: prepare, look at and count data sets."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from enfilade.errors import unknown
from enfilade.options import (
    Count,
    Flag,
    Folder,
    MaybeFile,
    MaybeFolder,
    Name,
    Options,
    complain,
    open_reader,
    parse_options,
)


@dataclass(frozen=True)
class DataPrepare:
    """Turn a data set as it is distributed into the folder that its reader wants."""

    name: Annotated[Positional[str], arg(metavar="NAME", help_behavior_hint="")]
    """The data set: nyuv2."""
    mat: Annotated[str, arg(metavar="FILE")]
    """The official nyu_depth_v2_labeled.mat."""
    out: Folder
    """The folder to fill."""
    splits: MaybeFile = None
    """The official splits.mat; default: beside the first file."""
    mapping: MaybeFile = None
    """The official classMapping40.mat; default: beside the first file."""
    raw_depth: Flag = False
    """The sensor's depth with its holes, instead of the in-painted one."""
    image: Literal["jpg", "png"] = "jpg"
    """Format of the colour images; png is lossless and five times as large."""

    def run(self) -> int:
        if self.name != "nyuv2":
            raise unknown("data set that needs preparing", self.name, ["nyuv2"])
        from enfilade.data.prepare import prepare_nyuv2

        folder = prepare_nyuv2(
            self.mat,
            self.out,
            splits=self.splits,
            mapping=self.mapping,
            raw_depth=self.raw_depth,
            image=self.image,
        )
        print(f"prepared {folder}")
        return 0


@dataclass(frozen=True)
class DataHHA:
    """Make the HHA image of every frame of an NYUv2 folder from its depth, for recipes that take HHA."""

    root: Folder
    """Folder of the data; its hha/ is filled where a frame has none."""

    def run(self) -> int:
        from enfilade.data.prepare import prepare_hha

        print(f"wrote {prepare_hha(self.root)} HHA images to {self.root}/hha")
        return 0


@dataclass(frozen=True)
class DataCheck:
    """Read every sample of a data set once; say what is in it and name what is broken."""

    name: Annotated[Positional[str], arg(metavar="NAME", help_behavior_hint="")]
    """The data set: nyuv2, camvid, sunrgbd, voc2012, frames or rooms."""
    root: MaybeFolder = None
    """Folder of the data (rooms are rendered and need none)."""
    split: Name = "train"
    """Split to read."""
    option: Options = ()
    """Option of the data set's reader, e.g. --option length=20 for rooms."""
    json: Flag = False
    """Print the findings as JSON, and nothing else, on stdout."""

    def run(self) -> int:
        from enfilade.data.inspect import check

        found = check(open_reader(self.name, self.root, self.split, parse_options(self.option)), quiet=False)
        print(found.json() if self.json else found.text())
        return 1 if found.broken else 0


@dataclass(frozen=True)
class DataShow:
    """Draw some samples of a data set on one sheet: RGB, labels, depth."""

    name: Annotated[Positional[str], arg(metavar="NAME", help_behavior_hint="")]
    """The data set: nyuv2, camvid, sunrgbd, voc2012, frames or rooms."""
    root: MaybeFolder = None
    """Folder of the data (rooms are rendered and need none)."""
    split: Name = "train"
    """Split to draw from."""
    out: Annotated[str, arg(metavar="FILE")] = "sheet.png"
    """PNG file to write."""
    count: Count = 12
    """Samples on the sheet."""
    seed: Count = 0
    """Other samples for another seed."""
    option: Options = ()
    """Option of the data set's reader, e.g. --option length=20 for rooms."""

    def run(self) -> int:
        from enfilade.data.inspect import show

        show(
            open_reader(self.name, self.root, self.split, parse_options(self.option)),
            self.out,
            count=self.count,
            seed=self.seed,
        )
        print(self.out)
        return 0


@dataclass(frozen=True)
class DataWeights:
    """Count the classes of a data set and write weights that balance them in a loss (median frequency)."""

    name: Annotated[Positional[str], arg(metavar="NAME", help_behavior_hint="")]
    """The data set, one with labels."""
    out: Annotated[str, arg(metavar="FILE")]
    """JSON file to write."""
    root: MaybeFolder = None
    """Folder of the data (rooms are rendered and need none)."""
    split: Name = "train"
    """Split to count."""
    power: Annotated[float, arg(metavar="X")] = 1.0
    """Of the weights: 1 is full balance, 0.5 half way in the logarithm, 0 none."""
    count_void: Flag = False
    """Take void into the pixels of the images that contain a class; training counts labelled pixels only."""
    option: Options = ()
    """Option of the data set's reader, e.g. --option length=20 for rooms."""
    json: Flag = False
    """Print the file's contents, and nothing else, on stdout."""

    def run(self) -> int:
        import json

        from enfilade.data import weights
        from enfilade.images import make_folder

        reader = open_reader(self.name, self.root, self.split, parse_options(self.option))
        make_folder(Path(self.out).parent)  # rather now than after the counting
        counts = weights.count(reader, len(reader.space), tolerant=True, quiet=False)
        for name, why in counts.broken:
            complain(f"{name}: {why}")
        document = weights.describe(counts, self.name, self.split, reader.space, self.power, count_void=self.count_void)
        weights.write(document, self.out)
        print(json.dumps(document, indent=1) if self.json else f"{weights.text(document)}\n\n{self.out}")
        return 1 if counts.broken else 0


@dataclass(frozen=True)
class DataRegions:
    """Write region support (RSN's Algorithm 1) for a data set with labels and depth, and show some of it."""

    name: Annotated[Positional[str], arg(metavar="NAME", help_behavior_hint="")]
    """The data set: nyuv2, sunrgbd, frames with labels, or rooms."""
    out: Folder
    """Folder for NAME.png of each sample (16 bit, millimetres) and sheet.png; what is there is kept."""
    root: MaybeFolder = None
    """Folder of the data (rooms are rendered and need none)."""
    split: Name = "train"
    """Split to read."""
    show: Count = 6
    """Samples on the sheet: RGB, labels, depth, region support; 0 for no sheet."""
    option: Options = ()
    """Option of the data set's reader, e.g. --option length=20 for rooms."""

    def run(self) -> int:
        from enfilade.data.region_files import show_region_support, write_region_support

        reader = open_reader(self.name, self.root, self.split, parse_options(self.option))
        found = write_region_support(reader, self.out, quiet=False)
        for name, why in found.broken:
            complain(f"{name}: {why}")
        print(f"{found.written} written, {found.present} there before, {len(found.broken)} broken: {self.out}")
        if self.show > 0:
            sheet = Path(self.out, "sheet.png")
            show_region_support(reader, sheet, count=self.show)
            print(sheet)
        return 1 if found.broken else 0
