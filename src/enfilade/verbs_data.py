"""The verbs under `enfilade data`: prepare, look at and count data sets."""

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from enfilade.errors import unknown
from enfilade.options import Count, Flag, Folder, MaybeFile, MaybeFolder, Name, Options, open_reader, parse_options


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
    """The data set: nyuv2, frames or rooms."""
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
    """The data set: nyuv2, frames or rooms."""
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
